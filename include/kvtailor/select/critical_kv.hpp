// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// CriticalKv<Base>: half of the rows as another selector says, the others by what they can do to the hidden state too.
//
// Score:   of the rows that an even cut would keep, the first_stage share with the highest scores of the other selector above
//          all; for the rest (s_j + epsilon) times the mean over the group's query heads of |W_O v_j|_1.
// Needs:   what the other needs, values, output projection.  Cost: O(group * rows * head_dim * width).
// Source:  CriticalKV, Feng et al., arXiv 2502.03805; defaults and even share as in kvpress.
#pragma once

#include <limits>
#include <new>
#include <vector>

#include "kvtailor/core/concepts.hpp"
#include "kvtailor/select/device_products.hpp"
#include "kvtailor/select/row_products.hpp"
#include "kvtailor/store/score_ranks.hpp"

namespace kvt::inline v0 {

template <TokenSelector Base>
struct CriticalKv {
  static_assert(!JoinsHeads<Base>, "each head is scored alone here; heads of the other selector decide together");
  static constexpr EvidenceSet own_needs = Evidence::values | Evidence::output_projection;
  static constexpr EvidenceSet needs = Base::needs | own_needs;
  Base base = {};
  float epsilon = 1e-4f;
  double first_stage = 0.5;  // 0 .. 1

  EvidenceSet active_needs() const noexcept { return needs_of(base) | own_needs; }
  Status check() const noexcept {
    if (!(epsilon >= 0 && epsilon <= 1e6f)) {
      return error(Errc::bad_value, "epsilon is {}; it must be between 0 and 1e6", static_cast<double>(epsilon));
    }
    if (!(first_stage >= 0 && first_stage <= 1)) {
      return error(Errc::bad_value, "first_stage is {}; it must be between 0 and 1", first_stage);
    }
    return success();
  }
  Status check(const Geometry& shape) const noexcept {
    KVT_TRY(check());
    return check_policy(base, shape);
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    KVT_TRY(check());
    KVT_TRY(base.score(seen, score));
    std::vector<int> order(score.size());
    for (std::size_t row = 0; row < order.size(); ++row) order[row] = static_cast<int>(row);
    const auto last = order.begin() + first_rows(seen.share, seen.num_rows());
    const auto above = [&](int a, int b) {
      const float x = score[static_cast<std::size_t>(a)], y = score[static_cast<std::size_t>(b)];
      return x != y ? x > y : a < b;
    };
    if (last != order.end()) std::nth_element(order.begin(), last, order.end(), above);
    std::vector<float> norms(score.size());
    projected_norms(seen, Norm::sum, norms);
    constexpr float most = std::numeric_limits<float>::max();
    for (std::size_t row = 0; row < score.size(); ++row) score[row] = detail::weighted(score[row] + epsilon, norms[row]);
    std::for_each(order.begin(), last, [&](int row) { score[static_cast<std::size_t>(row)] = most; });
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

  // The same on a device: see store/head_score.hpp.
  template <int size, int warps>
  struct Stages {
    typename detail::ScoreRanks<warps>::Shared ranks;
    detail::FewRows<size, warps> few;
  };
  template <class Own, int size, int warps>
  union Around {
    Own base;
    Stages<size, warps> own;
  };
  template <int size, int warps, class Own = Base>
  using Shared = Around<typename Own::template Shared<size, warps>, size, warps>;
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    using Ranks = detail::ScoreRanks<Block::warps>;
    base.score_on_device(block, rows, shared.base, score);
    Ranks ranks(shared.own.ranks);
    const HighestRows first = ranks.highest(block, score, rows.count, first_rows(rows.evidence.share, rows.count));
    detail::each_projected_norm(block, rows, Norm::sum, shared.own.few, [&](const auto& lanes, int r, float norm) {
      const bool in = first.has(Ranks::rank(score[r]), r);
      const float own = in ? std::numeric_limits<float>::max() : detail::weighted(score[r] + epsilon, norm);
      lanes.once([&] { score[r] = own; });
    });
  }

 private:
  // Rows of the first stage. A share of 29 of 100 rows is a little less than that in binary.
  KVT_HD int first_rows(double share, int rows) const {
    const double even = share * rows * first_stage + 1e-6;
    return even < rows ? static_cast<int>(even) : rows;
  }
};

}  // namespace kvt::inline v0
