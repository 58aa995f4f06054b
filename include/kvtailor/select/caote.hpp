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

template <AttentionSelector Base>
struct Caote {
  static_assert(!JoinsHeads<Base>, "each head is scored alone here; heads of the other selector decide together");
  static constexpr EvidenceSet needs = Base::needs | Evidence::values;
  Base base = {};

  EvidenceSet active_needs() const noexcept { return needs_of(base) | Evidence::values; }
  Status check() const noexcept {
    if constexpr (requires { base.check(); }) return base.check();
    return success();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    KVT_TRY(base.attention(seen, score));
    const auto kept = static_cast<std::size_t>(base.first_kept(seen)), dim = static_cast<std::size_t>(seen.head_dim);
    double total = 0;
    for (const float weight : score) total += static_cast<double>(weight);
    const double share = total > 0 ? 1 / total : 0;
    std::vector<double> sum(dim);
    for (std::size_t row = 0; row < score.size(); ++row) {
      const double own = share * static_cast<double>(score[row]);
      for (std::size_t d = 0; d < dim; ++d) sum[d] += own * static_cast<double>(seen.values[row * dim + d]);
    }
    std::vector<float> difference(dim);
    constexpr float most = std::numeric_limits<float>::max();
    for (std::size_t row = 0; row < kept; ++row) {
      for (std::size_t d = 0; d < dim; ++d) {
        // Smaller by a power of two: squares of values of 1e18 that add up leave fp32, and no weight times that would be NaN.
        difference[d] = static_cast<float>(0x1p-8 * (sum[d] - static_cast<double>(seen.values[row * dim + d])));
      }
      const double own = share * static_cast<double>(score[row]);
      const double far = 0x1p8 * std::sqrt(static_cast<double>(dot(difference.data(), difference.data(), seen.head_dim)));
      score[row] = own < 1 ? static_cast<float>(std::min(own / (1 - own) * far, 0.5 * static_cast<double>(most))) : most;
    }
    std::fill(score.begin() + static_cast<std::ptrdiff_t>(kept), score.end(), most);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }
};

}  // namespace kvt::inline v0
