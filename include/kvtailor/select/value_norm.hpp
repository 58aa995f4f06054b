// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// ValueNorm<Base>: the scores of another selector, rows with large values before others.
//
// Score:   (s_j + epsilon) * |v_j|, Euclidean; or times the mean over the group's query heads of |W_O v_j|, what the row can do
//          to the hidden state. Rows that the other selector keeps above all stay so.
// Needs:   what the other needs, values, and the output projection if the weight goes through it.
//          Cost: O(rows * head_dim), or O(group * head_dim * (width + rows) * head_dim).
// Source:  VATP, Guo et al., arXiv 2406.12335 (there |v|_1); through the projection: KVzip+ of kvpress.
#pragma once

#include <limits>
#include <new>
#include <vector>

#include "kvtailor/select/row_products.hpp"
#include "kvtailor/select/window_attention.hpp"

namespace kvt::inline v0 {

enum class Through { nothing, output };

template <TokenSelector Base, Through through = Through::nothing>
struct ValueNorm {
  static_assert(!JoinsHeads<Base>, "each head is scored alone here; heads of the other selector decide together");
  static constexpr EvidenceSet own_needs =
      through == Through::output ? Evidence::values | Evidence::output_projection : EvidenceSet(Evidence::values);
  static constexpr EvidenceSet needs = Base::needs | own_needs;
  Base base = {};
  float epsilon = 0;

  EvidenceSet active_needs() const noexcept { return needs_of(base) | own_needs; }
  Status check() const noexcept {
    if (!(epsilon >= 0 && epsilon <= 1e6f)) {
      return error(Errc::bad_value, "epsilon is {}; it must be between 0 and 1e6", static_cast<double>(epsilon));
    }
    if constexpr (requires { base.check(); }) return base.check();
    return success();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    KVT_TRY(check());
    std::size_t kept = score.size();
    if constexpr (AttentionSelector<Base>) {
      KVT_TRY(base.attention(seen, score));
      kept = static_cast<std::size_t>(base.first_kept(seen));
    } else {
      KVT_TRY(base.score(seen, score));
    }
    std::vector<float> norms(score.size());
    if constexpr (through == Through::output) {
      projected_norms(seen, Norm::root, norms);
    } else {
      value_norms(seen, norms);
    }
    constexpr float most = std::numeric_limits<float>::max();
    for (std::size_t row = 0; row < score.size(); ++row) {
      const bool stays = row >= kept || score[row] >= most;
      const float own = (score[row] + epsilon) * std::min(norms[row], 1e25f);
      score[row] = stays ? most : std::clamp(own, -0.5f * most, 0.5f * most);
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }
};

}  // namespace kvt::inline v0
