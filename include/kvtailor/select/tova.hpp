// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Tova: rows the last query looked at, all heads of a layer together.
//
// Score:   softmax of the last query over the rows it may see, mean over all query heads of the layer; a row that only some
//          heads hold has the mean of those. Rows from the query's own on score above all.
// Needs:   keys, positions, window queries (one).  Cost: O(group * rows * head_dim).
// Source:  TOVA, Oren et al., arXiv 2401.06104; the last row stays, as in kvpress.
#pragma once

#include <vector>

#include "kvtailor/select/window_attention.hpp"

namespace kvt::inline v0 {

struct Tova {
  static constexpr EvidenceSet needs = Evidence::keys | Evidence::positions | Evidence::window_queries;
  static constexpr int window = 1;

  // Of one head, as mean over its group.
  Status attention(const HeadEvidence& seen, std::span<float> out) const noexcept {
    const WindowAttention last(seen, window);
    KVT_TRY(last.check());
    const float average = 1.f / static_cast<float>(seen.group_size);
    std::fill(out.begin(), out.end(), 0.f);
    return last.each_head([&](const float* mass) {
      for (std::size_t row = 0; row < out.size(); ++row) out[row] += mass[row] * average;
    });
  }
  int first_kept(const HeadEvidence& seen) const noexcept { return WindowAttention(seen, window).rows_before(); }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    KVT_TRY(attention(seen, score));
    std::fill(score.begin() + first_kept(seen), score.end(), above_attention);
    return success();
  }
  Status join(const LayerScores& layer) const noexcept try {
    // Heads hold rows of their own: positions that any of them has, in order, and the next row of each head.
    std::vector<int> places;
    for (const auto& positions : layer.positions) places.insert(places.end(), positions.begin(), positions.end());
    std::sort(places.begin(), places.end());
    places.erase(std::unique(places.begin(), places.end()), places.end());
    std::vector<std::size_t> next(layer.positions.size());
    for (const int place : places) {
      const auto each_row = [&](auto&& f) {
        for (std::size_t h = 0; h < next.size(); ++h) {
          if (next[h] < layer.positions[h].size() && layer.positions[h][next[h]] == place) f(h, layer.scores[h][next[h]]);
        }
      };
      double sum = 0;
      int heads = 0;
      each_row([&](std::size_t, float score) { sum += static_cast<double>(score), ++heads; });
      each_row([&](std::size_t h, float& score) { score = static_cast<float>(sum / heads), ++next[h]; });
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

  // The same on a device: see store/head_score.hpp.
  template <int dim, int warps>
  struct Shared {};
  template <class Block, class Rows, class Memory>
  KVT_HD void attention_on_device(const Block& block, const Rows& rows, Memory&, float* out) const {
    const float average = 1.f / static_cast<float>(rows.window.group());
    detail::window_attention(block, rows, out, [=](float sum, const float* mass, int r) { return sum + mass[r] * average; });
  }
  template <class Rows>
  KVT_HD int first_kept_on_device(const Rows& rows) const {
    return rows.rows_before(rows.window.first_position());
  }
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    detail::score_by_attention(*this, block, rows, shared, score);
  }
  // Of one row: a mean of those that other heads have at its position.
  template <class Layer>
  KVT_HD float joined(const Layer& layer, int, int position, float) const {
    float sum = 0;
    int heads = 0;
    for (int h = 0; h < layer.num_heads; ++h) {
      const auto rows = layer.rows(h);
      const int r = rows.rows_before(position);
      if (r < rows.count && rows.position(r) == position) sum += layer.score(h, r), ++heads;
    }
    return sum / static_cast<float>(heads);
  }
};

static_assert(JoinsHeads<Tova> && AttentionSelector<Tova>);

}  // namespace kvt::inline v0
