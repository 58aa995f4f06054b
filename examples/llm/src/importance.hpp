// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What rows of a context give to what the model does with it.
#pragma once

#include <span>
#include <vector>

#include "engine.hpp"
#include "tokenizer.hpp"

namespace kvt_llm {

// [heads, rows of the context] of a cache that holds it and knows the output projections: what rows give while the model
// answers `asked` by `reply`, or repeats the context if there is no reply; see kvt::OracleImportance. Largest over queries, or
// added up. Each layer is divided by what its values are through the output projection. The policies of the cache are others
// then.
std::vector<float> importance_of(Engine& engine, kvt::AnyCache& cache, const Tokenizer& tokenizer, std::span<const int> context,
                                 std::span<const int> asked, std::span<const int> reply, int chunk, bool mean);

}  // namespace kvt_llm
