// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// WindowMass: the weight that the last queries give to each row of a head, by one block of threads with tensor cores.
//
// Logits are fragments as in DecodeWarp; up to 32 queries share each unpacked code. Rows are gone through twice, first for the
// maximum and the sum of each query, then for weights: nothing but a number for each row is written down. A query is two fp16
// numbers an element, what rounding leaves of the first in the second, so that a logit is as good as in fp32.
// Error: of logits, 2^-24 of the sizes of the products, and that of keys (two bits: levels right to 5e-4).
#pragma once

#include "kvtailor/attend/split_decode.hpp"
#include "kvtailor/store/device_queries.hpp"

namespace kvt::inline v0 {

// Rows: ScoredRows.
template <class Rows>
struct WindowMass {
  using Key = typename Rows::Key;
  static constexpr int dim = Rows::dim, warps = Rows::warps;
  static constexpr int eights = dim <= 128 ? 4 : 2, vectors = 8 * eights;  // queries at a time
  static constexpr int table_bytes = Rows::Body::table_bytes;
  // That registers are shared out among: codes beside the logits of so many queries need more than 128 a thread.
  static constexpr int blocks = Rows::Body::Keys::scaled ? 1 : 2;
  struct Shared {
    QueryFragments<dim> query[eights], rest[eights];
    float prepared[8 * dim];
    float max[warps][vectors], sum[warps][vectors];
    float top[vectors], share[vectors];  // of all rows: the maximum, and one over the sum, of 2^logit
    int position[vectors];
  };

  const Rows& rows;
  const DeviceQueries& queries;
  int head;
  Shared& shared;
  const std::byte* table;  // table_bytes, filled
  float* mass;             // [rows]

  KVT_HD int size() const { return queries.state[head].size; }
  KVT_HD int group() const { return queries.group; }
  KVT_HD int first_position() const { return queries.position(head, 0); }

  // The weights that query head g of the group gives to each row, summed over the queries: [rows], until the next call.
  template <class Block>
  KVT_HD const float* of_query_head(const Block& block, int g) const {
    using Lanes = typename Block::Lanes;
    for (int first = 0; first < size(); first += vectors) {
      const int m = size() - first < vectors ? size() - first : vectors;
      block.each_warp([&](const Lanes& lanes, int warp) {
        if (warp != 0) return;
        lanes.each([&](int lane) {  // queries that are not there see nothing
          for (int v = lane; v < vectors; v += Lanes::size) shared.position[v] = v < m ? queries.position(head, first + v) : -1;
        });
      });
      typename Block::template PerWarp<State<Lanes>> state;
      KVT_LOOP_ON_DEVICE
      for (int pass = 0; pass < 2; ++pass) {
        pack<Key>(block, g, first, m);
        block.each_warp([&](const Lanes& lanes, int warp) {
          if (pass == 0) state[warp].start(lanes);
          visit<typename Rows::Body>(lanes, warp, rows.body, rows.encoded, state[warp], pass, first > 0,
                                     [&](int r) { return rows.sinks + r; });
        });
        pack<Dense<Half, dim>>(block, g, first, m);
        block.each_warp([&](const Lanes& lanes, int warp) {
          visit<typename Rows::Near>(lanes, warp, rows.near, rows.count - rows.encoded, state[warp], pass, first > 0,
                                     [&](int r) { return r < rows.sinks ? r : r + rows.encoded; });
          if (pass == 0) state[warp].store(lanes, shared.max[warp], shared.sum[warp]);
        });
        if (pass == 0) join(block);
      }
    }
    return mass;
  }

 private:
  static constexpr float none = -std::numeric_limits<float>::infinity();
  // A softmax of each query over the rows that a lane has seen.
  template <class Lanes>
  struct State {
    typename Lanes::template Reg<float> max[eights][2], sum[eights][2];

    KVT_HD KVT_INLINE void start(const Lanes& lanes) {
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < 2 * eights; ++k) {
        max[k / 2][k % 2] = map(lanes, [](int) { return none; });
        sum[k / 2][k % 2] = map(lanes, [](int) { return 0.f; });
      }
    }
    KVT_HD KVT_INLINE void add(const Lanes& lanes, int e, int c, const typename Lanes::template Reg<Float4>& logit) {
      const auto top = map(
          lanes, [c](int, float m, const Float4& x) { return std::fmax(m, std::fmax(x.x[c], x.x[c + 2])); }, max[e][c], logit);
      sum[e][c] = map(
          lanes,
          [c](int, float m, float now, float s, const Float4& x) {
            if (now == none) return 0.f;
            return s * fast_exp2(m - now) + (fast_exp2(x.x[c] - now) + fast_exp2(x.x[c + 2] - now));
          },
          max[e][c], top, sum[e][c], logit);
      max[e][c] = top;
    }
    // Over all lanes, to [vectors].
    KVT_HD KVT_INLINE void store(const Lanes& lanes, float* max_to, float* sum_to) {
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < 2 * eights; ++k) {
        auto &m = max[k / 2][k % 2], &s = sum[k / 2][k % 2];
        for (int mask = 4; mask < 32; mask *= 2) {
          const auto other_max = shuffle_xor(lanes, m, mask), other_sum = shuffle_xor(lanes, s, mask);
          const auto top = map(
              lanes, [](int, float a, float b) { return std::fmax(a, b); }, m, other_max);
          s = map(
              lanes,
              [](int, float a, float b, float now, float own, float other) {
                return now == none ? 0.f : own * fast_exp2(a - now) + other * fast_exp2(b - now);
              },
              m, other_max, top, s, other_sum);
          m = top;
        }
        map(
            lanes,
            [&](int lane, float own_max, float own_sum) {
              if (lane < 4) {
                max_to[8 * (k / 2) + 2 * lane + k % 2] = own_max;
                sum_to[8 * (k / 2) + 2 * lane + k % 2] = own_sum;
              }
              return 0;
            },
            m, s);
      }
    }
  };

  // Queries `first` .. first + m - 1 in the basis of a codec; logits are times log2(e).
  template <class Codec, class Block>
  KVT_HD void pack(const Block& block, int g, int first, int m) const {
    using Lanes = typename Block::Lanes;
    constexpr float log2e = 1.44269504f;
    for (int e = 0; e < eights; ++e) {
      block.each_warp([&](const Lanes& lanes, int warp) {
        if (8 * e + warp >= m) return;
        const float* const query = queries.query(head, first + 8 * e + warp) + static_cast<long long>(g) * dim;
        Codec{}.prepare(lanes, query, queries.state[head].scale * log2e, shared.prepared + warp * dim);
      });
      block.each_warp([&](const Lanes& lanes, int warp) {
        shared.query[e].pack(lanes, shared.prepared, m - 8 * e, warp, warps, &shared.rest[e]);
      });
    }
  }
  // The maximum of the warps, and one over the sum. A query that sees no row gives nothing.
  template <class Block>
  KVT_HD void join(const Block& block) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp != 0) return;
      lanes.each([&](int lane) {
        for (int v = lane; v < vectors; v += Lanes::size) {
          float top = none, total = 0;
          for (int w = 0; w < warps; ++w) top = std::fmax(top, shared.max[w][v]);
          for (int w = 0; w < warps && top != none; ++w) total += shared.sum[w][v] * fast_exp2(shared.max[w][v] - top);
          shared.top[v] = top != none ? top : 0.f;
          shared.share[v] = total > 0 ? 1 / total : 0.f;
        }
      });
    });
  }
  // A warp's share of `count` rows: in the first pass to its state, in the second to the mass of row rank(r).
  template <class Layout, class Lanes, class Rank>
  KVT_HD void visit(const Lanes& lanes, int warp, const SlicePages& pages, int count, State<Lanes>& state, int pass, bool add,
                    Rank&& rank) const {
    using Reader = DecodeWarp<Layout, Lanes>;
    using Keys = typename Layout::Keys;
    for (int slice = warp; slice * slice_rows < count; slice += warps) {
      const auto at = Reader::place(lanes, pages.at(slice, Layout::bytes));
      typename Lanes::template Reg<std::uint32_t> words[Reader::template kept<Keys>], scales[4] = {};
      Reader::template fetch<Keys>(lanes, at.words, words);
      Reader::load_scales(lanes, at, scales);
      Reader::template each_half<Keys>(lanes, at.words, words, [&](int half, int first) {
        typename Lanes::template Reg<Float4> logit[eights];
        for (int e = 0; e < eights; ++e) logit[e] = map(lanes, [](int) { return Float4{{0, 0, 0, 0}}; });
        KVT_UNROLL_ON_DEVICE
        for (int k = 0; k < dim / 16; ++k) {
          typename Lanes::template Reg<std::uint32_t> a[4];
          Reader::template registers<Keys>(lanes, at.words, words, first + k, table, a);
          KVT_UNROLL_ON_DEVICE
          for (int e = 0; e < eights; ++e) {
            const auto part = [&](const QueryFragments<dim>& q, int i) {
              return map(lanes, [&](int lane) { return q.word[k][i][lane]; });
            };
            mma(lanes, logit[e], a, part(shared.query[e], 0), part(shared.query[e], 1));
            mma(lanes, logit[e], a, part(shared.rest[e], 0), part(shared.rest[e], 1));
          }
        }
        const int row = slice * slice_rows + 16 * half;
        const int* const positions = pages.positions(slice, Layout::bytes) + 16 * half;
        KVT_UNROLL_ON_DEVICE
        for (int e = 0; e < eights; ++e) finish<Layout>(lanes, scales, half, e, count - row, positions, logit[e]);
        if (pass == 0) {
          KVT_UNROLL_ON_DEVICE
          for (int k = 0; k < 2 * eights; ++k) state.add(lanes, k / 2, k % 2, logit[k / 2]);
        } else {
          store_weights(lanes, logit, count - row, add, [&](int r) { return rank(row + r); });
        }
      });
    }
  }
  // Products to logits: scaled, capped, and -infinity where a row is not there or not seen. `left`: rows from the first on.
  template <class Layout, class Lanes>
  KVT_HD KVT_INLINE void finish(const Lanes& lanes, const typename Lanes::template Reg<std::uint32_t> (&scales)[4], int half,
                                int e, int left, const int* positions, typename Lanes::template Reg<Float4>& logit) const {
    using Keys = typename Layout::Keys;
    const int sliding = queries.state[head].sliding;
    const float cap = queries.state[head].soft_cap * 1.44269504f;
    logit = map(
        lanes,
        [&](int lane, Float4 x, std::uint32_t even, std::uint32_t odd) {
          const std::uint32_t both = half == 0 ? even : odd;  // of rows g and g + 8
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, vector = lane % 4 * 2 + i % 2;
            const float scale = !Keys::scaled ? 1.f : i < 2 ? low_half(both) : high_half(both);
            x.x[i] *= scale * (shared.query[e].unit[vector] * Keys::unit);
            if (cap > 0) x.x[i] = cap * std::tanh(x.x[i] / cap);
            const int own = shared.position[8 * e + vector], at = row < left ? positions[row] : own;
            if (row >= left || at > own || (sliding > 0 && at <= own - sliding)) x.x[i] = none;
          }
          return x;
        },
        logit, scales[0], scales[1]);
  }
  template <class Lanes, class Rank>
  KVT_HD KVT_INLINE void store_weights(const Lanes& lanes, const typename Lanes::template Reg<Float4> (&logit)[eights],
                                       int left, bool add, Rank&& rank) const {
    typename Lanes::template Reg<float> weight[2] = {map(lanes, [](int) { return 0.f; }), map(lanes, [](int) { return 0.f; })};
    KVT_UNROLL_ON_DEVICE
    for (int e = 0; e < eights; ++e) {
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < 2; ++k) {
        weight[k] = map(
            lanes,
            [&](int lane, float sum, const Float4& x) {
              for (int c = 0; c < 2; ++c) {
                const int v = 8 * e + lane % 4 * 2 + c;
                sum += fast_exp2(x.x[2 * k + c] - shared.top[v]) * shared.share[v];
              }
              return sum;
            },
            weight[k], logit[e]);
      }
    }
    for (int mask = 1; mask < 4; mask *= 2) {
      for (auto& one : weight) {
        one = map(
            lanes, [](int, float a, float b) { return a + b; }, one, shuffle_xor(lanes, one, mask));
      }
    }
    map(
        lanes,
        [&](int lane, float low, float high) {
          for (int k = 0; k < 2 && lane % 4 == 0; ++k) {
            const int row = lane / 4 + 8 * k;
            if (row >= left) continue;
            float& to = mass[rank(row)];
            to = (add ? to : 0.f) + (k == 0 ? low : high);
          }
          return 0;
        },
        weight[0], weight[1]);
  }
};

}  // namespace kvt::inline v0
