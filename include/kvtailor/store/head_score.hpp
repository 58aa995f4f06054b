// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Which rows of heads stay, on a device, by one block of threads a head:
//   ScoreWork   scores of a token selector; rows that are never dropped get infinity
//   JoinWork    the same of a selector whose heads decide together, out of the scores of all heads of the layer
//   LayerEndsWork      where the rows end, and those begin that a cut lets stay whatever their scores
//   MarkWork    the rows with the highest scores, the first of equal ones: see cut() in store/cut.hpp
//
// A selector that works on a device has, beside score() for the host:
//   Shared<size, warps>                          memory that the warps share; a row takes up to `size` elements while it is
//   read score_on_device(block, rows, shared, scores)    rows: see ScoredRows; with its queries if it needs them, see
//   QueriedRows
// and, if its heads decide together,
//   joined(layer, head, position, score)    a row's score once all heads of the layer have theirs: see ScoredLayer
// and, if it goes by attention (AttentionSelector),
//   attention_on_device(block, rows, shared, out), first_kept_on_device(rows)
// and, if it may find that it cannot score a head's rows, and sets rows.evidence.refused of it then,
//   refusal()    the Status of that
// and, if it needs numbers from the host,
//   device_table(head_dim)    a vector of floats: rows.evidence.table
// and, if it needs memory of the device while it works,
//   device_space(head_dim, rows)    bytes for a head of so many rows: ScoredRows::space()
// and, if not all it may be told makes sense, check() or check(geometry), which return a Status. One that scores by
// HeadEvidence::chosen_before where that is not 0, without queries, says so by `slides`.
#pragma once

#include <limits>

#include "kvtailor/core/concepts.hpp"
#include "kvtailor/store/score_ranks.hpp"
#include "kvtailor/store/scored_rows.hpp"
#include "kvtailor/store/window_mass.hpp"

namespace kvt::inline v0 {

// Rows with the queries of their head, one or more: see WindowMass. What these do uses up what a selector has in its shared
// memory.
template <class Codec>
struct QueriedRows : ScoredRows<Codec> {
  const WindowMass<ScoredRows<Codec>>& window;
};

// All heads of a layer, after each was scored.
template <class Codec>
struct ScoredLayer {
  const HeadsOf<Codec>& heads;
  const DeviceEvidence& evidence;
  int first, num_heads;  // heads of the model
  const float* scores;   // of the layer's first head
  long long stride;

  KVT_HD ScoredRows<Codec> rows(int h) const { return {heads, num_heads, first + h, nullptr, evidence}; }
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
    const DeviceEvidence evidence{};
    const ScoredLayer<Codec> layer{heads, evidence, first, num_kv_heads, scores + first * stride, stride};
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
  union Shared {
    typename Selector::template Shared<Rows::basis, warps> own;
    std::conditional_t<needs_queries, typename Window::Shared, std::byte> window;
  };

  HeadsOf<Codec> heads;
  Selector selector;
  DeviceEvidence evidence;
  int num_kv_heads;
  float* scores;  // [heads, stride]
  long long stride;
  DeviceQueries queries;  // if the selector needs them
  float* mass;            // [heads, stride], likewise

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, [[maybe_unused]] std::byte* table) const {
    const Rows rows(heads, num_kv_heads, h, table, evidence);
    float* const own = scores + h * stride;
    if constexpr (needs_queries) {
      Window::fill_table(block, table);
      const Window window{rows, queries, h, shared.window, table, mass + h * stride};
      selector.score_on_device(block, QueriedRows<Codec>{rows, window}, shared.own, own);
    } else {
      selector.score_on_device(block, rows, shared.own, own);
    }
    if constexpr (!joins_on_device<Selector>) detail::protect_rows(block, rows, heads.recent_rows, own);
  }
};

// One block for each layer.
template <class Codec>
struct LayerEndsWork {
  static constexpr int warps = 1, blocks = 1, dynamic_bytes = 0;
  struct Shared {};

  HeadsOf<Codec> heads;
  int num_kv_heads;
  LayerEnds* ends;  // [layers]

  template <class Block>
  KVT_HD void operator()(const Block& block, int layer, Shared&, std::byte*) const {
    block.each_warp([&](const typename Block::Lanes& lanes, int) {
      lanes.once([&] {
        const DeviceEvidence evidence{};
        int end = 0, first = std::numeric_limits<int>::max();
        for (int h = layer * num_kv_heads; h < (layer + 1) * num_kv_heads; ++h) {
          const ScoredRows<Codec> rows(heads, num_kv_heads, h, nullptr, evidence);
          const int dense = rows.count - rows.encoded - rows.sinks,
                    recent = dense < heads.recent_rows ? dense : heads.recent_rows;
          const int last = rows.count > 0 ? rows.position(rows.count - 1) + 1 : 0;
          const int own = recent > 0 ? rows.position(rows.count - recent) : first;
          end = last > end ? last : end;
          first = own < first ? own : first;
        }
        ends[layer] = {first < end ? first : end, end};
      });
    });
  }
};

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
