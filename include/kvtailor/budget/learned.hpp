// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// LearnedShares: how many rows a head keeps was trained together with the model's answers, for every budget.
//
// Rule:    BudgetHead (learn/budget_head.hpp) says what share of its rows each head keeps. Rows that always stay are not
//          counted; all others ever appended to a layer are, so that a cut of what an earlier one left leaves what one cut
//          would have.
// Needs:   the numbers of a trained policy, from a file (io/policy_file.hpp).  Cost: O(heads log heads).
// Source:  LKV, arXiv 2605.06676 (its budgets, LKV-H).
#pragma once

#include <new>
#include <vector>

#include "kvtailor/budget/apportion.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/geometry.hpp"
#include "kvtailor/learn/budget_head.hpp"

namespace kvt::inline v0 {

struct LearnedShares {
  static constexpr EvidenceSet needs = {};
  BudgetHead<float> budget;
  int num_kv_heads = 0;  // of a layer

  Status check(const Geometry& shape) const noexcept {
    if (num_kv_heads != shape.num_kv_heads) {
      return error(Errc::bad_shape, "the learned budgets are of a model with {} KV heads; this one has {}", num_kv_heads,
                   shape.num_kv_heads);
    }
    if (budget.num_heads() != shape.num_heads()) {
      return error(Errc::bad_shape, "the learned budgets are of a model with {} layers; this one has {}",
                   budget.num_heads() / num_kv_heads, shape.num_layers);
    }
    return success();
  }
  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept try {
    const FreeRows free(want);
    std::vector<float> shares(keep.size(), 1.f);
    if (const double retention = free.retention(); retention < 1) {
      KVT_TRY(budget.shares(std::clamp(static_cast<float>(retention), 1e-4f, 1 - 1e-4f), shares));
    }
    const std::vector<double> kept(shares.begin(), shares.end());
    free.apportion(want, kept, keep);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }
};

static_assert(BudgetAllocator<LearnedShares>);

}  // namespace kvt::inline v0
