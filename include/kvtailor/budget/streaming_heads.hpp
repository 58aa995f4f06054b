// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// StreamingHeads: some heads keep everything, the others a few rows.
//
// Rule:    every head is given `rows` rows; what is left goes to the heads with the highest gates, each as much as it has. With
//          SinkRecent the others are streaming heads: first and newest rows.
// Needs:   gates, one a head, from a file. Cost: O(heads log heads).
// Source:  DuoAttention, Xiao et al., arXiv 2410.10819, which publishes gates for several models as tables of text
//          ("full_attention_heads.tsv", a line a layer): see read_table() in io/table.hpp.
#pragma once

#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "kvtailor/budget/apportion.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/geometry.hpp"

namespace kvt::inline v0 {

struct StreamingHeads {
  static constexpr EvidenceSet needs = {};
  std::vector<float> gates;  // [num_layers, num_kv_heads]; higher: the head needs its rows
  int rows = 384;            // of a streaming head, sinks and recent rows with them, as far as the budget goes

  Status check(const Geometry& shape) const noexcept {
    if (rows < 0) return error(Errc::bad_value, "rows is {}; it must be zero or more", rows);
    if (gates.size() != static_cast<std::size_t>(shape.num_heads())) {
      return error(Errc::bad_shape, "there are {} gates; the cache has {} heads", static_cast<double>(gates.size()),
                   shape.num_heads());
    }
    for (const float gate : gates) {
      if (gate != gate) return error(Errc::bad_value, "a gate is {}; it must be a number", static_cast<double>(gate));
    }
    return success();
  }
  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept try {
    std::int64_t left = want.total;
    for (std::size_t h = 0; h < keep.size(); ++h) left -= keep[h] = std::clamp(rows, want.floor[h], want.seen[h]);
    if (left < 0) {
      // Not even those: an even share, but no head above its rows.
      const std::vector<double> weight(keep.size(), 1.0);
      const std::vector<std::int64_t> lower(want.floor.begin(), want.floor.end()), upper(keep.begin(), keep.end());
      std::vector<std::int64_t> share(keep.size());
      apportion(want.total, weight, lower, upper, share);
      std::copy(share.begin(), share.end(), keep.begin());
      return success();
    }
    std::vector<std::size_t> order(keep.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return gates[a] > gates[b]; });
    for (const std::size_t h : order) {
      const auto more = std::min<std::int64_t>(left, want.seen[h] - keep[h]);
      keep[h] += static_cast<int>(more);
      left -= more;
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }
};

static_assert(BudgetAllocator<StreamingHeads>);

}  // namespace kvt::inline v0
