// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Curve: how many rows a head keeps was found out beforehand, for every budget.
//
// Rule:    a table says what share of its rows each head drops when i of steps + 1 parts are dropped on the whole, and between
//          two steps what lies between. Rows that always stay are not counted; all others ever appended to a layer are, so that
//          a cut of what an earlier one left leaves what one cut would have.
// Needs:   the table, from a file.  Cost: O(heads log heads).
// Source:  LU-KV, arXiv 2602.08585, whose tables [99, num_layers, num_kv_heads] are read as they are published (.npy): see
//          io/table.hpp. Its code takes the nearest step and scales within each layer. learn/marginal_utility.hpp makes tables.
#pragma once

#include <new>
#include <string>
#include <vector>

#include "kvtailor/budget/apportion.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/geometry.hpp"

namespace kvt::inline v0 {

struct Curve {
  static constexpr EvidenceSet needs = {};
  std::vector<float> dropped;            // [steps, num_layers, num_kv_heads], 0 .. 1
  int num_layers = 0, num_kv_heads = 0;  // of the model it was made for; 0: not known
  std::string selector = {};             // it was made for, by its name with all parameters; empty: not known

  Status check(const Geometry& shape) const noexcept {
    const auto heads = static_cast<std::size_t>(shape.num_heads());
    if (dropped.empty() || dropped.size() % heads != 0) {
      return error(Errc::bad_shape, "the curve has {} numbers; it must have some for each of {} heads",
                   static_cast<double>(dropped.size()), shape.num_heads());
    }
    if (num_layers != 0 && num_layers != shape.num_layers) {
      return error(Errc::bad_shape, "the curve is of a model with {} layers; this one has {}", num_layers, shape.num_layers);
    }
    if (num_kv_heads != 0 && num_kv_heads != shape.num_kv_heads) {
      return error(Errc::bad_shape, "the curve is of a model with {} KV heads; this one has {}", num_kv_heads,
                   shape.num_kv_heads);
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
    const std::size_t heads = keep.size(), steps = dropped.size() / heads;
    const FreeRows free(want);
    const double at = std::max(0.0, (1 - free.retention()) * static_cast<double>(steps + 1));
    const auto step = std::min(static_cast<std::size_t>(at), steps);
    std::vector<double> kept(heads);
    for (std::size_t h = 0; h < heads; ++h) {
      // Nothing is dropped before the first step, and all after the last.
      const auto row = [&](std::size_t s) { return static_cast<double>(dropped[(s - 1) * heads + h]); };
      const double before = step == 0 ? 0 : row(step), after = step == steps ? 1 : row(step + 1);
      kept[h] = 1 - std::lerp(before, after, at - static_cast<double>(step));
    }
    free.apportion(want, kept, keep);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }
};

static_assert(BudgetAllocator<Curve>);

}  // namespace kvt::inline v0
