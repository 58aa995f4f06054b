// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Prefill: a text into an empty cache, and all that policies want to have seen before the cache is cut.
#pragma once

#include <functional>
#include <span>

#include "engine.hpp"
#include "tokenizer.hpp"

namespace kvt_llm {

// Whether the cache is to be cut by what the model needs to repeat its context.
inline bool wants_repetition(const kvt::AnyCache& cache) { return cache.needs().has(kvt::Evidence::reconstruction); }

// Lets the model read a request to repeat the context, and the context again, over the cache that holds it, in parts of 2,048
// tokens or as many as its positions allow; what it saw before is forgotten, and the repetition is dropped again. Prompts are
// those of KVzip, arXiv 2505.23416. after_chunk, if there is one, is called each time the model has read some of it.
void repeat_context(Engine& engine, kvt::AnyCache& cache, const Tokenizer& tokenizer, std::span<const int> context, int chunk,
                    const std::function<void()>& after_chunk = {});

// Runs the context at positions 0, 1, ... in chunks, the first longer by `extra`, and lets the model repeat it if that is
// wanted; progress(n) is told of each chunk of the context.
void prefill(Engine& engine, kvt::AnyCache& cache, const Tokenizer& tokenizer, std::span<const int> context, int chunk,
             int extra = 0, const std::function<void(int)>& progress = {});

}  // namespace kvt_llm
