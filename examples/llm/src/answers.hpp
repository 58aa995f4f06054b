// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Answers: how well a question is answered over a cache, of ours or of llama.cpp.
#pragma once

#include <functional>
#include <span>

#include "engine.hpp"
#include "prompt.hpp"

namespace kvt_llm {

// Whatever reads tokens and knows what it has read.
struct Reader {
  // The logits that tokens at positions first, first + 1, ... give, of all of them or of the last; valid until the next call.
  std::function<std::span<const float>(std::span<const int> tokens, int first, Engine::Logits which)> eval;
  std::function<void(int position)> truncate;  // forgets positions from there on
};
Reader reader_of(Engine& engine, kvt::AnyCache& cache);

struct Score {
  double exact = 0;     // all tokens of all answers are the most likely ones
  double partial = 0;   // share of the answers that are; of the tokens if there is one answer
  double log_prob = 0;  // nats, mean of the answers' tokens
};

// Reads the question and each right reply, behind the context that is there already; the one that the model would rather give
// counts. see(reply, logits), if there is one, is given the logits after each token of each reply.
Score answer(const Reader& reader, const Prompt& prompt, std::size_t vocabulary,
             const std::function<void(std::size_t reply, std::span<const float> logits)>& see = {});

}  // namespace kvt_llm
