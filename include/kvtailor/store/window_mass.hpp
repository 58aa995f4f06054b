// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// WindowMass: the weight that the last queries give to each row of a head, by one block of threads.
//
// Logits are fragments as in DecodeWarp, or lie as in RowWarp; up to 32 queries share each unpacked code. Rows are gone through
// twice, first for the maximum and the sum of each query, then for weights: nothing but a number for each row is written down.
// A query of tensor cores is two fp16 numbers an element, what rounding leaves of the first in the second, so that a logit is
// as good as in fp32.
// Error: of logits, 2^-24 of the sizes of the products, and that of keys (two bits: levels right to 5e-4; groups:
// elements right to 2^-11).
#pragma once

#include "kvtailor/store/device_queries.hpp"
#include "kvtailor/store/scored_rows.hpp"

namespace kvt::inline v0 {

// Rows: ScoredRows. largest: the largest weight that any of the queries gives a row, instead of the sum of all.
template <class Rows, bool largest = false>
struct WindowMass {
  using Key = typename Rows::Key;
  using Plain = typename Rows::Plain;
  using Body = typename Rows::Body;
  using Near = typename Rows::Near;
  static constexpr int dim = Rows::dim, warps = Rows::warps;
  static constexpr int eights = dim <= 128 ? 4 : 2, vectors = 8 * eights;  // queries at a time
  static constexpr bool in_blocks = Rows::in_blocks;
  static constexpr int table_bytes = Body::table_bytes;  // of fragments
  static constexpr int dynamic_bytes =
      in_blocks ? WarpBlock<typename Rows::Codec>::warps * WarpBlock<typename Rows::Codec>::bytes : table_bytes;
  // That registers are shared out among: codes beside the logits of so many queries need more than 128 a thread.
  static constexpr int blocks = std::is_same_v<Body, Near> && Body::fragments ? 2 : 1;

 private:
  struct Fragments {
    QueryFragments<dim> query[eights], rest[eights];
    float prepared[8 * dim];
  };
  static constexpr int of_body = Body::fragments ? 0 : max_basis_dim<Key>, of_near = Near::fragments ? 0 : dim;

 public:
  struct Shared {
    union {  // queries in the basis of the rows that are looked at
      std::conditional_t<Body::fragments || Near::fragments, Fragments, std::byte> fragments;
      float prepared[vectors * (of_body > of_near ? of_body : of_near) + 1];
    };
    float max[2][warps][vectors], sum[2][warps][vectors];  // of encoded rows, of dense ones
    float top[vectors], share[vectors];                    // of all rows: the maximum, and one over the sum, of 2^logit
    int position[vectors];
  };

  const Rows& rows;
  const DeviceQueries& queries;
  int head;
  Shared& shared;
  const std::byte* table;             // filled
  float* mass;                        // [rows]
  bool adds = false;                  // to what is there
  const float* sink_logit = nullptr;  // that takes a share too, unless null

  // The table, in dynamic_bytes that all warps share.
  template <class Block>
  KVT_HD static void fill_table(const Block& block, [[maybe_unused]] std::byte* table) {
    if constexpr (Body::fragments && dynamic_bytes > 0) {
      using Lanes = typename Block::Lanes;
      block.each_warp([&](const Lanes& lanes, int warp) {
        lanes.each([&](int lane) { Body::fill_tables(table, warp * Lanes::size + lane, warps * Lanes::size); });
      });
    }
  }

  KVT_HD int size() const { return queries.state[head].size; }
  KVT_HD int group() const { return queries.group; }
  KVT_HD int first_position() const { return queries.position(head, 0); }

  // The weights that query head g of the group gives to each row, summed over the queries: [rows], until the next call.
  template <class Block>
  KVT_HD const float* of_query_head(const Block& block, int g) const {
    using Lanes = typename Block::Lanes;
    for (int first = 0; first < size(); first += vectors) {
      const int m = size() - first < vectors ? size() - first : vectors;
      const bool add = adds || first > 0;
      block.each_warp([&](const Lanes& lanes, int warp) {
        if (warp != 0) return;
        lanes.each([&](int lane) {  // queries that are not there see nothing
          for (int v = lane; v < vectors; v += Lanes::size) shared.position[v] = v < m ? queries.position(head, first + v) : -1;
        });
      });
      KVT_LOOP_ON_DEVICE
      for (int pass = 0; pass < 2; ++pass) {
        pack<Body>(block, detail::key_codec<Key>(rows.body), g, first, m);
        block.each_warp([&](const Lanes& lanes, int warp) {
          const auto rank = [&](int r) { return rows.sinks + r; };
          if constexpr (in_blocks) {
            visit_blocks(lanes, warp, m, pass, add, rank);
          } else {
            visit<Key, Body>(lanes, warp, rows.body, rows.encoded, m, 0, pass, add, rank);
          }
        });
        pack<Near>(block, Plain{}, g, first, m);
        block.each_warp([&](const Lanes& lanes, int warp) {
          visit<Plain, Near>(lanes, warp, rows.near, rows.count - rows.encoded, m, 1, pass, add,
                             [&](int r) { return r < rows.sinks ? r : r + rows.encoded; });
        });
        if (pass == 0) join(block);
      }
    }
    return mass;
  }

 private:
  static constexpr float none = -std::numeric_limits<float>::infinity();
  // Weights of two queries.
  KVT_HD KVT_INLINE static float joined(float a, float b) { return largest ? std::fmax(a, b) : a + b; }
  // A softmax of each query over the rows that a lane has seen. own: queries of each eight that a lane has logits of.
  template <class Lanes, int own>
  struct State {
    using Reg = typename Lanes::template Reg<float>;
    static constexpr int count = own * eights;
    Reg max[count], sum[count];

    KVT_HD KVT_INLINE void start(const Lanes& lanes) {
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < count; ++k) {
        max[k] = map(lanes, [](int) { return none; });
        sum[k] = map(lanes, [](int) { return 0.f; });
      }
    }
    template <class... Logit>
    KVT_HD KVT_INLINE void add(const Lanes& lanes, int k, const Logit&... logit) {
      const Reg top = map(
          lanes,
          [](int, float m, auto... x) {
            ((m = std::fmax(m, x)), ...);
            return m;
          },
          max[k], logit...);
      sum[k] = map(
          lanes,
          [](int, float m, float now, float s, auto... x) {
            if (now == none) return 0.f;
            return s * fast_exp2(m - now) + (fast_exp2(x - now) + ...);
          },
          max[k], top, sum[k], logit...);
      max[k] = top;
    }
    // Over all lanes, to [vectors].
    KVT_HD KVT_INLINE void store(const Lanes& lanes, float* max_to, float* sum_to) {
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < count; ++k) {
        for (int mask = 8 / own; mask < 32; mask *= 2) {
          const Reg other_max = shuffle_xor(lanes, max[k], mask), other_sum = shuffle_xor(lanes, sum[k], mask);
          const Reg top = map(
              lanes, [](int, float a, float b) { return std::fmax(a, b); }, max[k], other_max);
          sum[k] = map(
              lanes,
              [](int, float a, float b, float now, float s, float other) {
                return now == none ? 0.f : s * fast_exp2(a - now) + other * fast_exp2(b - now);
              },
              max[k], other_max, top, sum[k], other_sum);
          max[k] = top;
        }
        map(
            lanes,
            [&](int lane, float own_max, float own_sum) {
              if (lane < 8 / own) {
                max_to[8 * (k / own) + own * lane + k % own] = own_max;
                sum_to[8 * (k / own) + own * lane + k % own] = own_sum;
              }
              return 0;
            },
            max[k], sum[k]);
      }
    }
  };

  // Queries `first` .. first + m - 1 in the basis of a codec; logits are times log2(e).
  template <class Layout, class Codec, class Block>
  KVT_HD void pack(const Block& block, const Codec& codec, int g, int first, int m) const {
    using Lanes = typename Block::Lanes;
    constexpr float log2e = 1.44269504f;
    const auto prepare = [&](const Lanes& lanes, int v, float* to) {
      const float* const query = queries.query(head, first + v) + static_cast<long long>(g) * dim;
      codec.prepare(lanes, query, queries.state[head].scale * log2e, to);
    };
    if constexpr (Layout::fragments) {
      auto& to = shared.fragments;
      for (int e = 0; e < eights; ++e) {
        block.each_warp([&](const Lanes& lanes, int warp) {
          if (8 * e + warp < m) prepare(lanes, 8 * e + warp, to.prepared + warp * dim);
        });
        block.each_warp([&](const Lanes& lanes, int warp) {
          to.query[e].template pack<typename Layout::Keys>(lanes, to.prepared, m - 8 * e, warp, warps, &to.rest[e]);
        });
      }
    } else {
      block.each_warp([&](const Lanes& lanes, int warp) {
        for (int v = warp; v < m; v += warps) prepare(lanes, v, shared.prepared + v * basis_dim(codec));
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
          const float sink = sink_logit != nullptr ? *sink_logit * 1.44269504f : none;
          float top = sink, total = 0;
          for (int w = 0; w < 2 * warps; ++w) top = std::fmax(top, shared.max[w / warps][w % warps][v]);
          for (int w = 0; w < 2 * warps && top != none; ++w) {
            total += shared.sum[w / warps][w % warps][v] * fast_exp2(shared.max[w / warps][w % warps][v] - top);
          }
          if (sink != none) total += fast_exp2(sink - top);
          shared.top[v] = top != none ? top : 0.f;
          shared.share[v] = total > 0 ? 1 / total : 0.f;
        }
      });
    });
  }
  // A warp's share of `count` rows: in the first pass to its maximum and sum of side `part`, in the second to the mass of row
  // rank(r).
  template <class Codec, class Layout, class Lanes, class Rank>
  KVT_HD void visit(const Lanes& lanes, int warp, const SlicePages& pages, int count, int m, int part, int pass, bool add,
                    Rank&& rank) const {
    State<Lanes, Layout::fragments ? 2 : 1> state;
    state.start(lanes);
    for (int slice = warp; slice * slice_rows < count; slice += warps) {
      const std::byte* const from = pages.at(slice, Layout::bytes);
      const int* const positions = pages.positions(slice, Layout::bytes);
      const int first = slice * slice_rows;
      const auto rank_of = [&](int r) { return rank(first + r); };
      if constexpr (Layout::fragments) {
        visit_fragments<Layout>(lanes, from, positions, count - first, state, pass, add, rank_of);
      } else {
        visit_rows<Codec>(lanes, from, positions, count - first, m, state, pass, add, rank_of);
      }
    }
    if (pass == 0) state.store(lanes, shared.max[part][warp], shared.sum[part][warp]);
  }
  // A slice, of which `left` rows are there.
  template <class Layout, class Lanes, class Rank>
  KVT_HD KVT_INLINE void visit_fragments(const Lanes& lanes, const std::byte* slice, const int* positions, int left,
                                         State<Lanes, 2>& state, int pass, bool add, Rank&& rank) const {
    using Reader = DecodeWarp<Layout, Lanes>;
    using Keys = typename Layout::Keys;
    const auto at = Reader::place(lanes, slice);
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
          mma(lanes, logit[e], a, part(shared.fragments.query[e], 0), part(shared.fragments.query[e], 1));
          mma(lanes, logit[e], a, part(shared.fragments.rest[e], 0), part(shared.fragments.rest[e], 1));
        }
      }
      KVT_UNROLL_ON_DEVICE
      for (int e = 0; e < eights; ++e) {
        finish<Layout>(lanes, scales, half, e, left - 16 * half, positions + 16 * half, logit[e]);
      }
      if (pass == 0) {
        KVT_UNROLL_ON_DEVICE
        for (int k = 0; k < 2 * eights; ++k) {
          const auto of_row = [&](int i) {
            return map(
                lanes, [i](int, const Float4& x) { return x.x[i]; }, logit[k / 2]);
          };
          state.add(lanes, k, of_row(k % 2), of_row(k % 2 + 2));
        }
      } else {
        store_weights(lanes, logit, left - 16 * half, add, [&](int r) { return rank(16 * half + r); });
      }
    });
  }
  // The same, where logits lie as in RowWarp.
  template <class Codec, class Lanes, class Rank>
  KVT_HD KVT_INLINE void visit_rows(const Lanes& lanes, const std::byte* slice, const int* positions, int left, int m,
                                    State<Lanes, 1>& state, int pass, bool add, Rank&& rank) const {
    using Reg = typename Lanes::template Reg<float>;
    const int last = left < slice_rows ? left - 1 : slice_rows - 1;
    KVT_LOOP_ON_DEVICE
    for (int row = 0; row <= last; row += 4) {
      FourRows<Codec, Lanes> keys(lanes, slice, row, last);
      const auto own_row = [=](int lane) { return row + lane / 8 < last ? row + lane / 8 : last; };
      const Reg scale = map(lanes, [=](int lane) { return Codec{}.row_scale(slice + own_row(lane) * Codec::row_bytes, 0); });
      Reg weight = map(lanes, [](int) { return 0.f; });
      KVT_UNROLL_ON_DEVICE
      for (int e = 0; e < eights; ++e) {
        const Reg product = map(
            lanes, [](int, float x, float by) { return x * by; },
            keys.products(lanes, shared.prepared + 8 * e * max_basis_dim<Codec>, m - 8 * e), scale);
        meet(
            lanes, product, e, row, last, [&](int r) { return positions[r]; }, state, pass, weight);
      }
      if (pass == 1) add_mass(lanes, weight, row, last, add, rank);
    }
  }
  // The same of a warp's share of blocks.
  template <class Lanes, class Rank>
  KVT_HD void visit_blocks(const Lanes& lanes, int warp, int m, int pass, bool add, Rank&& rank) const {
    using Own = WarpBlock<typename Rows::Codec>;
    const auto& stream = rows.body;
    Own& own = Own::of(rows.memory, warp);
    const int length = basis_dim(stream.keys), pages = warp < Own::warps ? stream.pages_of(*stream.bytes) : 0;
    State<Lanes, 1> state;
    state.start(lanes);
    for (int p = warp; p < pages; p += Own::warps) {
      stream.each_record(p, [&](int offset, const BlockRecord& record) {
        stream.read(lanes, offset + record.keys_at(), record.key_bytes, own.block);
        for (int e = 0; 8 * e < m; ++e) {
          const int some = m - 8 * e < 8 ? m - 8 * e : 8;
          stream.keys.logits(lanes, own.block, record.rows, shared.prepared + 8 * e * length, some, own.logit[0],
                             BlockRecord::most_rows);
          const int last = record.rows - 1;
          for (int row = 0; row <= last; row += 4) {
            const auto product = map(lanes, [&](int lane) {
              return lane % 8 < some && row + lane / 8 <= last ? own.logit[lane % 8][row + lane / 8] : 0.f;
            });
            auto weight = map(lanes, [](int) { return 0.f; });
            meet(
                lanes, product, e, row, last, [&](int r) { return stream.position(offset, r); }, state, pass, weight);
            if (pass == 1) {
              add_mass(lanes, weight, row, last, add || e > 0, [&](int r) { return rank(record.first_row + r); });
            }
          }
          lanes.each([](int) {});  // all have read the logits
        }
      });
    }
    if (pass == 0) state.store(lanes, shared.max[0][warp], shared.sum[0][warp]);
  }
  // Products of rows row .. row + 3, none after `last`, with vectors 8 e .. 8 e + 7, as RowWarp has them: to the state, or as
  // weights.
  template <class Lanes, class Position>
  KVT_HD KVT_INLINE void meet(const Lanes& lanes, const typename Lanes::template Reg<float>& product, int e, int row, int last,
                              Position&& position, State<Lanes, 1>& state, int pass,
                              typename Lanes::template Reg<float>& weight) const {
    const float cap = queries.state[head].soft_cap * 1.44269504f;
    const auto logit = map(
        lanes,
        [&](int lane, float x) {
          if (cap > 0) x = cap * std::tanh(x / cap);
          const int own = row + lane / 8;
          return own <= last && sees(8 * e + lane % 8, position(own)) ? x : none;
        },
        product);
    if (pass == 0) {
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < eights; ++k) {  // registers have no index
        if (k == e) state.add(lanes, k, logit);
      }
    } else {
      weight = map(
          lanes,
          [&](int lane, float sum, float x) {
            const int v = 8 * e + lane % 8;
            return joined(sum, fast_exp2(x - shared.top[v]) * shared.share[v]);
          },
          weight, logit);
    }
  }
  template <class Lanes, class Rank>
  KVT_HD KVT_INLINE void add_mass(const Lanes& lanes, typename Lanes::template Reg<float> weight, int row, int last, bool add,
                                  Rank&& rank) const {
    for (int mask = 1; mask < 8; mask *= 2) {
      weight = map(
          lanes, [](int, float a, float b) { return joined(a, b); }, weight, shuffle_xor(lanes, weight, mask));
    }
    map(
        lanes,
        [&](int lane, float all) {
          if (lane % 8 != 0 || row + lane / 8 > last) return 0;
          float& to = mass[rank(row + lane / 8)];
          to = joined(add ? to : 0.f, all);
          return 0;
        },
        weight);
  }
  KVT_HD KVT_INLINE bool sees(int v, int at) const {
    const int own = shared.position[v], sliding = queries.state[head].sliding;
    return at <= own && (sliding <= 0 || at > own - sliding);
  }
  // Products to logits: scaled, capped, and -infinity where a row is not there or not seen. `left`: rows from the first on.
  template <class Layout, class Lanes>
  KVT_HD KVT_INLINE void finish(const Lanes& lanes, const typename Lanes::template Reg<std::uint32_t> (&scales)[4], int half,
                                int e, int left, const int* positions, typename Lanes::template Reg<Float4>& logit) const {
    using Keys = typename Layout::Keys;
    const float cap = queries.state[head].soft_cap * 1.44269504f;
    logit = map(
        lanes,
        [&](int lane, Float4 x, std::uint32_t first, std::uint32_t second) {
          const Float4 by = Keys::scales(first, second);
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, vector = lane % 4 * 2 + i % 2;
            const float scale = half == 0 ? by.x[i / 2] : by.x[2 + i / 2];
            x.x[i] *= scale * (shared.fragments.query[e].unit[vector] * Keys::unit);
            if (cap > 0) x.x[i] = cap * std::tanh(x.x[i] / cap);
            if (row >= left || !sees(8 * e + vector, positions[row])) x.x[i] = none;
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
                sum = joined(sum, fast_exp2(x.x[2 * k + c] - shared.top[v]) * shared.share[v]);
              }
              return sum;
            },
            weight[k], logit[e]);
      }
    }
    for (int mask = 1; mask < 4; mask *= 2) {
      for (auto& one : weight) {
        one = map(
            lanes, [](int, float a, float b) { return joined(a, b); }, one, shuffle_xor(lanes, one, mask));
      }
    }
    map(
        lanes,
        [&](int lane, float low, float high) {
          for (int k = 0; k < 2 && lane % 4 == 0; ++k) {
            const int row = lane / 4 + 8 * k;
            if (row >= left) continue;
            float& to = mass[rank(row)];
            to = joined(add ? to : 0.f, k == 0 ? low : high);
          }
          return 0;
        },
        weight[0], weight[1]);
  }
};

}  // namespace kvt::inline v0
