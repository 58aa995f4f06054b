// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Adaptive: within each layer, rows go to the heads whose scores are highest.
//
// Rule:    layers share the total in proportion to the rows they have; in a layer every head is safe for a fraction
//          `safeguard` of its even share, the rest goes to the highest scores of the layer, whichever head they are in.
//          Ties go to the lower row, then the lower head.
// Needs:   scores, comparable between the heads of a layer.  Cost: O(rows log rows); on a device about 100 looks at each score.
// Source:  Ada-KV, Feng et al., arXiv 2407.11550; safeguard of the kept count, as kvpress has it.
#pragma once

#include <new>

#include "kvtailor/budget/apportion.hpp"
#include "kvtailor/budget/top_rows.hpp"
#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

struct Adaptive {
  static constexpr EvidenceSet needs = Evidence::scores;
  double safeguard = 0.20;  // 0 .. 1

  // What does not depend on scores: how many rows each head is safe for, and how many of a layer go to its highest other
  // scores: safe [heads], left [layers].
  Status share_out(const BudgetRequest& want, std::span<int> safe, std::span<std::int64_t> left) const noexcept try {
    if (!(safeguard >= 0 && safeguard <= 1)) {
      return error(Errc::bad_value, "safeguard is {}; it must be between 0 and 1", safeguard);
    }
    const auto layers = static_cast<std::size_t>(want.num_layers);
    const auto heads = static_cast<std::size_t>(want.num_kv_heads);
    std::vector<double> weight(layers);
    std::vector<std::int64_t> lower(layers), upper(layers), share(layers);
    for (std::size_t h = 0; h < want.seen.size(); ++h) {
      lower[h / heads] += want.floor[h];
      upper[h / heads] += want.seen[h];
    }
    for (std::size_t l = 0; l < layers; ++l) weight[l] = std::max(1e-9, static_cast<double>(upper[l]));
    apportion(want.total, weight, lower, upper, share);
    for (std::size_t l = 0; l < layers; ++l) {
      left[l] = give_safe_rows(want, l * heads, (l + 1) * heads, share[l], safeguard, safe);
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }

  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept try {
    const auto layers = static_cast<std::size_t>(want.num_layers);
    const auto heads = static_cast<std::size_t>(want.num_kv_heads);
    std::vector<std::int64_t> left(layers);
    KVT_TRY(share_out(want, keep, left));
    const float* scores = want.scores.data();
    for (std::size_t l = 0; l < layers; ++l) {
      scores = give_to_highest(want, l * heads, (l + 1) * heads, left[l], scores, keep);
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }
};

using AdaKv = Adaptive;

static_assert(BudgetAllocator<Adaptive>);

}  // namespace kvt::inline v0
