// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// cut: the only place that decides which row is dropped.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "kvtailor/core/config.hpp"

namespace kvt::inline v0 {

// Marks the `keep` rows with the highest scores; a tie goes to the lower row, which is the lower position.
// O(rows). May throw std::bad_alloc.
inline void cut(std::span<const float> score, int keep, std::span<unsigned char> mark) {
  const int n = static_cast<int>(score.size());
  KVT_ASSERT(keep >= 0 && keep <= n);
  std::fill(mark.begin(), mark.end(), static_cast<unsigned char>(0));
  std::vector<int> order(static_cast<std::size_t>(n));
  for (int row = 0; row < n; ++row) order[static_cast<std::size_t>(row)] = row;
  const auto above = [&](int a, int b) {
    const float x = score[static_cast<std::size_t>(a)], y = score[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  };
  if (keep < n) std::nth_element(order.begin(), order.begin() + keep, order.end(), above);
  for (int k = 0; k < keep; ++k) mark[static_cast<std::size_t>(order[static_cast<std::size_t>(k)])] = 1;
}

}  // namespace kvt::inline v0
