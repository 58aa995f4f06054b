// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The page of a report: all that is on it is in the report's JSON. Nothing is loaded from elsewhere.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "plot.hpp"

namespace kvt_llm {

// HTML; `plot` draws into the SVG file `drawing`, which is read back.
std::string report_page(const nlohmann::json& report, const Plot& plot, const std::string& drawing);

// What is chosen at each budget, for a terminal.
std::string report_text(const nlohmann::json& report);

}  // namespace kvt_llm
