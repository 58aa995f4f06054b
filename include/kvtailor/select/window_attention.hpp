// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What the last queries looked at: the base of the selectors that go by attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "kvtailor/attend/softmax_state.hpp"
#include "kvtailor/core/block_loops.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

// A selector whose scores are weights of attention, but for rows that it lets stay whatever they got.
template <class S>
concept AttentionSelector = TokenSelector<S> && requires(const S s, const HeadEvidence& seen, std::span<float> out) {
  // out [rows], none negative
  { s.attention(seen, out) }
  noexcept->std::same_as<Status>;
  // the first of the rows that stay, up to the last
  { s.first_kept(seen) }
  noexcept->std::same_as<int>;
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
  // the queries. Takes queries * rows floats. Uses the evidence's scratch memory.
  template <class F>
  Status each_head(F&& f) const noexcept try {
    const int n = seen_.num_rows(), dim = seen_.head_dim, many = size();
    const AttendOptions& attend = seen_.attend;
    float* const mass = seen_.scratch.data();
    const float scale = attend.scale != 0 ? attend.scale : 1.f / std::sqrt(static_cast<float>(dim));
    std::vector<float> queries(static_cast<std::size_t>(many) * static_cast<std::size_t>(dim));
    std::vector<float> logits(static_cast<std::size_t>(many) * static_cast<std::size_t>(n));
    for (int g = 0; g < seen_.group_size; ++g) {
      for (int w = 0; w < many; ++w) {
        const auto at = static_cast<std::int64_t>(first_) + w;
        const float* const from = seen_.window_queries + at * seen_.window_stride + g * dim;
        for (int d = 0; d < dim; ++d) queries[static_cast<std::size_t>(w * dim + d)] = from[d] * scale;
      }
      multiply(queries.data(), many, logits.data());
      std::fill(mass, mass + n, 0.f);
      for (int w = 0; w < many; ++w) add_weights(w, logits.data() + static_cast<std::ptrdiff_t>(w) * n, mass);
      f(mass);
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

 private:
  // logits [many, rows] of queries [many, dim]: each key is read once for four of them.
  void multiply(const float* queries, int many, float* logits) const noexcept {
    const int n = seen_.num_rows(), dim = seen_.head_dim;
    const auto key = [&](int row) { return seen_.keys.data() + static_cast<std::ptrdiff_t>(std::min(row, n - 1)) * dim; };
    const auto some = [&]<int count>(const detail::FourRows<float>& rows, int row, int first) {
      float product[count][4];
      detail::dot_rows<count>(rows, queries + static_cast<std::ptrdiff_t>(first) * dim, dim, dim, product);
      for (int j = 0; j < count; ++j) {
        float* const to = logits + static_cast<std::ptrdiff_t>(first + j) * n + row;
        for (int i = 0; i < 4 && row + i < n; ++i) to[i] = product[j][i];
      }
    };
    for (int row = 0; row < n; row += 4) {
      const detail::FourRows<float> rows{{key(row), key(row + 1), key(row + 2), key(row + 3)}};
      int first = 0;
      for (; first + 4 <= many; first += 4) some.template operator()<4>(rows, row, first);
      for (; first < many; ++first) some.template operator()<1>(rows, row, first);
    }
  }
  // Weights of query w, of its logits, which are used up.
  void add_weights(int w, float* logits, float* mass) const noexcept {
    const AttendOptions& attend = seen_.attend;
    const int position = seen_.window_positions[first_ + static_cast<std::size_t>(w)];
    const auto begin = seen_.positions.begin(), end = std::upper_bound(begin, seen_.positions.end(), position);
    const auto start = attend.window > 0 ? std::upper_bound(begin, end, position - attend.window) : begin;
    const int from = static_cast<int>(start - begin), count = static_cast<int>(end - start);
    if (count == 0) return;
    float* const x = logits + from;
    if (attend.soft_cap > 0) {
      for (int i = 0; i < count; ++i) x[i] = attend.soft_cap * std::tanh(x[i] / attend.soft_cap);
    }
    const float top = largest_of(x, count);
    for (int i = 0; i < count; ++i) x[i] = exp_nonpositive(x[i] - top);
    const float share = 1.f / sum_of(x, count);
    for (int i = 0; i < count; ++i) mass[from + i] += x[i] * share;
  }

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

namespace detail {

// On a device: what the queries of a window gave each row, joined over the query heads of the group: join(what it has so far,
// mass, r), mass [rows] as in WindowAttention::each_head().
template <class Block, class Rows, class Join>
KVT_HD void window_attention(const Block& block, const Rows& rows, float* out, Join&& join) {
  for (int g = 0; g < rows.window.group(); ++g) {
    const float* const mass = rows.window.of_query_head(block, g);
    each_index(block, 0, rows.count, [&](int r) { out[r] = join(g == 0 ? 0.f : out[r], mass, r); });
  }
}
// What rows were given by all observed queries: score(weight, queries) of each. Nobody can be scored where there were none. any
// [warps] is shared.
template <class Block, class Rows, class Score>
KVT_HD void given_to_rows(const Block& block, const Rows& rows, int* any, float* out, Score&& score) {
  const auto& attention = rows.evidence.attention;
  const float* const weight = attention.weight_of(rows.head());
  const int *const queries = attention.queries_of(rows.head()), given = attention.given[rows.head()];
  each_index(block, 0, rows.count, [&](int r) { out[r] = r < given ? score(weight[r], queries[r]) : 0.f; });
  const int seen = over_block<true>(block, any, [&](int thread, int threads) {
    int own = 0;
    for (int r = thread; r < given; r += threads) own = queries[r] > own ? queries[r] : own;
    return own;
  });
  if (seen == 0 && rows.count > 0) each_index(block, 0, 1, [&](int) { rows.evidence.refused[rows.head()] = 1; });
}
// The scores of a selector by attention whose other rows stay.
template <class Selector, class Block, class Rows, class Memory>
KVT_HD void score_by_attention(const Selector& selector, const Block& block, const Rows& rows, Memory& shared, float* score) {
  selector.attention_on_device(block, rows, shared, score);
  each_index(block, selector.first_kept_on_device(rows), rows.count, [&](int r) { score[r] = above_attention; });
}

}  // namespace detail

}  // namespace kvt::inline v0
