// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What the last queries looked at: the base of the selectors that go by attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvtailor/attend/softmax_state.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

// A selector whose scores come from weights of attention, which attention() gives without marks on rows that are to stay:
// out [rows], none negative.
template <class S>
concept AttentionSelector = TokenSelector<S> && requires(const S s, const HeadEvidence& seen, std::span<float> out) {
  { s.attention(seen, out) }
  noexcept->std::same_as<Status>;
};

// The score of a row that stays before all others: above every mean of shares.
inline constexpr float above_attention = 2.f;

// The last queries that a selector with a window looks at.
class WindowAttention {
 public:
  WindowAttention(const HeadEvidence& seen, int window) noexcept
      : seen_(seen),
        first_(seen.window_positions.size() -
               std::min<std::size_t>(seen.window_positions.size(), static_cast<std::size_t>(window))) {}

  Status check() const noexcept {
    if (size() > 0) return success();
    return error(Errc::no_evidence, "the token selector has seen {} queries; call observe() before compress()", 0);
  }
  int size() const noexcept { return static_cast<int>(seen_.window_positions.size() - first_); }
  // Rows before the position of the first query.
  int rows_before() const noexcept {
    const auto& positions = seen_.positions;
    return static_cast<int>(std::lower_bound(positions.begin(), positions.end(), seen_.window_positions[first_]) -
                            positions.begin());
  }
  // f(mass) for each query head of the group: mass [rows], the softmax weights of a query over the rows it may see, summed over
  // the queries. Uses the evidence's scratch memory.
  template <class F>
  void each_head(F&& f) const noexcept {
    const int n = seen_.num_rows(), dim = seen_.head_dim;
    const AttendOptions& attend = seen_.attend;
    float* const logit = seen_.scratch.data();
    float* const mass = logit + n;
    float* const query = mass + n;
    const float scale = attend.scale != 0 ? attend.scale : 1.f / std::sqrt(static_cast<float>(dim));
    for (int g = 0; g < seen_.group_size; ++g) {
      std::fill(mass, mass + n, 0.f);
      for (auto w = first_; w < seen_.window_positions.size(); ++w) {
        const int position = seen_.window_positions[w];
        const auto begin = seen_.positions.begin(), end = std::upper_bound(begin, seen_.positions.end(), position);
        const auto start = attend.window > 0 ? std::upper_bound(begin, end, position - attend.window) : begin;
        const int from = static_cast<int>(start - begin), to = static_cast<int>(end - begin);
        const float* const source = seen_.window_queries + static_cast<std::int64_t>(w) * seen_.window_stride + g * dim;
        for (int d = 0; d < dim; ++d) query[d] = source[d] * scale;
        float largest = -std::numeric_limits<float>::infinity();
        for (int row = from; row < to; ++row) {
          logit[row] = dot(seen_.keys.data() + static_cast<std::int64_t>(row) * dim, query, dim);
          if (attend.soft_cap > 0) logit[row] = attend.soft_cap * std::tanh(logit[row] / attend.soft_cap);
          largest = std::max(largest, logit[row]);
        }
        double total = 0;
        for (int row = from; row < to; ++row) {
          logit[row] = exp_nonpositive(logit[row] - largest);
          total += static_cast<double>(logit[row]);
        }
        const float share = total > 0 ? static_cast<float>(1.0 / total) : 0.f;
        for (int row = from; row < to; ++row) mass[row] += logit[row] * share;
      }
      f(mass);
    }
  }

 private:
  const HeadEvidence& seen_;
  std::size_t first_;  // of the observed queries
};

// Attention pooled over neighbouring rows.
struct Pooling {
  enum class Kind { average, maximum };
  int kernel = 5;  // rows pooled together, odd
  Kind kind = Kind::average;

  Status check() const noexcept {
    if (kernel < 1 || kernel % 2 == 0) return error(Errc::bad_value, "kernel is {}; it must be odd and positive", kernel);
    return success();
  }
  // Over the neighbours of a row among the first n. Those past the ends count as nothing; the average divides by the kernel all
  // the same.
  KVT_HD float operator()(const float* mass, int row, int n) const {
    const int first = row > kernel / 2 ? row - kernel / 2 : 0, last = n - 1 - row > kernel / 2 ? row + kernel / 2 : n - 1;
    float sum = 0;
    for (int i = first; i <= last; ++i) sum = kind == Kind::average ? sum + mass[i] : mass[i] > sum ? mass[i] : sum;
    return kind == Kind::average ? sum / static_cast<float>(kernel) : sum;
  }
};

}  // namespace kvt::inline v0
