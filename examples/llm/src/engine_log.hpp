// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What llama.cpp and ggml have to say. Errors are kept for the message of whoever failed; the rest is dropped.
#pragma once

#include <string>

namespace kvt::llm {

// Called by everything here that uses llama.cpp or ggml; the first call installs the log.
void quiet_engine_log();

// The error lines since the last call as ": line; line", or nothing.
std::string take_engine_errors();

}  // namespace kvt::llm
