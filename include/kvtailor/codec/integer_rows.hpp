// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention on rows of small integers, on a host with AVX2; wide_rows.hpp has it with AVX-512. Rows lie in tiles of eight (see
// row_wise.hpp), so that a register holds four elements of each of eight rows: sums of keys need no lanes to be added up, and
// one shuffle of bytes turns four rows and four elements round for values.
//
// Rows are seen through a type R:
//   size, group            elements of a row, and of those that share a scale; multiples of 8
//   most                   the largest magnitude an integer has, at most 128
//   tile_bytes             of a tile
//   tile(row)              rows row .. row + 7, which begin a tile
//   column<k, plus>(tile)  integers 4 k .. 4 k + 3 of each row, plus `offset`, so that none is below zero, or plus 0
//   scales(row, g)         what the integers of group g of rows row .. row + 7 are multiplied by; zeros of rows that are not
//   leasts(row, g)         there. What is added then, if has_least.
//   offsets                instead of `offset`, if keys have one for each element: int32 [size]
//
// Products are of 16 bits, sums of 32; fast ones are of bytes, and added up in 16 bits as long as they fit. See precision.hpp.
//
// Error:   queries are rounded to 2^-16 of their largest element, or 2^-31 dim most of their norm where that is more; weights
//          times scales to 2^-16 of the largest weight of 128 rows, or 2^-32 most of their sum, times the largest scale. Below
//          1e-30 they count as zero.
//          Fast: queries to half a unit of 1/127 of their largest element; weights times scales to a unit of 1/255 of the
//          largest of 128 rows, up or down so that nothing is lost in sum. Where integers are larger than 64, there are
//          64/most as many units.
#pragma once

#include "kvtailor/codec/precision.hpp"
#include "kvtailor/codec/wide_rows.hpp"
#if defined(KVT_HOST_AVX2) && !defined(KVT_HOST_AVX512)

#include <numeric>
#include <type_traits>

namespace kvt::inline v0::detail {

// sum + the products of 16-bit numbers, two by two
KVT_INLINE __m256i add_products(__m256i sum, __m256i a, __m256i b) {
  // Written out, since GCC copies the sums of built-in functions to and fro.
  const __m256i two = _mm256_madd_epi16(a, b);
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(two));
  return sum;
}

// What follows knows nothing of codecs, so that one copy of each function serves all of them:
//   multiply_keys   out[i * out_stride + 8 t + r] = sum over groups g of scale[g * most_integer_rows + 8 t + r] times (row r
//                   of tile t . query i, in group g, less its start), of `columns` registers of each tile and query
//   add_values      to[i * to_stride + 4 c ..] += unit[i] * (sum over rows of weight i times column c of the row, less
//                   start[i]), of columns of most_tiles registers each, as many as weights
// Keys have the offset. Values have it for words; for bytes they have not, and are turned.
// A register of a query or of weights is four elements again and again: what four elements, or four rows, are met by.
inline constexpr int most_tiles = most_integer_rows / 8;

KVT_INLINE void add_group(__m256i whole, std::uint32_t start, const float* scale, bool first, float* out) {
  const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(whole, _mm256_set1_epi32(static_cast<int>(start))));
  const __m256 by = _mm256_load_ps(scale);
  _mm256_store_ps(out, first ? _mm256_mul_ps(sum, by) : _mm256_fmadd_ps(sum, by, _mm256_load_ps(out)));
}
// Of two columns, a half of whose rows is in either half of a register.
KVT_INLINE void add_columns(__m256i first, __m256i second, float unit, float* to, std::uint32_t start = 0) {
  const __m256i eight =
      _mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31));
  const __m256 whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(eight, _mm256_set1_epi32(static_cast<int>(start))));
  _mm256_storeu_ps(to, _mm256_fmadd_ps(whole, _mm256_set1_ps(unit), _mm256_loadu_ps(to)));
}

// Of numbers that fit 16 bits.
KVT_INLINE __m128i to_words(__m256i x) { return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)); }

// 16-bit queries and weights. A register of a query or of weights has four words four times.
struct Words {
  using Element = std::int16_t;
  static constexpr bool offset_values = true;

  KVT_INLINE static void store_eight(__m256i x, Element* to) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_words(x)); }
  KVT_INLINE static __m256i four_elements(const Element* from) {
    long long four;
    std::memcpy(&four, from, sizeof four);
    return _mm256_set1_epi64x(four);
  }
  KVT_INLINE static __m256i eight_weights(__m128i words) {
    return _mm256_permute4x64_epi64(_mm256_castsi128_si256(words), 0x50);
  }

  // Sums of x[k] times y[i * stride + k] over n registers, in each word of 32 bits those of four elements. Values are turned.
  template <int many, int, bool values>
  KVT_INLINE static void multiply(const __m256i* x, int n, const __m256i* y, int stride, __m256i (&sum)[many]) {
    __m256i two[many][2];
    each<many>([&]<int i>() KVT_INLINE_LAMBDA { two[i][0] = two[i][1] = _mm256_setzero_si256(); });
    for (int k = 0; k < n; ++k) {
      __m256i low, high;
      if constexpr (values) {
        const __m256i place =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 4, -1, 8, -1, 12, -1, 1, -1, 5, -1, 9, -1, 13, -1));
        low = _mm256_shuffle_epi8(x[k], place);
        high = _mm256_shuffle_epi8(x[k], _mm256_add_epi8(place, _mm256_set1_epi16(2)));
      } else {
        low = _mm256_unpacklo_epi8(x[k], _mm256_setzero_si256());
        high = _mm256_unpackhi_epi8(x[k], _mm256_setzero_si256());
      }
      each<many>([&]<int i>() KVT_INLINE_LAMBDA {
        two[i][0] = add_products(two[i][0], low, y[i * stride + k]);
        two[i][1] = add_products(two[i][1], high, y[i * stride + k]);
      });
    }
    each<many>([&]<int i>() KVT_INLINE_LAMBDA { sum[i] = _mm256_hadd_epi32(two[i][0], two[i][1]); });
  }
};

// Queries and weights of a byte; weights have no sign. A register of either has four bytes eight times. `fit` is how many
// products of registers fit in 16 bits when they are added up.
struct Bytes {
  using Element = std::int8_t;
  static constexpr bool offset_values = false;

  KVT_INLINE static void store_eight(__m256i x, Element* to) {
    const __m128i words = to_words(x);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }
  KVT_INLINE static __m256i four_elements(const Element* from) {
    int four;
    std::memcpy(&four, from, sizeof four);
    return _mm256_set1_epi32(four);
  }
  KVT_INLINE static __m256i eight_weights(__m128i bytes) {
    constexpr long long first = 0x0302010003020100, last = 0x0706050407060504;
    return _mm256_shuffle_epi8(_mm256_broadcastq_epi64(bytes), _mm256_setr_epi64x(first, first, last, last));
  }

  // Sums of x[k] times y[i * stride + k] over n registers. Values have a sign, and keys none.
  template <int many, int fit, bool values>
  KVT_INLINE static void multiply(const __m256i* x, int n, const __m256i* y, int stride, __m256i (&sum)[many]) {
    each<many>([&]<int i>() KVT_INLINE_LAMBDA { sum[i] = _mm256_setzero_si256(); });
    // Registers k .. k + length - 1, added up in 16 bits.
    const auto add = [&]<int length>(int k, std::integral_constant<int, length>) KVT_INLINE_LAMBDA {
      __m256i short_sum[many];
      each<length>([&]<int part>() KVT_INLINE_LAMBDA {
        each<many>([&]<int i>() KVT_INLINE_LAMBDA {
          add_product<values, part == 0>(short_sum[i], x[k + part], y[i * stride + k + part]);
        });
      });
      each<many>([&]<int i>() KVT_INLINE_LAMBDA {
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(short_sum[i], _mm256_set1_epi16(1)));
      });
    };
    constexpr int at_once = std::max(1, 4 / fit);
    int k = 0;
    for (; k + at_once * fit <= n; k += at_once * fit) {
      each<at_once>([&]<int part>() KVT_INLINE_LAMBDA { add(k + part * fit, std::integral_constant<int, fit>{}); });
    }
    for (; k < n; ++k) add(k, std::integral_constant<int, 1>{});
  }

 private:
  // Written out, since GCC reads factors and multiplies ahead until it has no registers left.
  template <bool x_is_signed, bool first>
  KVT_INLINE static void add_product(__m256i& sum, __m256i x, const __m256i& y) {
    __m256i two;
    if constexpr (x_is_signed && first) {
      asm("vmovdqa %1, %0\n\tvpmaddubsw %2, %0, %0" : "=&x"(sum) : "m"(y), "x"(x));
    } else if constexpr (x_is_signed) {
      asm("vmovdqa %2, %1\n\tvpmaddubsw %3, %1, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(two) : "m"(y), "x"(x));
    } else if constexpr (first) {
      asm("vpmaddubsw %2, %1, %0" : "=x"(sum) : "x"(x), "m"(y));
    } else {
      asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(two) : "x"(x), "m"(y));
    }
  }
};

template <class Factors, int many, int fit>
[[gnu::noinline]] void multiply_keys(const __m256i* x, int tiles, int columns, int groups, const __m256i* q,
                                     const std::uint32_t* start, const float* scale, float* out, int out_stride, Ahead ahead) {
  for (int t = 0; t < tiles; ++t) {
    ahead.ask(t);
    for (int g = 0; g < groups; ++g) {
      const int first = columns / groups * g;
      __m256i sum[many];
      Factors::template multiply<many, fit, false>(x + t * columns + first, columns / groups, q + first, columns, sum);
      each<many>([&]<int i>() KVT_INLINE_LAMBDA {
        add_group(sum[i], start[i * groups + g], scale + g * most_integer_rows + 8 * t, g == 0, out + i * out_stride + 8 * t);
      });
    }
  }
}
template <class Factors, int many, int fit>
[[gnu::noinline]] void add_values(const __m256i* x, int columns, int tiles, const __m256i* weights, const std::uint32_t* start,
                                  const float* unit, float* to, int to_stride, Ahead ahead) {
  for (int c = 0; c < columns; c += 2) {
    ahead.ask(c / 2);
    __m256i sum[2][many];
    Factors::template multiply<many, fit, true>(x + c * most_tiles, tiles, weights, most_tiles, sum[0]);
    Factors::template multiply<many, fit, true>(x + (c + 1) * most_tiles, tiles, weights, most_tiles, sum[1]);
    each<many>([&]<int i>() KVT_INLINE_LAMBDA {
      add_columns(sum[0][i], sum[1][i], unit[i], to + i * to_stride + 4 * c, Factors::offset_values ? start[i] : 0);
    });
  }
}

template <class R, Precision precision>
struct IntegerRows {
  static constexpr bool bytes = precision == Precision::fast;
  using Factors = std::conditional_t<bytes, Bytes, Words>;
  static constexpr int dim = R::size, groups = dim / R::group, columns = dim / 4, group_columns = R::group / 4;
  static constexpr int most_vectors = most_integer_vectors, most_rows = most_integer_rows, batch = 4;
  static_assert(R::group % 8 == 0 && dim % R::group == 0);

  // out[j * stride + row] = query j . row
  template <class Lanes>
  static void logits(const Lanes& lanes, const R& rows, int n, const float* queries, int m, float* out, int stride) {
    for (int first = 0; first < m; first += most_vectors) {
      const auto make = [&] { return Queries(rows, queries + first * dim, std::min(most_vectors, m - first)); };
      lanes.with(queries + first * dim, make, [&](const Queries& some) {
        for (int row = 0; row < n; row += most_rows) {
          some_logits(lanes, first == 0, rows, row, std::min(most_rows, n - row), some, out + first * stride + row, stride);
        }
      });
    }
  }
  // acc[j] += sum over rows of weights[j * stride + row] * row
  template <class Lanes>
  static void accumulate(const Lanes& lanes, const R& rows, int n, const float* weights, int m, int stride, float* acc) {
    for (int first = 0; first < m; first += most_vectors) {
      for (int row = 0; row < n; row += most_rows) {
        some_sums(lanes, first == 0, rows, row, std::min(most_rows, n - row), weights + first * stride + row,
                  std::min(most_vectors, m - first), stride, acc + first * dim);
      }
    }
  }

 private:
  using Element = typename Factors::Element;
  // Every product with a row, and every part of one, fits in 32 bits; of bytes, that of two in 16.
  static constexpr float largest_sum = 2147000000.f / R::most;
  static constexpr int pair = 32767;
  static constexpr int fit(int most) { return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : most; }
  static constexpr int query_most = bytes ? std::min(127, pair / (4 * R::most)) : 32767;
  static constexpr int weight_most = bytes ? std::min(255, pair / (2 * R::most)) : 32767;
  static constexpr int queries_fit = fit(pair / (4 * R::most * query_most));
  static constexpr int weights_fit = fit(pair / (2 * R::most * weight_most));

  // Scales, or least elements, of up to most_rows rows from `first` on.
  struct Lines {
    alignas(32) float of[groups][most_rows];
    template <class Eight>
    Lines(int n, const Eight& eight) {
      for (int row = 0; row < n; row += 8) {
        for (int g = 0; g < groups; ++g) _mm256_store_ps(of[g] + row, eight(row, g));
      }
    }
  };
  static Lines scales(const R& rows, int first, int n) {
    return Lines(n, [&](int row, int g) KVT_INLINE_LAMBDA { return rows.scales(first + row, g); });
  }
  static Lines leasts(const R& rows, int first, int n) requires(R::has_least) {
    return Lines(n, [&](int row, int g) KVT_INLINE_LAMBDA { return rows.leasts(first + row, g); });
  }
  // The largest magnitude of n numbers, a multiple of 8, and the sum of their magnitudes.
  struct Size {
    float largest = 0, total = 0;
    Size() = default;
    Size(float most, float sum) : largest(most), total(sum) {}
    Size times(float x) const { return {largest * x, total * x}; }
    Size(const float* x, int n) {
      __m256 sum = _mm256_setzero_ps(), most = sum;
      for (int i = 0; i < n; i += 8) {
        const __m256 size = magnitude(_mm256_loadu_ps(x + i));
        sum = _mm256_add_ps(sum, size);
        most = _mm256_max_ps(most, size);
      }
      largest = largest_of(most);
      total = kvt::detail::sum(sum);
    }
  };

  struct Queries {
    int m;
    alignas(32) __m256i of[most_vectors][columns];
    std::uint32_t start[most_vectors][groups];  // what is too much since rows are raised
    float unit[most_vectors];
    float total[most_vectors][R::has_least ? groups : 1];  // of a group

    Queries([[maybe_unused]] const R& rows, const float* queries, int count) : m(count) {
      for (int j = 0; j < m; ++j) {
        const float* const x = queries + j * dim;
        const VectorSize<dim> size(x);
        const float factor = integer_factor(query_most, size.largest, size.norm, bytes ? 3e38f : largest_sum / size.root());
        unit[j] = integer_unit(factor, size.norm);
        const __m256 by = _mm256_set1_ps(factor);
        Element whole[dim];
        for (int g = 0; g < groups; ++g) {
          __m256i sum = _mm256_setzero_si256();
          for (int d = g * R::group; d < (g + 1) * R::group; d += 8) {
            const __m256i eight = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + d), by));
            Factors::store_eight(eight, whole + d);
            if constexpr (requires { rows.offsets; }) {
              sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(eight, load_bytes(rows.offsets + d)));
            } else {
              sum = _mm256_add_epi32(sum, eight);
            }
          }
          start[j][g] = sum_of_words(sum);
          if constexpr (!requires { rows.offsets; }) start[j][g] *= R::offset;
          if constexpr (R::has_least) total[j][g] = sum_of(x + g * R::group, R::group);
        }
        for (int k = 0; k < columns; ++k) of[j][k] = Factors::four_elements(whole + 4 * k);
      }
    }
  };
  template <class Lanes>
  static void some_logits(const Lanes& lanes, bool first_time, const R& rows, int first, int n, const Queries& query,
                          float* out, int stride) {
    const Lines scale = scales(rows, first, n);
    constexpr int strip = std::max(1, std::min(most_tiles, 256 / columns));  // tiles at once: 8 KiB of them
    for (int from = 0; from < n; from += 8 * strip) {
      const int count = std::min(8 * strip, n - from), tiles = (count + 7) / 8;
      __m256i x[strip][columns];
      for (int t = 0; t < tiles; ++t) {
        const unsigned char* const tile = rows.tile(first + from + 8 * t);
        each<columns>([&]<int k>() KVT_INLINE_LAMBDA { x[t][k] = R::template column<k, R::offset>(tile); });
      }
      const Ahead ahead = first_time ? lanes.ahead(rows.tile(first + from), R::tile_bytes) : Ahead{};
      alignas(32) float product[most_vectors][8 * strip];
      each_batch<batch>(query.m, [&]<int many>(int j) {
        multiply_keys<Factors, many, queries_fit>(x[0], tiles, columns, groups, query.of[j], query.start[j], scale.of[0] + from,
                                                  product[j], 8 * strip, j == 0 ? ahead : Ahead{});
      });
      for (int t = 0; t < tiles; ++t) {
        __m256 least[R::has_least ? groups : 1];
        if constexpr (R::has_least) {
          for (int g = 0; g < groups; ++g) least[g] = rows.leasts(first + from + 8 * t, g);
        }
        for (int j = 0; j < query.m; ++j) {
          __m256 eight = _mm256_mul_ps(_mm256_load_ps(product[j] + 8 * t), _mm256_set1_ps(query.unit[j]));
          if constexpr (R::has_least) {
            for (int g = 0; g < groups; ++g) eight = _mm256_fmadd_ps(least[g], _mm256_set1_ps(query.total[j][g]), eight);
          }
          float* const to = out + j * stride + from + 8 * t;
          if (8 * t + 8 <= count) {
            _mm256_storeu_ps(to, eight);
          } else {
            alignas(32) float some[8];
            _mm256_store_ps(some, eight);
            std::copy_n(some, count - 8 * t, to);
          }
        }
      }
    }
  }

  // Weights times the scales of a group, and how they are met.
  struct Weights {
    alignas(32) __m256i of[most_vectors][most_tiles];
    std::uint32_t start[most_vectors];  // of words
    float unit[most_vectors];
  };

  template <class Lanes>
  static void some_sums(const Lanes& lanes, bool first_time, const R& rows, int first, int n, const float* weights, int m,
                        int stride, float* acc) {
    const Lines scale = scales(rows, first, n);
    const int tiles = (n + 7) / 8;
    float filled[most_vectors][most_rows];  // with zeros, up to a whole tile
    const float* own[most_vectors];
    for (int j = 0; j < m; ++j) {
      own[j] = weights + j * stride;
      if (n % 8 == 0) continue;
      std::fill_n(std::copy_n(own[j], n, filled[j]), 8 * tiles - n, 0.f);
      own[j] = filled[j];
    }
    if constexpr (R::has_least) {
      const Lines least = leasts(rows, first, n);
      for (int j = 0; j < m; ++j) {
        for (int g = 0; g < groups; ++g) {
          const float shift = dot(own[j], least.of[g], 8 * tiles);
          for (int d = 0; d < R::group; ++d) acc[j * dim + g * R::group + d] += shift;
        }
      }
    }
    Size size[bytes ? 1 : most_vectors];
    for (int j = 0; j < m && !bytes; ++j) size[j] = Size(own[j], 8 * tiles);
    const Ahead ahead = first_time ? lanes.ahead(rows.tile(first), 2 * tiles * R::tile_bytes / columns) : Ahead{};
    each<groups>([&]<int g>() {
      Weights weight[bytes ? 2 : 1];  // bytes: those above, and those below zero
      bool below = false;
      if constexpr (bytes) {
        for (int j = 0; j < m; ++j) below |= weights_to_bytes(own[j], scale.of[g], tiles, 1, weight[0], j);
      } else {
        const float most = Size(scale.of[g], 8 * tiles).largest;
        for (int j = 0; j < m; ++j) weights_to_words(own[j], scale.of[g], tiles, size[j].times(most), weight[0], j);
      }
      if constexpr (bytes) {
        for (int j = 0; j < m && below; ++j) weights_to_bytes(own[j], scale.of[g], tiles, -1, weight[1], j);
      }
      constexpr int some = std::gcd(group_columns, 8);
      each<group_columns / some>([&]<int part>() {
        constexpr int from = g * group_columns + part * some;
        __m256i x[some][most_tiles];
        for (int t = 0; t < tiles; ++t) {
          const unsigned char* const tile = rows.tile(first + 8 * t);
          each<some>([&]<int c>() KVT_INLINE_LAMBDA {
            if constexpr (bytes) {
              x[c][t] = turned(R::template column<from + c, 0>(tile));
            } else {
              x[c][t] = R::template column<from + c, R::offset>(tile);
            }
          });
        }
        for (int sign = 0; sign <= (below ? 1 : 0); ++sign) {
          const Weights& w = weight[sign];
          each_batch<batch>(m, [&]<int many>(int j) {
            add_values<Factors, many, weights_fit>(x[0], some, tiles, w.of[j], w.start + j, w.unit + j,
                                                   acc + j * dim + 4 * from, dim,
                                                   j == 0 && sign == 0 ? ahead.after(from / 2) : Ahead{});
          });
        }
      });
    });
  }
  // Weights times scales are at most `size`.
  static void weights_to_words(const float* weights, const float* scale, int tiles, Size size, Weights& to, int j) {
    const float factor = integer_factor(weight_most, size.largest, size.total, largest_sum);
    const __m256 by = _mm256_set1_ps(factor);
    __m256i whole = _mm256_setzero_si256();
    for (int t = 0; t < tiles; ++t) {
      const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(weights + 8 * t), _mm256_load_ps(scale + 8 * t));
      const __m256i eight = _mm256_cvtps_epi32(_mm256_mul_ps(x, by));
      whole = _mm256_add_epi32(whole, eight);
      to.of[j][t] = Factors::eight_weights(to_words(eight));
    }
    to.start[j] = R::offset * sum_of_words(whole);
    to.unit[j] = integer_unit(factor, size.total);
  }
  // Of weights times scales, times `sign`, that are above zero; others become zero. What is left of a unit makes a whole one in
  // as many rows as it is worth: small weights count together, as those beside the first row of a text. Whether there are
  // weights below zero.
  static bool weights_to_bytes(const float* weights, const float* scale, int tiles, int sign, Weights& to, int j) {
    static constexpr GoldenSteps<most_rows> threshold;
    __m256 total = _mm256_setzero_ps(), most = total, least = total;
    alignas(32) float product[most_rows];
    for (int row = 0; row < 8 * tiles; row += 8) {
      const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(weights + row), _mm256_load_ps(scale + row));
      total = _mm256_add_ps(total, x);
      most = _mm256_max_ps(x, most);
      least = _mm256_min_ps(x, least);
      _mm256_store_ps(product + row, x);
    }
    const float all = std::fabs(sum(total)), largest = largest_of(sign > 0 ? most : magnitude(least));
    const float factor = integer_factor(weight_most, largest, all, 3e38f);
    const __m256 by = _mm256_set1_ps(static_cast<float>(sign) * factor);
    for (int t = 0; t < tiles; ++t) {
      const __m256 x = _mm256_fmadd_ps(_mm256_load_ps(product + 8 * t), by, _mm256_load_ps(threshold.of + 8 * t));
      const __m128i words = to_words(_mm256_cvttps_epi32(x));
      to.of[j][t] = Factors::eight_weights(_mm_packus_epi16(words, words));
    }
    to.unit[j] = static_cast<float>(sign) * integer_unit(factor, all);
    return _mm256_movemask_ps(_mm256_cmp_ps(least, _mm256_setzero_ps(), _CMP_LT_OQ)) != 0;
  }
};

}  // namespace kvt::inline v0::detail

#endif
#if defined(KVT_HOST_AVX2)

namespace kvt::inline v0::detail {

// IntegerRows at the precision of the codec that rows are of.
template <class Codec, class Lanes, class R>
void integer_logits([[maybe_unused]] const Codec& codec, const Lanes& lanes, const R& rows, int n, const float* queries, int m,
                    float* out, int stride) {
#if defined(KVT_HOST_AVX512)
  // Queries are words.
  IntegerRows<R, Precision::accurate>::logits(lanes, rows, n, queries, m, out, stride);
#else
  with_precision(codec, [&]<Precision precision>()
                            KVT_INLINE_LAMBDA { IntegerRows<R, precision>::logits(lanes, rows, n, queries, m, out, stride); });
#endif
}
template <class Codec, class Lanes, class R>
void integer_sums(const Codec& codec, const Lanes& lanes, const R& rows, int n, const float* weights, int m, int stride,
                  float* acc) {
  with_precision(codec, [&]<Precision precision>() KVT_INLINE_LAMBDA {
    IntegerRows<R, precision>::accumulate(lanes, rows, n, weights, m, stride, acc);
  });
}

}  // namespace kvt::inline v0::detail

#endif
