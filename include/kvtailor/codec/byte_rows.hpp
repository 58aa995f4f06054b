// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention on rows of small integers whose own error is large beside that of a byte, on a host with AVX2 that has no
// instruction for sums of products: products of bytes with bytes, added up in 16 bits as long as they fit. Rows are those of
// integer_rows.hpp, which is as fast, and more accurate, where there is such an instruction.
//
// Error:   queries are rounded to half a unit of 1/127 of their largest element; weights times scales to a unit of 1/255 of the
//          largest of 128 rows, up or down so that nothing is lost in sum. Where integers are larger than 64, there are
//          64/most as many units.
#pragma once

#include <type_traits>

#include "kvtailor/codec/integer_rows.hpp"
#if defined(KVT_HOST_AVX2)

namespace kvt::inline v0::detail {

#if defined(KVT_HOST_AVX512)
template <class R>
using HostRows = IntegerRows<R>;
#else

// Sums of products of bytes, those of a below 2^8 and those of b from -2^7 on, four by four. `fit` is how many sums of two
// products fit in 16 bits: one is begun, up to so many in all are added, then it ends.
struct ByteSums {
  __m256i sum = _mm256_setzero_si256();
  __m256i short_sum;
  KVT_INLINE void begin(__m256i a, __m256i b) { short_sum = _mm256_maddubs_epi16(a, b); }
  KVT_INLINE void add(__m256i a, __m256i b) { short_sum = _mm256_add_epi16(short_sum, _mm256_maddubs_epi16(a, b)); }
  KVT_INLINE void end() { sum = _mm256_add_epi32(sum, _mm256_madd_epi16(short_sum, _mm256_set1_epi16(1))); }
};

// out[i * out_stride + row] = x[row] . q[i] - start[i], of n rows, a multiple of 4, of `registers` registers each, every
// `apart` registers. Rows are below 2^8, queries from -2^7 on.
template <int many, int registers, int fit>
[[gnu::noinline]] inline void byte_products(const __m256i* x, int n, int apart, const __m256i* q, const std::uint32_t* start,
                                            float* out, int out_stride) {
  const auto product = [&](int row, int i) KVT_INLINE_LAMBDA {
    const __m256i* const a = x + row * apart;
    const __m256i* const b = q + i * apart;
    ByteSums sums;
    each<registers>([&]<int k>() KVT_INLINE_LAMBDA {
      if constexpr (k % fit == 0) {
        sums.begin(a[k], b[k]);
      } else {
        sums.add(a[k], b[k]);
      }
      if constexpr (k % fit == fit - 1 || k + 1 == registers) sums.end();
    });
    return sums.sum;
  };
  for (int row = 0; row < n; row += 4) {
    __m256i half[many][2];
    each<2>([&]<int p>() KVT_INLINE_LAMBDA {
      each<many>([&]<int i>() KVT_INLINE_LAMBDA {
        half[i][p] = _mm256_hadd_epi32(product(row + 2 * p, i), product(row + 2 * p + 1, i));
      });
    });
    each<many>([&]<int i>() KVT_INLINE_LAMBDA {
      const __m256i four = _mm256_hadd_epi32(half[i][0], half[i][1]);
      const __m128i whole = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
      _mm_store_ps(out + i * out_stride + row,
                   _mm_cvtepi32_ps(_mm_sub_epi32(whole, _mm_set1_epi32(static_cast<int>(start[i])))));
    });
  }
}

// to[i * to_stride + 0 .. 31] += unit[i] * sum over n rows of weight[i * weight_stride + row] * row, n a multiple of 4. Four
// rows lie one beside the other in four registers.
template <int many, int fit>
[[gnu::noinline]] inline void add_quads(const __m256i* quad, int n, const std::uint8_t* weight, int weight_stride,
                                        const float* unit, float* to, int to_stride) {
  ByteSums sums[many][4];
  const auto each_sum = [&](auto f) KVT_INLINE_LAMBDA {
    each<many>([&]<int i>() KVT_INLINE_LAMBDA { each<4>([&]<int p>() KVT_INLINE_LAMBDA { f(sums[i][p], i, p); }); });
  };
  const auto four_weights = [&](int i, int row) KVT_INLINE_LAMBDA {
    int four;
    std::memcpy(&four, weight + i * weight_stride + row, sizeof four);
    return _mm256_set1_epi32(four);
  };
  for (int row = 0; row < n;) {
    const int end = std::min(n, row + 4 * fit);
    each_sum([&](ByteSums& sum, int i, int p) KVT_INLINE_LAMBDA { sum.begin(four_weights(i, row), quad[row + p]); });
    for (row += 4; row < end; row += 4) {
      each_sum([&](ByteSums& sum, int i, int p) KVT_INLINE_LAMBDA { sum.add(four_weights(i, row), quad[row + p]); });
    }
    each_sum([](ByteSums& sum, int, int) KVT_INLINE_LAMBDA { sum.end(); });
  }
  each<many>([&]<int i>() KVT_INLINE_LAMBDA {
    add_elements({sums[i][0].sum, sums[i][1].sum, sums[i][2].sum, sums[i][3].sum}, unit[i], to + i * to_stride);
  });
}

template <class R>
struct ByteRows {
  static constexpr int dim = R::size, groups = dim / R::group, registers = dim / 32;
  static constexpr int most_vectors = most_integer_vectors, most_rows = most_integer_rows;
  static_assert(dim % 32 == 0 && R::group % 32 == 0 && R::most < 128 && !R::has_least);

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
  static constexpr int pair = 32767;  // what the sum of two products may be
  // Rows are made positive for products with queries; weights are.
  static constexpr int query_most = std::min(127, pair / (4 * R::most)), weight_most = std::min(255, pair / (2 * R::most));
  static constexpr int queries_fit = pair / (4 * R::most * query_most), weights_fit = pair / (2 * R::most * weight_most);

  struct Queries {
    int m;
    __m256i bytes[most_vectors][registers];
    std::uint32_t start[groups][most_vectors];  // what is too much where rows are made positive
    float unit[most_vectors];

    Queries(const float* queries, int count) : m(count) {
      for (int j = 0; j < m; ++j) {
        const float* const x = queries + j * dim;
        const VectorSize<dim> size(x);
        const float factor = integer_factor(query_most, size.largest, size.norm, 3e38f);
        unit[j] = integer_unit(factor, size.norm);
        const __m256 by = _mm256_set1_ps(factor);
        for (int g = 0; g < groups; ++g) start[g][j] = 0;
        for (int k = 0; k < registers; ++k) {
          const auto round = [&](int d) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 32 * k + d), by)); };
          const __m256i whole[4] = {round(0), round(8), round(16), round(24)};
          const __m256i four = _mm256_add_epi32(_mm256_add_epi32(whole[0], whole[1]), _mm256_add_epi32(whole[2], whole[3]));
          alignas(32) std::int32_t eight[8];
          _mm256_store_si256(reinterpret_cast<__m256i*>(eight), four);
          // Unsigned, since what is no number becomes the lowest one.
          for (const int q : eight) start[32 * k / R::group][j] += unsigned{R::most} * static_cast<unsigned>(q);
          const __m256i bytes_by_lane =
              _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
          bytes[j][k] = _mm256_permutevar8x32_epi32(bytes_by_lane, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
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
        each<registers>([&]<int c>() {
          x[row][c] = _mm256_add_epi8(rows.template bytes<c>(at), _mm256_set1_epi8(static_cast<char>(R::most)));
        });
      }
      alignas(32) float product[most_vectors][groups][strip];
      each_batch<4>(query.m, [&]<int many>(int j) {
        for (int g = 0; g < groups; ++g) {
          constexpr int length = registers / groups;
          byte_products<many, length, queries_fit>(x[0] + g * length, fours, registers, query.bytes[j] + g * length,
                                                   query.start[g] + j, product[j][g], groups * strip);
        }
      });
      for (int j = 0; j < query.m; ++j) {
        lines.template logits<groups>(product[j][0], strip, from, count, query.unit[j], nullptr, out + j * stride + from);
      }
    }
  }

  static void some_sums(const R& rows, int first, int n, const float* weights, int m, int stride, float* acc) {
    const RowLines<R> lines(rows, first, n);
    const int padded = (n + 7) / 8 * 8;
    alignas(32) std::uint8_t weight[2][most_vectors][groups][most_rows];  // above and below zero
    float unit[2][groups][most_vectors];
    bool negative = false;
    for (int j = 0; j < m; ++j) {
      alignas(32) float own[most_rows];
      std::copy_n(weights + j * stride, n, own);
      std::fill_n(own + n, padded - n, 0.f);
      for (int g = 0; g < groups; ++g) {
        bool any = false;
        unit[0][g][j] = weights_to_bytes(own, lines.scale[g], padded, weight[0][j][g], any);
        if (!any) continue;
        if (!negative) {
          std::memset(weight[1], 0, sizeof weight[1]);
          std::fill_n(unit[1][0], groups * most_vectors, 0.f);
        }
        negative = true;
        for (int row = 0; row < n; ++row) own[row] = -own[row];
        unit[1][g][j] = -weights_to_bytes(own, lines.scale[g], padded, weight[1][j][g], any);
        for (int row = 0; row < n; ++row) own[row] = -own[row];
      }
    }
    each<registers>([&]<int c>() {
      constexpr int g = 32 * c / R::group;
      __m256i quad[most_rows];
      for (int row = 0; row < padded; row += 4) {
        const auto bytes = [&](int r) KVT_INLINE_LAMBDA { return rows.template bytes<c>(first + std::min(row + r, n - 1)); };
        const __m256i x0 = bytes(0), x1 = bytes(1), x2 = bytes(2), x3 = bytes(3);
        const __m256i low = _mm256_unpacklo_epi8(x0, x1), high = _mm256_unpackhi_epi8(x0, x1);
        const __m256i next_low = _mm256_unpacklo_epi8(x2, x3), next_high = _mm256_unpackhi_epi8(x2, x3);
        quad[row] = _mm256_unpacklo_epi16(low, next_low);
        quad[row + 1] = _mm256_unpackhi_epi16(low, next_low);
        quad[row + 2] = _mm256_unpacklo_epi16(high, next_high);
        quad[row + 3] = _mm256_unpackhi_epi16(high, next_high);
      }
      for (int sign = 0; sign <= (negative ? 1 : 0); ++sign) {
        each_batch<registers_of_sums / 4>(m, [&]<int many>(int j) {
          add_quads<many, weights_fit>(quad, padded, weight[sign][j][g], groups * most_rows, unit[sign][g] + j,
                                       acc + j * dim + 32 * c, dim);
        });
      }
    });
  }
  // Of weights times scales that are above zero; others become zero. What is left of a unit makes a whole one in as many rows
  // as it is worth: small weights count together, as those beside the first row of a text.
  static float weights_to_bytes(const float* weights, const float* scale, int n, std::uint8_t* to, bool& any_below) {
    struct Thresholds {
      alignas(32) float of[most_rows] = {};
      constexpr Thresholds() {
        double x = 0.5;
        for (float& t : of) {
          t = static_cast<float>(x) * 0.999f;
          x += 0.6180339887498949;
          x -= x >= 1 ? 1 : 0;
        }
      }
    };
    static constexpr Thresholds threshold;
    const __m256 zero = _mm256_setzero_ps();
    __m256 total = zero, largest = zero, least = zero;
    alignas(32) float product[most_rows];
    for (int row = 0; row < n; row += 8) {
      const __m256 x = _mm256_mul_ps(_mm256_load_ps(weights + row), _mm256_load_ps(scale + row));
      total = _mm256_add_ps(total, magnitude(x));
      largest = _mm256_max_ps(x, largest);
      least = _mm256_min_ps(x, least);
      _mm256_store_ps(product + row, _mm256_max_ps(x, zero));
    }
    any_below = _mm256_movemask_ps(_mm256_cmp_ps(least, zero, _CMP_LT_OQ)) != 0;
    const float factor = integer_factor(weight_most, largest_of(largest), sum(total), 3e38f);
    const __m256 by = _mm256_set1_ps(factor);
    for (int row = 0; row < n; row += 8) {
      const __m256 x = _mm256_fmadd_ps(_mm256_load_ps(product + row), by, _mm256_load_ps(threshold.of + row));
      const __m256i whole = _mm256_cvttps_epi32(x);
      const __m128i eight = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + row), _mm_packus_epi16(eight, eight));
    }
    return integer_unit(factor, sum(total));
  }
};

template <class R>
using HostRows = std::conditional_t<R::coarse, ByteRows<R>, IntegerRows<R> >;
#endif

}  // namespace kvt::inline v0::detail

#endif
