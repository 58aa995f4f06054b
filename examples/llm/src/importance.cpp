// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See importance.hpp.
#include "importance.hpp"

#include <algorithm>

#include "command.hpp"
#include "kvtailor/budget/any_allocator.hpp"
#include "kvtailor/learn/importance.hpp"
#include "kvtailor/select/any_selector.hpp"
#include "prefill.hpp"

namespace kvt_llm {

std::vector<float> importance_of(Engine& engine, kvt::AnyCache& cache, const Tokenizer& tokenizer, std::span<const int> context,
                                 std::span<const int> asked, std::span<const int> reply, int chunk, bool mean) {
  const kvt::Geometry& shape = cache.geometry();
  const std::size_t rows = context.size(), heads = static_cast<std::size_t>(shape.num_heads());
  const auto kv_heads = static_cast<std::size_t>(shape.num_kv_heads);
  const kvt::AnyAllocator uniform(kvt::Uniform{});
  std::vector<float> importance(heads * rows, 0.f), scores;
  std::vector<double> whole(static_cast<std::size_t>(shape.num_layers), 0);
  check(cache.set_policies(uniform, kvt::AnySelector(kvt::OutputNorm{})));
  check(cache.scores(1, scores));
  for (std::size_t i = 0; i < scores.size(); ++i) whole[i / (kv_heads * rows)] += static_cast<double>(scores[i]);

  const auto over = mean ? kvt::OverQueries::sum : kvt::OverQueries::largest;
  check(cache.set_policies(uniform, kvt::AnySelector(kvt::OracleImportance{chunk, over})));
  cache.forget();
  const auto look = [&] {
    check(cache.scores(1, scores));
    const std::size_t now = scores.size() / heads;  // the context's rows and those that came after
    for (std::size_t i = 0; i < importance.size(); ++i) {
      const float seen = scores[i / rows * now + i % rows];
      importance[i] = mean ? importance[i] + seen : std::max(importance[i], seen);
    }
    cache.forget();
  };
  if (reply.empty()) {
    repeat_context(engine, cache, tokenizer, context, chunk, look);
  } else {
    auto at = static_cast<int>(rows);
    const auto part = [](std::span<const int> all, int first, int n) {
      return all.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
    };
    // The step that makes the first token of the answer is that of the question's last one.
    const std::span<const int> question = asked.first(asked.size() - 1);
    in_chunks(static_cast<int>(question.size()), chunk, 0,
              [&](int first, int n) { engine.eval(cache, part(question, first, n), at + first, Engine::Logits::last); });
    cache.forget();
    at += static_cast<int>(question.size());
    std::vector<int> steps = {asked.back()};
    steps.insert(steps.end(), reply.begin(), reply.end() - 1);
    in_chunks(static_cast<int>(steps.size()), chunk, 0, [&](int first, int n) {
      engine.eval(cache, part(steps, first, n), at + first, Engine::Logits::last);
      look();
    });
  }
  for (std::size_t i = 0; i < importance.size(); ++i) {
    const double all = whole[i / (kv_heads * rows)];
    importance[i] = all > 0 ? static_cast<float>(static_cast<double>(importance[i]) / all) : 0.f;
  }
  return importance;
}

}  // namespace kvt_llm
