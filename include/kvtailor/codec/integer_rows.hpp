// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention on rows of small integers, on a host with AVX2: products of 16 bits, sums of 32 bits.
//
// Rows are seen through a type R:
//   size, group           elements of a row, and of those that share a scale; both multiples of 32
//   most                  the largest magnitude an integer has, at most 128
//   bytes<c>(row)         integers 32 c .. 32 c + 31 of a row
//   scale(row, g)         what the integers of group g are multiplied by; least(row, g), if has_least, what is added then
//   coarse                its own error allows for queries and weights of a byte: see byte_rows.hpp
//
// Error:   queries are rounded to 2^-16 of their largest element, or 2^-31 dim most of their norm where that is more; weights
//          times scales to 2^-16 of the largest of 128 rows, or 2^-32 most of their sum. Below 1e-30 they count as zero.
#pragma once

#include "kvtailor/core/simd.hpp"
#if defined(KVT_HOST_AVX2)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

namespace kvt::inline v0::detail {

// 32 numbers in 32 bytes as 16-bit numbers: elements 0 .. 7 and 16 .. 23 in to[0], 8 .. 15 and 24 .. 31 in to[1].
KVT_INLINE void widen(__m256i bytes, __m256i* to) {
  const __m256i signs = _mm256_cmpgt_epi8(_mm256_setzero_si256(), bytes);
  to[0] = _mm256_unpacklo_epi8(bytes, signs);
  to[1] = _mm256_unpackhi_epi8(bytes, signs);
}

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
  // Written out, since GCC copies the sums of built-in functions to and fro.
#if defined(KVT_HOST_AVX512)
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  const __m256i two = _mm256_madd_epi16(a, b);
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(two));
#endif
  return sum;
}

#if defined(KVT_HOST_AVX512)
inline constexpr int registers_of_sums = 16;
#else
inline constexpr int registers_of_sums = 8;
#endif

// f<0>(), f<1>(), ... Compilers keep arrays in registers only if their indices are constants from the start.
template <int count, class F>
KVT_INLINE void each(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>) KVT_INLINE_LAMBDA { (f.template operator()<i>(), ...); }
  (std::make_integer_sequence<int, count>{});
}
// f<many>(j) for vectors j .. j + many - 1: `most` at a time, and once for those that are left.
template <int most, class F>
KVT_INLINE void each_batch(int m, F f, int j = 0) {
  for (; j + most <= m; j += most) f.template operator()<most>(j);
  if constexpr (most > 1) {
    if (j < m) each_batch<most - 1>(m, f, j);
  }
}

struct FourSums {
  __m256i of[4];
  KVT_INLINE void clear() { of[0] = of[1] = of[2] = of[3] = _mm256_setzero_si256(); }
  // To each sum its own products.
  KVT_INLINE void add(const __m256i (&x)[4], __m256i y) {
    of[0] = add_products(of[0], x[0], y);
    of[1] = add_products(of[1], x[1], y);
    of[2] = add_products(of[2], x[2], y);
    of[3] = add_products(of[3], x[3], y);
  }
};

// Products of rows that are unpacked already know nothing of codecs: one copy of each function serves all of them.

// out[i * out_stride + row] = x[row] . q[i], of n rows, a multiple of 4, of `registers` registers each, every `apart`
// registers. Those of more than one group are sums over groups of the products of the group times scale[g * scale_stride +
// row].
template <int many, int groups>
[[gnu::noinline]] inline void row_products(const __m256i* x, int n, int registers, int apart, const __m256i* q,
                                           const float* scale, int scale_stride, float* out, int out_stride) {
  constexpr int near = registers_of_sums / 4;  // rows at a time
  for (int row = 0; row < n; row += 4) {
    __m256i half[many][2];
    __m256 scaled[many][4];
    each<4 / near>([&]<int part>() KVT_INLINE_LAMBDA {
      constexpr int r = part * near;
      const __m256i* const y = x + (row + r) * apart;
      for (int g = 0; g < groups; ++g) {
        __m256i sum[many][near];
        each<many>([&]<int i>() KVT_INLINE_LAMBDA {
          each<near>([&]<int s>() KVT_INLINE_LAMBDA { sum[i][s] = _mm256_setzero_si256(); });
        });
        const int end = registers / groups * (g + 1);
        for (int k = registers / groups * g; k < end; ++k) {
          each<many>([&]<int i>() KVT_INLINE_LAMBDA {
            each<near>([&]<int s>()
                           KVT_INLINE_LAMBDA { sum[i][s] = add_products(sum[i][s], y[s * apart + k], q[i * apart + k]); });
          });
        }
        each<many>([&]<int i>() KVT_INLINE_LAMBDA {
          if constexpr (groups == 1) {
            each<near / 2>([&]<int s>()
                               KVT_INLINE_LAMBDA { half[i][r / 2 + s] = _mm256_hadd_epi32(sum[i][2 * s], sum[i][2 * s + 1]); });
          } else {
            each<near>([&]<int s>() KVT_INLINE_LAMBDA {
              const __m256 by = _mm256_broadcast_ss(scale + g * scale_stride + row + r + s);
              const __m256 whole = _mm256_cvtepi32_ps(sum[i][s]);
              scaled[i][r + s] = g == 0 ? _mm256_mul_ps(whole, by) : _mm256_fmadd_ps(whole, by, scaled[i][r + s]);
            });
          }
        });
      }
    });
    each<many>([&]<int i>() KVT_INLINE_LAMBDA {
      __m128 logit;
      if constexpr (groups == 1) {
        const __m256i four = _mm256_hadd_epi32(half[i][0], half[i][1]);
        logit = _mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1)));
      } else {
        const __m256 four =
            _mm256_hadd_ps(_mm256_hadd_ps(scaled[i][0], scaled[i][1]), _mm256_hadd_ps(scaled[i][2], scaled[i][3]));
        logit = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
      }
      _mm_store_ps(out + i * out_stride + row, logit);
    });
  }
}

// to[0 .. 31] += unit * sums of 32 elements, in the order that unpacking bytes gives them.
KVT_INLINE void add_elements(const __m256i (&sum)[4], float unit, float* to) {
  const __m256 by = _mm256_set1_ps(unit);
  const auto add_eight = [&](__m256i whole, float* eight) KVT_INLINE_LAMBDA {
    _mm256_storeu_ps(eight, _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), by, _mm256_loadu_ps(eight)));
  };
  add_eight(_mm256_permute2x128_si256(sum[0], sum[1], 0x20), to);
  add_eight(_mm256_permute2x128_si256(sum[2], sum[3], 0x20), to + 8);
  add_eight(_mm256_permute2x128_si256(sum[0], sum[1], 0x31), to + 16);
  add_eight(_mm256_permute2x128_si256(sum[2], sum[3], 0x31), to + 24);
}

// to[i * to_stride + 0 .. 31] += unit[i] * sum over n rows of weight[i * weight_stride + row] * row; pairs(row, x) gives the
// elements of rows row and row + 1, one beside the other, as four registers.
template <int many, class Pairs>
KVT_INLINE void add_pairs(const Pairs& pairs, int n, const std::int16_t* weight, int weight_stride, const float* unit,
                          float* to, int to_stride) {
  FourSums sum[many];
  each<many>([&]<int i>() KVT_INLINE_LAMBDA { sum[i].clear(); });
  for (int row = 0; row < n; row += 2) {
    __m256i x[4];
    pairs(row, x);
    each<many>([&]<int i>() KVT_INLINE_LAMBDA {
      int both;
      std::memcpy(&both, weight + i * weight_stride + row, sizeof both);
      sum[i].add(x, _mm256_set1_epi32(both));
    });
  }
  each<many>([&]<int i>() KVT_INLINE_LAMBDA { add_elements(sum[i].of, unit[i], to + i * to_stride); });
}

// The same for pairs that were unpacked before.
template <int many>
[[gnu::noinline]] inline void add_stored_pairs(const __m256i* pair, int n, const std::int16_t* weight, int weight_stride,
                                               const float* unit, float* to, int to_stride) {
  const auto load = [pair](int row, __m256i* x) KVT_INLINE_LAMBDA {
    x[0] = pair[2 * row];
    x[1] = pair[2 * row + 1];
    x[2] = pair[2 * row + 2];
    x[3] = pair[2 * row + 3];
  };
  add_pairs<many>(load, n, weight, weight_stride, unit, to, to_stride);
}

KVT_INLINE __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }
KVT_INLINE float largest_of(__m256 x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// The largest magnitude in x [dim], and its norm or, where squares do not fit, a little more.
template <int dim>
struct VectorSize {
  float largest, norm;

  explicit VectorSize(const float* x) {
    __m256 square = _mm256_setzero_ps(), most = square;
    for (int d = 0; d < dim; d += 8) {
      const __m256 v = _mm256_loadu_ps(x + d);
      square = _mm256_fmadd_ps(v, v, square);
      most = _mm256_max_ps(most, magnitude(v));
    }
    const float total = sum(square);
    largest = largest_of(most);
    norm = std::isinf(total) ? largest * root() : std::sqrt(total);
  }
  static constexpr float root() {  // of dim, or a little more
    int r = 1;
    while (r * r < dim) ++r;
    return static_cast<float>(r);
  }
};

// Numbers times this are at most `to`, and their total at most `most`. Zero if they are as good as zero, or no numbers.
KVT_INLINE float integer_factor(float to, float largest, float total, float most) {
  return largest > 1e-30f && total < 3e38f ? std::min(to / largest, most / total) : 0.f;
}
// What the integers are multiplied by: not a number if any of them was none.
KVT_INLINE float integer_unit(float factor, float total) {
  return factor != 0 ? 1 / factor : total < 3e38f ? 0.f : std::nanf("");
}

inline constexpr int most_integer_vectors = 16, most_integer_rows = 128;  // at once

// Scales, and least elements, of up to most_integer_rows rows of R; zeros up to a multiple of 8 of them.
template <class R>
struct RowLines {
  static constexpr int groups = R::size / R::group, most_rows = most_integer_rows;
  alignas(32) float scale[groups][most_rows];
  alignas(32) float least[R::has_least ? groups : 1][most_rows];

  RowLines(const R& rows, int first, int n) {
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
  // to[0 .. count - 1], logits of rows `from` on, of products product[k * stride ..] of one group each, or, if there is one
  // run of them, of the whole row, scaled. `total` is the query's sum in each group.
  template <int runs>
  void logits(const float* product, int stride, int from, int count, float query_unit, const float* total, float* to) const {
    const __m256 unit = _mm256_set1_ps(query_unit);
    for (int row = 0; row < count; row += 8) {
      __m256 eight = _mm256_mul_ps(_mm256_load_ps(product + row), unit);
      if constexpr (runs == groups) eight = _mm256_mul_ps(eight, _mm256_load_ps(scale[0] + from + row));
      for (int k = 1; k < runs; ++k) {
        const __m256 next = _mm256_mul_ps(_mm256_load_ps(product + k * stride + row), unit);
        eight = _mm256_fmadd_ps(next, _mm256_load_ps(scale[k] + from + row), eight);
      }
      if constexpr (R::has_least) {
        for (int g = 0; g < groups; ++g) {
          eight = _mm256_fmadd_ps(_mm256_load_ps(least[g] + from + row), _mm256_set1_ps(total[g]), eight);
        }
      }
      if (row + 8 <= count) {
        _mm256_storeu_ps(to + row, eight);
      } else {
        alignas(32) float some[8];
        _mm256_store_ps(some, eight);
        std::copy_n(some, count - row, to + row);
      }
    }
  }
};

template <class R>
struct IntegerRows {
  static constexpr int dim = R::size, groups = dim / R::group, registers = dim / 16;
  static constexpr int most_vectors = most_integer_vectors, most_rows = most_integer_rows;
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
  template <int c>
  KVT_INLINE static void load(const R& rows, int row, __m256i* to) {
    widen(rows.template bytes<c>(row), to);
  }
  // Returns what the integers are to be multiplied by.
  static float to_integers(const float* x, __m256i* to) {
    // Every product with a row, and every part of one, fits in 32 bits.
    const VectorSize<dim> size(x);
    const float factor = integer_factor(32767, size.largest, size.norm, largest_sum / size.root());
    const __m256 by = _mm256_set1_ps(factor);
    for (int k = 0; k < dim / 32; ++k) {
      const auto round = [&](int part) { return _mm256_cvtps_epi32(_mm256_mul_ps(eight(x, k, part), by)); };
      to[2 * k] = _mm256_packs_epi32(round(0), round(1));
      to[2 * k + 1] = _mm256_packs_epi32(round(2), round(3));
    }
    return integer_unit(factor, size.norm);
  }

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
    const RowLines<R> lines(rows, first, n);
    constexpr int strip = std::max(8, 256 / registers / 8 * 8);  // rows at once: 8 KiB of them
    for (int from = 0; from < n; from += strip) {
      const int count = std::min(strip, n - from), fours = (count + 3) / 4 * 4;
      __m256i x[strip][registers];
      for (int row = 0; row < fours; ++row) {
        const int at = first + from + std::min(row, count - 1);
        each<dim / 32>([&]<int c>() { load<c>(rows, at, x[row] + 2 * c); });
      }
      // Sums of long groups are made one group after the other: joining the lanes of each is cheaper than scaling them.
      constexpr int sums = R::group >= 128 ? groups : 1;
      alignas(32) float logit[most_vectors][sums][strip];
      each_batch<4>(query.m, [&]<int many>(int j) {
        for (int k = 0; k < sums; ++k) {
          constexpr int length = registers / sums;
          row_products<many, groups / sums>(x[0] + k * length, fours, length, registers, query.whole[j] + k * length,
                                            lines.scale[0] + from, most_rows, logit[j][k], sums * strip);
        }
      });
      for (int j = 0; j < query.m; ++j) {
        lines.template logits<sums>(logit[j][0], strip, from, count, query.unit[j], query.total[j], out + j * stride + from);
      }
    }
  }

  static void some_sums(const R& rows, int first, int n, const float* weights, int m, int stride, float* acc) {
    const RowLines<R> lines(rows, first, n);
    const int padded = (n + 7) / 8 * 8;
    alignas(32) std::int16_t weight[most_vectors][groups][most_rows];
    float unit[groups][most_vectors];
    for (int j = 0; j < m; ++j) {
      alignas(32) float own[most_rows];
      std::copy_n(weights + j * stride, n, own);
      std::fill_n(own + n, padded - n, 0.f);
      for (int g = 0; g < groups; ++g) {
        unit[g][j] = weights_to_integers(own, lines.scale[g], padded, weight[j][g]);
        if constexpr (R::has_least) {
          const float shift = dot(own, lines.least[g], n);
          for (int d = 0; d < R::group; ++d) acc[j * dim + g * R::group + d] += shift;
        }
      }
    }
    // 32 elements of all rows at a time, so that their sums stay in registers.
    each<dim / 32>([&]<int c>() {
      constexpr int g = 32 * c / R::group;
      const auto pairs = [&](int row, __m256i* to) KVT_INLINE_LAMBDA {
        __m256i even[2], odd[2];
        load<c>(rows, first + row, even);
        load<c>(rows, first + std::min(row + 1, n - 1), odd);
        to[0] = _mm256_unpacklo_epi16(even[0], odd[0]);
        to[1] = _mm256_unpackhi_epi16(even[0], odd[0]);
        to[2] = _mm256_unpacklo_epi16(even[1], odd[1]);
        to[3] = _mm256_unpackhi_epi16(even[1], odd[1]);
      };
      constexpr int most = registers_of_sums / 4;
      if (m == most - 1) {
        add_pairs<most - 1>(pairs, n, weight[0][g], groups * most_rows, unit[g], acc + 32 * c, dim);
      } else if (m == most) {
        add_pairs<most>(pairs, n, weight[0][g], groups * most_rows, unit[g], acc + 32 * c, dim);
      } else {
        __m256i pair[most_rows / 2][4];
        for (int row = 0; row < n; row += 2) pairs(row, pair[row / 2]);
        each_batch<most>(m, [&]<int many>(int j) {
          add_stored_pairs<many>(pair[0], n, weight[j][g], groups * most_rows, unit[g] + j, acc + j * dim + 32 * c, dim);
        });
      }
    });
  }
  static float weights_to_integers(const float* weights, const float* scale, int n, std::int16_t* to) {
    __m256 total = _mm256_setzero_ps(), largest = total;
    for (int row = 0; row < n; row += 8) {
      const __m256 size = magnitude(_mm256_mul_ps(_mm256_load_ps(weights + row), _mm256_load_ps(scale + row)));
      total = _mm256_add_ps(total, size);
      largest = _mm256_max_ps(largest, size);
    }
    const float factor = integer_factor(32767, largest_of(largest), sum(total), largest_sum);
    const __m256 by = _mm256_set1_ps(factor);
    for (int row = 0; row < n; row += 8) {
      const __m256 x = _mm256_mul_ps(_mm256_mul_ps(_mm256_load_ps(weights + row), _mm256_load_ps(scale + row)), by);
      const __m256i whole = _mm256_cvtps_epi32(x);
      _mm_store_si128(reinterpret_cast<__m128i*>(to + row),
                      _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
    }
    return integer_unit(factor, sum(total));
  }
};

}  // namespace kvt::inline v0::detail

#endif
