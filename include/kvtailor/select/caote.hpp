// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Caote<Base>: rows whose loss would change the output of attention most.
//
// Score:   a_j / (1 - a_j) * |o - v_j| with o = sum a_j v_j, where a is the attention of another selector, scaled to the sum
// one:
//          exactly how far the output moves when row j alone is dropped. Rows that the other selector keeps above all stay so.
// Needs:   what the other needs, values.  Cost: O(rows * head_dim).
// Source:  CAOTE, Goel et al., arXiv 2504.14051.
#pragma once

#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "kvtailor/select/window_attention.hpp"

namespace kvt::inline v0 {

template <class Base>
requires AttentionSelector<Base> &&(!JoinsHeads<Base>)struct Caote {
  static constexpr EvidenceSet needs = Base::needs | Evidence::values;
  Base base = {};

  EvidenceSet active_needs() const noexcept { return needs_of(base) | Evidence::values; }
  Status check() const noexcept {
    if constexpr (requires { base.check(); }) return base.check();
    return success();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    std::vector<float> weight(score.size());
    KVT_TRY(base.attention(seen, weight));
    KVT_TRY(base.score(seen, score));
    const int dim = seen.head_dim;
    double total = 0;
    for (const float w : weight) total += static_cast<double>(w);
    std::vector<double> sum(static_cast<std::size_t>(dim));
    const auto share = [&](std::size_t row) { return total > 0 ? static_cast<double>(weight[row]) / total : 0; };
    const float* value = seen.values.data();
    for (std::size_t row = 0; row < score.size(); ++row, value += dim) {
      for (int d = 0; d < dim; ++d) sum[static_cast<std::size_t>(d)] += share(row) * static_cast<double>(value[d]);
    }
    constexpr auto most = static_cast<double>(std::numeric_limits<float>::max());
    value = seen.values.data();
    for (std::size_t row = 0; row < score.size(); ++row, value += dim) {
      double square = 0;
      for (int d = 0; d < dim; ++d) {
        const double e = sum[static_cast<std::size_t>(d)] - static_cast<double>(value[d]);
        square += e * e;
      }
      const double own = share(row), moved = own < 1 ? own / (1 - own) * std::sqrt(square) : most;
      score[row] = static_cast<float>(score[row] >= above_attention ? most : std::min(moved, 0.5 * most));
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }
};

}  // namespace kvt::inline v0
