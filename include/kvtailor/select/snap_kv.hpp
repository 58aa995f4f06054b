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

#include "kvtailor/select/window_attention.hpp"

namespace kvt::inline v0 {

struct SnapKv {
  using Pool = Pooling::Kind;
  static constexpr EvidenceSet needs = Evidence::keys | Evidence::positions | Evidence::window_queries;
  int window = 64;  // queries, 1 or more
  int kernel = 5;   // rows pooled together, odd
  Pool pool = Pool::average;

  Status check() const noexcept {
    if (window < 1) return error(Errc::bad_value, "window is {}; it must be 1 or more", window);
    return Pooling{kernel, pool}.check();
  }
  Status attention(const HeadEvidence& seen, std::span<float> out) const noexcept {
    KVT_TRY(check());
    const WindowAttention last(seen, window);
    KVT_TRY(last.check());
    const int before = last.rows_before();
    const float average = 1.f / (static_cast<float>(last.size()) * static_cast<float>(seen.group_size));
    const Pooling pooled{kernel, pool};
    std::fill(out.begin(), out.end(), 0.f);
    return last.each_head([&](const float* mass) {
      for (int row = 0; row < seen.num_rows(); ++row) {
        out[static_cast<std::size_t>(row)] += (row < before ? pooled(mass, row, before) : mass[row]) * average;
      }
    });
  }
  int first_kept(const HeadEvidence& seen) const noexcept { return WindowAttention(seen, window).rows_before(); }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    KVT_TRY(attention(seen, score));
    std::fill(score.begin() + first_kept(seen), score.end(), above_attention);
    return success();
  }

  // The same on a device: see store/head_score.hpp.
  template <int dim, int warps>
  struct Shared {};
  template <class Block, class Rows, class Memory>
  KVT_HD void attention_on_device(const Block& block, const Rows& rows, Memory&, float* out) const {
    const int before = first_kept_on_device(rows);
    const float average = 1.f / (static_cast<float>(rows.window.size()) * static_cast<float>(rows.window.group()));
    const Pooling pooled{kernel, pool};
    detail::window_attention(block, rows, out, [&](float sum, const float* mass, int r) {
      return sum + (r < before ? pooled(mass, r, before) : mass[r]) * average;
    });
  }
  template <class Rows>
  KVT_HD int first_kept_on_device(const Rows& rows) const {
    return rows.rows_before(rows.window.first_position());
  }
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    detail::score_by_attention(*this, block, rows, shared, score);
  }
};

static_assert(AttentionSelector<SnapKv>);

}  // namespace kvt::inline v0
