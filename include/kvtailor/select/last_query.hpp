// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// LastQuery: once, after a prompt, the rows its last query looked at; from then on a window of newest rows slides.
//
// Score:   softmax of the last query over the rows it may see, largest over the group's query heads; rows from the query's own
//          on above all. While rows come one by one after a cut: rows that the cut chose above all, then newer above older, so
//          that with a budget in rows the oldest row of the window leaves as a new one enters.
// Needs:   keys, positions, window queries (one).  Cost: O(group * rows * head_dim).
// Source:  SAGE-KV, Wang et al., arXiv 2503.08879, whose window is CacheOptions::recent_rows here. How it joins the heads of a
//          group is not published: the maximum is ours.
#pragma once

#include "kvtailor/select/window_attention.hpp"

namespace kvt::inline v0 {

struct LastQuery {
  static constexpr EvidenceSet needs = Evidence::keys | Evidence::positions | Evidence::window_queries;
  static constexpr int window = 1;
  static constexpr bool slides = true;

  Status attention(const HeadEvidence& seen, std::span<float> out) const noexcept {
    const WindowAttention last(seen, window);
    KVT_TRY(last.check());
    std::fill(out.begin(), out.end(), 0.f);
    return last.each_head([&](const float* mass) {
      for (std::size_t row = 0; row < out.size(); ++row) out[row] = std::max(out[row], mass[row]);
    });
  }
  int first_kept(const HeadEvidence& seen) const noexcept { return WindowAttention(seen, window).rows_before(); }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    if (seen.chosen_before > 0) {
      for (std::size_t row = 0; row < score.size(); ++row) {
        const bool chosen = seen.positions[row] < seen.chosen_before;
        score[row] = static_cast<float>(chosen ? score.size() : row);
      }
      return success();
    }
    KVT_TRY(attention(seen, score));
    std::fill(score.begin() + first_kept(seen), score.end(), above_attention);
    return success();
  }

  // The same on a device: see store/head_score.hpp.
  template <int dim, int warps>
  struct Shared {};
  template <class Block, class Rows, class Memory>
  KVT_HD void attention_on_device(const Block& block, const Rows& rows, Memory&, float* out) const {
    detail::window_attention(block, rows, out, [](float most, const float* mass, int r) { return std::fmax(most, mass[r]); });
  }
  template <class Rows>
  KVT_HD int first_kept_on_device(const Rows& rows) const {
    return rows.rows_before(rows.window.first_position());
  }
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    const int chosen_before = rows.evidence.chosen_before[rows.layer];
    if (chosen_before <= 0) return detail::score_by_attention(*this, block, rows, shared, score);
    const int chosen = rows.rows_before(chosen_before);
    detail::each_index(block, 0, rows.count, [&](int r) { score[r] = static_cast<float>(r < chosen ? rows.count : r); });
  }
};

static_assert(AttentionSelector<LastQuery>);

}  // namespace kvt::inline v0
