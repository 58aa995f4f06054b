// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Reductions of fp32 arrays. Compilers must not reorder sums by themselves, so partial results are spelt out: eight of them, in
// the vector extension of GCC and clang on the host, so that they stay in registers. The order of additions depends on the
// length alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kvtailor/core/config.hpp"
#if defined(__GNUC__) && !defined(__CUDA_ARCH__)
#define KVT_HOST_VECTORS
#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AVX2__) && defined(__FMA__)
#define KVT_HOST_AVX2
#if defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VBMI__) && \
    defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#define KVT_HOST_AVX512  // what came with Ice Lake and Zen 4
#endif
#endif
#endif

namespace kvt::inline v0 {

namespace detail {

#if defined(KVT_HOST_VECTORS)
using Float8 __attribute__((vector_size(32))) = float;

KVT_INLINE void load(const float* from, Float8& to) { std::memcpy(&to, from, sizeof to); }
#if defined(__AVX__)
KVT_INLINE float sum(__m256 x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#else
KVT_INLINE float sum(const Float8& x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
#endif
#endif

#if defined(KVT_HOST_AVX2)
// Eight codes of `width` bits: those `shift` bits up in eight bytes. Compilers do not find this form.
template <int width>
KVT_INLINE __m256i eight_codes(const unsigned char* bytes, int shift) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return _mm256_and_si256(_mm256_srli_epi32(wide, shift), _mm256_set1_epi32((1 << width) - 1));
}
// table[code] of eight codes below `size`.
template <int size>
KVT_INLINE __m256 look_up(const float* table, __m256i code) {
  if constexpr (size <= 4) {
    return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(table)), code);
  } else if constexpr (size == 8) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), code);
  } else {
    constexpr int top = size == 16 ? 3 : size == 32 ? 4 : 5;  // the highest bit of a code
    const __m256 low = look_up<size / 2>(table, code), high = look_up<size / 2>(table + size / 2, code);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 31 - top)));
  }
}
#endif

}  // namespace detail

// a . b, n a multiple of 8.
template <int n>
KVT_HD KVT_INLINE float dot(const float* a, const float* b) {
  static_assert(n % 8 == 0);
#if defined(KVT_HOST_VECTORS)
  detail::Float8 x, y, even, odd = {};
  detail::load(a, x);
  detail::load(b, y);
  even = x * y;
  if constexpr (n >= 16) {
    detail::load(a + 8, x);
    detail::load(b + 8, y);
    odd = x * y;
  }
  for (int i = 16; i < n; i += 16) {
    detail::load(a + i, x);
    detail::load(b + i, y);
    even = x * y + even;
    if (i + 8 == n) break;
    detail::load(a + i + 8, x);
    detail::load(b + i + 8, y);
    odd = x * y + odd;
  }
  even += odd;
  return detail::sum(even);
#else
  float total = 0;
  for (int i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
#endif
}

// a . b, any n.
KVT_HD KVT_INLINE float dot(const float* a, const float* b, int n) {
  float total = 0;
  int rest = n;  // elements that are in no eight
#if defined(KVT_HOST_VECTORS)
  if (n >= 8) {
    detail::Float8 x, y, even = {}, odd = {};
    int i = 0;
    for (; i + 16 <= n; i += 16) {
      detail::load(a + i, x);
      detail::load(b + i, y);
      even = x * y + even;
      detail::load(a + i + 8, x);
      detail::load(b + i + 8, y);
      odd = x * y + odd;
    }
    if (i + 8 <= n) {
      detail::load(a + i, x);
      detail::load(b + i, y);
      even = x * y + even;
    }
    even += odd;
    total = detail::sum(even);
    rest = n % 8;
  }
#endif
  for (int i = n - rest; i < n; ++i) total += a[i] * b[i];
  return total;
}

#if defined(KVT_HOST_VECTORS)
namespace detail {

KVT_INLINE void add_eights(float* to, const float (&w)[4], const float* a, const float* b, const float* c, const float* e) {
  Float8 x, sum;
  load(a, x);
  load(to, sum);
  sum = w[0] * x + sum;
  load(b, x);
  sum = w[1] * x + sum;
  load(c, x);
  sum = w[2] * x + sum;
  load(e, x);
  sum = w[3] * x + sum;
  std::memcpy(to, &sum, sizeof sum);
}

}  // namespace detail
#endif

// to += w[0] * a + w[1] * b + w[2] * c + w[3] * e, n a multiple of 8.
template <int n>
KVT_HD KVT_INLINE void add_rows(float* to, const float (&w)[4], const float* a, const float* b, const float* c,
                                const float* e) {
  static_assert(n % 8 == 0);
#if defined(KVT_HOST_VECTORS)
  KVT_UNROLL
  for (int i = 0; i < n; i += 8) detail::add_eights(to + i, w, a + i, b + i, c + i, e + i);
#else
  for (int i = 0; i < n; ++i) to[i] = w[3] * e[i] + (w[2] * c[i] + (w[1] * b[i] + (w[0] * a[i] + to[i])));
#endif
}

namespace detail {

#if defined(KVT_HOST_VECTORS)
// Joins the first n / 8 * 8 of n >= 8 numbers eight by eight; join(to, x) changes `to`. By reference, since how a vector is
// returned depends on what the compiler may use.
template <class Join>
KVT_INLINE void join_eights(const float* x, int n, Float8& all, Join join) {
  Float8 a, b, c, d;
  load(x, all);
  int i = 8;
  for (; i + 32 <= n; i += 32) {
    load(x + i, a);
    load(x + i + 8, b);
    load(x + i + 16, c);
    load(x + i + 24, d);
    join(a, b);
    join(c, d);
    join(a, c);
    join(all, a);
  }
  for (; i + 8 <= n; i += 8) {
    load(x + i, a);
    join(all, a);
  }
}
#endif

// Rows of floats or of small integers.
template <class T>
struct FourRows {
  const T* row[4];
};
#if defined(KVT_HOST_VECTORS)
KVT_INLINE void load(const std::int8_t* from, Float8& to) {
#if defined(KVT_HOST_AVX2)
  to = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  using Byte8 __attribute__((vector_size(8))) = std::int8_t;
  Byte8 x;
  std::memcpy(&x, from, sizeof x);
  to = __builtin_convertvector(x, Float8);
#endif
}
#endif
// out[j][i] = x[j * stride] [n] . row i, of `many` vectors.
template <int many, class T>
KVT_INLINE void dot_rows(const FourRows<T>& rows, const float* x, int stride, int n, float (&out)[many][4]) {
  int k = 0;
#if defined(KVT_HOST_VECTORS)
  Float8 sum[many][4] = {};
  for (; k + 8 <= n; k += 8) {
    Float8 by[many];
    KVT_UNROLL
    for (int j = 0; j < many; ++j) load(x + j * stride + k, by[j]);
    KVT_UNROLL
    for (int i = 0; i < 4; ++i) {
      Float8 row;
      load(rows.row[i] + k, row);
      KVT_UNROLL
      for (int j = 0; j < many; ++j) sum[j][i] = row * by[j] + sum[j][i];
    }
  }
  KVT_UNROLL
  for (int j = 0; j < many; ++j) {
#if defined(__AVX__)
    const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(sum[j][0], sum[j][1]), _mm256_hadd_ps(sum[j][2], sum[j][3]));
    _mm_storeu_ps(out[j], _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
#else
    for (int i = 0; i < 4; ++i) out[j][i] = detail::sum(sum[j][i]);
#endif
  }
#else
  for (auto& each : out) std::fill_n(each, 4, 0.f);
#endif
  for (; k < n; ++k) {
    for (int j = 0; j < many; ++j) {
      for (int i = 0; i < 4; ++i) out[j][i] += x[j * stride + k] * rows.row[i][k];
    }
  }
}
// to[j * stride] [n] += w[j][i] times row i, of `many` vectors.
template <int many, class T>
KVT_INLINE void add_rows(float* to, int stride, const float (&w)[many][4], const FourRows<T>& rows, int n) {
  int k = 0;
#if defined(KVT_HOST_VECTORS)
  for (; k + 8 <= n; k += 8) {
    Float8 sum[many];
    KVT_UNROLL
    for (int j = 0; j < many; ++j) load(to + j * stride + k, sum[j]);
    KVT_UNROLL
    for (int i = 0; i < 4; ++i) {
      Float8 row;
      load(rows.row[i] + k, row);
      KVT_UNROLL
      for (int j = 0; j < many; ++j) sum[j] = w[j][i] * row + sum[j];
    }
    KVT_UNROLL
    for (int j = 0; j < many; ++j) std::memcpy(to + j * stride + k, &sum[j], sizeof sum[j]);
  }
#endif
  for (; k < n; ++k) {
    for (int j = 0; j < many; ++j) {
      for (int i = 0; i < 4; ++i) to[j * stride + k] += w[j][i] * rows.row[i][k];
    }
  }
}

}  // namespace detail

// Of n >= 1 numbers, none of them NaN.
KVT_INLINE float largest_of(const float* x, int n) {
  const auto larger = [](auto& a, const auto& b) { a = a > b ? a : b; };
  float best = x[0];
  int i = 1;
#if defined(KVT_HOST_VECTORS)
  if (n >= 8) {
    detail::Float8 top;
    detail::join_eights(x, n, top, larger);
    for (int k = 0; k < 8; ++k) best = best > top[k] ? best : top[k];
    i = n / 8 * 8;
  }
#endif
  for (; i < n; ++i) larger(best, x[i]);
  return best;
}

KVT_INLINE float sum_of(const float* x, int n) {
  float total = 0;
  int i = 0;
#if defined(KVT_HOST_VECTORS)
  if (n >= 8) {
    detail::Float8 all;
    detail::join_eights(x, n, all, [](detail::Float8& a, const detail::Float8& b) { a += b; });
    total = detail::sum(all);
    i = n / 8 * 8;
  }
#endif
  for (; i < n; ++i) total += x[i];
  return total;
}

}  // namespace kvt::inline v0
