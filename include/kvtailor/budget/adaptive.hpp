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
      left[l] = share[l];
      for (std::size_t h = l * heads; h < (l + 1) * heads; ++h) {
        const double even = static_cast<double>(share[l]) / static_cast<double>(heads);
        safe[h] = std::clamp(static_cast<int>(safeguard * even), want.floor[h], want.seen[h]);
        left[l] -= safe[h];
      }
      // Floors of some heads can eat into what others are safe for.
      for (std::size_t h = (l + 1) * heads; h-- > l * heads && left[l] < 0;) {
        const auto give = std::min<std::int64_t>(-left[l], safe[h] - want.floor[h]);
        safe[h] -= static_cast<int>(give);
        left[l] += give;
      }
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
    struct Row {
      float score;
      int row, head;
    };
    std::vector<Row> free_rows;
    std::vector<std::pair<float, int>> order;
    const float* scores = want.scores.data();
    for (std::size_t l = 0; l < layers; ++l) {
      free_rows.clear();
      for (std::size_t h = l * heads; h < (l + 1) * heads; ++h) {
        const int n = want.seen[h];
        order.resize(static_cast<std::size_t>(n));
        for (int row = 0; row < n; ++row) order[static_cast<std::size_t>(row)] = {-scores[row], row};
        std::sort(order.begin(), order.end());
        for (int k = keep[h]; k < n; ++k) {
          const auto& [negative, row] = order[static_cast<std::size_t>(k)];
          free_rows.push_back({-negative, row, static_cast<int>(h)});
        }
        scores += n;
      }
      const auto take = std::min(static_cast<std::size_t>(std::max<std::int64_t>(left[l], 0)), free_rows.size());
      const auto above = [](const Row& a, const Row& b) {
        return a.score != b.score ? a.score > b.score : a.row != b.row ? a.row < b.row : a.head < b.head;
      };
      const auto middle = free_rows.begin() + static_cast<std::ptrdiff_t>(take);
      if (take < free_rows.size()) std::nth_element(free_rows.begin(), middle, free_rows.end(), above);
      for (auto it = free_rows.begin(); it != middle; ++it) ++keep[static_cast<std::size_t>(it->head)];
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }
};

using AdaKv = Adaptive;

static_assert(BudgetAllocator<Adaptive>);

}  // namespace kvt::inline v0
