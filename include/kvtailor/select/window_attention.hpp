// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What the last queries looked at: the base of the selectors that go by attention.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "kvtailor/attend/softmax_state.hpp"
#include "kvtailor/core/block_loops.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/row_tiles.hpp"

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

enum class OverQueries { sum, largest };

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
  // the queries, or the largest of them. Takes 128 * rows floats. Uses the evidence's scratch memory.
  template <class F>
  Status each_head(F&& f, OverQueries over = OverQueries::sum) const noexcept try {
    const int n = seen_.num_rows(), many = size(), heads = std::clamp(most / many, 1, seen_.group_size);
    float* const mass = seen_.scratch.data();
    std::vector<Query> queries;
    Weights weights;
    for (int g = 0; g < seen_.group_size; g += heads) {
      const int together = std::min(heads, seen_.group_size - g);
      for (int first = 0; first < many; first += most) {
        const int count = std::min(most, many - first);  // of each head
        queries.clear();
        for (int h = 0; h < together; ++h) {
          for (int w = first; w < first + count; ++w) queries.push_back(query(w, g + h));
        }
        weigh(queries, weights);
        const int wide = weights.wide;
        for (int h = 0; h < together; ++h) {
          if (first == 0) std::fill(mass, mass + n, 0.f);
          for (int row = 0; row < n && over == OverQueries::largest; ++row) {
            const float *const own = weights.of(row) + h * count, *const share = weights.shares(row) + h * count;
            for (int q = 0; q < count; ++q) mass[row] = std::max(mass[row], own[q] * share[q]);
          }
          for (int row = 0; row < n && over == OverQueries::sum; row += 4) {
            const float* const own = weights.of(row) + h * count;
            float sum[1][4];  // rows past the last lie in its tile
            detail::dot_rows<1>(detail::FourRows<float>{{own, own + wide, own + 2 * wide, own + 3 * wide}},
                                weights.shares(row) + h * count, 0, count, sum);
            for (int i = 0; i < 4 && row + i < n; ++i) mass[row + i] += sum[0][i];
          }
          if (first + count == many) f(mass);
        }
      }
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

 private:
  static constexpr int most = 128;  // queries that rows meet at a time
  struct Query {
    const float* from;
    int begin, end;  // of the rows that it may see
  };
  // exp(logit - top) of each row and query, `top` being the query's largest logit up to the row's block, and for each block
  // what makes weights of them: rows are gone through once, while they are in the cache.
  struct Weights {
    int wide = 0;  // queries, and what fills the last lanes
    detail::LineFloats exps;
    std::vector<std::array<float, most>> share;

    const float* of(int row) const noexcept { return exps.data() + static_cast<std::ptrdiff_t>(row) * wide; }
    const float* shares(int row) const noexcept { return share[static_cast<std::size_t>(row / detail::RowBlock::most)].data(); }
  };

  Query query(int w, int g) const noexcept {
    const auto at = first_ + static_cast<std::size_t>(w);
    const int position = seen_.window_positions[at], window = seen_.attend.window;
    const auto begin = seen_.positions.begin(), end = std::upper_bound(begin, seen_.positions.end(), position);
    const auto start = window > 0 ? std::upper_bound(begin, end, position - window) : begin;
    return {seen_.window_queries + static_cast<std::int64_t>(at) * seen_.window_stride + g * seen_.head_dim,
            static_cast<int>(start - begin), static_cast<int>(end - begin)};
  }
  void weigh(std::span<const Query> queries, Weights& out) const {
    const int n = seen_.num_rows(), dim = seen_.head_dim, count = static_cast<int>(queries.size());
    const float cap = seen_.attend.soft_cap;
    const float scale = seen_.attend.scale != 0 ? seen_.attend.scale : 1.f / std::sqrt(static_cast<float>(dim));
    detail::PackedVectors packed;
    packed.assign(count, dim, [&](int q, int k) { return queries[static_cast<std::size_t>(q)].from[k] * scale; });
    const int wide = out.wide = packed.wide();
    out.exps.resize(static_cast<std::size_t>(n + detail::RowTile::rows) * static_cast<std::size_t>(wide));
    out.share.clear();
    std::array<float, most> top;
    top.fill(std::numeric_limits<float>::lowest());
    std::array<double, most> total = {};
    detail::each_block(seen_.keys, dim, [&](int first, const detail::RowBlock& block) {
      const int rows = block.count();
      float* const x = out.exps.data() + static_cast<std::ptrdiff_t>(first) * wide;
      for (int q = 0; q < count;) q += block.multiply(packed, q, dim, 0, x + q, wide);
      if (cap > 0) {
        for (int i = 0; i < rows * wide; ++i) x[i] = cap * std::tanh(x[i] / cap);
      }
      for (int q = 0; q < count; ++q) {
        const auto [from, begin, end] = queries[static_cast<std::size_t>(q)];
        for (int row = 0; row < rows && (begin > first || end < first + rows); ++row) {
          if (first + row < begin || first + row >= end) x[row * wide + q] = -std::numeric_limits<float>::infinity();
        }
      }
      std::array<float, most> sum;
      const auto before = top;
      exponentials(x, rows, wide, top.data(), sum.data());
      for (std::size_t q = 0; q < most; ++q) {
        total[q] = total[q] * static_cast<double>(exp_nonpositive(before[q] - top[q])) + static_cast<double>(sum[q]);
      }
      out.share.push_back(top);
    });
    for (auto& share : out.share) {
      for (std::size_t q = 0; q < most; ++q) {
        share[q] = total[q] > 0 ? exp_nonpositive(share[q] - top[q]) / static_cast<float>(total[q]) : 0.f;
      }
    }
  }
  // Of logits [rows, wide]: raises the largest of each query, makes exponentials of them, and sums these up.
  static void exponentials(float* __restrict logits, int rows, int wide, float* __restrict top, float* __restrict sum) {
    std::fill_n(sum, most, 0.f);
    for (int row = 0; row < rows; ++row) {
      const float* const x = logits + static_cast<std::ptrdiff_t>(row) * wide;
      for (int q = 0; q < wide; ++q) top[q] = x[q] > top[q] ? x[q] : top[q];
    }
    for (int row = 0; row < rows; ++row) {
      float* const x = logits + static_cast<std::ptrdiff_t>(row) * wide;
      for (int q = 0; q < wide; ++q) sum[q] += x[q] = exp_nonpositive(x[q] - top[q]);
    }
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
