// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Curve: how many rows a head keeps was found out beforehand, for every budget.
//
// Rule:    a table says what share of its rows each head drops when i of steps + 1 parts are dropped on the whole; the nearest
// i
//          is taken, and what heads keep by it is scaled to the budget.
// Needs:   the table, from a file.  Cost: O(heads log heads).
// Source:  LU-KV, arXiv 2602.08585, whose tables [99, num_layers, num_kv_heads] are read as they are published (.npy): see
//          read_table() in io/table.hpp. Its code scales within each layer.
#pragma once

#include <new>
#include <vector>

#include "kvtailor/budget/apportion.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/geometry.hpp"

namespace kvt::inline v0 {

struct Curve {
  static constexpr EvidenceSet needs = {};
  std::vector<float> dropped;  // [steps, num_layers, num_kv_heads], 0 .. 1

  Status check(const Geometry& shape) const noexcept {
    const auto heads = static_cast<std::size_t>(shape.num_heads());
    if (dropped.empty() || dropped.size() % heads != 0) {
      return error(Errc::bad_shape, "the curve has {} numbers; it must have some for each of {} heads",
                   static_cast<double>(dropped.size()), shape.num_heads());
    }
    for (const float share : dropped) {
      if (!(share >= 0 && share <= 1)) {
        return error(Errc::bad_value, "the curve drops {} of a head's rows; it must be between 0 and 1",
                     static_cast<double>(share));
      }
    }
    return success();
  }
  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept try {
    const auto steps = static_cast<double>(dropped.size() / keep.size());
    double rows = 0;
    for (const int n : want.seen) rows += n;
    const double share = rows > 0 ? 1 - static_cast<double>(want.total) / rows : 0;
    const double step = std::clamp(std::round(share * (steps + 1)), 1.0, steps);
    const float* const table = dropped.data() + static_cast<std::size_t>(step - 1) * keep.size();
    std::vector<double> weight(keep.size());
    for (std::size_t h = 0; h < keep.size(); ++h) {
      weight[h] = std::max(1e-9, (1 - static_cast<double>(table[h])) * want.seen[h]);
    }
    apportion(want, weight, keep);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }
};

static_assert(BudgetAllocator<Curve>);

}  // namespace kvt::inline v0
