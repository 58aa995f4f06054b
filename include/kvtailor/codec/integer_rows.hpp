// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention on rows of small integers, on a host with AVX2: products of 16 bits, sums of 32 bits.
//
// Rows are seen through a type R:
//   size, group           elements of a row, and of those that share a scale; both multiples of 32
//   most                  the largest magnitude an integer has
//   load(row, to)         the integers of a row as size / 16 registers of 16-bit numbers, in the order of widen()
//   scale(row, g)         what the integers of group g are multiplied by; least(row, g), if has_least, what is added then
//
// Error:   queries are rounded to 2^-16 of their largest element, or 2^-31 dim most of their norm where that is more; weights
//          times scales to 2^-16 of the largest of 128 rows, or 2^-32 most of their sum. Below 1e-30 they count as zero.
#pragma once

#include "kvtailor/core/simd.hpp"
#if defined(KVT_HOST_AVX2)

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace kvt::inline v0::detail {

// 32 numbers in 32 bytes as 16-bit numbers: elements 0 .. 7 and 16 .. 23 in to[0], 8 .. 15 and 24 .. 31 in to[1].
KVT_INLINE void widen(__m256i low_bytes, __m256i high_bytes, __m256i* to) {
  to[0] = _mm256_unpacklo_epi8(low_bytes, high_bytes);
  to[1] = _mm256_unpackhi_epi8(low_bytes, high_bytes);
}
KVT_INLINE void widen(__m256i bytes, __m256i* to) { widen(bytes, _mm256_cmpgt_epi8(_mm256_setzero_si256(), bytes), to); }

KVT_INLINE __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
KVT_INLINE __m256i load_bytes(const void* low, const void* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low))),
                                 _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
}
// Codes of `width` bits of elements i .. i + 31, one a byte, from a plane in which byte j of `stride` holds elements j,
// j + stride, j + 2 stride, ... from the low bits up.
template <int width, int stride>
KVT_INLINE __m256i plane_codes(const unsigned char* plane, int i) {
  const auto shift = [&](int element) { return (i + element) / stride * width; };
  const auto from = [&](int element) { return plane + (i + element) % stride; };
  __m256i codes;
  if constexpr (stride % 32 == 0) {
    codes = _mm256_srli_epi16(load_bytes(from(0)), shift(0));
  } else if constexpr (stride % 16 == 0) {
    codes = _mm256_srlv_epi64(load_bytes(from(0), from(16)), _mm256_setr_epi64x(shift(0), shift(0), shift(16), shift(16)));
  } else if constexpr (stride % 8 == 0) {
    const auto eight = [&](int element) {
      long long bytes;
      std::memcpy(&bytes, from(element), 8);
      return bytes;
    };
    codes = _mm256_srlv_epi64(_mm256_setr_epi64x(eight(0), eight(8), eight(16), eight(24)),
                              _mm256_setr_epi64x(shift(0), shift(8), shift(16), shift(24)));
  } else {
    alignas(32) unsigned char each[32];
    for (int k = 0; k < 32; ++k) each[k] = static_cast<unsigned char>(*from(k) >> shift(k));
    codes = load_bytes(each);
  }
  return width == 8 ? codes : _mm256_and_si256(codes, _mm256_set1_epi8((1 << width) - 1));
}
// 32 bits as bytes of all ones or zero.
KVT_INLINE __m256i spread_bits(const unsigned char* from) {
  int bits;
  std::memcpy(&bits, from, sizeof bits);
#if defined(KVT_HOST_AVX512)
  return _mm256_movm_epi8(static_cast<__mmask32>(bits));
#else
  const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i place = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
  return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), place), place);
#endif
}
// Bytes of an aligned table of `size` bytes, 16 to 128, at indices below it.
template <int size>
KVT_INLINE __m256i look_up_bytes(const std::int8_t* table, __m256i index) {
  if constexpr (size == 16) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
  } else {
#if defined(KVT_HOST_AVX512)
    // The masked form: gcc 12 warns of an uninitialised value inside the plain one.
    if constexpr (size == 32) return _mm256_maskz_permutexvar_epi8(0xffffffff, index, load_bytes(table));
    if constexpr (size == 64) return _mm256_permutex2var_epi8(load_bytes(table), index, load_bytes(table + 32));
#endif
    constexpr int top = size == 32 ? 4 : size == 64 ? 5 : 6;  // the highest bit of an index
    return _mm256_blendv_epi8(look_up_bytes<size / 2>(table, index), look_up_bytes<size / 2>(table + size / 2, index),
                              _mm256_slli_epi16(index, 7 - top));
  }
}
// sum + the products of 16-bit numbers, two by two
KVT_INLINE __m256i add_products(__m256i sum, __m256i a, __m256i b) {
#if defined(KVT_HOST_AVX512)
  return _mm256_dpwssd_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

template <class R>
struct IntegerRows {
  static constexpr int dim = R::size, groups = dim / R::group, registers = dim / 16, group_registers = R::group / 16;
  static constexpr int most_vectors = 16, most_rows = 128;  // at once
  static_assert(dim % 32 == 0 && R::group % 32 == 0);

  // out[j * stride + row] = query j . row
  static void logits(const R& rows, int n, const float* queries, int m, float* out, int stride) {
    for (int first = 0; first < m; first += most_vectors) {
      const Queries some(queries + first * dim, std::min(most_vectors, m - first));
      for (int row = 0; row < n; row += most_rows) {
        some_logits(rows, row, std::min(most_rows, n - row), some, out + first * stride + row, stride);
      }
    }
  }
  // acc[j] += sum over rows of weights[j * stride + row] * row
  static void accumulate(const R& rows, int n, const float* weights, int m, int stride, float* acc) {
    for (int first = 0; first < m; first += most_vectors) {
      for (int row = 0; row < n; row += most_rows) {
        some_sums(rows, row, std::min(most_rows, n - row), weights + first * stride + row, std::min(most_vectors, m - first),
                  stride, acc + first * dim);
      }
    }
  }

 private:
  static constexpr float largest_sum = 2147000000.f / R::most;

  // Elements 32 k .. of [dim], in the order of widen().
  KVT_INLINE static __m256 eight(const float* from, int k, int part) {
    const float* const at = from + 32 * k + 4 * part;
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at)), _mm_loadu_ps(at + 16), 1);
  }
  // Returns what the integers are to be multiplied by.
  static float to_integers(const float* x, __m256i* to) {
    __m256 square = _mm256_setzero_ps(), largest = square;
    for (int d = 0; d < dim; d += 8) {
      const __m256 v = _mm256_loadu_ps(x + d);
      square = _mm256_fmadd_ps(v, v, square);
      largest = _mm256_max_ps(largest, magnitude(v));
    }
    // Every product with a row, and every part of one, fits in 32 bits.
    const float top = largest_of(largest), total = sum(square);
    const float norm = std::isinf(total) ? top * root() : std::sqrt(total);
    const float factor = factor_for(top, norm, largest_sum / root());
    const __m256 by = _mm256_set1_ps(factor);
    for (int k = 0; k < dim / 32; ++k) {
      const auto round = [&](int part) { return _mm256_cvtps_epi32(_mm256_mul_ps(eight(x, k, part), by)); };
      to[2 * k] = _mm256_packs_epi32(round(0), round(1));
      to[2 * k + 1] = _mm256_packs_epi32(round(2), round(3));
    }
    return unit_for(factor, norm);
  }
  static constexpr float root() {  // of dim, or a little more
    int r = 1;
    while (r * r < dim) ++r;
    return static_cast<float>(r);
  }
  KVT_INLINE static __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }
  KVT_INLINE static float largest_of(__m256 x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }
  // Numbers times this are at most 32,767, and their total at most `most`. Zero if they are as good as zero, or no numbers.
  KVT_INLINE static float factor_for(float largest, float total, float most) {
    return largest > 1e-30f && total < 3e38f ? std::min(32767.f / largest, most / total) : 0.f;
  }
  KVT_INLINE static float unit_for(float factor, float total) {
    return factor != 0 ? 1 / factor : total < 3e38f ? 0.f : std::nanf("");
  }

  // The sums of four vectors, given the hadd of two and that of the others.
  KVT_INLINE static __m128 sums_of_four(__m256i ab, __m256i cd) {
    const __m256i four = _mm256_hadd_epi32(ab, cd);
    return _mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1)));
  }

  // Scales, and least elements, of up to most_rows rows; zeros up to a multiple of 8 of them.
  struct Lines {
    alignas(32) float scale[groups][most_rows];
    alignas(32) float least[R::has_least ? groups : 1][most_rows];

    Lines(const R& rows, int first, int n) {
      for (int row = 0; row < n; ++row) {
        for (int g = 0; g < groups; ++g) {
          scale[g][row] = rows.scale(first + row, g);
          if constexpr (R::has_least) least[g][row] = rows.least(first + row, g);
        }
      }
      for (int row = n; row % 8 != 0; ++row) {
        for (int g = 0; g < groups; ++g) scale[g][row] = 0;
        if constexpr (R::has_least) {
          for (int g = 0; g < groups; ++g) least[g][row] = 0;
        }
      }
    }
  };

  struct Queries {
    int m;
    __m256i whole[most_vectors][registers];
    float unit[most_vectors];
    float total[most_vectors][R::has_least ? groups : 1];  // of a group

    Queries(const float* queries, int count) : m(count) {
      for (int j = 0; j < m; ++j) {
        unit[j] = to_integers(queries + j * dim, whole[j]);
        if constexpr (R::has_least) {
          for (int g = 0; g < groups; ++g) total[j][g] = sum_of(queries + j * dim + g * R::group, R::group);
        }
      }
    }
  };

  static void some_logits(const R& rows, int first, int n, const Queries& query, float* out, int stride) {
    const Lines lines(rows, first, n);
    for (int row = 0; row < n; row += 4) {
      __m128 logit[most_vectors];
      const auto at = [&](int r) { return first + std::min(row + r, n - 1); };
      if constexpr (group_registers > 4) {
        products_by_two(rows, at, query, lines, row, logit);
      } else {
        products_by_four(rows, at, query, lines, row, logit);
      }
      for (int j = 0; j < query.m; ++j) {
        logit[j] = _mm_mul_ps(logit[j], _mm_set1_ps(query.unit[j]));
        if constexpr (groups == 1) logit[j] = _mm_mul_ps(logit[j], _mm_load_ps(lines.scale[0] + row));
        if constexpr (R::has_least) {
          for (int g = 0; g < groups; ++g) {
            logit[j] = _mm_fmadd_ps(_mm_load_ps(lines.least[g] + row), _mm_set1_ps(query.total[j][g]), logit[j]);
          }
        }
        float* const to = out + j * stride + row;
        if (row + 4 <= n) {
          _mm_storeu_ps(to, logit[j]);
        } else {
          alignas(16) float four[4];
          _mm_store_ps(four, logit[j]);
          std::copy_n(four, n - row, to);
        }
      }
    }
  }
  // Products with four rows, those of many groups times their scales. Two rows at a time, and as much of them as registers
  // hold: both operands of most products come from registers then.
  template <class At>
  KVT_INLINE static void products_by_two(const R& rows, At at, const Queries& query, const Lines& lines, int row,
                                         __m128* logit) {
#if defined(KVT_HOST_AVX512)
    constexpr int near = group_registers % 8 == 0 ? 8 : group_registers % 4 == 0 ? 4 : 2;
#else
    constexpr int near = group_registers % 4 == 0 ? 4 : 2;
#endif
    __m256i half[groups][most_vectors][2];
    for (int r = 0; r < 4; r += 2) {
      __m256i even[registers], odd[registers];
      rows.load(at(r), even);
      rows.load(at(r + 1), odd);
      for (int k = 0; k < registers; k += near) {
        __m256i x[2][near];
        for (int i = 0; i < near; ++i) x[0][i] = even[k + i];
        for (int i = 0; i < near; ++i) x[1][i] = odd[k + i];
        for (int j = 0; j < query.m; ++j) {
          const __m256i* const q = query.whole[j] + k;
          __m256i total[2] = {_mm256_madd_epi16(x[0][0], q[0]), _mm256_madd_epi16(x[1][0], q[0])};
          for (int i = 1; i < near; ++i) {
            total[0] = add_products(total[0], x[0][i], q[i]);
            total[1] = add_products(total[1], x[1][i], q[i]);
          }
          const __m256i sum = _mm256_hadd_epi32(total[0], total[1]);
          __m256i& to = half[k / group_registers][j][r / 2];
          to = k % group_registers == 0 ? sum : _mm256_add_epi32(to, sum);
        }
      }
    }
    for (int j = 0; j < query.m; ++j) {
      logit[j] = sums_of_four(half[0][j][0], half[0][j][1]);
      if constexpr (groups == 1) continue;
      logit[j] = _mm_mul_ps(logit[j], _mm_load_ps(lines.scale[0] + row));
      for (int g = 1; g < groups; ++g) {
        logit[j] = _mm_fmadd_ps(sums_of_four(half[g][j][0], half[g][j][1]), _mm_load_ps(lines.scale[g] + row), logit[j]);
      }
    }
  }
  // Products with four rows at once, those of many groups times their scales.
  template <class At>
  KVT_INLINE static void products_by_four(const R& rows, At at, const Queries& query, const Lines& lines, int row,
                                          __m128* logit) {
    __m256i x[4][registers];
    for (int r = 0; r < 4; ++r) rows.load(at(r), x[r]);
    for (int g = 0; g < groups; ++g) {
      const __m128 scale = _mm_load_ps(lines.scale[g] + row);
      for (int j = 0; j < query.m; ++j) {
        const __m256i* const q = query.whole[j] + g * group_registers;
        __m256i total[4];
        for (int r = 0; r < 4; ++r) {
          const __m256i* const y = x[r] + g * group_registers;
          total[r] = _mm256_madd_epi16(y[0], q[0]);
          for (int i = 1; i < group_registers; ++i) total[r] = add_products(total[r], y[i], q[i]);
        }
        const __m128 sum = sums_of_four(_mm256_hadd_epi32(total[0], total[1]), _mm256_hadd_epi32(total[2], total[3]));
        logit[j] = groups == 1 ? sum : g == 0 ? _mm_mul_ps(sum, scale) : _mm_fmadd_ps(sum, scale, logit[j]);
      }
    }
  }

  static void some_sums(const R& rows, int first, int n, const float* weights, int m, int stride, float* acc) {
    const Lines lines(rows, first, n);
    const int padded = (n + 7) / 8 * 8;
    alignas(32) std::int16_t weight[most_vectors][groups][most_rows];
    float unit[most_vectors][groups];
    __m256i whole[most_vectors][2 * registers];
    for (int j = 0; j < m; ++j) {
      alignas(32) float own[most_rows];
      std::copy_n(weights + j * stride, n, own);
      std::fill_n(own + n, padded - n, 0.f);
      for (int g = 0; g < groups; ++g) {
        unit[j][g] = weights_to_integers(own, lines.scale[g], padded, weight[j][g]);
        if constexpr (R::has_least) {
          const float shift = dot(own, lines.least[g], n);
          for (int d = 0; d < R::group; ++d) acc[j * dim + g * R::group + d] += shift;
        }
      }
      for (__m256i& s : whole[j]) s = _mm256_setzero_si256();
    }
    for (int row = 0; row < n; row += 4) {
      __m256i near[2 * registers], far[2 * registers];  // rows 0 and 1, and 2 and 3, element by element
      pairs(rows, first + row, first + n, near);
      pairs(rows, first + row + 2, first + n, far);
      for (int k = 0; k < 2 * registers; k += 4) {
        __m256i x[2][4];
        for (int i = 0; i < 4; ++i) x[0][i] = near[k + i];
        for (int i = 0; i < 4; ++i) x[1][i] = far[k + i];
        for (int j = 0; j < m; ++j) {
          const std::int16_t* const w = weight[j][k / (2 * group_registers)] + row;
          const __m256i a = two_weights(w), b = two_weights(w + 2);
          for (int i = 0; i < 4; ++i) {
            whole[j][k + i] = add_products(add_products(whole[j][k + i], x[0][i], a), x[1][i], b);
          }
        }
      }
    }
    for (int j = 0; j < m; ++j) {
      for (int k = 0; k < 2 * registers; ++k) {
        const __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(whole[j][k]), _mm256_set1_ps(unit[j][k / (2 * group_registers)]));
        float* const to = acc + j * dim + 32 * (k / 4) + 4 * (k % 4);
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), _mm256_castps256_ps128(part)));
        _mm_storeu_ps(to + 16, _mm_add_ps(_mm_loadu_ps(to + 16), _mm256_extractf128_ps(part, 1)));
      }
    }
  }
  KVT_INLINE static void pairs(const R& rows, int row, int end, __m256i* to) {
    __m256i even[registers], odd[registers];
    rows.load(std::min(row, end - 1), even);
    rows.load(std::min(row + 1, end - 1), odd);
    for (int k = 0; k < registers; ++k) {
      to[2 * k] = _mm256_unpacklo_epi16(even[k], odd[k]);
      to[2 * k + 1] = _mm256_unpackhi_epi16(even[k], odd[k]);
    }
  }
  KVT_INLINE static __m256i two_weights(const std::int16_t* from) {
    int both;
    std::memcpy(&both, from, sizeof both);
    return _mm256_set1_epi32(both);
  }
  static float weights_to_integers(const float* weights, const float* scale, int n, std::int16_t* to) {
    __m256 total = _mm256_setzero_ps(), largest = total;
    for (int row = 0; row < n; row += 8) {
      const __m256 size = magnitude(_mm256_mul_ps(_mm256_load_ps(weights + row), _mm256_load_ps(scale + row)));
      total = _mm256_add_ps(total, size);
      largest = _mm256_max_ps(largest, size);
    }
    const float factor = factor_for(largest_of(largest), sum(total), largest_sum);
    const __m256 by = _mm256_set1_ps(factor);
    for (int row = 0; row < n; row += 8) {
      const __m256 x = _mm256_mul_ps(_mm256_mul_ps(_mm256_load_ps(weights + row), _mm256_load_ps(scale + row)), by);
      const __m256i whole = _mm256_cvtps_epi32(x);
      _mm_store_si128(reinterpret_cast<__m128i*>(to + row),
                      _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
    }
    return unit_for(factor, sum(total));
  }
};

}  // namespace kvt::inline v0::detail

#endif
