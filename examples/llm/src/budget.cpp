// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "budget.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvt::llm {

RowCounts count_rows(const AnyCache& cache) {
  const Geometry& geometry = cache.geometry();
  RowCounts counts{0, std::numeric_limits<int>::max(), 0};
  for (int layer = 0; layer < geometry.num_layers; ++layer) {
    for (int head = 0; head < geometry.num_kv_heads; ++head) {
      const int rows = cache.num_rows(layer, head);
      counts.mean += rows;
      counts.min = std::min(counts.min, rows);
      counts.max = std::max(counts.max, rows);
    }
  }
  counts.mean /= geometry.num_heads();
  return counts;
}

Done Budget::enforce(AnyCache& cache, int protected_rows) const {
  if (!retain) return done();
  if (retain->unit == Retain::Unit::bytes) {
    if (static_cast<double>(cache.memory().total()) <= retain->amount) return done();
    return from(cache.compress(*retain));
  }
  double rows = retain->amount;
  if (retain->unit == Retain::Unit::ratio) {
    rows = std::max(std::ceil(rows * cache.end_position(0)), static_cast<double>(protected_rows));
  }
  if (count_rows(cache).mean <= rows) return done();
  return from(cache.compress(Retain::rows(static_cast<long long>(rows))));
}

}  // namespace kvt::llm
