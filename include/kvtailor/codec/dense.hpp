// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Dense: rows as they are, in fp16, bf16 or fp32.
//
// Block:   n rows: T value[n][head_dim].
// Error:   that of rounding to T: at most 2^-11 (fp16), 2^-8 (bf16), 0 (fp32) of each element.
// Cost:    head_dim * sizeof(T) bytes a row.
// Source:  none.
#pragma once

#include <type_traits>

#include "kvtailor/codec/row_wise.hpp"
#include "kvtailor/core/check.hpp"
#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

template <class T, int dim>
struct Dense {
  static_assert(is_supported_head_dim(dim), "head_dim must be 40, 64, 80, 96, 112, 128, 192 or 256");
  static constexpr int head_dim = dim;
  static constexpr int max_block_rows = 1 << 16;
  static constexpr int row_bytes = dim * static_cast<int>(sizeof(T));

  KVT_HD constexpr int max_block_bytes(int n) const { return n * row_bytes; }
  // No limit of its own: each element is compared with max_element().
  static constexpr double max_row_norm() { return static_cast<double>(max_element()) * dim; }
  static constexpr float max_element() {
    if constexpr (std::is_same_v<T, Half>) {
      return Half::max;
    } else {
      return max_row_element;
    }
  }

  int encode(const float* rows, int n, std::byte* block) const noexcept {
    T* const out = reinterpret_cast<T*>(block);
    for (int i = 0; i < n * dim; ++i) out[i] = from_float<T>(rows[i]);
    return n * row_bytes;
  }
  KVT_HD void decode(const std::byte* block, int, int row, float* out) const noexcept {
    load_floats<dim>(row_of(block, row), out);
  }
  int erase(const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    return erase_by_row(*this, block, n, keep, to) * row_bytes;
  }
  KVT_HD void copy_row(const std::byte* from, int, int row, std::byte* to, int, int to_row) const noexcept {
    std::memcpy(to + static_cast<long long>(to_row) * row_bytes, from + static_cast<long long>(row) * row_bytes, row_bytes);
  }

  template <class Lanes>
  KVT_HD void prepare(const Lanes& lanes, const float* q, float scale, float* prepared) const noexcept {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) prepared[d] = q[d] * scale;
    });
  }
  template <class Lanes>
  KVT_HD void logits(const Lanes& lanes, const std::byte* block, int n, const float* prepared, int m, float* out,
                     int stride) const noexcept {
    logits_by_row(*this, lanes, block, n, prepared, m, out, stride);
  }
  template <class Lanes>
  KVT_HD void accumulate(const Lanes& lanes, const std::byte* block, int n, const float* weights, int m, int stride,
                         float* acc) const noexcept {
    accumulate_by_row(*this, lanes, block, n, weights, m, stride, acc);
  }
  template <class Lanes>
  KVT_HD void finish(const Lanes& lanes, float* acc, float* out) const noexcept {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) out[d] += acc[d];
    });
  }

  template <int lanes>
  KVT_HD KVT_INLINE void load(const std::byte* block, int, int row, int lane, LaneRow<dim, lanes>& to) const {
    const T* const from = row_of(block, row);
    if constexpr (lanes == 1) {
      load_floats<dim>(from, to.x);
    } else {
      for (int i = 0; i < LaneRow<dim, lanes>::length; ++i) {
        const int d = i * lanes + lane;
        to.x[i] = d < dim ? to_float(from[d]) : 0.f;
      }
    }
  }
  KVT_HD KVT_INLINE float row_scale(const std::byte*, int) const { return 1.f; }

 private:
  KVT_HD KVT_INLINE static const T* row_of(const std::byte* block, int row) {
    return reinterpret_cast<const T*>(block) + static_cast<long long>(row) * dim;
  }
};

static_assert(RowWiseCodec<Dense<Half, 64>> && RowWiseCodec<Dense<float, 40>>);

}  // namespace kvt::inline v0
