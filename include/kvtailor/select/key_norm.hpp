// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// KeyNorm: short keys are kept; they tend to get the most attention.
//
// Score:   -|k_j|, Euclidean, on stored keys.
// Needs:   keys.  Cost: O(rows * head_dim).
// Source:  Devoto et al., arXiv 2406.11430.
#pragma once

#include <cmath>

#include "kvtailor/core/block_loops.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

struct KeyNorm {
  static constexpr EvidenceSet needs = Evidence::keys;

  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    const float* key = seen.keys.data();
    for (float& own : score) {
      own = -std::sqrt(dot(key, key, seen.head_dim));
      key += seen.head_dim;
    }
    return success();
  }

  // The same on a device: see store/head_score.hpp.
  template <int size, int warps>
  struct Shared {
    float key[warps][size];
  };
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      float* const key = shared.key[warp];
      rows.each_key(lanes, warp, key, [&](int r) {
        const float square = detail::product<Rows::dim>(lanes, key, key);
        lanes.once([&] { score[r] = -std::sqrt(square); });
      });
    });
  }
};

static_assert(TokenSelector<KeyNorm>);

}  // namespace kvt::inline v0
