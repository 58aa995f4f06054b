// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See prefill.hpp.
#include "prefill.hpp"

#include <algorithm>
#include <stdexcept>

#include "command.hpp"

namespace kvt_llm {

void repeat_context(Engine& engine, kvt::AnyCache& cache, const Tokenizer& tokenizer, std::span<const int> context, int chunk,
                    const std::function<void()>& after_chunk) {
  constexpr std::size_t most = 2048, overlap = 8;
  const auto end = static_cast<int>(context.size());
  const auto request = [&](std::size_t at) {
    std::vector<int> tokens = tokenizer.encode(at == 0 ? "\n\nRepeat the previous context exactly."
                                                       : "\n\nRepeat the part of the previous context exactly, starting with",
                                               false, false);
    if (at > 0) {
      const auto shown = context.subspan(at - std::min(at, overlap), std::min(at, overlap));
      tokens.insert(tokens.end(), shown.begin(), shown.end());
    }
    return tokens;
  };
  const int room = engine.model().parameters().context - end - static_cast<int>(request(overlap).size());
  if (room < 1) {
    throw std::runtime_error("a context of " + std::to_string(end) + " tokens cannot be repeated: the model's context is " +
                             std::to_string(engine.model().parameters().context));
  }
  cache.forget();
  const std::size_t part = std::min(most, static_cast<std::size_t>(room));
  for (std::size_t at = 0; at < context.size(); at += part) {
    std::vector<int> tokens = request(at);
    const auto repeated = context.subspan(at, std::min(part, context.size() - at));
    tokens.insert(tokens.end(), repeated.begin(), repeated.end());
    in_chunks(static_cast<int>(tokens.size()), chunk, 0, [&](int first, int n) {
      engine.eval(cache, std::span(tokens).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)), end + first,
                  Engine::Logits::last);
      if (after_chunk) after_chunk();
    });
    check(cache.truncate(end));
  }
}

void prefill(Engine& engine, kvt::AnyCache& cache, const Tokenizer& tokenizer, std::span<const int> context, int chunk,
             int extra, const std::function<void(int)>& progress) {
  in_chunks(static_cast<int>(context.size()), chunk, extra, [&](int at, int n) {
    engine.eval(cache, context.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at, Engine::Logits::last);
    if (progress) progress(n);
  });
  if (wants_repetition(cache)) repeat_context(engine, cache, tokenizer, context, chunk);
}

}  // namespace kvt_llm
