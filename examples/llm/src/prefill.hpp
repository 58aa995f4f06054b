// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Prefill: a text into an empty cache, with all that a token selector may want to have seen before the cache is cut.
#pragma once

#include <functional>
#include <span>

#include "engine.hpp"

namespace kvt_llm {

// Runs the tokens at positions 0, 1, ... in chunks; progress(n) is told of each. A selector that has to see a text twice gets
// its second pass here.
void prefill(Engine& engine, kvt::AnyCache& cache, std::span<const int> tokens, int chunk,
             const std::function<void(int)>& progress = {});

}  // namespace kvt_llm
