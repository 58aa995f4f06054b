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

#include "kvtailor/select/device_products.hpp"
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
  static constexpr bool slides = false;  // rows are weighted by attention
  Base base = {};
  float epsilon = 0;

  EvidenceSet active_needs() const noexcept { return needs_of(base) | own_needs; }
  Status check() const noexcept {
    if (!(epsilon >= 0 && epsilon <= 1e6f)) {
      return error(Errc::bad_value, "epsilon is {}; it must be between 0 and 1e6", static_cast<double>(epsilon));
    }
    return success();
  }
  Status check(const Geometry& shape) const noexcept {
    KVT_TRY(check());
    return check_policy(base, shape);
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
    for (std::size_t row = 0; row < score.size(); ++row) score[row] = weighted(score[row], row >= kept, norms[row]);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

  // The same on a device: see store/head_score.hpp.
  template <class Own, int size, int warps>
  union Around {
    Own base;
    std::conditional_t<through == Through::output, detail::FewRows<size, warps>, float[warps][size]> value;
  };
  template <int size, int warps, class Own = Base>
  using Shared = Around<typename Own::template Shared<size, warps>, size, warps>;
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    int kept = rows.count;
    if constexpr (AttentionSelector<Base>) {
      base.attention_on_device(block, rows, shared.base, score);
      kept = base.first_kept_on_device(rows);
    } else {
      base.score_on_device(block, rows, shared.base, score);
    }
    const auto weigh = [&](const auto& lanes, int r, float norm) {
      lanes.once([&] { score[r] = weighted(score[r], r >= kept, norm); });
    };
    if constexpr (through == Through::output) {
      detail::each_projected_norm(block, rows, Norm::root, shared.value, weigh);
    } else {
      detail::each_value_norm(block, rows, shared.value, weigh);
    }
  }

 private:
  KVT_HD float weighted(float score, bool kept, float norm) const {
    constexpr float most = std::numeric_limits<float>::max();
    return kept || score >= most ? most : detail::weighted(score + epsilon, norm);
  }
};

}  // namespace kvt::inline v0
