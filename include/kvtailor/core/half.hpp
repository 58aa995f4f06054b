// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Half and BFloat16: 16-bit storage types. Conversion to them rounds to nearest even; conversion from them is exact.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kvtailor/core/config.hpp"
#if defined(__AVX2__) && !defined(__CUDA_ARCH__)
#include <immintrin.h>
#endif

namespace kvt::inline v0 {

KVT_HD KVT_INLINE float float_from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
KVT_HD KVT_INLINE std::uint32_t bits_from_float(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct Half {
  static constexpr float max = 65504.f;
  std::uint16_t bits;
};
struct BFloat16 {
  static constexpr float max = 3.38953139e38f;
  std::uint16_t bits;
};

KVT_HD KVT_INLINE float to_float(float x) { return x; }
KVT_HD KVT_INLINE float to_float(BFloat16 x) { return float_from_bits(static_cast<std::uint32_t>(x.bits) << 16); }
KVT_HD KVT_INLINE float to_float(Half x) {
#if defined(__F16C__) && !defined(__CUDA_ARCH__)
  return _cvtsh_ss(x.bits);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t rest = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent and makes subnormals normal in one step.
  const std::uint32_t finite = bits_from_float(float_from_bits(rest) * 5.192296858534828e33f);
  const std::uint32_t special = rest | 0x7f800000u;
  return float_from_bits(sign | (rest >= (0x7c00u << 13) ? special : finite));
#endif
}

template <class T>
KVT_HD inline T from_float(float x);
template <>
KVT_HD inline float from_float<float>(float x) {
  return x;
}
template <>
KVT_HD inline BFloat16 from_float<BFloat16>(float x) {
  const std::uint32_t bits = bits_from_float(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
KVT_HD inline Half from_float<Half>(float x) {
  const std::uint32_t bits = bits_from_float(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t size = bits & 0x7fffffffu;
  std::uint32_t out;
  if (size > 0x7f800000u) {
    out = 0x7e00u;
  } else if (size >= 0x477ff000u) {  // 65520 and above round to infinity
    out = 0x7c00u;
  } else if (size < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    out = bits_from_float(float_from_bits(size) + 0.5f) - 0x3f000000u;
  } else {
    out = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | out)};
}

#if defined(__F16C__) && defined(__AVX2__) && !defined(__CUDA_ARCH__)
// Eight at a time with AVX-512 too: what reads them does so in eights, and sixteen stored at once are slow to read in halves.
KVT_INLINE void load_sixteen(const float* from, __m256 (&to)[2]) {
  to[0] = _mm256_loadu_ps(from);
  to[1] = _mm256_loadu_ps(from + 8);
}
KVT_INLINE void load_sixteen(const Half* from, __m256 (&to)[2]) {
  to[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  to[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)));
}
KVT_INLINE void load_sixteen(const BFloat16* from, __m256 (&to)[2]) {
  const __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
#if defined(__AVX512VL__) && defined(__AVX512BW__)
  const auto upper_halves = [&](int k) KVT_INLINE_LAMBDA {
    const __m256i word = _mm256_setr_epi32(k << 16, (k + 1) << 16, (k + 2) << 16, (k + 3) << 16, (k + 4) << 16, (k + 5) << 16,
                                           (k + 6) << 16, (k + 7) << 16);
    return _mm256_castsi256_ps(_mm256_maskz_permutexvar_epi16(0xaaaa, word, sixteen));
  };
  to[0] = upper_halves(0);
  to[1] = upper_halves(8);
#else
  const __m256i x = _mm256_permute4x64_epi64(sixteen, 0xd8);
  to[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), x));
  to[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), x));
#endif
}
#endif
// n values.
template <int n, class T>
KVT_HD KVT_INLINE void load_floats(const T* from, float* to) {
  int i = 0;
#if defined(__F16C__) && defined(__AVX2__) && !defined(__CUDA_ARCH__)
  for (; i + 16 <= n; i += 16) {
    __m256 x[2];
    load_sixteen(from + i, x);
    _mm256_storeu_ps(to + i, x[0]);
    _mm256_storeu_ps(to + i + 8, x[1]);
  }
  if constexpr (std::is_same_v<T, Half>) {
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
#endif
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

}  // namespace kvt::inline v0
