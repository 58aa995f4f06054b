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
    // Heads hold rows of their own: one place for each position that any of them has, and how many have it.
    int end = 0;
    for (const auto& positions : layer.positions) end = std::max(end, positions.empty() ? 0 : positions.back() + 1);
    struct Sum {
      double score = 0;
      int heads = 0;
    };
    std::vector<Sum> at(static_cast<std::size_t>(end));
    for (std::size_t h = 0; h < layer.positions.size(); ++h) {
      for (std::size_t row = 0; row < layer.positions[h].size(); ++row) {
        Sum& sum = at[static_cast<std::size_t>(layer.positions[h][row])];
        sum.score += static_cast<double>(layer.scores[h][row]);
        ++sum.heads;
      }
    }
    for (std::size_t h = 0; h < layer.positions.size(); ++h) {
      for (std::size_t row = 0; row < layer.positions[h].size(); ++row) {
        const Sum& sum = at[static_cast<std::size_t>(layer.positions[h][row])];
        layer.scores[h][row] = static_cast<float>(sum.score / sum.heads);
      }
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }
};

static_assert(JoinsHeads<Tova> && AttentionSelector<Tova>);

}  // namespace kvt::inline v0
