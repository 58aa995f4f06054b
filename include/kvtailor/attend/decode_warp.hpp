// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DecodeWarp: attention of up to eight query vectors, or sixteen, over slices of one head, by one warp with tensor cores.
//
// A slice's logits S^T = K q^T are a fragment D of 16 rows by 8 vectors; weights become a fragment B by two transpositions in
// registers, and outputs O^T = V^T p^T stay in fragments D of 16 dims by 8 vectors. All vectors share each unpacked code.
// Scales meet the logit and the weight, never an element. Words of the next slice are asked for as soon as those of this one
// are used.
//
// The running maximum is raised only when a logit is above it by `slack`: rarely, and by all lanes together. Weights are at
// most 2^slack, so that a weight times the largest scale of a value that caches take, 65504 / 8.188, is below the largest fp16.
// Error: queries, weights times scales, and elements of groups are rounded to fp16 (2^-11 of each, below 2^-14 to 2^-25).
#pragma once

#include "kvtailor/attend/slices.hpp"

namespace kvt::inline v0 {

// Rows of one head, in pages of four slices: slices, then the positions of their rows, int32. In device memory on the device,
// where the number of rows may change between two steps.
struct SlicePages {
  static constexpr int page_slices = 4, page_rows = page_slices * slice_rows;

  std::byte* pool;
  const int* page;  // [ceil(rows / page_rows)] a page's number in the pool; null: pages lie in order
  const int* rows;  // how many there are
  int page_bytes;   // from page to page, a multiple of 128

  KVT_HD KVT_INLINE std::byte* at(int slice, int slice_bytes) const {
    const int in_order = slice / page_slices;
    return pool + static_cast<long long>(page != nullptr ? page[in_order] : in_order) * page_bytes +
           slice % page_slices * slice_bytes;
  }
  KVT_HD KVT_INLINE int* positions(int slice, int slice_bytes) const {
    return reinterpret_cast<int*>(at(slice / page_slices * page_slices, slice_bytes) + page_slices * slice_bytes) +
           slice % page_slices * slice_rows;
  }
  KVT_HD KVT_INLINE static constexpr long long bytes_of_page(int slice_bytes) {
    return page_slices * (static_cast<long long>(slice_bytes) + slice_rows * static_cast<int>(sizeof(int)));
  }
};

// Up to eight query vectors as fragments B, made once for all warps of a block. A vector is divided by the power of two of its
// largest element, so that fp16 holds it, and logits are multiplied by that again. Vectors that are not there are zeros.
template <int dim>
struct QueryFragments {
  std::uint32_t word[dim / 16][2][32];
  float unit[8];

  // prepared [m, dim], m <= 8: in the codec's basis, times scale and log2(e). A warp's share of the words. rest: gets the words
  // of what rounding leaves, in the same units; both together are right to 2^-25 of a vector's largest element. Keys: fragments
  // that say which dims lie where.
  template <class Keys, class Lanes>
  KVT_HD void pack(const Lanes& lanes, const float* prepared, int m, int warp = 0, int warps = 1,
                   QueryFragments* rest = nullptr) {
    auto largest = map(lanes, [&](int lane) {
      float most = 0;
      for (int d = lane % 4; d < dim && lane / 4 < m; d += 4) most = std::fmax(most, std::fabs(prepared[lane / 4 * dim + d]));
      return most;
    });
    for (int mask = 1; mask < 4; mask *= 2) {
      largest = map(
          lanes, [](int, float a, float b) { return std::fmax(a, b); }, largest, shuffle_xor(lanes, largest, mask));
    }
    map(
        lanes,
        [&](int lane, float most) {
          const int vector = lane / 4;
          const float power = power_of_two(most), inverse = 1 / power;
          if (warp == 0 && lane % 4 == 0) unit[vector] = power;
          for (int k = warp; k < dim / 16; k += warps) {
            for (int i = 0; i < 2; ++i) {
              const auto element = [&](int h) {
                return prepared[vector * dim + Keys::template place<true>(lane, k, 2 * i, h).dim] * inverse;
              };
              const std::uint32_t both = vector < m ? pack_halves(element(0), element(1)) : 0;
              word[k][i][lane] = both;
              if (rest == nullptr) continue;
              rest->word[k][i][lane] = vector < m ? pack_halves(element(0) - low_half(both), element(1) - high_half(both)) : 0;
            }
          }
          return 0;
        },
        largest);
  }

 private:
  // 2^floor(log2(x)), or 1 of zero and of what is not finite.
  KVT_HD static float power_of_two(float x) {
    const std::uint32_t exponent = bits_from_float(x) & 0x7f800000u;
    return exponent == 0 || exponent == 0x7f800000u ? 1.f : float_from_bits(exponent);
  }
};

// What a warp attends with; memory that all lanes see.
template <class Vectors>
struct DecodeQueries {
  const Vectors* vectors;  // fragments of eight vectors each, or vectors
  const int* position;     // [m]
  int m;
  float cap;   // soft cap of logits, times log2(e); 0 means none
  int window;  // as AttendOptions::window
  // Slices of which all vectors see all rows: their positions are not looked at.
  int whole_from = 0, whole_to = 0;

  // Whether a vector sees a row at a position.
  KVT_HD KVT_INLINE bool sees(int vector, long long row) const {
    const long long own = position[vector];
    return row <= own && (window == 0 || row > own - window);
  }
};

// limited: whether a window, positions or a soft cap are looked at; otherwise every row is seen. width: vectors at most, a
// multiple of eight.
template <class Layout, class Lanes, bool limited = false, int width = 8>
class DecodeWarp {
  template <class, bool>
  friend struct WindowMass;  // reads slices too

 public:
  using Keys = typename Layout::Keys;
  using Values = typename Layout::Values;
  using Queries = DecodeQueries<QueryFragments<Layout::dim>>;
  template <class T>
  using Reg = typename Lanes::template Reg<T>;
  static constexpr int dim = Layout::dim, across = dim / 16, eights = width / 8;
  static constexpr float slack = 3;
  // Whether words of the next slice, and queries, wait in registers: where there are enough. Words of 16 rows of the largest
  // heads are read in a loop: straight code of 32 would be reordered until it spills.
  static constexpr bool ahead = dim <= 128 && !(width > 8 && Layout::grouped), queries_wait = dim * width <= 1024;
  // Whether scales of values are floats before the next are asked for: more registers, and no copy of the words.
  static constexpr bool converted_early =
      width == 8 && (Layout::table_bytes > 0 || (Keys::words % 4 == 0 && Values::words % 4 == 0));
  template <class Fragments>
  static constexpr bool halved = read_by_halves<dim> && !Fragments::streamed;
  template <class Fragments>
  static constexpr int kept = Fragments::streamed ? 1 : (Fragments::words + Fragments::extra) / (halved<Fragments> ? 2 : 1);

  // Attends to slices first, first + step, ... below last. table: Layout::table_bytes, filled.
  KVT_HD void run(const Lanes& lanes, const SlicePages pages, const Queries& query, const std::byte* table, int first, int last,
                  int step) {
    start(lanes, query);
    if (first >= last) return;
    const int rows = *pages.rows;
    const bool paged = any(lanes, map(lanes, [&](int) { return pages.page != nullptr; }));  // what is voted on is kept
    const auto locate = [&](int slice) {
      const int in_order = static_cast<int>(static_cast<unsigned>(slice) / SlicePages::page_slices);
      const int number = paged ? pages.page[in_order] : in_order;
      // Whole pages apart, slices lie alike in them, and where they lie is known before the loop.
      const int in_page = (step % SlicePages::page_slices == 0 ? first : slice) % SlicePages::page_slices;
      const auto from = [&](int offset) {
        return offset_by(pages.pool + (in_page * Layout::bytes + offset), number, pages.page_bytes);
      };
      return Place{map(lanes, [&](int lane) { return from(16 * lane); }),
                   map(lanes, [&](int lane) { return from(Layout::scales_at + lane / 4 * 4 * Layout::scale_words); })};
    };
    Reg<std::uint32_t> keys[kept<Keys>], values[kept<Values>], scales[4] = {};
    Place at = locate(first);
    fetch<Keys>(lanes, at.words, keys);
    if constexpr (ahead) fetch<Values>(lanes, values_of(lanes, at), values);
    load_scales(lanes, at, scales);
    for (int slice = first; slice < last; slice += step) {
      const bool more = slice + step < last;
      const Place next = more ? locate(slice + step) : at;
      Reg<Float4> logit[eights][2];
      multiply_keys(lanes, at.words, keys, table, query, logit);
      const Reg<Float4> key_scale = row_scales<Keys>(lanes, scales);
      constexpr int own = Layout::value_scale_word;
      const Reg<std::uint32_t> value_words[2] = {scales[own], scales[own + 1]};
      Reg<Float4> value_scale;
      if constexpr (converted_early) value_scale = row_scales<Values>(lanes, value_words);
      if constexpr (!ahead) fetch<Values>(lanes, values_of(lanes, at), values);
      if (ahead && more) {
        fetch<Keys>(lanes, next.words, keys);
        load_scales(lanes, next, scales);
      }
      KVT_UNROLL_ON_DEVICE
      for (int v = 0; v < eights; ++v) {
        scale_logits(lanes, key_scale, query, v, logit[v]);
        if (limited && (slice < query.whole_from || slice >= query.whole_to)) {
          hide_unseen(lanes, pages.positions(slice, Layout::bytes), query, v, logit[v]);
        }
        hide_or_raise(lanes, slice == rows / slice_rows, rows % slice_rows, v, logit[v]);
      }
      if constexpr (!converted_early) value_scale = row_scales<Values>(lanes, value_words);
      Reg<std::uint32_t> weight[eights][2][2];
      KVT_UNROLL_ON_DEVICE
      for (int v = 0; v < eights; ++v) to_weights(lanes, value_scale, logit[v], v, weight[v]);
      multiply_values(lanes, values_of(lanes, at), values, table, weight);
      if (more) {
        if constexpr (ahead) {
          fetch<Values>(lanes, values_of(lanes, next), values);
        } else {
          fetch<Keys>(lanes, next.words, keys);
          load_scales(lanes, next, scales);
        }
      }
      at = next;
    }
    for (auto& sum : sum_) {
      for (int c = 0; c < 2; ++c) {
        for (int mask = 4; mask < 32; mask *= 2) {
          sum[c] = map(
              lanes, [](int, float a, float b) { return a + b; }, sum[c], shuffle_xor(lanes, sum[c], mask));
        }
      }
    }
  }

  // The maximum, and sum of 2^(logit - maximum), of each vector: max [width], sum [width].
  KVT_HD void store_state(const Lanes& lanes, float* max, float* sum) const {
    KVT_UNROLL_ON_DEVICE
    for (int v = 0; v < eights; ++v) {
      map(
          lanes,
          [&](int lane, float max0, float max1, float sum0, float sum1) {
            if (lane < 4) {
              const int vector = 8 * v + 2 * lane;
              max[vector] = max0;
              max[vector + 1] = max1;
              sum[vector] = sum0;
              sum[vector + 1] = sum1;
            }
            return 0;
          },
          max_[v][0], max_[v][1], sum_[v][0], sum_[v][1]);
    }
  }
  // rows [width, dim] = or += (if `add`) factor [width] times the weighted rows of each vector, in the codec's basis.
  KVT_HD void store_rows(const Lanes& lanes, const float* factor, bool add, float* rows) const {
    KVT_UNROLL_ON_DEVICE
    for (int v = 0; v < eights; ++v) {
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < across; ++k) {
        map(
            lanes,
            [&](int lane, const Float4& x) {
              const int vector = 8 * v + lane % 4 * 2;
              for (int i = 0; i < 4; ++i) {
                float& to = rows[(vector + i % 2) * dim + Values::template place<false>(lane, k, i / 2, 0).dim];
                to = x.x[i] * (factor[vector + i % 2] * Values::unit) + (add ? to : 0.f);
              }
              return 0;
            },
            acc_[v][k]);
      }
    }
  }

 private:
  using Address = Reg<const std::byte*>;
  // Where a lane reads a slice: its words by fours, and scales of its rows.
  struct Place {
    Address words, scales;
  };
  KVT_HD KVT_INLINE static Place place(const Lanes& lanes, const std::byte* slice) {
    return {map(lanes, [&](int lane) { return slice + 16 * lane; }),
            map(lanes, [&](int lane) { return slice + (Layout::scales_at + lane / 4 * 4 * Layout::scale_words); })};
  }
  KVT_HD KVT_INLINE static Address values_of(const Lanes& lanes, const Place& at) {
    return offset(lanes, at.words, Layout::values_at);
  }
  template <class Fragments>
  KVT_HD KVT_INLINE static void fetch(const Lanes& lanes, const Address& from, Reg<std::uint32_t>* to) {
    if constexpr (!Fragments::streamed && !halved<Fragments>) Layout::template load<Fragments>(lanes, from, to);
  }
  // Of a tile; `words` are those of the slice, unless they are read now.
  template <class Fragments>
  KVT_HD KVT_INLINE static void registers(const Lanes& lanes, const Address& from, const Reg<std::uint32_t>* words, int tile,
                                          const std::byte* table, Reg<std::uint32_t> (&a)[4]) {
    if constexpr (Fragments::streamed) {
      load_words<4>(lanes, offset(lanes, from, tile * 4 * Layout::word_bytes), a);
    } else {
      Fragments::unpack(lanes, words, tile, table, a);
    }
  }
  // Of rows g, g + 8, g + 16 and g + 24: keys in the first words, values in those from Layout::value_scale_word on.
  KVT_HD KVT_INLINE static void load_scales(const Lanes& lanes, const Place& at, Reg<std::uint32_t>* to) {
    if constexpr (Layout::scale_words > 0) load_words<Layout::scale_words>(lanes, at.scales, to);
  }
  template <class Fragments>
  KVT_HD KVT_INLINE static Reg<Float4> row_scales(const Lanes& lanes, const Reg<std::uint32_t>* words) {
    return map(
        lanes, [](int, std::uint32_t first, std::uint32_t second) { return Fragments::scales(first, second); }, words[0],
        words[1]);
  }
  // Words of other lanes that registers need, once those of the slice, or of 16 rows, are there.
  template <class Fragments>
  KVT_HD KVT_INLINE static void follow(const Lanes& lanes, Reg<std::uint32_t>* words) {
    if constexpr (Fragments::follows) Fragments::follow(lanes, words);
  }

  KVT_HD void start(const Lanes& lanes, const Queries& query) {
    for (int v = 0; v < eights; ++v) {
      if constexpr (queries_wait) {
        for (int k = 0; k < across; ++k) {
          for (int i = 0; i < 2; ++i) query_[v][k][i] = map(lanes, [&](int lane) { return query.vectors[v].word[k][i][lane]; });
        }
      }
      for (int c = 0; c < 2; ++c) {
        query_unit_[v][c] = map(lanes, [&](int lane) { return query.vectors[v].unit[lane % 4 * 2 + c] * Keys::unit; });
        unit_[v][c] = limited && query.cap > 0 ? map(lanes, [](int) { return 1.f; }) : query_unit_[v][c];
        max_[v][c] = most_[v][c] = map(lanes, [](int) { return -std::numeric_limits<float>::infinity(); });
        sum_[v][c] = map(lanes, [](int) { return 0.f; });
      }
      for (int k = 0; k < across; ++k) acc_[v][k] = map(lanes, [](int) { return Float4{{0, 0, 0, 0}}; });
    }
  }

  // What 16 rows are multiplied by: multiply(half), with the words of the half from tile `first` on.
  template <class Fragments, class Multiply>
  KVT_HD KVT_INLINE static void each_half(const Lanes& lanes, const Address& from, Reg<std::uint32_t>* words,
                                          Multiply&& multiply) {
    if constexpr (halved<Fragments>) {
      KVT_LOOP_ON_DEVICE
      for (int half = 0; half < 2; ++half) {
        Layout::template load_half<Fragments>(lanes, from, half, words);
        follow<Fragments>(lanes, words);
        multiply(half, 0);
      }
    } else {
      follow<Fragments>(lanes, words);
      multiply(0, 0);
      multiply(1, across);
    }
  }
  KVT_HD KVT_INLINE void multiply_keys(const Lanes& lanes, const Address& from, Reg<std::uint32_t>* words,
                                       const std::byte* table, const Queries& query, Reg<Float4> (&logit)[eights][2]) const {
    const auto zero = map(lanes, [](int) { return Float4{{0, 0, 0, 0}}; });
    // sum(v): of the eight vectors from 8 v on
    const auto multiply = [&](int tile, int k, auto&& sum) {
      Reg<std::uint32_t> a[4];
      registers<Keys>(lanes, from, words, tile, table, a);
      KVT_UNROLL_ON_DEVICE
      for (int v = 0; v < eights; ++v) {
        if constexpr (queries_wait) {
          mma(lanes, sum(v), a, query_[v][k][0], query_[v][k][1]);
        } else {
          const auto part = [&](int i) { return map(lanes, [&](int lane) { return query.vectors[v].word[k][i][lane]; }); };
          mma(lanes, sum(v), a, part(0), part(1));
        }
      }
    };
    if constexpr (halved<Keys>) {
      each_half<Keys>(lanes, from, words, [&](int half, int first) {
        Reg<Float4> sum[eights];
        for (auto& each : sum) each = zero;
        KVT_UNROLL_ON_DEVICE
        for (int k = 0; k < across; ++k) multiply(first + k, k, [&](int v) -> Reg<Float4>& { return sum[v]; });
        KVT_UNROLL_ON_DEVICE
        for (int v = 0; v < eights; ++v) (half == 0 ? logit[v][0] : logit[v][1]) = sum[v];
      });
    } else {  // two sums in turn: neither waits for its own last product
      follow<Keys>(lanes, words);
      for (auto& each : logit) each[0] = each[1] = zero;
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < across; ++k) {
        multiply(k, k, [&](int v) -> Reg<Float4>& { return logit[v][0]; });
        multiply(across + k, k, [&](int v) -> Reg<Float4>& { return logit[v][1]; });
      }
    }
  }
  KVT_HD KVT_INLINE void multiply_values(const Lanes& lanes, const Address& from, Reg<std::uint32_t>* words,
                                         const std::byte* table, const Reg<std::uint32_t> (&weight)[eights][2][2]) {
    each_half<Values>(lanes, from, words, [&](int half, int first) {
      Reg<std::uint32_t> part[eights][2];
      KVT_UNROLL_ON_DEVICE
      for (int v = 0; v < eights; ++v) {
        for (int i = 0; i < 2; ++i) part[v][i] = half == 0 ? weight[v][0][i] : weight[v][1][i];
      }
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < across; ++k) {
        Reg<std::uint32_t> a[4];
        registers<Values>(lanes, from, words, first + k, table + value_table_offset, a);
        KVT_UNROLL_ON_DEVICE
        for (int v = 0; v < eights; ++v) mma(lanes, acc_[v][k], a, part[v][0], part[v][1]);
      }
    });
  }
  // What follows is of the eight vectors from 8 v on.
  KVT_HD KVT_INLINE void scale_logits(const Lanes& lanes, const Reg<Float4>& scale, const Queries& query, int v,
                                      Reg<Float4> (&logit)[2]) const {
    KVT_UNROLL_ON_DEVICE
    for (int j = 0; j < 2; ++j) {
      logit[j] = map(
          lanes,
          [j](int, const Float4& x, const Float4& by) {
            const float low = by.x[2 * j], high = by.x[2 * j + 1];
            return Keys::scaled ? Float4{{x.x[0] * low, x.x[1] * low, x.x[2] * high, x.x[3] * high}} : x;
          },
          logit[j], scale);
    }
    if (limited && query.cap > 0) {
      const float cap = query.cap, inverse = 1 / cap;
      for (int j = 0; j < 2; ++j) {
        logit[j] = map(
            lanes,
            [cap, inverse](int, Float4 x, float unit0, float unit1) {
              for (int i = 0; i < 4; ++i) x.x[i] = cap * std::tanh(x.x[i] * (i % 2 == 0 ? unit0 : unit1) * inverse);
              return x;
            },
            logit[j], query_unit_[v][0], query_unit_[v][1]);
      }
    }
  }
  // Logits of rows that do not exist; the slice has `left` that do.
  KVT_HD KVT_INLINE static void hide_missing(const Lanes& lanes, int left, Reg<Float4> (&logit)[2]) {
    for (int j = 0; j < 2; ++j) {
      logit[j] = map(
          lanes,
          [j, left](int lane, Float4 x) {
            for (int i = 0; i < 4; ++i) {
              if (16 * j + lane / 4 + i / 2 * 8 >= left) x.x[i] = -std::numeric_limits<float>::infinity();
            }
            return x;
          },
          logit[j]);
    }
  }
  KVT_HD KVT_INLINE static void hide_unseen(const Lanes& lanes, const int* positions, const Queries& query, int v,
                                            Reg<Float4> (&logit)[2]) {
    for (int j = 0; j < 2; ++j) {
      logit[j] = map(
          lanes,
          [j, v, positions, &query](int lane, Float4 x) {
            for (int i = 0; i < 4; ++i) {
              const int vector = 8 * v + lane % 4 * 2 + i % 2;
              if (vector >= query.m) continue;
              if (!query.sees(vector, positions[16 * j + lane / 4 + i / 2 * 8]))
                x.x[i] = -std::numeric_limits<float>::infinity();
            }
            return x;
          },
          logit[j]);
    }
  }
  KVT_HD KVT_INLINE void find_tops(const Lanes& lanes, const Reg<Float4> (&logit)[2], int v, Reg<float> (&top)[2]) const {
    for (int c = 0; c < 2; ++c) {
      top[c] = map(
          lanes,
          [c](int, const Float4& a, const Float4& b, float unit) {
            return std::fmax(std::fmax(a.x[c], a.x[c + 2]), std::fmax(b.x[c], b.x[c + 2])) * unit;
          },
          logit[0], logit[1], unit_[v][c]);
    }
  }
  // What is rare, found by one vote: rows that are missing, `left` of the slice are there, and logits above the maximum.
  KVT_HD KVT_INLINE void hide_or_raise(const Lanes& lanes, bool missing, int left, int v, Reg<Float4> (&logit)[2]) {
    Reg<float> top[2];
    find_tops(lanes, logit, v, top);
    const auto too_high = [&](bool rare) {
      return any(lanes,
                 map(
                     lanes, [rare](int, float a, float b, float most0, float most1) { return a > most0 || b > most1 || rare; },
                     top[0], top[1], most_[v][0], most_[v][1]));
    };
    if (!too_high(missing)) return;
    if (missing) {
      hide_missing(lanes, left, logit);
      find_tops(lanes, logit, v, top);
    }
    if (too_high(false)) raise(lanes, top, v);
  }
  KVT_HD void raise(const Lanes& lanes, Reg<float> (&top)[2], int v) {
    Reg<float> factor[2];
    for (int c = 0; c < 2; ++c) {
      for (int mask = 4; mask < 32; mask *= 2) {
        top[c] = map(
            lanes, [](int, float a, float b) { return std::fmax(a, b); }, top[c], shuffle_xor(lanes, top[c], mask));
      }
      top[c] = map(
          lanes, [](int, float a, float b) { return std::fmax(a, b); }, top[c], max_[v][c]);
      // A vector that has seen nothing stays so, and keeps its zeros.
      factor[c] = map(
          lanes, [](int, float before, float now) { return before == now ? 1.f : fast_exp2(before - now); }, max_[v][c],
          top[c]);
      max_[v][c] = top[c];
      most_[v][c] = map(
          lanes, [](int, float max) { return max + slack; }, top[c]);
      sum_[v][c] = map(
          lanes, [](int, float a, float b) { return a * b; }, sum_[v][c], factor[c]);
    }
    KVT_UNROLL_ON_DEVICE
    for (int k = 0; k < across; ++k) {
      acc_[v][k] = map(
          lanes,
          [](int, const Float4& x, float f0, float f1) {
            return Float4{{x.x[0] * f0, x.x[1] * f1, x.x[2] * f0, x.x[3] * f1}};
          },
          acc_[v][k], factor[0], factor[1]);
    }
  }
  KVT_HD KVT_INLINE void to_weights(const Lanes& lanes, const Reg<Float4>& scale, const Reg<Float4> (&logit)[2], int v,
                                    Reg<std::uint32_t> (&weight)[2][2]) {
    KVT_UNROLL_ON_DEVICE
    for (int j = 0; j < 2; ++j) {
      const Reg<Float4> e = map(
          lanes,
          [](int, const Float4& x, float unit0, float unit1, float max0, float max1) {
            return Float4{{weight_of(x.x[0], unit0, max0), weight_of(x.x[1], unit1, max1), weight_of(x.x[2], unit0, max0),
                           weight_of(x.x[3], unit1, max1)}};
          },
          logit[j], unit_[v][0], unit_[v][1], max_[v][0], max_[v][1]);
      for (int c = 0; c < 2; ++c) {
        sum_[v][c] = map(
            lanes, [c](int, float sum, const Float4& x) { return sum + (x.x[c] + x.x[c + 2]); }, sum_[v][c], e);
      }
      for (int i = 0; i < 2; ++i) {
        weight[j][i] = transpose(lanes, map(
                                            lanes,
                                            [i, j](int, const Float4& x, const Float4& of) {
                                              const float by = Values::scaled ? of.x[2 * j + i] : 1.f;
                                              return pack_halves(x.x[2 * i] * by, x.x[2 * i + 1] * by);
                                            },
                                            e, scale));
      }
    }
  }
  KVT_HD KVT_INLINE static float weight_of(float logit, float unit, float max) {
    if constexpr (limited) {  // a vector may have seen no row yet
      if (max == -std::numeric_limits<float>::infinity()) return 0.f;
    }
    return fast_exp2(std::fma(logit, unit, -max));
  }

  Reg<std::uint32_t> query_[eights][queries_wait ? across : 1][2];
  Reg<Float4> acc_[eights][across];
  Reg<float> query_unit_[eights][2], unit_[eights][2];            // of queries and keys; of logits, which a cap leaves none
  Reg<float> max_[eights][2], most_[eights][2], sum_[eights][2];  // most_: what a logit may be before the maximum is raised
};

}  // namespace kvt::inline v0
