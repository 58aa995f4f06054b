// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Global: rows go to the heads whose scores are highest, over all layers.
//
// Rule:    every head is safe for a fraction `safeguard` of an even share, the rest goes to the highest scores of the model.
//          Ties go to the lower row, then the lower head.
// Needs:   scores that are comparable between layers, as those of Reconstruction are: with KeyDiff or ExpectedAttention it is
//          worse than Uniform.  Cost: O(rows log rows).
// Source:  KVzip, Kim et al., arXiv 2505.23416, whose safeguard is zero.
#pragma once

#include <new>

#include "kvtailor/budget/top_rows.hpp"
#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

struct Global {
  static constexpr EvidenceSet needs = Evidence::scores;
  double safeguard = 0.20;  // 0 .. 1

  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept try {
    if (!(safeguard >= 0 && safeguard <= 1)) {
      return error(Errc::bad_value, "safeguard is {}; it must be between 0 and 1", safeguard);
    }
    const std::int64_t left = give_safe_rows(want, 0, keep.size(), want.total, safeguard, keep);
    (void)give_to_highest(want, 0, keep.size(), left, want.scores.data(), keep);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }
};

static_assert(BudgetAllocator<Global>);

}  // namespace kvt::inline v0
