// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See prefill.hpp.
#include "prefill.hpp"

#include "command.hpp"

namespace kvt_llm {

void prefill(Engine& engine, kvt::AnyCache& cache, std::span<const int> tokens, int chunk,
             const std::function<void(int)>& progress) {
  in_chunks(static_cast<int>(tokens.size()), chunk, 0, [&](int at, int n) {
    engine.eval(cache, tokens.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at, Engine::Logits::last);
    if (progress) progress(n);
  });
}

}  // namespace kvt_llm
