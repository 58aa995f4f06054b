// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// ExpectedAttention: rows that queries still to come will look at, as queries so far lead one to expect.
//
// Score:   queries before RoPE are taken as normal with mean m and covariance S. R is the mean of RoPE's matrices at the
// `future`
//          positions that follow. z_j = scale * k_j . R m + scale^2 / 2 * k_j . R S R' k_j is the logarithm of the expected
//          weight; softmax over the rows that are no sinks, mean over the group's query heads, plus epsilon, times |v_j|.
//          Rows at positions below num_sinks score above all.
// Needs:   query moments (with CacheOptions::ropes), keys, values, positions.  Cost: O(group * rows * head_dim^2).
// Source:  Expected Attention, Devoto et al., arXiv 2510.00636; defaults of kvpress. LU-KV has epsilon 0.02.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "kvtailor/attend/softmax_state.hpp"
#include "kvtailor/core/block_loops.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/simd.hpp"
#include "kvtailor/select/device_products.hpp"
#include "kvtailor/select/row_products.hpp"
#include "kvtailor/store/device_moments.hpp"

namespace kvt::inline v0 {

struct ExpectedAttention {
  static constexpr EvidenceSet needs =
      Evidence::query_moments | Evidence::rope | Evidence::keys | Evidence::values | Evidence::positions;
  int future = 512;   // positions, 1 or more
  int num_sinks = 4;  // rows at positions 0 .. num_sinks - 1
  float epsilon = 0;
  bool covariance = true;
  bool value_norm = true;

  Status check() const noexcept {
    if (future < 1) return error(Errc::bad_value, "future is {}; it must be 1 or more", future);
    if (num_sinks < 0) return error(Errc::bad_value, "num_sinks is {}; it must be zero or more", num_sinks);
    if (!(epsilon >= 0 && epsilon <= 1e6f)) {
      return error(Errc::bad_value, "epsilon is {}; it must be between 0 and 1e6", static_cast<double>(epsilon));
    }
    return success();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    KVT_TRY(check());
    if (seen.moments.count == 0) return refusal();
    const auto dim = static_cast<std::size_t>(seen.head_dim);
    const float scale = seen.attend.scale != 0 ? seen.attend.scale : 1.f / std::sqrt(static_cast<float>(dim));
    std::size_t first = 0;
    while (first < score.size() && seen.positions[first] < num_sinks) ++first;
    const std::span<const float> keys = seen.keys.subspan(first * dim);
    const std::size_t n = score.size() - first;
    const std::vector<Turn> turns = mean_turns(*seen.rope, seen.end_position);
    const auto group = static_cast<std::size_t>(seen.group_size);
    std::vector<float> means(seen.moments.mean, seen.moments.mean + group * dim), squares;
    std::vector<double> forms(covariance ? group * n : 0), products(group * n);
    std::vector<float> logit(n);
    for (std::size_t g = 0; g < group; ++g) turn(*seen.rope, turns, means.data() + g * dim, 1);
    if (covariance) {
      squares.assign(seen.moments.covariance, seen.moments.covariance + group * dim * dim);
      for (std::size_t g = 0; g < group; ++g) {
        float* const square = squares.data() + g * dim * dim;
        for (std::size_t i = 0; i < dim; ++i) turn(*seen.rope, turns, square + i * dim, 1);        // S R'
        for (std::size_t j = 0; j < dim; ++j) turn(*seen.rope, turns, square + j, seen.head_dim);  // R S R'
      }
    }
    quadratic_forms(keys, seen.head_dim, squares, means, forms, products);
    std::fill(score.begin(), score.begin() + static_cast<std::ptrdiff_t>(first), std::numeric_limits<float>::max());
    std::fill(score.begin() + static_cast<std::ptrdiff_t>(first), score.end(), 0.f);
    for (std::size_t g = 0; g < group && n > 0; ++g) {
      // Keys may have elements of 1e18.
      for (std::size_t r = 0; r < n; ++r) {
        const double by = static_cast<double>(scale), spread = covariance ? 0.5 * by * by * forms[g * n + r] : 0;
        logit[r] = static_cast<float>(std::clamp(by * products[g * n + r] + spread, -1e30, 1e30));
      }
      const float top = largest_of(logit.data(), static_cast<int>(n));
      for (float& x : logit) x = exp_nonpositive(x - top);
      double sum = 0;
      for (const float x : logit) sum += static_cast<double>(x);
      const auto share = static_cast<float>(1 / (sum * seen.group_size));
      for (std::size_t r = 0; r < n; ++r) score[first + r] += logit[r] * share;
    }
    if (value_norm && n > 0) {
      std::vector<float> norms(score.size());
      value_norms(seen, norms);
      for (std::size_t r = first; r < score.size(); ++r) score[r] = (score[r] + epsilon) * norms[r];
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

  // The same on a device: see store/head_score.hpp. Keys are turned back by the mean of RoPE's matrices instead of the moments,
  // and logits take four bytes for each row.
  static Status refusal() noexcept {
    return error(Errc::no_evidence, "ExpectedAttention has seen {} queries; call observe() before compress()", 0);
  }
  long long device_space(int, long long rows) const { return 4 * rows; }
  template <int size, int warps>
  struct Shared {
    detail::FewRows<size, warps> few;
    float mean[size], cosine[size / 2], sine[size / 2], top[warps];
    double sum[warps];
  };
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    const int group = rows.evidence.group, n = rows.count, first = rows.rows_before(num_sinks);
    const DeviceMoments moments = rows.evidence.moments.from_head(rows.head() * group);
    const DeviceRope rope = rows.evidence.ropes[rows.layer];
    constexpr float most = std::numeric_limits<float>::max();
    detail::each_index(block, 0, n, [&](int r) { score[r] = r < first ? most : 0.f; });
    if (moments.state->count == 0) {
      detail::each_index(block, 0, 1, [&](int) { rows.evidence.refused[rows.head()] = 1; });
      return;
    }
    const int begin = rows.evidence.ends[rows.layer].end;
    detail::each_index(block, 0, rope.pairs(), [&](int i) {
      const double turns = rope.turns[i], half = Direction(turns / 2).sine;
      const Direction middle(turns * (begin + 0.5 * (future - 1)));
      const double length = std::fabs(half) < 1e-12 ? 1 : Direction(turns / 2 * future).sine / (half * future);
      shared.cosine[i] = static_cast<float>(length * middle.cosine);
      shared.sine[i] = static_cast<float>(length * middle.sine);
    });
    float* const logit = rows.template space<float>();
    for (int g = 0; g < group && first < n; ++g) {
      detail::each_index(block, 0, Rows::dim, [&](int d) { shared.mean[d] = moments.mean_of(g)[d]; });
      find_logits(block, rows, shared, rope, moments.squares_of(g), *moments.state, first, logit);
      const float top = detail::over_block<true>(block, shared.top, [&](int thread, int threads) {
        float own = -most;
        for (int r = first + thread; r < n; r += threads) own = std::fmax(own, logit[r]);
        return own;
      });
      const double sum = detail::sum_of_block(block, shared.sum, [&](int thread, int threads) {
        double own = 0;
        for (int r = first + thread; r < n; r += threads) own += static_cast<double>(logit[r] = std::exp(logit[r] - top));
        return own;
      });
      const auto share = static_cast<float>(1 / (sum * group));
      detail::each_index(block, first, n, [&](int r) { score[r] += logit[r] * share; });
    }
    if (!value_norm) return;
    detail::each_value_norm(block, rows, shared.few.scratch, [&](const auto& lanes, int r, float norm) {
      lanes.once([&] { score[r] = r < first ? most : (score[r] + epsilon) * norm; });
    });
  }

 private:
  // Of rows from `first` on, for one query head: squares of differences of its queries from their mean, which is shared.
  template <class Block, class Rows, class Memory, class State>
  KVT_HD void find_logits(const Block& block, const Rows& rows, Memory& shared, const DeviceRope& rope, const float* squares,
                          const State& state, int first, float* logit) const {
    using Lanes = typename Block::Lanes;
    using Few = decltype(shared.few);
    constexpr int most = Few::most, dim = Rows::dim;
    const double scale = static_cast<double>(state.scale), by = 0.5 * scale * scale / static_cast<double>(state.count);
    block.each_warp([&](const Lanes& lanes, int warp) {
      auto& row = shared.few.row[warp];
      rows.template each_few<true>(
          lanes, warp, first, rows.count, shared.few.scratch[warp], row, shared.few.index[warp], [&](const int* index, int n) {
            turn(lanes, shared, rope, row, n);
            typename Lanes::template Reg<float> part[most];
            KVT_UNROLL_ON_DEVICE
            for (int k = 0; k < most; ++k) lanes.each([&](int lane) { part[k][lane] = 0; });
            for (int i = 0; i < dim && covariance; ++i) {
              lanes.each([&](int lane) {
                for (int j = lane; j <= i; j += Lanes::size) {
                  const float own = squares[i * (i + 1) / 2 + j] * (i == j ? 1.f : 2.f);
                  KVT_UNROLL_ON_DEVICE
                  for (int k = 0; k < most; ++k) part[k][lane] += own * (row[k][i] * row[k][j]);
                }
              });
            }
            KVT_UNROLL_ON_DEVICE
            for (int k = 0; k < most; ++k) {
              if (k >= n) continue;
              const float form = lanes.sum(part[k]);
              const double x = scale * static_cast<double>(detail::product<dim>(lanes, row[k], shared.mean)) +
                               by * static_cast<double>(form);
              lanes.once([&] { logit[index[k]] = static_cast<float>(x > -1e30 ? x < 1e30 ? x : 1e30 : -1e30); });
            }
          });
    });
  }
  // Rows by the transposed mean of RoPE's matrices.
  template <class Lanes, class Memory, class Row>
  KVT_HD static void turn(const Lanes& lanes, const Memory& shared, const DeviceRope& rope, Row& row, int n) {
    lanes.each([&](int lane) {
      for (int i = lane; i < rope.pairs(); i += Lanes::size) {
        const float c = shared.cosine[i], s = shared.sine[i];
        for (int k = 0; k < n; ++k) {
          float &a = row[k][rope.rope.first(i)], &b = row[k][rope.rope.second(i)];
          const float turned = a * c + b * s;
          b = b * c - a * s;
          a = turned;
        }
      }
    });
  }

  struct Turn {
    float cosine, sine;
  };
  // The mean of cos and sin of RoPE's angles at the positions from `begin` on: sums of a geometric series.
  std::vector<Turn> mean_turns(const Rope& rope, int begin) const {
    std::vector<Turn> turns;
    for (int i = 0; i < rope.rotary_dim / 2; ++i) {
      const double half = rope.step(i) / 2, middle = rope.step(i) * (begin + 0.5 * (future - 1));
      const double size = std::fabs(std::sin(half)) < 1e-12 ? 1 : std::sin(half * future) / (std::sin(half) * future);
      turns.push_back({static_cast<float>(size * std::cos(middle)), static_cast<float>(size * std::sin(middle))});
    }
    return turns;
  }
  static void turn(const Rope& rope, const std::vector<Turn>& turns, float* x, int stride) {
    for (int i = 0; i < static_cast<int>(turns.size()); ++i) {
      const auto [c, s] = turns[static_cast<std::size_t>(i)];
      float &a = x[rope.first(i) * stride], &b = x[rope.second(i) * stride];
      const float turned = a * c - b * s;
      b = a * s + b * c;
      a = turned;
    }
  }
};

static_assert(TokenSelector<ExpectedAttention>);

}  // namespace kvt::inline v0
