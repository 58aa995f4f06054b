// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See hindsight.hpp.
#include "hindsight.hpp"

#include <algorithm>
#include <stdexcept>

#include "command.hpp"
#include "kvtailor/budget/any_allocator.hpp"
#include "kvtailor/learn/importance.hpp"
#include "kvtailor/select/any_selector.hpp"

namespace kvt_llm {

std::vector<float> see_importance(kvt::AnyCache& cache, int chunk, kvt::OverQueries over,
                                  const std::function<void(const Look& look)>& go_on) {
  const auto& shape = cache.geometry();
  for (int l = 0; l < shape.num_layers; ++l) {
    if (cache.layer_shape(l) != shape.layer()) throw std::runtime_error("the oracle needs layers that are alike in shape");
  }
  const std::size_t heads = static_cast<std::size_t>(shape.num_heads());
  const auto layers = static_cast<std::size_t>(shape.num_layers);
  const kvt::AnyAllocator uniform(kvt::Uniform{});
  std::vector<float> scores;
  check(cache.set_policies(uniform, kvt::AnySelector(kvt::OutputNorm{})));
  check(cache.scores(1, scores));
  const std::size_t of_layer = scores.size() / layers, rows = scores.size() / heads;
  std::vector<float> importance(scores.size(), 0.f);
  std::vector<double> whole(layers, 0);
  for (std::size_t i = 0; i < scores.size(); ++i) whole[i / of_layer] += static_cast<double>(scores[i]);

  check(cache.set_policies(uniform, kvt::AnySelector(kvt::OracleImportance{chunk, over})));
  cache.forget();
  go_on([&] {
    check(cache.scores(1, scores));
    const std::size_t now = scores.size() / heads;  // rows that were there and those that came after
    for (std::size_t i = 0; i < importance.size(); ++i) {
      const float seen = scores[i / rows * now + i % rows];
      importance[i] = over == kvt::OverQueries::sum ? importance[i] + seen : std::max(importance[i], seen);
    }
    cache.forget();
  });
  for (std::size_t i = 0; i < importance.size(); ++i) {
    const double all = whole[i / of_layer];
    importance[i] = all > 0 ? static_cast<float>(static_cast<double>(importance[i]) / all) : 0.f;
  }
  return importance;
}

void read_answer(Engine& engine, kvt::AnyCache& cache, std::span<const int> asked, std::span<const int> reply, int chunk,
                 const Look& look) {
  int at = cache.end_position(0);
  const auto read = [&](std::span<const int> tokens, const Look& after_chunk) {
    in_chunks(static_cast<int>(tokens.size()), chunk, 0, [&](int first, int n) {
      engine.eval(cache, tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)), at + first,
                  Engine::Logits::last);
      if (after_chunk) after_chunk();
    });
    at += static_cast<int>(tokens.size());
  };
  // The step that makes the first token of the answer is that of the question's last one.
  read(asked.first(asked.size() - 1), {});
  cache.forget();
  std::vector<int> looking = {asked.back()};
  looking.insert(looking.end(), reply.begin(), reply.end() - 1);
  read(looking, look);
}

bool take_oracle(kvt::Composition& names) {
  if (names.selector != "oracle") {
    if (names.selector.starts_with("oracle:")) throw std::runtime_error("the oracle has no parameters");
    return false;
  }
  if (names.allocator.starts_with("curve")) {
    throw std::runtime_error("a curve is of a token selector, and the oracle is none: give it uniform, adaptive or global");
  }
  names.selector = "value_norm:through=output(sink_recent)";
  return true;
}

kvt::Status KnownScores::score(const kvt::HeadEvidence& seen, std::span<float> score) const noexcept {
  const std::size_t rows = of_rows->size() / static_cast<std::size_t>(shape.num_heads());
  const auto head = static_cast<std::size_t>(seen.layer * shape.num_kv_heads + seen.kv_head);
  for (std::size_t i = 0; i < score.size(); ++i) {
    const auto row = static_cast<std::size_t>(seen.positions[i]);
    if (row >= rows) {
      return kvt::error(kvt::Errc::no_evidence, "scores of {} rows are known, not of one at {}", static_cast<double>(rows),
                        seen.positions[i]);
    }
    score[i] = (*of_rows)[head * rows + row];
  }
  return kvt::success();
}

}  // namespace kvt_llm
