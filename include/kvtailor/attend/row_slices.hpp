// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Slices of any codec whose rows decode one by one, at any head dim:
//   RowSlices   32 rows of keys and values, each as the codec encodes it alone
//   FourRows    of such a block, in registers: logits and sums for eight vectors
//   RowWarp     attention over such slices by one warp, with fp32 products: what DecodeWarp is for tensor cores
//
// Lane l holds elements l, l + 32, ... of a row. Products of four rows and eight vectors are 32 sums over all lanes, made in 31
// exchanges, after which lane 8 k + j has the logit of row k and vector j: its scale, its weight and whether it is seen are
// the affair of one lane. Errors are those of fp32 sums.
#pragma once

#include <limits>

#include "kvtailor/attend/decode_warp.hpp"
#include "kvtailor/codec/dense.hpp"

namespace kvt::inline v0 {

// Rows of keys, then of values, each a block of its own: where a row lies does not depend on how many there are, nor are there
// tiles, whose places would take registers.
template <class KeyCodec, class ValueCodec>
struct RowSlices {
  static_assert(KeyCodec::head_dim == ValueCodec::head_dim);
  using Key = KeyCodec;
  using Value = ValueCodec;
  using Pages = SlicePages;
  static constexpr bool fragments = false, grouped = false, packs_queries = false;
  static constexpr int dim = Key::head_dim, tables_bytes = 0, table_bytes = 0;
  static constexpr int values_at = (slice_rows * Key::row_bytes + 63) / 64 * 64;
  static constexpr int bytes = (values_at + slice_rows * Value::row_bytes + 127) / 128 * 128;

  // Byte of a dense element in a slice.
  template <bool keys>
  KVT_HD static constexpr int dense_at(int row, int d) {
    using Codec = std::conditional_t<keys, Key, Value>;
    return (keys ? 0 : values_at) + (row * dim + d) * static_cast<int>(sizeof(typename Codec::Element));
  }
};

template <class Codec, class Lanes>
class FourRows {
  static_assert(Lanes::size == 32);

 public:
  static constexpr int basis = max_basis_dim<Codec>;
  using Row = LaneRow<basis, Lanes::size>;
  template <class T>
  using Reg = typename Lanes::template Reg<T>;

  // Rows first, first + 1, ... of a block; in place of those after `last` that one.
  KVT_HD KVT_INLINE FourRows(const Lanes& lanes, const std::byte* block, int first, int last)
      : block_(block), first_(first), last_(last) {
    if constexpr (held == 4) load(lanes, 0);
  }
  // In lane 8 k + j: the product of row k and vector j [basis], without the row's scale; 0 if there are no more than j vectors.
  KVT_HD KVT_INLINE Reg<float> products(const Lanes& lanes, const float* vectors, int m) {
    Reg<float> all = map(lanes, [](int) { return 0.f; });
    KVT_LOOP_ON_DEVICE
    for (int from = 0; from < 4; from += held) {
      if constexpr (held < 4) load(lanes, from);
      const Reg<float> some = products_of_held(lanes, vectors, m);
      all = map(
          lanes, [from](int lane, float a, float b) { return held == 4 || lane / 8 == from ? b : a; }, all, some);
    }
    return all;
  }
  // acc [8] += the rows times weights, which lie as products do.
  KVT_HD KVT_INLINE void add_to(const Lanes& lanes, const Reg<float>& weight, int m, Reg<Row>* acc) {
    KVT_LOOP_ON_DEVICE
    for (int from = 0; from < 4; from += held) {
      if constexpr (held < 4) load(lanes, from);
      KVT_UNROLL_ON_DEVICE
      for (int j = 0; j < 8; ++j) {
        if (j >= m) continue;
        KVT_UNROLL_ON_DEVICE
        for (int k = 0; k < held; ++k) {
          acc[j] = map(
              lanes,
              [](int, Row sum, const Row& x, float w) {
                KVT_UNROLL_ON_DEVICE
                for (int i = 0; i < Row::length; ++i) sum.x[i] += w * x.x[i];
                return sum;
              },
              acc[j], row_[k], gather(lanes, weight, map(lanes, [=](int) { return 8 * (from + k) + j; })));
        }
      }
    }
  }

 private:
  // Rows in registers at a time: where a row has most elements, there is room for one beside a warp's sums.
  static constexpr int held = basis <= 256 ? 4 : 1;
  static_assert(held == 4 || held == 1);

  // In lane 8 k + j of each 8 held lanes.
  KVT_HD KVT_INLINE Reg<float> products_of_held(const Lanes& lanes, const float* vectors, int m) const {
    Reg<float> sum[8 * held];
    KVT_UNROLL_ON_DEVICE
    for (auto& each : sum) each = map(lanes, [](int) { return 0.f; });
    KVT_UNROLL_ON_DEVICE
    for (int j = 0; j < 8; ++j) {
      if (j >= m) continue;
      KVT_UNROLL_ON_DEVICE
      for (int i = 0; i < Row::length; ++i) {
        const Reg<float> element = map(lanes, [=](int lane) {
          const int d = i * Lanes::size + lane;
          return basis % Lanes::size == 0 || d < basis ? vectors[j * basis + d] : 0.f;
        });
        KVT_UNROLL_ON_DEVICE
        for (int k = 0; k < held; ++k) {
          sum[8 * k + j] = map(
              lanes, [i](int, float so_far, const Row& x, float q) { return so_far + x.x[i] * q; }, sum[8 * k + j], row_[k],
              element);
        }
      }
    }
    // A lane keeps the half of the sums that its own number is in, and gives the other away.
    KVT_UNROLL_ON_DEVICE
    for (int turn = 0; 4 * held >> turn > 0; ++turn) {
      const int half = 4 * held >> turn;
      KVT_UNROLL_ON_DEVICE
      for (int s = 0; s < 4 * held; ++s) {  // a bound that is known before loops are unrolled keeps the sums in registers
        if (s >= half) continue;
        const Reg<float> given = map(
            lanes, [half](int lane, float low, float high) { return (lane & half) != 0 ? low : high; }, sum[s], sum[s + half]);
        sum[s] = map(
            lanes, [half](int lane, float low, float high, float got) { return ((lane & half) != 0 ? high : low) + got; },
            sum[s], sum[s + half], shuffle_xor(lanes, given, half));
      }
    }
    for (int mask = 8 * held; mask < Lanes::size; mask *= 2) {
      sum[0] = map(
          lanes, [](int, float a, float b) { return a + b; }, sum[0], shuffle_xor(lanes, sum[0], mask));
    }
    return sum[0];
  }

  KVT_HD KVT_INLINE void load(const Lanes& lanes, int from) {
    KVT_UNROLL_ON_DEVICE
    for (int k = 0; k < held; ++k) {
      const int at = first_ + from + k < last_ ? first_ + from + k : last_;
      row_[k] = map(lanes, [block = block_, at](int lane) {
        Row x;
        Codec{}.template load<Lanes::size>(block + at * Codec::row_bytes, 1, 0, lane, x);
        return x;
      });
    }
  }

  const std::byte* block_;
  int first_, last_;
  Reg<Row> row_[held];
};

// limited, width: as DecodeWarp's.
template <class Layout, class Lanes, bool limited = false, int width = 8>
class RowWarp {
 public:
  using Key = typename Layout::Key;
  using Value = typename Layout::Value;
  using Queries = DecodeQueries<float>;  // vectors: [m, basis of Key], in its basis, times scale and log2(e)
  template <class T>
  using Reg = typename Lanes::template Reg<T>;
  static constexpr int basis = max_basis_dim<Value>, eights = width / 8;  // basis: elements of a sum

  // Attends to slices first, first + step, ... below last.
  KVT_HD void run(const Lanes& lanes, const SlicePages pages, const Queries& query, const std::byte*, int first, int last,
                  int step) {
    for (int v = 0; v < eights; ++v) {
      max_[v] = map(lanes, [](int) { return none; });
      sum_[v] = map(lanes, [](int) { return 0.f; });
      for (auto& acc : acc_[v]) acc = map(lanes, [](int) { return Row{}; });
    }
    const int rows = first < last ? *pages.rows : 0;
    for (int slice = first; slice < last; slice += step) {
      const std::byte* const keys = pages.at(slice, Layout::bytes);
      const int* const positions =
          limited && (slice < query.whole_from || slice >= query.whole_to) ? pages.positions(slice, Layout::bytes) : nullptr;
      const int left = rows - slice * slice_rows < slice_rows ? rows - slice * slice_rows : slice_rows;
      KVT_LOOP_ON_DEVICE
      for (int row = 0; row < left; row += 4) attend(lanes, keys, positions, row, left - 1, query);
    }
    for (auto& sum : sum_) {
      for (int mask = 8; mask < 32; mask *= 2) {
        sum = map(
            lanes, [](int, float a, float b) { return a + b; }, sum, shuffle_xor(lanes, sum, mask));
      }
    }
  }
  // The maximum, and sum of 2^(logit - maximum), of each vector: max [width], sum [width].
  KVT_HD void store_state(const Lanes& lanes, float* max, float* sum) const {
    for (int v = 0; v < eights; ++v) {
      map(
          lanes,
          [&](int lane, float own_max, float own_sum) {
            if (lane < 8) {
              max[8 * v + lane] = own_max;
              sum[8 * v + lane] = own_sum;
            }
            return 0;
          },
          max_[v], sum_[v]);
    }
  }
  // rows [width, basis] = or += (if `add`) factor [width] times the weighted rows of each vector, in the codec's basis.
  KVT_HD void store_rows(const Lanes& lanes, const float* factor, bool add, float* rows) const {
    KVT_UNROLL_ON_DEVICE
    for (int j = 0; j < width; ++j) {
      map(
          lanes,
          [&](int lane, const Row& x) {
            KVT_UNROLL_ON_DEVICE
            for (int i = 0; i < Row::length; ++i) {
              const int d = i * Lanes::size + lane;
              if (basis % Lanes::size != 0 && d >= basis) continue;
              float& to = rows[j * basis + d];
              to = x.x[i] * factor[j] + (add ? to : 0.f);
            }
            return 0;
          },
          acc_[j / 8][j % 8]);
    }
  }

 private:
  using Row = LaneRow<basis, Lanes::size>;
  static constexpr float slack = 3, none = -std::numeric_limits<float>::infinity();

  // Rows `row` to row + 3 of a slice, but none after `last`. positions: null if all vectors see them.
  KVT_HD KVT_INLINE void attend(const Lanes& lanes, const std::byte* slice, const int* positions, int row, int last,
                                const Queries& query) {
    FourRows<Key, Lanes> keys(lanes, slice, row, last);
    FourRows<Value, Lanes> values(lanes, slice + Layout::values_at, row, last);
    const auto own_row = [=](int lane) { return row + lane / 8 < last ? row + lane / 8 : last; };
    const Reg<float> key_scale =
        map(lanes, [=](int lane) { return Key{}.row_scale(slice + own_row(lane) * Key::row_bytes, 0); });
    const Reg<float> value_scale = map(
        lanes, [=](int lane) { return Value{}.row_scale(slice + Layout::values_at + own_row(lane) * Value::row_bytes, 0); });
    KVT_UNROLL_ON_DEVICE
    for (int v = 0; v < eights; ++v) {
      const Reg<float> logit = map(
          lanes,
          [&](int lane, float x, float scale) {
            x *= scale;
            if (limited && query.cap > 0) x = query.cap * std::tanh(x / query.cap);
            const int vector = 8 * v + lane % 8;
            bool seen = row + lane / 8 <= last;
            if (limited && positions != nullptr && vector < query.m) {
              seen = seen && query.sees(vector, positions[own_row(lane)]);
            }
            return seen ? x : none;
          },
          keys.products(lanes, query.vectors + 8 * v * max_basis_dim<Key>, query.m - 8 * v), key_scale);
      if (any(lanes, map(
                         lanes, [](int, float x, float max) { return x > max + slack; }, logit, max_[v]))) {
        raise(lanes, logit, v);
      }
      const Reg<float> weight = map(
          lanes, [](int, float x, float max) { return limited && max == none ? 0.f : fast_exp2(x - max); }, logit, max_[v]);
      sum_[v] = map(
          lanes, [](int, float sum, float w) { return sum + w; }, sum_[v], weight);
      values.add_to(lanes,
                    map(
                        lanes, [](int, float w, float scale) { return w * scale; }, weight, value_scale),
                    query.m - 8 * v, acc_[v]);
    }
  }
  KVT_HD KVT_INLINE void raise(const Lanes& lanes, const Reg<float>& logit, int v) {
    Reg<float> top = logit;
    for (int mask = 8; mask < 32; mask *= 2) {
      top = map(
          lanes, [](int, float a, float b) { return std::fmax(a, b); }, top, shuffle_xor(lanes, top, mask));
    }
    top = map(
        lanes, [](int, float a, float b) { return std::fmax(a, b); }, top, max_[v]);
    // A vector that has seen nothing stays so, and keeps its zeros.
    const Reg<float> factor = map(
        lanes, [](int, float before, float now) { return before == now ? 1.f : fast_exp2(before - now); }, max_[v], top);
    max_[v] = top;
    sum_[v] = map(
        lanes, [](int, float a, float b) { return a * b; }, sum_[v], factor);
    KVT_UNROLL_ON_DEVICE
    for (int j = 0; j < 8; ++j) {
      acc_[v][j] = map(
          lanes,
          [](int, Row x, float by) {
            KVT_UNROLL_ON_DEVICE
            for (int i = 0; i < Row::length; ++i) x.x[i] *= by;
            return x;
          },
          acc_[v][j], gather(lanes, factor, map(lanes, [j](int) { return j; })));
    }
  }

  Reg<Row> acc_[eights][8];
  Reg<float> max_[eights], sum_[eights];  // of vector lane % 8; sums of the lane's rows until all are seen
};

}  // namespace kvt::inline v0
