// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// KeyDiff: keys that differ from the others are kept.
//
// Score:   -cos(k_j, mean over i of k_i / |k_i|), on stored (post-RoPE) keys.
// Needs:   keys.  Cost: O(rows * head_dim).
// Source:  KeyDiff, Park et al., arXiv 2504.15364.
#pragma once

#include <algorithm>
#include <cmath>

#include "kvtailor/core/block_loops.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

struct KeyDiff {
  static constexpr EvidenceSet needs = Evidence::keys;

  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    const int n = seen.num_rows();
    const int dim = seen.head_dim;
    float* const mean = seen.scratch.data();
    std::fill(mean, mean + dim, 0.f);
    float* const inverse = mean + dim;
    for (int row = 0; row < n; ++row) {
      const float* const key = seen.keys.data() + static_cast<std::int64_t>(row) * dim;
      inverse[row] = inverse_norm(key, dim);
      for (int d = 0; d < dim; ++d) mean[d] += key[d] * inverse[row];
    }
    const float mean_inverse = inverse_norm(mean, dim);
    for (int d = 0; d < dim; ++d) mean[d] *= mean_inverse;
    for (int row = 0; row < n; ++row) {
      const float* const key = seen.keys.data() + static_cast<std::int64_t>(row) * dim;
      score[static_cast<std::size_t>(row)] = -dot(key, mean, dim) * inverse[row];
    }
    return success();
  }

  // The same on a device: see store/head_score.hpp.
  template <int size, int warps>
  struct Shared {
    float key[warps][size], sum[warps][size], mean[size];
  };
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    using Lanes = typename Block::Lanes;
    constexpr int dim = Rows::dim, warps = Block::warps;
    block.each_warp([&](const Lanes& lanes, int warp) {
      float *const key = shared.key[warp], *const sum = shared.sum[warp];
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) sum[d] = 0;
      });
      rows.each_key(lanes, warp, key, [&](int) {
        const float inverse = inverse_norm<dim>(lanes, key);
        lanes.each([&](int lane) {
          for (int d = lane; d < dim; d += Lanes::size) sum[d] += key[d] * inverse;
        });
      });
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp != 0) return;
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) {
          float all = 0;
          for (int w = 0; w < warps; ++w) all += shared.sum[w][d];
          shared.mean[d] = all;
        }
      });
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      float* const key = shared.key[warp];
      const float mean_inverse = inverse_norm<dim>(lanes, shared.mean);
      rows.each_key(lanes, warp, key, [&](int r) {
        const float cosine = detail::product<dim>(lanes, key, shared.mean) * inverse_norm<dim>(lanes, key) * mean_inverse;
        lanes.once([&] { score[r] = -cosine; });
      });
    });
  }

 private:
  template <int dim, class Lanes>
  KVT_HD static float inverse_norm(const Lanes& lanes, const float* x) {
    const float square = detail::product<dim>(lanes, x, x);
    return square > 0 ? 1.f / std::sqrt(square) : 0.f;
  }
  // A zero row has no direction: its cosine counts as zero.
  static float inverse_norm(const float* x, int dim) {
    const float square = dot(x, x, dim);
    return square > 0 ? 1.f / std::sqrt(square) : 0.f;
  }
};

static_assert(TokenSelector<KeyDiff>);

}  // namespace kvt::inline v0
