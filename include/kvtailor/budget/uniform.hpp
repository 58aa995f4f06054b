// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Uniform: every head keeps the same number of rows, as far as it has them.
//
// Needs:   nothing.  Cost: O(heads log heads).
// Source:  none: the baseline of every eviction method.
#pragma once

#include <new>

#include "kvtailor/budget/apportion.hpp"
#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

struct Uniform {
  static constexpr EvidenceSet needs = {};

  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept try {
    apportion(want, std::vector<double>(keep.size(), 1.0), keep);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }
};

static_assert(BudgetAllocator<Uniform>);

}  // namespace kvt::inline v0
