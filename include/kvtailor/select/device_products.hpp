// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What selectors multiply and add on a device, by the lanes of a warp and the warps of a block: row_products.hpp is the host's.
#pragma once

#include <cmath>

#include "kvtailor/core/block_loops.hpp"
#include "kvtailor/core/evidence.hpp"

namespace kvt::inline v0 {

enum class Norm { sum, root };  // of magnitudes; of squares

namespace detail {

// A score times a norm, where both may be large; below what rows have that stay.
KVT_HD inline float weighted(float score, float norm) {
  constexpr float most = 0x1.fffffep+127f;
  const float own = score * (norm < 1e25f ? norm : 1e25f);
  return own < -0.5f * most ? -0.5f * most : own > 0.5f * most ? 0.5f * most : own;
}

// A few rows of each warp, so that what they are multiplied by is read once for all of them.
template <int size, int warps>
struct FewRows {
  static constexpr int most = size <= 128 ? 4 : size <= 256 ? 2 : 1;
  float scratch[warps][size], row[warps][most][size];
  int index[warps][most];
};

// f(lanes, r, norm) of each row: a norm of its value.
template <class Block, class Rows, int warps, int size, class F>
KVT_HD void each_value_norm(const Block& block, const Rows& rows, float (&value)[warps][size], F&& f) {
  using Lanes = typename Block::Lanes;
  block.each_warp([&](const Lanes& lanes, int warp) {
    float* const own = value[warp];
    rows.each_value(lanes, warp, own, [&](int r) { f(lanes, r, std::sqrt(product<Rows::dim>(lanes, own, own))); });
  });
}
// The same of the mean over the group's query heads of the norm of the value through the output projection.
template <class Block, class Rows, int size, int warps, class F>
KVT_HD void each_projected_norm(const Block& block, const Rows& rows, Norm norm, FewRows<size, warps>& few, F&& f) {
  using Lanes = typename Block::Lanes;
  constexpr int most = FewRows<size, warps>::most, dim = Rows::dim;
  const OutputProjection output = rows.evidence.projections[rows.layer];
  const int group = rows.evidence.group;
  const long long stride = static_cast<long long>(rows.num_kv_heads) * group * dim;
  block.each_warp([&](const Lanes& lanes, int warp) {
    auto& row = few.row[warp];
    rows.template each_few<false>(
        lanes, warp, 0, rows.count, few.scratch[warp], row, few.index[warp], [&](const int* index, int n) {
          float all[most] = {};
          for (int g = 0; g < group; ++g) {
            const float* const weights = output.weights + (static_cast<long long>(rows.kv_head) * group + g) * dim;
            typename Lanes::template Reg<float> part[most];
            KVT_UNROLL_ON_DEVICE
            for (int k = 0; k < most; ++k) lanes.each([&](int lane) { part[k][lane] = 0; });
            for (int first = 0; first < output.width; first += Lanes::size) {
              lanes.each([&](int lane) {
                if (first + lane >= output.width) return;
                const float* const own = weights + (first + lane) * stride;
                float x[most] = {};
                for (int d = 0; d < dim; ++d) {
                  KVT_UNROLL_ON_DEVICE
                  for (int k = 0; k < most; ++k) x[k] += own[d] * row[k][d];  // rows after the n-th are not looked at
                }
                KVT_UNROLL_ON_DEVICE
                for (int k = 0; k < most; ++k) part[k][lane] += norm == Norm::sum ? std::fabs(x[k]) : x[k] * x[k];
              });
            }
            KVT_UNROLL_ON_DEVICE
            for (int k = 0; k < most; ++k) {
              const float own = lanes.sum(part[k]);
              all[k] += norm == Norm::sum ? own : std::sqrt(own);
            }
          }
          KVT_UNROLL_ON_DEVICE
          for (int k = 0; k < most; ++k) {
            if (k < n) f(lanes, index[k], all[k] / static_cast<float>(group));
          }
        });
  });
}

}  // namespace detail

}  // namespace kvt::inline v0
