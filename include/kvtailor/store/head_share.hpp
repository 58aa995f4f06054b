// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// How many rows of heads stay, on a device, where the highest scores of a layer decide (budget/adaptive.hpp):
//   SafeRowsWork    which rows a head keeps whatever other heads have, by one block of threads a head
//   ShareRowsWork   the rows that are left to a layer go to the highest other scores, by one block of threads a layer
// Of equal scores the lower row comes first, then the lower head: the counts are those of the host.
#pragma once

#include "kvtailor/store/head_score.hpp"

namespace kvt::inline v0 {

struct SafeRowsWork {
  static constexpr int warps = 8, blocks = 1, dynamic_bytes = 0;
  using Shared = detail::ScoreRanks<warps>::Shared;

  DeviceHeads heads;
  const int* keep;      // [heads], rows a head is safe for
  const float* scores;  // [heads, stride]
  long long stride;
  HighestRows* safe;  // [heads]

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, std::byte*) const {
    using Ranks = detail::ScoreRanks<warps>;
    const int n = heads.near_rows[h] + heads.body_rows[h], wanted = keep[h] < n ? keep[h] : n;
    const float* const score = scores + h * stride;
    Ranks ranks(shared);
    const HighestRows last = ranks.highest(block, score, n, wanted);
    block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
      if (warp == 0) lanes.once([&] { safe[h] = last; });
    });
  }
};

struct ShareRowsWork {
  static constexpr int warps = 8, blocks = 1, dynamic_bytes = 0;
  using Shared = detail::ScoreRanks<warps>::Shared;

  DeviceHeads heads;
  int num_kv_heads;
  const HighestRows* safe;   // [heads]
  const std::int64_t* left;  // [layers], rows besides those
  const float* scores;       // [heads, stride]
  long long stride;
  int* keep;  // [heads]: rows a head is safe for become those it keeps

  template <class Block>
  KVT_HD void operator()(const Block& block, int layer, Shared& shared, std::byte*) const {
    using Ranks = detail::ScoreRanks<warps>;
    const int first = layer * num_kv_heads, last = first + num_kv_heads;
    // How many of a thread's rows of heads from .. to are not safe, and chosen(rank, row).
    const auto count_free = [&](int from, int to, int thread, int step, auto chosen) {
      int own = 0;
      for (int h = from; h < to; ++h) {
        const HighestRows kept = safe[h];
        for (int r = thread; r < rows_of(h); r += step) {
          const std::uint32_t rank = Ranks::rank(scores[h * stride + r]);
          own += !kept.has(rank, r) && chosen(rank, r) ? 1 : 0;
        }
      }
      return own;
    };
    std::int64_t free_rows = 0;
    int most_rows = 0;
    for (int h = first; h < last; ++h) {
      free_rows += rows_of(h) - keep[h];
      most_rows = rows_of(h) > most_rows ? rows_of(h) : most_rows;
    }
    const auto wanted = static_cast<int>(left[layer] < free_rows ? left[layer] : free_rows);
    if (wanted <= 0) return;
    Ranks ranks(shared);
    const std::uint32_t threshold = ranks.threshold(block, wanted, [&](std::uint32_t least, int thread, int step) {
      return count_free(first, last, thread, step, [&](std::uint32_t rank, int) { return rank >= least; });
    });
    const int above = ranks.count(block, [&](int thread, int step) {
      return count_free(first, last, thread, step, [&](std::uint32_t rank, int) { return rank > threshold; });
    });
    // Of equal rows those before `row` are taken, and of those at it the first heads'.
    const auto equal_before = [&](int before, int thread, int step) {
      return count_free(first, last, thread, step, [&](std::uint32_t rank, int r) { return rank == threshold && r < before; });
    };
    const int row = ranks.last_with_fewer(block, most_rows, wanted - above, equal_before);
    int at_row = wanted - above - ranks.count(block, [&](int thread, int step) { return equal_before(row, thread, step); });
    for (int h = first; h < last; ++h) {
      int more = ranks.count(block, [&](int thread, int step) {
        return count_free(h, h + 1, thread, step,
                          [&](std::uint32_t rank, int r) { return rank > threshold || (rank == threshold && r < row); });
      });
      if (at_row > 0 && row < rows_of(h)) {
        const std::uint32_t rank = Ranks::rank(scores[h * stride + row]);
        if (rank == threshold && !safe[h].has(rank, row)) {
          ++more;
          --at_row;
        }
      }
      block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
        if (warp == 0) lanes.once([&] { keep[h] += more; });
      });
    }
  }

 private:
  KVT_HD KVT_INLINE int rows_of(int h) const { return heads.near_rows[h] + heads.body_rows[h]; }
};

}  // namespace kvt::inline v0
