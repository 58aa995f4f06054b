// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Plain loops in double precision that share no code with the library.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

namespace reference {

struct Attend {
  double scale = 0, soft_cap = 0;
  int window = 0;
  const float* sink_logit = nullptr;
};

// One query vector over rows [n, dim] with increasing positions.
inline std::vector<double> attend(const float* q, int position, const std::vector<float>& keys,
                                  const std::vector<float>& values, const std::vector<int>& positions, int dim,
                                  const Attend& o) {
  std::vector<double> out(static_cast<std::size_t>(dim), 0.0), logit;
  std::vector<std::size_t> seen;
  double top = -std::numeric_limits<double>::infinity();
  for (std::size_t r = 0; r < positions.size(); ++r) {
    if (positions[r] > position || (o.window > 0 && positions[r] <= position - o.window)) continue;
    double x = 0;
    for (int d = 0; d < dim; ++d) x += double(q[d]) * double(keys[r * std::size_t(dim) + std::size_t(d)]);
    x *= o.scale != 0 ? o.scale : 1.0 / std::sqrt(double(dim));
    if (o.soft_cap > 0) x = o.soft_cap * std::tanh(x / o.soft_cap);
    logit.push_back(x);
    seen.push_back(r);
    top = std::max(top, x);
  }
  if (seen.empty()) return out;
  if (o.sink_logit != nullptr) top = std::max(top, double(*o.sink_logit));
  double sum = o.sink_logit != nullptr ? std::exp(double(*o.sink_logit) - top) : 0;
  for (std::size_t i = 0; i < seen.size(); ++i) {
    const double w = std::exp(logit[i] - top);
    sum += w;
    for (int d = 0; d < dim; ++d) out[std::size_t(d)] += w * double(values[seen[i] * std::size_t(dim) + std::size_t(d)]);
  }
  for (double& x : out) x /= sum;
  return out;
}

}  // namespace reference
