// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Shifted: the mean of a block's rows, stored once, and any other codec for what rows differ by.
//
// For keys, whose mean is most of them in many models. LowRank finds the mean and more, for about the same bytes.
//
// Block:   Half mean[head_dim], then the block of the codec.
// Error:   that of the codec, relative to the rows without their mean.
// Cost:    2 * head_dim bytes a block beside the codec.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kvtailor/codec/row_wise.hpp"

namespace kvt::inline v0 {

template <PlainCodec Codec>
struct Shifted : PlainBasis<Codec::head_dim> {
  static constexpr int dim = Codec::head_dim;
  static constexpr int max_block_rows = Codec::max_block_rows;
  static constexpr int mean_bytes = 2 * dim;

  [[no_unique_address]] Codec codec = {};

  KVT_HD int max_block_bytes(int n) const { return mean_bytes + codec.max_block_bytes(n); }
  Status validate() const { return kvt::validate(codec); }
  // A mean is not longer than the longest row, nor is a row without it twice as long; an element of it has to fit fp16.
  double max_row_norm() const { return std::min(0.5 * static_cast<double>(codec.max_row_norm()), 65504.0); }

  int encode(const float* rows, int n, std::byte* block) const {
    const auto size = static_cast<std::size_t>(n) * dim;
    std::vector<float> rest(rows, rows + size);
    for (int d = 0; d < dim; ++d) shift(rest.data(), n, d, block);
    return mean_bytes + codec.encode(rest.data(), n, block + mean_bytes);
  }
  // Takes the mean of channel d out of rows [n, head_dim], and into a block.
  KVT_HD static void shift(float* rows, int n, int d, std::byte* block) {
    double sum = 0;
    for (int row = 0; row < n; ++row) sum += static_cast<double>(rows[row * dim + d]);
    const bool fits = std::fabs(sum / n) <= static_cast<double>(Half::max);  // false for NaN, which no cache lets in
    const Half mean = from_float<Half>(fits ? static_cast<float>(sum / n) : 0.f);
    std::memcpy(block + 2 * d, &mean, 2);
    for (int row = 0; row < n; ++row) rows[row * dim + d] -= to_float(mean);
  }
  KVT_HD void decode(const std::byte* block, int n, int row, float* out) const noexcept {
    codec.decode(block + mean_bytes, n, row, out);
    for (int d = 0; d < dim; ++d) out[d] += mean(block, d);
  }
  int erase(const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    return erase(Serial{}, block, n, keep, to);
  }
  template <class Lanes>
  KVT_HD int erase(const Lanes& lanes, const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    detail::copy_bytes(lanes, block, mean_bytes, to);
    return mean_bytes + codec.erase(lanes, block + mean_bytes, n, keep, to + mean_bytes);
  }

  template <class Lanes>
  KVT_HD void row_of(const Lanes& lanes, const std::byte* block, int n, int row, float* out) const noexcept {
    codec.row_of(lanes, block + mean_bytes, n, row, out);
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) out[d] += mean(block, d);
    });
  }

  template <class Lanes>
  KVT_HD void logits(const Lanes& lanes, const std::byte* block, int n, const float* prepared, int m, float* out,
                     int stride) const noexcept {
    codec.logits(lanes, block + mean_bytes, n, prepared, m, out, stride);
    for (int j = 0; j < m; ++j) {
      typename Lanes::template Reg<float> part;
      lanes.each([&](int lane) {
        part[lane] = 0;
        for (int d = lane; d < dim; d += Lanes::size) part[lane] += mean(block, d) * prepared[j * dim + d];
      });
      const float shift = lanes.sum(part);
      lanes.each([&](int lane) {
        for (int row = lane; row < n; row += Lanes::size) out[j * stride + row] += shift;
      });
    }
  }
  template <class Lanes>
  KVT_HD void accumulate(const Lanes& lanes, const std::byte* block, int n, const float* weights, int m, int stride,
                         float* acc) const noexcept {
    codec.accumulate(lanes, block + mean_bytes, n, weights, m, stride, acc);
    for (int j = 0; j < m; ++j) {
      typename Lanes::template Reg<float> part;
      lanes.each([&](int lane) {
        part[lane] = 0;
        for (int row = lane; row < n; row += Lanes::size) part[lane] += weights[j * stride + row];
      });
      const float total = lanes.sum(part);
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) acc[j * dim + d] += total * mean(block, d);
      });
    }
  }

 private:
  KVT_HD KVT_INLINE static float mean(const std::byte* block, int d) {
    Half x;
    std::memcpy(&x, block + 2 * d, 2);
    return to_float(x);
  }
};

}  // namespace kvt::inline v0
