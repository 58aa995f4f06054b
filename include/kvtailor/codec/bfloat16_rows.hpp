// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention on rows of bf16, on a host with AVX2 and F16C: sixteen elements at a time of several rows and vectors, so that
// nothing that was widened is stored. For fp16, which one instruction widens, RowCodec is as fast.
#pragma once

#include "kvtailor/codec/integer_rows.hpp"
#include "kvtailor/core/half.hpp"
#include "kvtailor/core/lanes.hpp"
#if defined(KVT_HOST_AVX2) && defined(__F16C__)

namespace kvt::inline v0::detail {

template <int dim>
struct BFloat16Rows {
  static_assert(dim % 16 == 0);

  // out[j * stride + row] = query j . row, of rows [n, dim]
  template <class Lanes>
  static void logits(const Lanes& lanes, const BFloat16* rows, int n, const float* queries, int m, float* out, int stride) {
    each_batch<4>(m, [&]<int many>(int j) KVT_INLINE_LAMBDA {
      some_logits<many>(lanes, j == 0, rows, n, queries + j * dim, out + j * stride, stride);
    });
  }
  // acc[j] += sum over rows of weights[j * stride + row] * row
  template <class Lanes>
  static void accumulate(const Lanes& lanes, const BFloat16* rows, int n, const float* weights, int m, int stride, float* acc) {
    each_batch<4>(m, [&]<int many>(int j) KVT_INLINE_LAMBDA {
      some_sums<many>(lanes, j == 0, rows, n, weights + j * stride, stride, acc + j * dim);
    });
  }

 private:
  // As many rows at a time as there are `together`, then one by one: f<count>(row). The first vectors to read them ask for
  // others.
  template <int together, class Lanes, class F>
  KVT_INLINE static void each_row(const Lanes& lanes, bool first, const BFloat16* rows, int n, F f) {
    const ReadAhead<Lanes, 2 * dim> ahead(lanes, rows, n / together * together);
    int row = 0;
    for (int stretch = 0; stretch < ahead.stretches; ++stretch) {
      for (; row < ahead.end[stretch]; row += together) {
        if (first) ahead.template ask<together>(rows + row * dim, stretch);
        f.template operator()<together>(row);
      }
    }
    for (; row < n; ++row) f.template operator()<1>(row);
  }
  template <int many, class Lanes>
  [[gnu::noinline]] static void some_logits(const Lanes& lanes, bool first, const BFloat16* rows, int n, const float* q,
                                            float* out, int stride) {
    each_row<2>(lanes, first, rows, n, [&]<int count>(int row) KVT_INLINE_LAMBDA {
      __m256 sum[many][count];
      each<many>([&]<int i>()
                     KVT_INLINE_LAMBDA { each<count>([&]<int r>() KVT_INLINE_LAMBDA { sum[i][r] = _mm256_setzero_ps(); }); });
      KVT_UNROLL
      for (int d = 0; d < dim; d += 16) {
        __m256 x[count][2];
        each<count>([&]<int r>() KVT_INLINE_LAMBDA { load_sixteen(rows + (row + r) * dim + d, x[r]); });
        each<many>([&]<int i>() KVT_INLINE_LAMBDA {
          each<2>([&]<int p>() KVT_INLINE_LAMBDA {
            const __m256 y = _mm256_loadu_ps(q + i * dim + d + 8 * p);
            each<count>([&]<int r>() KVT_INLINE_LAMBDA { sum[i][r] = _mm256_fmadd_ps(x[r][p], y, sum[i][r]); });
          });
        });
      }
      each<many>([&]<int i>() KVT_INLINE_LAMBDA {
        float* const to = out + i * stride + row;
        if constexpr (count == 2) {
          const __m256 both = _mm256_hadd_ps(sum[i][0], sum[i][1]);
          const __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
          _mm_storel_pi(reinterpret_cast<__m64*>(to), _mm_hadd_ps(four, four));
        } else {
          *to = detail::sum(sum[i][0]);
        }
      });
    });
  }
  template <int many, class Lanes>
  [[gnu::noinline]] static void some_sums(const Lanes& lanes, bool first, const BFloat16* rows, int n, const float* weights,
                                          int stride, float* acc) {
    each_row<4>(lanes, first, rows, n, [&]<int count>(int row) KVT_INLINE_LAMBDA {
      KVT_UNROLL
      for (int d = 0; d < dim; d += 16) {
        __m256 x[count][2];
        each<count>([&]<int r>() KVT_INLINE_LAMBDA { load_sixteen(rows + (row + r) * dim + d, x[r]); });
        each<many>([&]<int i>() KVT_INLINE_LAMBDA {
          float* const to = acc + i * dim + d;
          __m256 low = _mm256_loadu_ps(to), high = _mm256_loadu_ps(to + 8);
          each<count>([&]<int r>() KVT_INLINE_LAMBDA {
            const __m256 w = _mm256_broadcast_ss(weights + i * stride + row + r);
            low = _mm256_fmadd_ps(w, x[r][0], low);
            high = _mm256_fmadd_ps(w, x[r][1], high);
          });
          _mm256_storeu_ps(to, low);
          _mm256_storeu_ps(to + 8, high);
        });
      }
    });
  }
};

}  // namespace kvt::inline v0::detail

#endif
