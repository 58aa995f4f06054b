// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Rows that go to the highest scores of several heads.
#pragma once

#include <algorithm>
#include <vector>

#include "kvtailor/core/evidence.hpp"

namespace kvt::inline v0 {

// Heads first .. last - 1 keep keep[h] rows, their own highest; `left` rows more go to the highest scores of the others,
// whichever head they are in, of equal ones to the lower row, then the lower head. scores: of head `first` on, one head after
// another. Returns the scores after those. O(rows log rows). May throw std::bad_alloc.
inline const float* give_to_highest(const BudgetRequest& want, std::size_t first, std::size_t last, std::int64_t left,
                                    const float* scores, std::span<int> keep) {
  struct Row {
    float score;
    int row, head;
  };
  std::vector<Row> free_rows;
  std::vector<std::pair<float, int>> order;
  for (std::size_t h = first; h < last; ++h) {
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
  const auto take = std::min(static_cast<std::size_t>(std::max<std::int64_t>(left, 0)), free_rows.size());
  const auto above = [](const Row& a, const Row& b) {
    return a.score != b.score ? a.score > b.score : a.row != b.row ? a.row < b.row : a.head < b.head;
  };
  const auto middle = free_rows.begin() + static_cast<std::ptrdiff_t>(take);
  if (take < free_rows.size()) std::nth_element(free_rows.begin(), middle, free_rows.end(), above);
  for (auto it = free_rows.begin(); it != middle; ++it) ++keep[static_cast<std::size_t>(it->head)];
  return scores;
}

// The rows that heads first .. last - 1, which share `share` rows, are safe for: the fraction `safeguard` of an even share,
// within floors and what there is. Returns the rows left.
inline std::int64_t give_safe_rows(const BudgetRequest& want, std::size_t first, std::size_t last, std::int64_t share,
                                   double safeguard, std::span<int> safe) {
  std::int64_t left = share;
  for (std::size_t h = first; h < last; ++h) {
    const double even = static_cast<double>(share) / static_cast<double>(last - first);
    safe[h] = std::clamp(static_cast<int>(safeguard * even), want.floor[h], want.seen[h]);
    left -= safe[h];
  }
  // Floors of some heads can eat into what others are safe for.
  for (std::size_t h = last; h-- > first && left < 0;) {
    const auto give = std::min<std::int64_t>(-left, safe[h] - want.floor[h]);
    safe[h] -= static_cast<int>(give);
    left += give;
  }
  return left;
}

}  // namespace kvt::inline v0
