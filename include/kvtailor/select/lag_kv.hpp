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

#include "kvtailor/core/block_loops.hpp"
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

  // The same on a device: see store/head_score.hpp. O(rows * (head_dim + lag)).
  long long device_space(int, long long rows) const {
    return 2 * static_cast<long long>(sizeof(double)) * std::min<long long>(lag, rows);
  }
  template <int size, int warps>
  struct Shared {
    float scratch[warps][size], row[warps][size];
    float least[size];
    double factor[size], part[warps];
  };
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    const int n = rows.count, parts = n > num_sinks ? (n - num_sinks) / lag : 0;
    detail::each_index(block, 0, n, [&](int r) {
      score[r] = parts >= 2 || r < num_sinks ? 1.f : static_cast<float>(r - num_sinks) / static_cast<float>(n - num_sinks);
    });
    double *const own = rows.template space<double>(), *const of_values = own + lag;
    for (int part = 0; part + 1 < parts; ++part) {
      const int first = num_sinks + part * lag;
      spread_on_device<true>(block, rows, first, shared, own);
      spread_on_device<false>(block, rows, first, shared, of_values);
      detail::each_index(block, 0, lag, [&](int i) { own[i] = (own[i] + of_values[i]) / 2; });
      detail::each_index(block, 0, lag, [&](int i) {
        int below = 0;  // of equal rows the first ranks highest
        for (int j = 0; j < lag && !cross; ++j) below += own[j] < own[i] || (own[j] == own[i] && j > i) ? 1 : 0;
        score[first + i] = cross ? static_cast<float>(own[i]) : static_cast<float>(below) / static_cast<float>(lag);
      });
    }
  }

 private:
  template <bool keys, class Block, class Rows, class Memory>
  KVT_HD void spread_on_device(const Block& block, const Rows& rows, int first, Memory& shared, double* out) const {
    using Lanes = typename Block::Lanes;
    using Channels = LaneRow<Rows::dim, Lanes::size>;
    constexpr int dim = Rows::dim;
    constexpr float infinite = std::numeric_limits<float>::infinity();
    block.each_warp([&](const Lanes& lanes, int warp) {
      typename Lanes::template Reg<Channels> low, high;
      lanes.each([&](int lane) {
        KVT_UNROLL_ON_DEVICE
        for (int k = 0; k < Channels::length; ++k) low[lane].x[k] = infinite, high[lane].x[k] = -infinite;
      });
      float* const row = shared.row[warp];
      rows.template each_decoded<keys>(lanes, warp, first + lag, first + 2 * lag, shared.scratch[warp], row, [&](int) {
        lanes.each([&](int lane) {
          KVT_UNROLL_ON_DEVICE
          for (int k = 0; k < Channels::length; ++k) {
            const int d = k * Lanes::size + lane;
            if (dim % Lanes::size != 0 && d >= dim) continue;
            low[lane].x[k] = std::fmin(low[lane].x[k], row[d]);
            high[lane].x[k] = std::fmax(high[lane].x[k], row[d]);
          }
        });
      });
      lanes.each([&](int lane) {
        KVT_UNROLL_ON_DEVICE
        for (int k = 0; k < Channels::length; ++k) {
          const int d = k * Lanes::size + lane;
          if (dim % Lanes::size != 0 && d >= dim) continue;
          shared.scratch[warp][d] = low[lane].x[k];
          row[d] = high[lane].x[k];
        }
      });
    });
    detail::each_index(block, 0, dim, [&](int d) {
      float low = infinite, high = -infinite;
      for (int w = 0; w < Block::warps; ++w) {
        low = std::fmin(low, shared.scratch[w][d]);
        high = std::fmax(high, shared.row[w][d]);
      }
      shared.least[d] = low;
      shared.factor[d] = high > low ? 1 / (static_cast<double>(high) - static_cast<double>(low)) : 0;
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      const float* const row = shared.row[warp];
      rows.template each_decoded<keys>(lanes, warp, first, first + lag, shared.scratch[warp], shared.row[warp], [&](int r) {
        const auto sum = [&](auto&& term) {
          typename Lanes::template Reg<double> part;
          lanes.each([&](int lane) {
            part[lane] = 0;
            for (int d = lane; d < dim; d += Lanes::size) {
              part[lane] += term((static_cast<double>(row[d]) - static_cast<double>(shared.least[d])) * shared.factor[d]);
            }
          });
          return lanes.sum(part);
        };
        const double mean = sum([](double x) { return x; }) / dim;
        const double square = sum([=](double x) { return (x - mean) * (x - mean); });
        lanes.once([&] { out[r - first] = std::sqrt(square / (dim - 1)); });
      });
    });
    const double largest = detail::over_block<true>(block, shared.part, [&](int thread, int threads) {
      double own = 0;
      for (int i = thread; i < lag; i += threads) own = out[i] > own ? out[i] : own;
      return own;
    });
    const double sum = detail::sum_of_block(block, shared.part, [&](int thread, int threads) {
      double own = 0;
      for (int i = thread; i < lag; i += threads) own += out[i] = std::exp(out[i] - largest);
      return own;
    });
    detail::each_index(block, 0, lag, [&](int i) { out[i] /= sum; });
  }
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
