// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention over a block whose rows decode one by one: shared by every row-wise codec, on every lane group.
#pragma once

#include <cstddef>

#include "kvtailor/core/half.hpp"
#include "kvtailor/core/lanes.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

// What a lane holds of a row of `head_dim` elements: element i of lane l is row element i * lanes + l.
template <int head_dim, int lanes>
struct LaneRow {
  static constexpr int length = (head_dim + lanes - 1) / lanes;
  float x[length];
};

template <int head_dim, int lanes>
KVT_HD KVT_INLINE float lane_dot(const LaneRow<head_dim, lanes>& row, const float* q, int lane) {
  if constexpr (lanes == 1) {
    return dot<head_dim>(row.x, q);
  } else {
    float total = 0;
    for (int i = 0; i < LaneRow<head_dim, lanes>::length; ++i) {
      const int d = i * lanes + lane;
      if (d < head_dim) total += row.x[i] * q[d];
    }
    return total;
  }
}

// Codec supplies load<lanes>(block, n, row, lane, LaneRow&) and row_scale(block, row).
template <class Codec, class Lanes>
KVT_HD KVT_INLINE void logits_by_row(const Codec& codec, const Lanes& lanes, const std::byte* block, int n,
                                     const float* prepared, int m, float* out, int stride) {
  constexpr int head_dim = Codec::head_dim;
  for (int row = 0; row < n; ++row) {
    typename Lanes::template Reg<LaneRow<head_dim, Lanes::size>> x;
    lanes.each([&](int lane) { codec.template load<Lanes::size>(block, n, row, lane, x[lane]); });
    const float scale = codec.row_scale(block, row);
    for (int j = 0; j < m; ++j) {
      typename Lanes::template Reg<float> part;
      lanes.each([&](int lane) { part[lane] = lane_dot(x[lane], prepared + j * head_dim, lane); });
      const float logit = lanes.sum(part) * scale;
      lanes.once([&] { out[j * stride + row] = logit; });
    }
  }
}

template <class Codec, class Lanes>
KVT_HD KVT_INLINE void accumulate_by_row(const Codec& codec, const Lanes& lanes, const std::byte* block, int n,
                                         const float* weights, int m, int stride, float* acc) {
  constexpr int head_dim = Codec::head_dim;
  for (int row = 0; row < n; ++row) {
    typename Lanes::template Reg<LaneRow<head_dim, Lanes::size>> x;
    lanes.each([&](int lane) { codec.template load<Lanes::size>(block, n, row, lane, x[lane]); });
    const float scale = codec.row_scale(block, row);
    for (int j = 0; j < m; ++j) {
      const float weight = weights[j * stride + row] * scale;
      float* const to = acc + j * head_dim;
      lanes.each([&](int lane) {
        for (int i = 0; i < LaneRow<head_dim, Lanes::size>::length; ++i) {
          const int d = i * Lanes::size + lane;
          if (head_dim % Lanes::size == 0 || d < head_dim) to[d] += weight * x[lane].x[i];
        }
      });
    }
  }
}

// Packs the marked rows of one block into `to`; returns how many there are.
template <class Codec>
int erase_by_row(const Codec& codec, const std::byte* block, int n, const unsigned char* keep, std::byte* to) {
  int kept = 0;
  for (int row = 0; row < n; ++row) kept += keep[row] != 0;
  int next = 0;
  for (int row = 0; row < n; ++row) {
    if (keep[row] != 0) codec.copy_row(block, n, row, to, kept, next++);
  }
  return kept;
}

}  // namespace kvt::inline v0
