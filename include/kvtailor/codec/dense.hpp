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

#include "kvtailor/codec/bfloat16_rows.hpp"
#include "kvtailor/codec/row_wise.hpp"
#include "kvtailor/core/check.hpp"
#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

template <class T, int dim>
struct Dense : RowCodec<Dense<T, dim>, dim, 0, dim* static_cast<int>(sizeof(T))> {
  using Element = T;
  static constexpr bool tiled = false;

  // No limit of its own: each element is compared with max_element().
  static constexpr double max_row_norm() { return static_cast<double>(max_element()) * dim; }
  static constexpr float max_element() {
    if constexpr (std::is_same_v<T, Half>) {
      return Half::max;
    } else {
      return max_row_element;
    }
  }

  template <class Lanes>
  KVT_HD void encode_row(const Lanes& lanes, const float* x, std::byte* block, int n, int row, float*) const {
    T* const to = reinterpret_cast<T*>(Dense::code_bytes_of(block, n, row));
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) to[d] = from_float<T>(x[d]);
    });
  }
  template <int lanes>
  KVT_HD KVT_INLINE void load(const std::byte* block, int n, int row, int lane, LaneRow<dim, lanes>& to) const {
    const T* const from = reinterpret_cast<const T*>(Dense::code_bytes_of(block, n, row));
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

#if defined(KVT_HOST_AVX2) && defined(__F16C__)
  template <class Lanes>
  KVT_HD void logits(const Lanes& lanes, const std::byte* block, int n, const float* prepared, int m, float* out,
                     int stride) const noexcept {
    if constexpr (std::is_same_v<T, BFloat16> && Lanes::size == 1 && dim % 16 == 0) {
      detail::BFloat16Rows<dim>::logits(lanes, reinterpret_cast<const BFloat16*>(block), n, prepared, m, out, stride);
    } else {
      Rows::logits(lanes, block, n, prepared, m, out, stride);
    }
  }
  template <class Lanes>
  KVT_HD void accumulate(const Lanes& lanes, const std::byte* block, int n, const float* weights, int m, int stride,
                         float* acc) const noexcept {
    if constexpr (std::is_same_v<T, BFloat16> && Lanes::size == 1 && dim % 16 == 0) {
      detail::BFloat16Rows<dim>::accumulate(lanes, reinterpret_cast<const BFloat16*>(block), n, weights, m, stride, acc);
    } else {
      Rows::accumulate(lanes, block, n, weights, m, stride, acc);
    }
  }

 private:
  using Rows = RowCodec<Dense, dim, 0, dim* static_cast<int>(sizeof(T))>;
#endif
};

static_assert(RowWiseCodec<Dense<Half, 64>> && RowWiseCodec<Dense<float, 40>>);

}  // namespace kvt::inline v0
