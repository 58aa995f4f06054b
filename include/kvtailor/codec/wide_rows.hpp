// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// IntegerRows with AVX-512 (VNNI, VBMI): the same as integer_rows.hpp has with AVX2, on two tiles at a time. A product is of
// bytes, four of which an instruction adds up; words are two bytes apart, the upper one times 256. Codes are unpacked, met by
// up to four queries and forgotten. A permutation of bytes looks at six bits of an index, so that codes of planes need no
// masks.
//
// Rows are seen through the type R of integer_rows.hpp, but for columns, which are seen in runs so that code is short:
//   period                   how many columns have the same code but for an offset
//   strided                  column u of run w, w < period, is u period + w; otherwise w (columns / period) + u
//   column<u, plus>(rows, w)  that column of sixteen rows, from a TilePair or, with words of four bytes turned round, a
//                            TurnedPair; of strided rows with runs of fours, also columns w .. w + 3 of four rows, from
//                            HalfTile and TurnedHalf
//
// Error:   queries to 2^-16 of their largest element, weights times scales to 2^-16 of the largest of 128 rows, and as there at
//          large head dims. Fast: weights times scales to a unit of 1/255 of the largest of 128 rows, up or down so that
//          nothing is lost in sum.
#pragma once

#include "kvtailor/codec/code_tiles.hpp"
#include "kvtailor/codec/precision.hpp"
#if defined(KVT_HOST_AVX512)

#include <numeric>

namespace kvt::inline v0::detail {

// sum + in each word of 32 bits the products of four bytes: x without a sign, y with. Written out, since GCC copies the sums of
// built-in functions to and fro.
KVT_INLINE void add_products(__m512i& sum, __m512i x, __m512i y) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y)); }

template <class R, Precision precision>
struct IntegerRows {
  static constexpr int dim = R::size, groups = dim / R::group, columns = dim / 4, group_columns = R::group / 4;
  static constexpr int most_vectors = most_integer_vectors, most_rows = most_integer_rows, batch = 4;
  static constexpr int pairs = most_rows / 16, at_once = 2;  // at_once: pairs of tiles for each reading of queries
  static constexpr bool bytes = precision == Precision::fast;
  static constexpr int weight_planes = bytes ? 1 : 2;

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
  static constexpr float most = 32639, largest_sum = 2147000000.f / R::most;

  // Four bytes of a query for each column: what they are times 256, and what is left, both with a sign.
  struct Queries {
    int m;
    alignas(64) std::int32_t high[most_vectors][columns], low[most_vectors][columns];
    std::uint32_t start[most_vectors][groups];  // what is too much since rows are raised
    float unit[most_vectors];
    float total[most_vectors][R::has_least ? groups : 1];  // of a group

    Queries([[maybe_unused]] const R& rows, const float* queries, int count) : m(count) {
      for (int j = 0; j < m; ++j) {
        const float* const x = queries + j * dim;
        const VectorSize<dim> size(x);
        const float factor = integer_factor(most, size.largest, size.norm, largest_sum / size.root());
        unit[j] = integer_unit(factor, size.norm);
        const __m256 by = _mm256_set1_ps(factor);
        for (int g = 0; g < groups; ++g) {
          __m256i sum = _mm256_setzero_si256();
          for (int d = g * R::group; d < (g + 1) * R::group; d += 8) {
            const __m256i eight = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + d), by));
            const __m256i up = _mm256_srai_epi32(_mm256_add_epi32(eight, _mm256_set1_epi32(128)), 8);
            _mm_storel_epi64(reinterpret_cast<__m128i*>(low[j] + d / 4), _mm256_cvtepi32_epi8(eight));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(high[j] + d / 4), _mm256_cvtepi32_epi8(up));
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
      }
    }
  };

  // Sixteen rows from `row` on of n from `first` on, of which the last may have no second tile: it counts for nothing.
  KVT_INLINE static TilePair tiles_at(const R& rows, int first, int row, int n) {
    const unsigned char* const tile = rows.tile(first + row);
    return {tile, row + 8 < n ? rows.tile(first + row + 8) : tile};
  }
  KVT_INLINE static __m512 scales(const R& rows, int first, int row, int n, int g) {
    return two_halves(rows.scales(first + row, g), row + 8 < n ? rows.scales(first + row + 8, g) : _mm256_setzero_ps());
  }
  KVT_INLINE static __m512 leasts(const R& rows, int first, int row, int n, int g) requires(R::has_least) {
    return two_halves(rows.leasts(first + row, g), row + 8 < n ? rows.leasts(first + row + 8, g) : _mm256_setzero_ps());
  }
  KVT_INLINE static __m512 two_halves(__m256 a, __m256 b) { return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1); }
  // Of the first `left` of sixteen.
  KVT_INLINE static __mmask16 mask(int left) { return static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1); }

  // What columns are, for u = 0 .. unrolled - 1 and w = 0 .. period - 1.
  static constexpr int unrolled = columns / R::period;
  KVT_INLINE static constexpr int column_of(int u, int w) { return R::strided ? u * R::period + w : w * unrolled + u; }
  // Groups are runs of columns, or there are as many of them as parts of what is unrolled.
  static constexpr bool runs = groups > 1 && !R::strided;
  static constexpr int parts = runs ? 1 : groups, part_columns = unrolled / parts, rounds = runs ? R::period : 1;
  static_assert(columns % R::period == 0 && unrolled % parts == 0 && (!runs || groups == R::period));

  // Pairs of tiles that queries are read for once.
  struct Rows {
    TilePair tiles[at_once];
    __m512 scale[at_once][groups], least[at_once][R::has_least ? groups : 1];
    __mmask16 there[at_once];

    // Rows `row` on of n from `first` on.
    Rows(const R& rows, int first, int row, int n) {
      for (int p = 0; p < at_once; ++p) {
        const int own = row + 16 * p < n ? row + 16 * p : row;
        tiles[p] = tiles_at(rows, first, own, n);
        there[p] = mask(std::max(0, n - row - 16 * p));
        for (int g = 0; g < groups; ++g) {
          scale[p][g] = scales(rows, first, own, n, g);
          if constexpr (R::has_least) least[p][g] = leasts(rows, first, own, n, g);
        }
      }
    }
  };
  // out[i * stride + row] = query j + i . row
  template <int many>
  [[gnu::noinline]] static void products(const Rows& rows, const Queries& query, int j, float* out, int stride) {
    __m512 product[at_once][many];
    each<parts>([&]<int part>() KVT_INLINE_LAMBDA {
      for (int round = 0; round < rounds; ++round) {
        __m512i high[at_once][many], low[at_once][many];
        each<at_once>([&]<int p>() KVT_INLINE_LAMBDA {
          each<many>([&]<int i>() KVT_INLINE_LAMBDA { high[p][i] = low[p][i] = _mm512_setzero_si512(); });
        });
        for (int w = round; w < (runs ? round + 1 : R::period); ++w) {
          each<part_columns>([&]<int c>() KVT_INLINE_LAMBDA {
            constexpr int u = part * part_columns + c;
            const int k = column_of(u, w);
            __m512i x[at_once];
            each<at_once>([&]<int p>() KVT_INLINE_LAMBDA { x[p] = R::template column<u, R::offset>(rows.tiles[p], w); });
            each<many>([&]<int i>() KVT_INLINE_LAMBDA {
              const __m512i up = _mm512_set1_epi32(query.high[j + i][k]), down = _mm512_set1_epi32(query.low[j + i][k]);
              each<at_once>([&]<int p>() KVT_INLINE_LAMBDA {
                add_products(high[p][i], x[p], up);
                add_products(low[p][i], x[p], down);
              });
            });
          });
        }
        const int g = runs ? round : part;
        each<at_once>([&]<int p>() KVT_INLINE_LAMBDA {
          each<many>([&]<int i>() KVT_INLINE_LAMBDA {
            const __m512i start = _mm512_set1_epi32(static_cast<int>(query.start[j + i][g]));
            const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[p][i], 8), low[p][i]);
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(whole, start));
            product[p][i] =
                g == 0 ? _mm512_mul_ps(sum, rows.scale[p][g]) : _mm512_fmadd_ps(sum, rows.scale[p][g], product[p][i]);
          });
        });
      }
    });
    each<at_once>([&]<int p>() KVT_INLINE_LAMBDA {
      each<many>([&]<int i>() KVT_INLINE_LAMBDA {
        __m512 x = _mm512_mul_ps(product[p][i], _mm512_set1_ps(query.unit[j + i]));
        if constexpr (R::has_least) {
          for (int g = 0; g < groups; ++g) x = _mm512_fmadd_ps(rows.least[p][g], _mm512_set1_ps(query.total[j + i][g]), x);
        }
        _mm512_mask_storeu_ps(out + i * stride + 16 * p, rows.there[p], x);
      });
    });
  }

  template <class Lanes>
  static void some_logits(const Lanes& lanes, bool first_time, const R& rows, int first, int n, const Queries& query,
                          float* out, int stride) {
    const Ahead ahead = first_time ? lanes.ahead(rows.tile(first), 2 * at_once * R::tile_bytes) : Ahead{};
    for (int row = 0; row < n; row += 16 * at_once) {
      ahead.ask(row / (16 * at_once));
      const Rows some(rows, first, row, n);
      each_batch<batch>(query.m, [&]<int many>(int j) { products<many>(some, query, j, out + j * stride + row, stride); });
    }
  }

  // Whether values are read four columns of four rows at a time, so that no lanes have to be added up.
  static constexpr bool fours = R::strided && R::period % 4 == 0;
  // Weights times the scales of a group: bytes of four rows, or in each of four lanes those of four rows four times.
  struct Weights {
    alignas(64) std::int32_t of[most_vectors][weight_planes][most_rows / (fours ? 4 : 1)];  // the highest bytes first
    std::uint32_t start[most_vectors];  // what is too much since rows are raised
    float unit[most_vectors];

    // The lowest byte of each of sixteen words.
    KVT_INLINE void set(int j, int plane, int pair, __m512i words) {
      const __m128i bytes_of = _mm512_cvtepi32_epi8(words);
      if constexpr (fours) {
        _mm_store_si128(reinterpret_cast<__m128i*>(of[j][plane] + 4 * pair), bytes_of);
      } else {
        const __m512i apart = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        _mm512_store_si512(of[j][plane] + 16 * pair, _mm512_permutexvar_epi32(apart, _mm512_castsi128_si512(bytes_of)));
      }
    }
  };
  static constexpr int largest_divisor(int n, int limit) {
    int d = std::max(1, limit);
    while (n % d != 0) --d;
    return d;
  }
  KVT_INLINE static void add_weighted(__m512i& sum, __m512i x, __m512i weights) {
    bytes ? add_products(sum, weights, x) : add_products(sum, x, weights);
  }

  // Sums of the columns of a group, four words of codes at a time.
  template <int part, int many>
  [[gnu::noinline]] static void group_sums(const R& rows, int first, int n, const Weights& weights, int j, int, float* acc,
                                           Ahead ahead) requires fours {
    constexpr int some = largest_divisor(part_columns, 16 / (weight_planes * many));
    for (int w = 0; w < R::period; w += 4) {
      each<4>([&]<int step>() KVT_INLINE_LAMBDA { ahead.ask(w + step); });
      each<part_columns / some>([&]<int s>() KVT_INLINE_LAMBDA {
        constexpr int from = part * part_columns + s * some;
        __m512i sum[some][many][weight_planes];
        each<some * many>([&]<int i>() KVT_INLINE_LAMBDA {
          each<weight_planes>([&]<int p>() KVT_INLINE_LAMBDA { sum[i / many][i % many][p] = _mm512_setzero_si512(); });
        });
        for (unsigned row = 0; row < static_cast<unsigned>(n); row += 8) {
          const unsigned char* const tile = rows.tile(first + static_cast<int>(row));
          each<2>([&]<int half>() KVT_INLINE_LAMBDA {
            const TurnedHalf<half> four{{tile}};
            __m512i x[some];
            each<some>([&]<int c>()
                           KVT_INLINE_LAMBDA { x[c] = R::template column < from + c, bytes ? 0 : R::offset > (four, w); });
            each<many>([&]<int i>() KVT_INLINE_LAMBDA {
              each<weight_planes>([&]<int p>() KVT_INLINE_LAMBDA {
                const __m512i own = _mm512_set1_epi32(weights.of[j + i][p][row / 4 + half]);
                each<some>([&]<int c>() KVT_INLINE_LAMBDA { add_weighted(sum[c][i][p], x[c], own); });
              });
            });
          });
        }
        each<some>([&]<int c>() KVT_INLINE_LAMBDA {
          each<many>([&]<int i>() KVT_INLINE_LAMBDA {
            const __m512i start = _mm512_set1_epi32(static_cast<int>(bytes ? 0 : weights.start[j + i]));
            float* const to = acc + i * dim + 4 * column_of(from + c, w);
            const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(joined(sum[c][i]), start));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(whole, _mm512_set1_ps(weights.unit[j + i]), _mm512_loadu_ps(to)));
          });
        });
      });
    }
  }
  KVT_INLINE static __m512i joined(const __m512i (&plane)[weight_planes]) {
    if constexpr (weight_planes == 1) return plane[0];
    if constexpr (weight_planes == 2) return _mm512_add_epi32(_mm512_slli_epi32(plane[0], 8), plane[1]);
  }

  // Sums of the columns of a group, some at a time, that share words of codes if columns do.
  template <int part, int many>
  [[gnu::noinline]] static void group_sums(const R& rows, int first, int n, const Weights& weights, int j, int run, float* acc,
                                           Ahead ahead) {
    constexpr int some = std::gcd(part_columns, weight_planes * many > 4 ? 2 : 4);
    const int count = (n + 15) / 16;
    for (int w = run; w < (runs ? run + 1 : R::period); ++w) {
      ahead.ask(w - run);
      each<part_columns / some>([&]<int s>() KVT_INLINE_LAMBDA {
        constexpr int from = part * part_columns + s * some;
        __m512i sum[some][many][weight_planes];
        each<some * many>([&]<int i>() KVT_INLINE_LAMBDA {
          each<weight_planes>([&]<int p>() KVT_INLINE_LAMBDA { sum[i / many][i % many][p] = _mm512_setzero_si512(); });
        });
        for (int t = 0; t < count; ++t) {
          const TurnedPair tiles{tiles_at(rows, first, 16 * t, n)};
          __m512i x[some];
          each<some>([&]<int c>()
                         KVT_INLINE_LAMBDA { x[c] = R::template column < from + c, bytes ? 0 : R::offset > (tiles, w); });
          each<many>([&]<int i>() KVT_INLINE_LAMBDA {
            each<weight_planes>([&]<int p>() KVT_INLINE_LAMBDA {
              const __m512i own = _mm512_load_si512(weights.of[j + i][p] + 16 * t);
              each<some>([&]<int c>() KVT_INLINE_LAMBDA { add_weighted(sum[c][i][p], x[c], own); });
            });
          });
        }
        each<some>([&]<int c>() KVT_INLINE_LAMBDA {
          each<many>([&]<int i>() KVT_INLINE_LAMBDA {
            add_column(joined(sum[c][i]), bytes ? 0 : weights.start[j + i], weights.unit[j + i],
                       acc + i * dim + 4 * column_of(from + c, w));
          });
        });
      });
    }
  }
  // Of a column, whose rows are in four lanes.
  KVT_INLINE static void add_column(__m512i rows, std::uint32_t start, float unit, float* to) {
    const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(rows), _mm512_extracti64x4_epi64(rows, 1));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128 whole = _mm_cvtepi32_ps(_mm_sub_epi32(four, _mm_set1_epi32(static_cast<int>(start))));
    _mm_storeu_ps(to, _mm_fmadd_ps(whole, _mm_set1_ps(unit), _mm_loadu_ps(to)));
  }

  template <class Lanes>
  static void some_sums(const Lanes& lanes, bool first_time, const R& rows, int first, int n, const float* weights, int m,
                        int stride, float* acc) {
    const int count = (n + 15) / 16;
    if constexpr (R::has_least) {
      for (int g = 0; g < groups; ++g) {
        __m512 least[pairs];
        for (int t = 0; t < count; ++t) least[t] = leasts(rows, first, 16 * t, n, g);
        for (int j = 0; j < m; ++j) {
          __m512 sum = _mm512_setzero_ps();
          for (int t = 0; t < count; ++t) {
            sum = _mm512_fmadd_ps(least[t], _mm512_maskz_loadu_ps(mask(n - 16 * t), weights + j * stride + 16 * t), sum);
          }
          const float shift = _mm512_reduce_add_ps(sum);
          for (int d = 0; d < R::group; ++d) acc[j * dim + g * R::group + d] += shift;
        }
      }
    }
    const Ahead ahead = first_time ? lanes.ahead(rows.tile(first), 2 * count * R::tile_bytes / (parts * R::period)) : Ahead{};
    each<parts>([&]<int part>() {
      for (int round = 0; round < rounds; ++round) {
        const int g = runs ? round : part;
        __m512 scale[pairs];
        for (int t = 0; t < count; ++t) scale[t] = scales(rows, first, 16 * t, n, g);
        for (int sign = 1; sign != 0;) {
          Weights w;
          bool below = false;
          for (int j = 0; j < m; ++j) {
            if constexpr (bytes) {
              below |= to_bytes(weights + j * stride, scale, n, sign, w, j);
            } else {
              to_words(weights + j * stride, scale, n, w, j);
            }
          }
          each_batch<batch>(m, [&]<int many>(int j) {
            group_sums<part, many>(rows, first, n, w, j, round, acc + j * dim,
                                   j == 0 && sign > 0 ? ahead.after(runs ? round : part * R::period) : Ahead{});
          });
          sign = below && sign > 0 ? -1 : 0;
        }
      }
    });
  }
  // f(t, which of its rows there are) for each pair of tiles of n rows; what is whole stays in registers.
  template <class F>
  KVT_INLINE static void each_pair(int n, const F& f) {
    if (n == most_rows) {
      each<pairs>([&]<int t>() KVT_INLINE_LAMBDA { f(t, static_cast<__mmask16>(0xffff)); });
    } else {
      for (int t = 0; 16 * t < n; ++t) f(t, mask(n - 16 * t));
    }
  }
  // Weights times scales, their largest magnitude and the sum of their magnitudes.
  struct Products {
    __m512 of[pairs];
    float largest, total;
    KVT_INLINE Products(const float* weights, const __m512* scale, int n) {
      __m512 top = _mm512_setzero_ps(), sum = top;
      each_pair(n, [&](int t, __mmask16 there) KVT_INLINE_LAMBDA {
        of[t] = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, weights + 16 * t), scale[t]);
        const __m512 size = _mm512_abs_ps(of[t]);
        top = _mm512_max_ps(top, size);
        sum = _mm512_add_ps(sum, size);
      });
      largest = _mm512_reduce_max_ps(top);
      total = _mm512_reduce_add_ps(sum);
    }
  };
  static void to_words(const float* weights, const __m512* scale, int n, Weights& to, int j) requires(!bytes) {
    const Products product(weights, scale, n);
    const float factor = integer_factor(most, product.largest, product.total, largest_sum);
    const __m512 by = _mm512_set1_ps(factor);
    __m512i whole = _mm512_setzero_si512();
    each_pair(n, [&](int t, __mmask16) KVT_INLINE_LAMBDA {
      const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(product.of[t], by));
      whole = _mm512_add_epi32(whole, x);
      to.set(j, 0, t, _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8));
      to.set(j, 1, t, x);
    });
    to.start[j] = static_cast<std::uint32_t>(R::offset) * static_cast<std::uint32_t>(_mm512_reduce_add_epi32(whole));
    to.unit[j] = integer_unit(factor, product.total);
  }
  // Of products, times `sign`, that are above zero; others become zero. What is left of a unit makes a whole one in as many
  // rows as it is worth: small weights count together, as those beside the first row of a text. Whether there are any below
  // zero.
  static bool to_bytes(const float* weights, const __m512* scale, int n, int sign, Weights& to, int j) requires(bytes) {
    static constexpr GoldenSteps<most_rows> threshold;
    const Products product(weights, scale, n);
    const float factor = integer_factor(255, product.largest, product.total, 3e38f);
    const __m512 by = _mm512_set1_ps(static_cast<float>(sign) * factor);
    __m512 least = _mm512_setzero_ps();
    each_pair(n, [&](int t, __mmask16) KVT_INLINE_LAMBDA {
      least = _mm512_min_ps(least, product.of[t]);
      const __m512 x = _mm512_fmadd_ps(product.of[t], by, _mm512_load_ps(threshold.of + 16 * t));
      to.set(j, 0, t, _mm512_max_epi32(_mm512_cvttps_epi32(x), _mm512_setzero_si512()));
    });
    to.unit[j] = static_cast<float>(sign) * integer_unit(factor, product.total);
    return _mm512_cmp_ps_mask(least, _mm512_setzero_ps(), _CMP_LT_OQ) != 0;
  }
};

}  // namespace kvt::inline v0::detail
#endif
