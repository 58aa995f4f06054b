// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// SnapKv: rows the last queries looked at are kept.
//
// Score:   softmax of each of the last `window` queries over the rows it may see; mean over the queries; pooled over
//          neighbouring rows before the window; mean over the group's query heads. Rows inside the window score above all.
// Needs:   keys, positions, window queries.  Cost: O(window * group * rows * head_dim).
// Source:  SnapKV, Li et al., arXiv 2404.14469; defaults of the authors' code (window 64, average over 5).
#pragma once

#include <algorithm>
#include <cmath>

#include "kvtailor/attend/softmax_state.hpp"
#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

struct SnapKv {
  enum class Pool { average, maximum };
  static constexpr EvidenceSet needs = Evidence::keys | Evidence::positions | Evidence::window_queries;
  int window = 64;  // queries, 1 or more
  int kernel = 5;   // rows pooled together, odd
  Pool pool = Pool::average;

  Status check() const noexcept {
    if (window < 1) return error(Errc::bad_value, "window is {}; it must be 1 or more", window);
    if (kernel < 1 || kernel % 2 == 0) return error(Errc::bad_value, "kernel is {}; it must be odd and positive", kernel);
    return success();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    KVT_TRY(check());
    if (seen.window_positions.empty()) {
      return error(Errc::bad_value, "SnapKv has seen {} queries; call observe() before compress()", 0);
    }
    const int n = seen.num_rows();
    const int dim = seen.head_dim;
    const auto num_queries = std::min<std::size_t>(seen.window_positions.size(), static_cast<std::size_t>(window));
    const auto first = seen.window_positions.size() - num_queries;
    const auto window_start = std::lower_bound(seen.positions.begin(), seen.positions.end(), seen.window_positions[first]);
    const int before = static_cast<int>(window_start - seen.positions.begin());  // rows
    float* const logit = seen.scratch.data();
    float* const mass = logit + n;
    float* const query = mass + n;
    const float scale = seen.attend.scale != 0 ? seen.attend.scale : 1.f / std::sqrt(static_cast<float>(dim));
    const float average = 1.f / static_cast<float>(num_queries * static_cast<std::size_t>(seen.group_size));
    std::fill(score.begin(), score.end(), 0.f);
    for (int g = 0; g < seen.group_size; ++g) {
      std::fill(mass, mass + n, 0.f);
      for (auto w = first; w < seen.window_positions.size(); ++w) {
        const int position = seen.window_positions[w];
        const auto end = std::upper_bound(seen.positions.begin(), seen.positions.end(), position);
        const auto begin = seen.attend.window > 0 ? std::upper_bound(seen.positions.begin(), end, position - seen.attend.window)
                                                  : seen.positions.begin();
        const int from = static_cast<int>(begin - seen.positions.begin());
        const int to = static_cast<int>(end - seen.positions.begin());
        const float* const source = seen.window_queries + static_cast<std::int64_t>(w) * seen.window_stride + g * dim;
        for (int d = 0; d < dim; ++d) query[d] = source[d] * scale;
        float largest = -std::numeric_limits<float>::infinity();
        for (int row = from; row < to; ++row) {
          logit[row] = dot(seen.keys.data() + static_cast<std::int64_t>(row) * dim, query, dim);
          if (seen.attend.soft_cap > 0) logit[row] = seen.attend.soft_cap * std::tanh(logit[row] / seen.attend.soft_cap);
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
      for (int row = 0; row < before; ++row) {
        score[static_cast<std::size_t>(row)] += pooled(mass, row, before) * average;
      }
    }
    // No mean of shares is above one.
    std::fill(score.begin() + before, score.end(), 2.f);
    return success();
  }

  // The same on a device: see store/head_score.hpp.
  template <int dim, int warps>
  struct Shared {};
  template <class Block, class Rows, class Window, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, const Window& seen, Memory&, float* score) const {
    using Lanes = typename Block::Lanes;
    const int before = rows.rows_before(seen.first_position());
    const float average = 1.f / (static_cast<float>(seen.size()) * static_cast<float>(seen.group()));
    for (int g = 0; g < seen.group(); ++g) {
      const float* const mass = seen.of_query_head(block, g);
      block.each_warp([&](const Lanes& lanes, int warp) {
        lanes.each([&](int lane) {
          for (int r = warp * Lanes::size + lane; r < rows.count; r += Block::warps * Lanes::size) {
            score[r] = r >= before ? 2.f : (g == 0 ? 0.f : score[r]) + pooled(mass, r, before) * average;
          }
        });
      });
    }
  }

 private:
  // Over the neighbours of a row. Those past the ends count as nothing; the average divides by the kernel all the same.
  KVT_HD float pooled(const float* mass, int row, int before) const {
    const int first = row > kernel / 2 ? row - kernel / 2 : 0,
              last = before - 1 - row > kernel / 2 ? row + kernel / 2 : before - 1;
    float sum = 0;
    for (int i = first; i <= last; ++i) sum = pool == Pool::average ? sum + mass[i] : mass[i] > sum ? mass[i] : sum;
    return pool == Pool::average ? sum / static_cast<float>(kernel) : sum;
  }
  static float dot(const float* a, const float* b, int dim) {
    float part[8] = {};
    for (int d = 0; d < dim; d += 8) {
      for (int i = 0; i < 8; ++i) part[i] += a[d + i] * b[d + i];
    }
    return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
  }
};

static_assert(TokenSelector<SnapKv>);

}  // namespace kvt::inline v0
