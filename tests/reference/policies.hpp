// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What selectors, allocators and the cut have to give, as plain loops in double precision that share no code with the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace reference {

using Index = std::size_t;

// KeyDiff: -cos(key, mean of all keys at length one).
inline std::vector<double> key_diff(const std::vector<float>& keys, int dim) {
  const Index d = static_cast<Index>(dim), n = keys.size() / d;
  const auto norm = [&](const double* x) {
    double s = 0;
    for (Index i = 0; i < d; ++i) s += x[i] * x[i];
    return std::sqrt(s);
  };
  std::vector<double> rows(keys.begin(), keys.end()), mean(d, 0.0), score(n, 0.0);
  for (Index r = 0; r < n; ++r) {
    const double size = norm(&rows[r * d]);
    for (Index i = 0; i < d && size > 0; ++i) mean[i] += rows[r * d + i] /= size;
  }
  const double size = norm(mean.data());
  for (Index r = 0; r < n && size > 0; ++r) {
    for (Index i = 0; i < d; ++i) score[r] -= rows[r * d + i] * mean[i] / size;
  }
  return score;
}

struct SnapKvInput {
  std::vector<float> keys;     // [rows, dim]
  std::vector<float> queries;  // [window, group, dim]
  std::vector<int> positions, window_positions;
  int dim = 0, group = 0;
  int kernel = 5;
  bool maximum = false;
  double scale = 0, soft_cap = 0;
  int sliding = 0;
};

// SnapKV: softmax of each query, mean over the queries, pooled for each query head over neighbouring rows before the window,
// mean over the heads. Rows that the window itself holds get +inf here.
inline std::vector<double> snap_kv(const SnapKvInput& in) {
  const Index n = in.positions.size(), d = static_cast<Index>(in.dim), heads = static_cast<Index>(in.group);
  std::vector<double> score(n, 0.0);
  for (Index g = 0; g < heads; ++g) {
    std::vector<double> mass(n, 0.0);
    for (Index w = 0; w < in.window_positions.size(); ++w) {
      std::vector<double> weight(n, 0.0);
      double sum = 0;
      for (Index r = 0; r < n; ++r) {
        if (in.positions[r] > in.window_positions[w]) continue;
        if (in.sliding > 0 && in.positions[r] <= in.window_positions[w] - in.sliding) continue;
        double x = 0;
        for (Index i = 0; i < d; ++i) x += double(in.keys[r * d + i]) * double(in.queries[(w * heads + g) * d + i]);
        x *= in.scale != 0 ? in.scale : 1 / std::sqrt(double(in.dim));
        if (in.soft_cap > 0) x = in.soft_cap * std::tanh(x / in.soft_cap);
        sum += weight[r] = std::exp(x);
      }
      for (Index r = 0; r < n && sum > 0; ++r) mass[r] += weight[r] / sum / double(in.window_positions.size());
    }
    for (int r = 0; r < int(n); ++r) {
      double pooled = 0;
      for (int i = r - in.kernel / 2; i <= r + in.kernel / 2; ++i) {
        if (i < 0 || i >= int(n) || in.positions[Index(i)] >= in.window_positions.front()) continue;
        pooled = in.maximum ? std::max(pooled, mass[Index(i)]) : pooled + mass[Index(i)] / in.kernel;
      }
      score[Index(r)] += pooled / double(heads);
    }
  }
  for (Index r = 0; r < n; ++r) {
    if (in.positions[r] >= in.window_positions.front()) score[r] = std::numeric_limits<double>::infinity();
  }
  return score;
}

// Ada-KV in one layer, by trying every way to share `total` rows out: heads keep at least `least` rows, and the sum of the
// scores that stay is largest. Scores of one head are in descending order.
inline std::vector<int> adaptive(int total, const std::vector<int>& least, const std::vector<std::vector<double>>& descending) {
  std::vector<int> now(least.size(), 0), best;
  double highest = -std::numeric_limits<double>::infinity();
  const auto visit = [&](const auto& self, Index h, int left, double sum) -> void {
    if (h == least.size()) {
      if (left == 0 && sum > highest) highest = sum, best = now;
      return;
    }
    double own = 0;
    for (int k = 0; k <= std::min(left, int(descending[h].size())); ++k) {
      if (k > 0) own += descending[h][Index(k - 1)];
      if (k < least[h]) continue;
      now[h] = k;
      self(self, h + 1, left - k, sum + own);
    }
  };
  visit(visit, 0, total, 0.0);
  return best;
}

// The `keep` largest; of equal ones the earlier.
inline std::vector<unsigned char> cut(const std::vector<float>& score, int keep) {
  std::vector<unsigned char> mark(score.size(), 0);
  for (int k = 0; k < keep; ++k) {
    Index best = score.size();
    for (Index r = 0; r < score.size(); ++r) {
      if (mark[r] == 0 && (best == score.size() || score[r] > score[best])) best = r;
    }
    mark[best] = 1;
  }
  return mark;
}

}  // namespace reference
