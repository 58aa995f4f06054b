// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// LagKv: rows that stand out against the rows that follow them; neither queries nor attention.
//
// Score:   rows after the first num_sinks are cut into parts of `lag`. In a part, keys are scaled channel by channel by the
//          least and largest element of the next part, the standard deviation over the channels of each row goes through a
//          softmax over the part, and the same of values; the mean of both is ranked within the part, 0 .. (lag - 1) / lag.
//          Sinks and the last whole part and what follows it score 1. Fewer than two parts: newer above older.
// Needs:   keys, values.  Cost: O(rows * (head_dim + log lag)).
// Source:  LagKV, Liang et al., arXiv 2504.04704. A channel that is constant in the next part counts as zero, where kvpress
// divides
//          by zero.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

struct LagKv {
  static constexpr EvidenceSet needs = Evidence::keys | Evidence::values;
  int lag = 128;       // rows of a part, 2 or more
  int num_sinks = 4;   // first rows
  bool cross = false;  // scores as they are, comparable between heads, instead of ranks

  Status check() const noexcept {
    if (lag < 2) return error(Errc::bad_value, "lag is {}; it must be 2 or more", lag);
    if (num_sinks < 0) return error(Errc::bad_value, "num_sinks is {}; it must be zero or more", num_sinks);
    return success();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    KVT_TRY(check());
    const int n = static_cast<int>(score.size()), parts = n > num_sinks ? (n - num_sinks) / lag : 0;
    std::fill(score.begin(), score.end(), 1.f);
    if (parts < 2) {
      for (int row = num_sinks; row < n; ++row) {
        score[static_cast<std::size_t>(row)] = static_cast<float>(row - num_sinks) / static_cast<float>(n - num_sinks);
      }
      return success();
    }
    std::vector<double> own(static_cast<std::size_t>(lag)), of_values(own.size());
    std::vector<int> order(own.size());
    for (int part = 0; part + 1 < parts; ++part) {
      const int first = num_sinks + part * lag;
      spread(seen.keys.data() + static_cast<std::ptrdiff_t>(first) * seen.head_dim, seen.head_dim, own);
      spread(seen.values.data() + static_cast<std::ptrdiff_t>(first) * seen.head_dim, seen.head_dim, of_values);
      for (std::size_t i = 0; i < own.size(); ++i) own[i] = (own[i] + of_values[i]) / 2;
      float* const to = score.data() + first;
      if (cross) {
        std::copy(own.begin(), own.end(), to);
        continue;
      }
      std::iota(order.begin(), order.end(), 0);
      std::sort(order.begin(), order.end(), [&](int a, int b) {
        const double x = own[static_cast<std::size_t>(a)], y = own[static_cast<std::size_t>(b)];
        return x != y ? x < y : a > b;  // of equal rows the first ranks highest
      });
      for (int rank = 0; rank < lag; ++rank) {
        to[order[static_cast<std::size_t>(rank)]] = static_cast<float>(rank) / static_cast<float>(lag);
      }
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

 private:
  // Of rows [lag, dim], which `lag` others follow: softmax over the rows of their standard deviation over channels.
  void spread(const float* rows, int dim, std::vector<double>& out) const {
    const float* const next = rows + static_cast<std::ptrdiff_t>(lag) * dim;
    // In double: what rows are scaled by may be as small as fp32 has it.
    std::vector<double> least(next, next + dim), factor(next, next + dim);
    for (int i = 1; i < lag; ++i) {
      for (int d = 0; d < dim; ++d) {
        const auto x = static_cast<double>(next[static_cast<std::ptrdiff_t>(i) * dim + d]);
        auto &low = least[static_cast<std::size_t>(d)], &high = factor[static_cast<std::size_t>(d)];
        low = std::min(low, x);
        high = std::max(high, x);
      }
    }
    for (std::size_t d = 0; d < least.size(); ++d) factor[d] = factor[d] > least[d] ? 1 / (factor[d] - least[d]) : 0;
    double largest = 0;
    std::vector<double> scaled(least.size());
    // In eight parts, which compilers may not make of a sum by themselves.
    const auto sum_of = [&](auto&& term) {
      double part[8] = {};
      for (std::size_t d = 0; d < scaled.size(); d += 8) {
        for (std::size_t i = 0; i < 8; ++i) part[i] += term(scaled[d + i]);
      }
      return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
    };
    for (std::size_t i = 0; i < out.size(); ++i, rows += dim) {
      // Two passes: a row far from the next part has a mean far above its deviation.
      for (std::size_t d = 0; d < scaled.size(); ++d) scaled[d] = (static_cast<double>(rows[d]) - least[d]) * factor[d];
      const double mean = sum_of([](double x) { return x; }) / dim;
      out[i] = std::sqrt(sum_of([&](double x) { return (x - mean) * (x - mean); }) / (dim - 1));
      largest = std::max(largest, out[i]);
    }
    double sum = 0;
    for (double& x : out) sum += x = std::exp(x - largest);
    for (double& x : out) x /= sum;
  }
};

static_assert(TokenSelector<LagKv>);

}  // namespace kvt::inline v0
