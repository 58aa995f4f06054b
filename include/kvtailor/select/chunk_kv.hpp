// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// ChunkKv<Base>: whole runs of text instead of single rows, the same of all heads of a layer.
//
// Score:   of all rows at positions k * length .. (k + 1) * length - 1: the sum over heads of the mean of their scores by
//          another selector. A budget that ends within a run keeps the first rows of that run.
// Needs:   what the other needs.  Cost: O(rows).
// Source:  ChunkKV, Liu et al., arXiv 2502.00299; length 20 as in kvpress, which rounds a budget down to whole runs.
#pragma once

#include <algorithm>
#include <limits>
#include <map>
#include <new>

#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

template <TokenSelector Base>
struct ChunkKv {
  static constexpr EvidenceSet needs = Base::needs | Evidence::positions;
  Base base = {};
  int length = 20;  // positions

  EvidenceSet active_needs() const noexcept { return needs_of(base) | Evidence::positions; }
  Status check() const noexcept {
    if (length < 1) return error(Errc::bad_value, "length is {}; it must be 1 or more", length);
    return success();
  }
  Status check(const Geometry& shape) const noexcept {
    KVT_TRY(check());
    return check_policy(base, shape);
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept { return base.score(seen, score); }
  Status join(const LayerScores& layer) const noexcept try {
    KVT_TRY(check());
    if constexpr (JoinsHeads<Base>) KVT_TRY(base.join(layer));
    std::map<int, double> of_chunk;
    for (std::size_t h = 0; h < layer.positions.size(); ++h) {
      each_chunk(layer.positions[h], [&](int chunk, std::size_t first, std::size_t last) {
        double sum = 0;
        for (std::size_t row = first; row < last; ++row) sum += static_cast<double>(layer.scores[h][row]);
        of_chunk[chunk] += sum / static_cast<double>(last - first);
      });
    }
    for (std::size_t h = 0; h < layer.positions.size(); ++h) {
      each_chunk(layer.positions[h], [&](int chunk, std::size_t first, std::size_t last) {
        constexpr auto most = static_cast<double>(std::numeric_limits<float>::max());
        const auto own = static_cast<float>(std::clamp(of_chunk[chunk], -most, most));
        for (std::size_t row = first; row < last; ++row) layer.scores[h][row] = own;
      });
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

  // The same on a device: see store/head_score.hpp.
  template <int dim, int warps, class Own = Base>
  using Shared = typename Own::template Shared<dim, warps>;
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    base.score_on_device(block, rows, shared, score);
  }
  template <class Layer>
  KVT_HD float joined(const Layer& layer, int, int position, float) const {
    static_assert(!JoinsHeads<Base>, "on a device, only rows of selectors that score each head alone are chunked");
    const int chunk = position / length;
    float sum = 0;
    for (int h = 0; h < layer.num_heads; ++h) {
      const auto rows = layer.rows(h);
      const int first = rows.rows_before(chunk * length), last = rows.rows_before((chunk + 1) * length);
      float own = 0;
      for (int r = first; r < last; ++r) own += layer.score(h, r);
      if (last > first) sum += own / static_cast<float>(last - first);
    }
    return sum;
  }

 private:
  // f(chunk, first, last) of the rows in each.
  template <class F>
  void each_chunk(std::span<const int> positions, F&& f) const {
    for (std::size_t first = 0, last = 0; first < positions.size(); first = last) {
      const int chunk = positions[first] / length;
      while (last < positions.size() && positions[last] / length == chunk) ++last;
      f(chunk, first, last);
    }
  }
};

}  // namespace kvt::inline v0
