// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// LavaScore: rows the last queries looked at, heads with large values before others.
//
// Score:   softmax of each of the last `window` queries, mean over the queries, pooled over neighbouring rows before the
//          window; largest over the group's query heads; times the largest |v|_1 of the head's rows before the window. Rows
//          inside the window score above all. Comparable between the heads of a layer: meant for Adaptive and Lava.
// Needs:   keys, values, positions, window queries.  Cost: O(window * group * rows * head_dim).
// Source:  LAVa, Shen et al., arXiv 2509.09754; defaults of the authors' code (window 32, maximum over 7).
#pragma once

#include <limits>

#include "kvtailor/select/window_attention.hpp"

namespace kvt::inline v0 {

struct LavaScore {
  static constexpr EvidenceSet needs = Evidence::keys | Evidence::values | Evidence::positions | Evidence::window_queries;
  int window = 32;  // queries, 1 or more
  int kernel = 7;   // rows pooled together, odd

  Status check() const noexcept {
    if (window < 1) return error(Errc::bad_value, "window is {}; it must be 1 or more", window);
    return Pooling{kernel}.check();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    KVT_TRY(check());
    const WindowAttention last(seen, window);
    KVT_TRY(last.check());
    const int before = last.rows_before();
    double length = 0;
    for (int row = 0; row < before; ++row) {
      const float* const value = seen.values.data() + static_cast<std::int64_t>(row) * seen.head_dim;
      double sum = 0;
      for (int d = 0; d < seen.head_dim; ++d) sum += static_cast<double>(std::fabs(value[d]));
      length = std::max(length, sum);
    }
    // Lengths of 1e20 are possible, and no row may reach those of the window.
    const float factor = static_cast<float>(std::min(length / last.size(), 1e30));
    const Pooling pooled{kernel, Pooling::Kind::maximum};
    std::fill(score.begin(), score.end(), 0.f);
    KVT_TRY(last.each_head([&](const float* mass) {
      for (int row = 0; row < before; ++row) {
        float& own = score[static_cast<std::size_t>(row)];
        own = std::max(own, pooled(mass, row, before) * factor);
      }
    }));
    std::fill(score.begin() + before, score.end(), std::numeric_limits<float>::max());
    return success();
  }

  // The same on a device: see store/head_score.hpp.
  template <int size, int warps>
  struct Shared {
    float scratch[warps][size], value[warps][size], longest[warps];
  };
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    using Lanes = typename Block::Lanes;
    const int before = rows.rows_before(rows.window.first_position());
    block.each_warp([&](const Lanes& lanes, int warp) {
      const float* const value = shared.value[warp];
      float longest = 0;
      rows.template each_decoded<false>(lanes, warp, 0, before, shared.scratch[warp], shared.value[warp], [&](int) {
        typename Lanes::template Reg<float> part;
        lanes.each([&](int lane) {
          part[lane] = 0;
          for (int d = lane; d < Rows::dim; d += Lanes::size) part[lane] += std::fabs(value[d]);
        });
        longest = std::fmax(longest, lanes.sum(part));
      });
      lanes.once([&] { shared.longest[warp] = longest; });
    });
    float length = 0;
    for (int w = 0; w < Block::warps; ++w) length = std::fmax(length, shared.longest[w]);
    block.each_warp([](const Lanes&, int) {});  // all have read them
    const float factor = std::fmin(length / static_cast<float>(rows.window.size()), 1e30f);
    const Pooling pooled{kernel, Pooling::Kind::maximum};
    detail::window_attention(block, rows, score, [=](float most, const float* mass, int r) {
      return r < before ? std::fmax(most, pooled(mass, r, before) * factor) : std::numeric_limits<float>::max();
    });
  }
};

static_assert(TokenSelector<LavaScore>);

}  // namespace kvt::inline v0
