// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Pyramid: early layers keep more rows than late ones, the same in all heads of a layer.
//
// Rule:    with k rows a head on average, layer l of L is given most - l * (most - least) / (L - 1), where least = k / beta and
//          most = 2 k - least; where that is more than the rows a head has beside protected ones, most is those and
//          least = 2 k - most, but no more than most.
// Needs:   nothing.  Cost: O(heads log heads).
// Source:  PyramidKV, Cai et al., arXiv 2406.02069. Protected rows are within the budget here, and what they lift a layer to is
//          taken from the others; kvpress takes an even budget then.
#pragma once

#include <new>

#include "kvtailor/budget/apportion.hpp"
#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

struct Pyramid {
  static constexpr EvidenceSet needs = {};
  double beta = 20;  // 1 or more: how steep

  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept try {
    if (!(beta >= 1 && beta <= 1e9)) return error(Errc::bad_value, "beta is {}; it must be between 1 and 1e9", beta);
    const auto heads = static_cast<double>(keep.size());
    double rows = 0;
    for (std::size_t h = 0; h < keep.size(); ++h) rows += want.seen[h] - want.floor[h];
    const double mean = static_cast<double>(want.total) / heads;
    double least = mean / beta, most = 2 * mean - least;
    if (most >= rows / heads) {
      most = rows / heads;
      least = std::min(most, 2 * mean - most);  // never upside down
    }
    std::vector<double> weight(keep.size());
    for (std::size_t h = 0; h < weight.size(); ++h) {
      const int layer = static_cast<int>(h) / want.num_kv_heads, last = want.num_layers - 1;
      weight[h] = last == 0 ? 1 : std::max(1e-9, most - layer * (most - least) / last);
    }
    apportion(want, weight, keep);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }
};

static_assert(BudgetAllocator<Pyramid>);

}  // namespace kvt::inline v0
