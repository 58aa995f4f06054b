// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// LogScale: a scale of 0 or 2^-15.875 .. 2^15.875 in 8 bits, eight steps to the factor of two.
//
// At head_dim 64 it saves an eighth of a bit an element beside fp16. A code chosen for the stored scale loses little: a step
// is 9 %, and half of one changes the error of 1- to 3-bit codes by less than their hundredth part.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kvtailor/core/half.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

struct LogScale {
  static constexpr float max = 60096.5f;
  std::uint8_t bits;  // 0 is zero, k is 2^((k - 128) / 8)

  // The scale `step` places up or down, of those that are not zero.
  KVT_HD constexpr LogScale next(int step) const {
    const int to = bits + step;
    return {static_cast<std::uint8_t>(bits == 0 ? 0 : to < 1 ? 1 : to > 255 ? 255 : to)};
  }
};

namespace detail {
struct Eighths {  // 2^(i / 8)
  float of[8] = {1.f, 1.09050773f, 1.18920712f, 1.29683955f, 1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};
};
}  // namespace detail

KVT_HD KVT_INLINE float to_float(LogScale x) {
  if (x.bits == 0) return 0.f;
  const int power = (x.bits >> 3) - 16;
  const float one = float_from_bits(static_cast<std::uint32_t>(power + 127) << 23);
  static constexpr detail::Eighths power_of_two;
  return one * power_of_two.of[x.bits & 7];
}
#if defined(KVT_HOST_AVX2)
namespace detail {
// Scales 0 .. 7; zeros from `count` on, which are not read.
KVT_INLINE __m256 load_eight(const LogScale* from, int count = 8) {
  static constexpr Eighths power_of_two;
  long long bytes = 0;
  std::memcpy(&bytes, from, static_cast<std::size_t>(std::min(count, 8)));
  const __m256i bits = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_srli_epi32(bits, 3), _mm256_set1_epi32(127 - 16)), 23);
  const __m256 eighth = _mm256_permutevar8x32_ps(_mm256_loadu_ps(power_of_two.of), bits);
  const __m256 scale = _mm256_mul_ps(_mm256_castsi256_ps(power), eighth);
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpeq_epi32(bits, _mm256_setzero_si256()), _mm256_castps_si256(scale)));
}
}  // namespace detail
#endif
// The nearest on a logarithmic scale; below 2^-16 zero. x >= 0.
template <>
KVT_HD inline LogScale from_float<LogScale>(float x) {
  if (!(x >= 1.52587891e-5f)) return {0};
  const std::uint32_t bits = bits_from_float(x);
  const int power = static_cast<int>(bits >> 23) - 127;
  const float mantissa = float_from_bits((bits & 0x7fffffu) | 0x3f800000u);
  // Between 2^(i / 8) and the next the border is 2^((2 i + 1) / 16).
  static constexpr float border[8] = {1.04427378f, 1.13878863f, 1.24185781f, 1.35425555f,
                                      1.47682615f, 1.61049033f, 1.75625216f, 1.91520656f};
  int eighth = 0;
  while (eighth < 8 && mantissa > border[eighth]) ++eighth;
  const int code = (power + 16) * 8 + eighth;
  return {static_cast<std::uint8_t>(code < 1 ? 1 : code > 255 ? 255 : code)};
}

}  // namespace kvt::inline v0
