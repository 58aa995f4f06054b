// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Which rows of heads stay, on a device, by one block of threads a head:
//   ScoreWork   scores of a token selector; rows that are never dropped get infinity
//   JoinWork    the same of a selector whose heads decide together, out of the scores of all heads of the layer
//   MarkWork    the rows with the highest scores, the first of equal ones: see cut() in store/cut.hpp
//
// A selector that works on a device has, beside score() for the host:
//   Shared<size, warps>                             memory that the warps share; a key takes up to `size` elements while it is
//   read score_on_device(block, rows, shared, scores)    rows: see ScoredRows
// or, if it needs queries,
//   score_on_device(block, rows, window, shared, scores)    window: see WindowMass; it has one query or more
// and, if its heads decide together,
//   joined(layer, head, position, score)    a row's score once all heads of the layer have theirs: see ScoredLayer
// and, if not all it may be told makes sense, check(), which returns a Status.
#pragma once

#include <limits>

#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/half.hpp"
#include "kvtailor/store/stream_work.hpp"
#include "kvtailor/store/window_mass.hpp"

namespace kvt::inline v0 {

// The rows of a head in the order of their positions, wherever they are stored.
template <class KvCodec>
struct ScoredRows {
  using Codec = KvCodec;
  using Key = typename Codec::key_type;
  using Plain = typename Codec::near_type;
  using Body = LayoutOf<Key, typename Codec::value_type>;
  using Near = DenseLayoutOf<Plain>;
  static constexpr bool in_blocks = lies_in_blocks<Codec>;
  static constexpr int dim = Key::head_dim, basis = max_basis_dim<Key>, warps = 8;

  int layer, kv_head;
  const SlicePages& near;
  const typename Body::Pages& body;
  std::byte* memory;  // where rows lie in blocks: WarpBlock [WarpBlock::warps]
  int sinks, encoded, count;

  KVT_HD ScoredRows(const HeadsOf<Codec>& heads, int num_kv_heads, int h, std::byte* dynamic)
      : layer(h / num_kv_heads),
        kv_head(h % num_kv_heads),
        near(heads.near[h]),
        body([&]() -> const auto& {
          if constexpr (in_blocks) {
            return heads.stream[h];
          } else {
            return heads.body[h];
          }
        }()),
        memory(dynamic),
        sinks(heads.near_rows[h] < heads.sink_rows ? heads.near_rows[h] : heads.sink_rows),
        encoded(heads.body_rows[h]),
        count(heads.near_rows[h] + heads.body_rows[h]) {}

  KVT_HD bool is_encoded(int r) const { return r >= sinks && r < sinks + encoded; }
  KVT_HD int place(int r) const { return is_encoded(r) ? r - sinks : r < sinks ? r : r - encoded; }
  KVT_HD int position(int r) const {
    const int at = place(r), slice = at / slice_rows;
    if (!is_encoded(r)) return near.positions(slice, Near::bytes)[at % slice_rows];
    if constexpr (in_blocks) {
      const int offset = body.find(at);
      return body.position(offset, at - body.record(offset).first_row);
    } else {
      return body.positions(slice, Body::bytes)[at % slice_rows];
    }
  }
  // How many rows come before a position.
  KVT_HD int rows_before(int at) const {
    int first = 0, last = count;
    while (first < last) {
      const int middle = first + (last - first) / 2;
      if (position(middle) < at) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }
  // f(r) of a warp's share of the rows, with key r at `to` [dim], and more that has no meaning up to [basis], as the key codec
  // turns rows: angles and lengths are those of keys as they came.
  template <class Lanes, class F>
  KVT_HD void each_key(const Lanes& lanes, int warp, float* to, F&& f) const {
    for (int r = warp; r < count; r += warps) {
      const int slice = place(r) / slice_rows, row = place(r) % slice_rows;
      if (!is_encoded(r)) {
        dense_key(lanes, near.at(slice, Near::bytes), row, to);
      } else if constexpr (in_blocks) {
        continue;
      } else {
        encoded_key(lanes, body.at(slice, Body::bytes), row, to);
      }
      f(r);
    }
    if constexpr (in_blocks) {
      if (warp >= WarpBlock<Codec>::warps) return;
      std::byte* const block = WarpBlock<Codec>::of(memory, warp).block;
      const int pages = body.pages_of(*body.bytes);
      for (int p = warp; p < pages; p += WarpBlock<Codec>::warps) {
        body.each_record(p, [&](int offset, const BlockRecord& record) {
          body.read(lanes, offset + record.keys_at(), record.key_bytes, block);
          for (int i = 0; i < record.rows; ++i) {
            body.keys.row_of(lanes, block, record.rows, i, to);
            f(sinks + record.first_row + i);
          }
        });
      }
    }
  }

 private:
  template <class Lanes>
  KVT_HD void dense_key(const Lanes& lanes, const std::byte* slice, int row, float* to) const {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) {
        typename Plain::Element x;
        std::memcpy(&x, slice + Near::template dense_at<true>(row, d), sizeof x);
        to[d] = to_float(x);
      }
    });
    detail::key_codec<Key>(body).prepare(lanes, to, 1.f, to);
  }
  template <class Lanes>
  KVT_HD static void encoded_key(const Lanes& lanes, const std::byte* slice, int row, float* to) {
    if constexpr (Body::fragments) {
      const auto byte = [&](int k) { return std::to_integer<unsigned char>(slice[Body::template scale_at<true>(row, k)]); };
      const float scale = FragmentsOf<Key>::scale(byte);
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) {
          to[d] = scale * FragmentsOf<Key>::value([&](int e) { return Body::template element<true>(slice, row, e); }, byte, d);
        }
      });
    } else {
      Key{}.row_of(lanes, slice + row * Key::row_bytes, 1, 0, to);
    }
  }
};

// All heads of a layer, after each was scored.
template <class Codec>
struct ScoredLayer {
  const HeadsOf<Codec>& heads;
  int first, num_heads;  // heads of the model
  const float* scores;   // of the layer's first head
  long long stride;

  KVT_HD ScoredRows<Codec> rows(int h) const { return {heads, num_heads, first + h, nullptr}; }
  KVT_HD float score(int h, int r) const { return scores[h * stride + r]; }
};

template <class Selector>
inline constexpr bool joins_on_device = JoinsHeads<Selector>;

namespace detail {

// Rows that are never dropped get infinity.
template <class Block, class Rows>
KVT_HD void protect_rows(const Block& block, const Rows& rows, int recent_rows, float* own) {
  const int recent = rows.count - rows.sinks < recent_rows ? rows.count - rows.sinks : recent_rows;
  block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
    if (warp != 0) return;
    lanes.each([&](int lane) {
      for (int r = lane; r < rows.sinks + recent; r += Block::Lanes::size) {
        own[r < rows.sinks ? r : rows.count - 1 - (r - rows.sinks)] = std::numeric_limits<float>::infinity();
      }
    });
  });
}

}  // namespace detail

// One block a head.
template <class Codec, class Selector>
struct JoinWork {
  static constexpr int warps = 8, blocks = 1, dynamic_bytes = 0;
  struct Shared {};

  HeadsOf<Codec> heads;
  Selector selector;
  int num_kv_heads;
  const float* scores;  // [heads, stride]
  float* joined;        // likewise
  long long stride;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared&, std::byte*) const {
    using Lanes = typename Block::Lanes;
    const int first = h / num_kv_heads * num_kv_heads;
    const ScoredLayer<Codec> layer{heads, first, num_kv_heads, scores + first * stride, stride};
    const ScoredRows<Codec> rows = layer.rows(h - first);
    float* const own = joined + h * stride;
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        for (int r = warp * Lanes::size + lane; r < rows.count; r += warps * Lanes::size) {
          own[r] = selector.joined(layer, h - first, rows.position(r), layer.score(h - first, r));
        }
      });
    });
    detail::protect_rows(block, rows, heads.recent_rows, own);
  }
};

template <class Codec, class Selector>
struct ScoreWork {
  using Rows = ScoredRows<Codec>;
  using Window = WindowMass<Rows>;
  static constexpr bool needs_queries = EvidenceSet(Selector::needs).has(Evidence::window_queries);
  static constexpr int warps = Rows::warps, blocks = needs_queries ? Window::blocks : 1,
                       dynamic_bytes = Rows::in_blocks ? WarpBlock<Codec>::warps * WarpBlock<Codec>::bytes
                                       : needs_queries ? Window::table_bytes
                                                       : 0;
  struct Shared {
    typename Selector::template Shared<Rows::basis, warps> own;
    std::conditional_t<needs_queries, typename Window::Shared, std::byte> window;
  };

  HeadsOf<Codec> heads;
  Selector selector;
  int num_kv_heads;
  float* scores;  // [heads, stride]
  long long stride;
  DeviceQueries queries;  // if the selector needs them
  float* mass;            // [heads, stride], likewise

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, [[maybe_unused]] std::byte* table) const {
    using Lanes = typename Block::Lanes;
    const Rows rows(heads, num_kv_heads, h, table);
    float* const own = scores + h * stride;
    if constexpr (needs_queries) {
      if constexpr (Rows::Body::fragments && dynamic_bytes > 0) {
        block.each_warp([&](const Lanes& lanes, int warp) {
          lanes.each([&](int lane) { Rows::Body::fill_tables(table, warp * Lanes::size + lane, warps * Lanes::size); });
        });
      }
      const Window window{rows, queries, h, shared.window, table, mass + h * stride};
      selector.score_on_device(block, rows, window, shared.own, own);
    } else {
      selector.score_on_device(block, rows, shared.own, own);
    }
    if constexpr (!joins_on_device<Selector>) detail::protect_rows(block, rows, heads.recent_rows, own);
  }
};

namespace detail {

// Counts by all threads of a block, of scores in the order of their ranks.
template <int warps>
class ScoreRanks {
 public:
  // What warps counted is read while the next count is made: there are two.
  struct Shared {
    int count[2][warps];
  };
  KVT_HD explicit ScoreRanks(Shared& shared) : shared_(shared) {}

  // Unsigned numbers in the order of floats; zeros are equal.
  KVT_HD KVT_INLINE static std::uint32_t rank(float x) {
    const std::uint32_t bits = bits_from_float(x + 0.f);
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  }
  // The sum of own(thread, threads).
  template <class Block, class Own>
  KVT_HD int count(const Block& block, Own own) {
    turn_ = 1 - turn_;
    block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
      constexpr int size = Block::Lanes::size;
      typename Block::Lanes::template Reg<int> part;
      lanes.each([&](int lane) { part[lane] = own(warp * size + lane, warps * size); });
      const int all = lanes.sum(part);
      lanes.once([&] { shared_.count[turn_][warp] = all; });
    });
    int all = 0;
    for (int w = 0; w < warps; ++w) all += shared_.count[turn_][w];
    return all;
  }
  // The highest rank that at least `wanted` scores reach, bit by bit: reaching(rank, thread, threads) counts them.
  template <class Block, class Reaching>
  KVT_HD std::uint32_t threshold(const Block& block, int wanted, Reaching reaching) {
    std::uint32_t least = 0;
    for (std::uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
      if (count(block, [&](int thread, int step) { return reaching(least | bit, thread, step); }) >= wanted) least |= bit;
    }
    return least;
  }
  // The last row of n > 0 before which there are fewer than `wanted` > 0: fewer(row, thread, threads) counts those before it.
  template <class Block, class Before>
  KVT_HD int last_with_fewer(const Block& block, int n, int wanted, Before before) {
    int row = 0;
    for (int bit = 1 << 30; bit != 0; bit >>= 1) {
      if (bit < n - row && count(block, [&](int thread, int step) { return before(row + bit, thread, step); }) < wanted)
        row += bit;
    }
    return row;
  }

 private:
  Shared& shared_;
  int turn_ = 0;
};

}  // namespace detail

// One block for each head: marks [heads, stride] of its rows become 1 for the keep[h] that stay, and 0.
struct MarkWork {
  static constexpr int warps = 8, blocks = 1, dynamic_bytes = 0;
  using Shared = detail::ScoreRanks<warps>::Shared;

  DeviceHeads heads;
  const int* keep;      // [heads]
  const float* scores;  // [heads, stride]
  unsigned char* marks;
  long long stride;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, std::byte*) const {
    using Lanes = typename Block::Lanes;
    using Ranks = detail::ScoreRanks<warps>;
    const int n = heads.near_rows[h] + heads.body_rows[h], wanted = keep[h] < n ? keep[h] : n;
    const float* const score = scores + h * stride;
    unsigned char* const mark = marks + h * stride;
    Ranks ranks(shared);
    const auto reaching = [&](std::uint32_t least, int thread, int step) {
      int own = 0;
      for (int r = thread; r < n; r += step) own += Ranks::rank(score[r]) >= least ? 1 : 0;
      return own;
    };
    const std::uint32_t threshold = ranks.threshold(block, wanted, reaching);
    const int above = threshold == 0xffffffffu
                          ? 0
                          : ranks.count(block, [&](int thread, int step) { return reaching(threshold + 1, thread, step); });
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        for (int r = warp * Lanes::size + lane; r < n; r += warps * Lanes::size) {
          mark[r] = Ranks::rank(score[r]) > threshold ? 1 : 0;
        }
      });
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp != 0) return;
      for (int first = 0, left = wanted - above; first < n && left > 0; first += Lanes::size) {
        typename Lanes::template Reg<int> own, before;
        lanes.each([&](int lane) {
          own[lane] = before[lane] = first + lane < n && Ranks::rank(score[first + lane]) == threshold ? 1 : 0;
        });
        lanes.exclusive_scan(before);
        const int equal = lanes.shuffle(before, Lanes::size - 1) + lanes.shuffle(own, Lanes::size - 1);
        lanes.each([&](int lane) {
          if (own[lane] != 0 && before[lane] < left) mark[first + lane] = 1;
        });
        left -= equal;
      }
    });
  }
};

}  // namespace kvt::inline v0
