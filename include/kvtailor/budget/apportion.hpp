// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Sharing out a whole number of rows in proportion to weights, within bounds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "kvtailor/core/evidence.hpp"

namespace kvt::inline v0 {

// share[i] between lower[i] and upper[i], sum(share) == total, and otherwise as near to weight[i] * c as one common factor c
// allows; rounded by largest remainder, ties to the lower index. Needs sum(lower) <= total <= sum(upper) and weights above
// zero. O(n log n) and 64 bisection steps. May throw std::bad_alloc.
inline void apportion(std::int64_t total, std::span<const double> weight, std::span<const std::int64_t> lower,
                      std::span<const std::int64_t> upper, std::span<std::int64_t> share) {
  const std::size_t n = weight.size();
  const auto ideal = [&](std::size_t i, double c) {
    return std::clamp(weight[i] * c, static_cast<double>(lower[i]), static_cast<double>(upper[i]));
  };
  double low = 0, high = 1;
  const auto sum = [&](double c) {
    double s = 0;
    for (std::size_t i = 0; i < n; ++i) s += ideal(i, c);
    return s;
  };
  while (sum(high) < static_cast<double>(total) && high < 1e300) high *= 2;
  for (int step = 0; step < 64; ++step) {
    const double middle = 0.5 * (low + high);
    (sum(middle) < static_cast<double>(total) ? low : high) = middle;
  }
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::int64_t left = total;
  for (std::size_t i = 0; i < n; ++i) {
    share[i] = std::clamp(static_cast<std::int64_t>(std::floor(ideal(i, high))), lower[i], upper[i]);
    left -= share[i];
  }
  // A remainder is compared to nine digits: the common factor is only known that well, and equal heads must tie.
  const auto remainder = [&](std::size_t i) { return std::llround((ideal(i, high) - static_cast<double>(share[i])) * 1e6); };
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return remainder(a) > remainder(b); });
  while (left != 0) {
    const std::int64_t before = left;
    for (std::size_t k = 0; k < n && left > 0; ++k) {
      if (share[order[k]] < upper[order[k]]) ++share[order[k]], --left;
    }
    for (std::size_t k = n; k-- > 0 && left < 0;) {
      if (share[order[k]] > lower[order[k]]) --share[order[k]], ++left;
    }
    if (left == before) break;
  }
}

// The total of a request, shared out in proportion to weight [heads], within what is protected and what there is.
inline void apportion(const BudgetRequest& want, std::span<const double> weight, std::span<int> keep) {
  const std::vector<std::int64_t> lower(want.floor.begin(), want.floor.end()), upper(want.seen.begin(), want.seen.end());
  std::vector<std::int64_t> share(keep.size());
  apportion(want.total, weight, lower, upper, share);
  std::copy(share.begin(), share.end(), keep.begin());
}

// Rows of a request that are not protected. Those that an earlier cut dropped count: what a cut of what it left leaves is to be
// what one cut would have.
struct FreeRows {
  std::vector<double> ever;  // [heads]
  double all = 0;            // of all heads
  std::int64_t total = 0;    // to keep

  explicit FreeRows(const BudgetRequest& want) : ever(want.seen.size()), total(want.total) {
    for (std::size_t h = 0; h < ever.size(); ++h) {
      const auto layer = h / static_cast<std::size_t>(want.num_kv_heads);
      const std::int64_t seen = want.seen[h];
      const std::int64_t rows = want.appended.empty() ? seen : std::max<std::int64_t>(seen, want.appended[layer]);
      ever[h] = static_cast<double>(rows - want.floor[h]);
      all += ever[h];
      total -= want.floor[h];
    }
  }
  // The share of them that may stay.
  double retention() const { return all > 0 ? static_cast<double>(total) / all : 1; }
  // Each head keeps its protected rows, and of the others in proportion to kept [heads] times those it ever had.
  void apportion(const BudgetRequest& want, std::span<const double> kept, std::span<int> keep) const {
    std::vector<double> weight(keep.size());
    std::vector<std::int64_t> lower(keep.size(), 0), upper(keep.size()), share(keep.size());
    for (std::size_t h = 0; h < keep.size(); ++h) {
      weight[h] = std::max(1e-9, ever[h] * kept[h]);
      upper[h] = want.seen[h] - want.floor[h];
    }
    v0::apportion(total, weight, lower, upper, share);
    for (std::size_t h = 0; h < keep.size(); ++h) keep[h] = static_cast<int>(want.floor[h] + share[h]);
  }
};

}  // namespace kvt::inline v0
