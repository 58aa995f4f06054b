// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Caote<Base>: rows whose loss would change the output of attention most.
//
// Score:   a_j / (1 - a_j) * |o - v_j| with o = sum a_j v_j, where a is the attention of another selector, scaled to the sum
// one:
//          exactly how far the output moves when row j alone is dropped. Rows that the other selector keeps above all stay so.
// Needs:   what the other needs, values.  Cost: O(rows * head_dim).
// Source:  CAOTE, Goel et al., arXiv 2504.14051.
#pragma once

#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "kvtailor/core/block_loops.hpp"
#include "kvtailor/select/window_attention.hpp"

namespace kvt::inline v0 {

template <AttentionSelector Base>
struct Caote {
  static_assert(!JoinsHeads<Base>, "each head is scored alone here; heads of the other selector decide together");
  static constexpr EvidenceSet needs = Base::needs | Evidence::values;
  static constexpr bool slides = false;  // it goes by attention
  Base base = {};

  EvidenceSet active_needs() const noexcept { return needs_of(base) | Evidence::values; }
  Status check(const Geometry& shape) const noexcept { return check_policy(base, shape); }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    KVT_TRY(base.attention(seen, score));
    const auto kept = static_cast<std::size_t>(base.first_kept(seen)), dim = static_cast<std::size_t>(seen.head_dim);
    double total = 0;
    for (const float weight : score) total += static_cast<double>(weight);
    const double share = total > 0 ? 1 / total : 0;
    std::vector<double> sum(dim);
    for (std::size_t row = 0; row < score.size(); ++row) {
      const double own = share * static_cast<double>(score[row]);
      for (std::size_t d = 0; d < dim; ++d) sum[d] += own * static_cast<double>(seen.values[row * dim + d]);
    }
    std::vector<float> difference(dim);
    for (std::size_t row = 0; row < kept; ++row) {
      for (std::size_t d = 0; d < dim; ++d) {
        difference[d] = static_cast<float>(smaller * (sum[d] - static_cast<double>(seen.values[row * dim + d])));
      }
      const float square = dot(difference.data(), difference.data(), seen.head_dim);
      score[row] = moved(share * static_cast<double>(score[row]), square);
    }
    std::fill(score.begin() + static_cast<std::ptrdiff_t>(kept), score.end(), most);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

  // The same on a device: see store/head_score.hpp. Distances are those of values as their codec turns them.
  template <int size, int warps>
  struct Sums {
    float value[warps][size], sum[warps][size], all[size];
    double part[warps];
  };
  template <class Own, int size, int warps>
  union Around {
    Own base;
    Sums<size, warps> own;
  };
  template <int size, int warps, class Own = Base>
  using Shared = Around<typename Own::template Shared<size, warps>, size, warps>;
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    using Lanes = typename Block::Lanes;
    constexpr int dim = Rows::dim;
    base.attention_on_device(block, rows, shared.base, score);
    const int kept = base.first_kept_on_device(rows);
    auto& memory = shared.own;
    const double total = detail::sum_of_block(block, memory.part, [&](int thread, int threads) {
      double own = 0;
      for (int r = thread; r < rows.count; r += threads) own += static_cast<double>(score[r]);
      return own;
    });
    const double share = total > 0 ? 1 / total : 0;
    block.each_warp([&](const Lanes& lanes, int warp) {
      float *const value = memory.value[warp], *const sum = memory.sum[warp];
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) sum[d] = 0;
      });
      rows.each_value(lanes, warp, value, [&](int r) {
        const auto own = static_cast<float>(share * static_cast<double>(score[r]));
        lanes.each([&](int lane) {
          for (int d = lane; d < dim; d += Lanes::size) sum[d] += own * value[d];
        });
      });
    });
    detail::each_index(block, 0, dim, [&](int d) {
      memory.all[d] = 0;
      for (int w = 0; w < Block::warps; ++w) memory.all[d] += memory.sum[w][d];
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      float* const value = memory.value[warp];
      rows.each_value(lanes, warp, value, [&](int r) {
        lanes.each([&](int lane) {
          for (int d = lane; d < dim; d += Lanes::size) value[d] = static_cast<float>(smaller) * (memory.all[d] - value[d]);
        });
        const float square = detail::product<dim>(lanes, value, value);
        lanes.once([&] { score[r] = r < kept ? moved(share * static_cast<double>(score[r]), square) : most; });
      });
    });
  }

 private:
  static constexpr float most = std::numeric_limits<float>::max();
  // Differences are smaller by a power of two: squares of values of 1e18 that add up leave fp32, and no weight times that would
  // be NaN.
  static constexpr double smaller = 0x1p-8;
  // How far the output moves without a row of such a weight, out of the square of the smaller difference.
  KVT_HD static float moved(double own, float square) {
    if (!(own < 1)) return most;
    const double far = own / (1 - own) * std::sqrt(static_cast<double>(square)) / smaller;
    return static_cast<float>(far < 0.5 * static_cast<double>(most) ? far : 0.5 * static_cast<double>(most));
  }
};

}  // namespace kvt::inline v0
