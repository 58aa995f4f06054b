// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// SoftmaxState: a softmax that is met in parts. The accumulator that belongs to it holds sum of exp(logit - max) * value.
// Source: online softmax, Milakov & Gimelshein, arXiv 1805.02867.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kvtailor/core/half.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

// exp(x) for x <= 0 within 2 units in the last place, zero below -87; NaN stays. Choices are masks: GCC makes branches of
// conditions on floats, and leaves the loop scalar.
KVT_HD KVT_INLINE float exp_nonpositive(float x) {
  const auto size = static_cast<std::int32_t>(bits_from_float(x) & 0x7fffffffu);
  constexpr std::int32_t most = 0x42ae0000, infinite = 0x7f800000;                          // 87
  const std::int32_t in_range = (size - most - 1) >> 31, is_nan = (infinite - size) >> 31;  // all ones or zero
  const float y = -float_from_bits(static_cast<std::uint32_t>(most + ((size - most) & in_range)));
  const float shifted = y * 1.44269504f + 12582912.f;  // 1.5 * 2^23 rounds to the nearest integer
  const float n = shifted - 12582912.f;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const auto scaled = static_cast<std::int32_t>(bits_from_float(p) + (bits_from_float(shifted) << 23));
  return float_from_bits(static_cast<std::uint32_t>((scaled & in_range) | (size & is_nan)));
}

#if defined(KVT_HOST_AVX512)
namespace detail {
// exp(y) of y <= 0 that are `there`, as exp_nonpositive() has it; of others zero.
KVT_INLINE __m512 exponentials(__m512 y, __mmask16 there) {
  const __mmask16 in_range = _mm512_mask_cmp_ps_mask(there, y, _mm512_set1_ps(-87), _CMP_NLT_UQ);  // or NaN
  // exp(y) is 2^(whole + rest), with the logarithm of e as the sum of two numbers.
  const __m512 log = _mm512_set1_ps(1.44269502f), more = _mm512_set1_ps(1.92596299e-8f);
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(y, log), _MM_FROUND_TO_NEAREST_INT);
  const __m512 rest = _mm512_fmadd_ps(y, more, _mm512_fmsub_ps(y, log, whole));
  __m512 p = _mm512_set1_ps(1.54531634e-4f);
  for (const float c : {1.33908633e-3f, 9.61808302e-3f, 5.55035695e-2f, 2.40226507e-1f, 6.93147182e-1f, 1.f}) {
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
  }
  return _mm512_maskz_scalef_ps(in_range, p, whole);
}
}  // namespace detail
#endif

// x[i] becomes exp(x[i] - top), as exp_nonpositive() has it; returns their sum. top is finite, and none is above it.
inline float exponentials(float* x, int n, float top) {
#if defined(KVT_HOST_AVX512)
  __m512 sum = _mm512_setzero_ps();
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 power = detail::exponentials(_mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(top)), 0xffff);
    _mm512_storeu_ps(x + i, power);
    sum = _mm512_add_ps(sum, power);
  }
  if (i < n) {
    const auto there = static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m512 y = _mm512_sub_ps(_mm512_maskz_loadu_ps(there, x + i), _mm512_set1_ps(top));
    const __m512 power = detail::exponentials(y, there);
    _mm512_mask_storeu_ps(x + i, there, power);
    sum = _mm512_add_ps(sum, power);
  }
  return _mm512_reduce_add_ps(sum);
#else
  for (int i = 0; i < n; ++i) x[i] = exp_nonpositive(x[i] - top);
  return sum_of(x, n);
#endif
}

struct SoftmaxState {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0;

  KVT_HD bool empty() const { return !(sum > 0); }

  // Raises the maximum to at least `logit`; returns what sum and accumulator so far are multiplied by.
  KVT_HD float raise(float logit) {
    if (!(logit > max)) return 1.f;
    const float factor = empty() ? 0.f : exp_nonpositive(max - logit);
    max = logit;
    sum *= factor;
    return factor;
  }
  // Joins another part; returns the factors of this accumulator and of the other's. Two empty parts give zeros.
  struct Factors {
    float own, other;
  };
  KVT_HD Factors merge(const SoftmaxState& part) {
    if (part.empty()) return {1.f, 0.f};
    const float own = raise(part.max);
    const float other = exp_nonpositive(part.max - max);
    sum += part.sum * other;
    return {own, other};
  }
};

}  // namespace kvt::inline v0
