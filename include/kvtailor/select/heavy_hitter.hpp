// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// HeavyHitter: rows that got the most attention so far.
//
// Score:   softmax weights of all queries since the row came, prompt and answer alike, mean over the group's query heads; as a
//          mean over the queries that could see the row, or as their sum, which favours old rows. What a row got stays with it
//          from cut to cut; that of queries that were truncated stays too.
// Needs:   attention: observe() costs as much as the logits of attention.  Cost: O(rows).
// Source:  H2O, Zhang et al., arXiv 2306.14048 (the sum); the mean is kvpress' ObservedAttention.
#pragma once

#include "kvtailor/select/window_attention.hpp"

namespace kvt::inline v0 {

struct HeavyHitter {
  enum class Over { visible, all };
  static constexpr EvidenceSet needs = Evidence::attention;
  Over over = Over::visible;

  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    bool any = false;
    for (std::size_t row = 0; row < score.size(); ++row) {
      const RowAttention& own = seen.attention[row];
      any = any || own.queries > 0;
      score[row] = over == Over::all ? own.sum : own.queries > 0 ? own.sum / static_cast<float>(own.queries) : 0.f;
    }
    if (any || score.empty()) return success();
    return refusal();
  }
  Status attention(const HeadEvidence& seen, std::span<float> out) const noexcept { return score(seen, out); }
  int first_kept(const HeadEvidence& seen) const noexcept { return seen.num_rows(); }

  // The same on a device: see store/head_score.hpp.
  static Status refusal() noexcept {
    return error(Errc::no_evidence, "the token selector has seen {} queries; call observe() before compress()", 0);
  }
  template <int size, int warps>
  struct Shared {
    int any[warps];
  };
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    const float average = 1.f / static_cast<float>(rows.evidence.group);
    const Over own = over;
    detail::given_to_rows(block, rows, shared.any, score, [=](float weight, int queries) {
      return own == Over::all ? weight * average : queries > 0 ? weight * average / static_cast<float>(queries) : 0.f;
    });
  }
  template <class Block, class Rows, class Memory>
  KVT_HD void attention_on_device(const Block& block, const Rows& rows, Memory& shared, float* out) const {
    score_on_device(block, rows, shared, out);
  }
  template <class Rows>
  KVT_HD int first_kept_on_device(const Rows& rows) const {
    return rows.count;
  }
};

static_assert(AttentionSelector<HeavyHitter>);

}  // namespace kvt::inline v0
