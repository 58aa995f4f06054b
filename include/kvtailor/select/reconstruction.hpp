// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Reconstruction: rows that the model needs to repeat its own context, whatever will be asked.
//
// Score:   the largest softmax weight that any query head of the group gave the row in any query observed since forget().
//          The engine: prefill; forget(); run "repeat the previous context" and the context over the cache; truncate() the
//          repetition; compress().
// Needs:   attention (observe() costs as much as the logits of attention) and an engine that repeats the context; engines look
//          for reconstruction among the cache's needs().  Cost: O(rows); a second prefill for the engine.
// Source:  KVzip, Kim et al., arXiv 2505.23416. Differs from it: weights are over all that a query sees, where its code has
//          sinks, one chunk of the context and the repetition; the same for a context of one chunk. With rows weighted through
//          the output projection (KVzip+): ValueNorm<Reconstruction, Through::output>.
#pragma once

#include "kvtailor/select/window_attention.hpp"

namespace kvt::inline v0 {

struct Reconstruction {
  static constexpr EvidenceSet needs = Evidence::attention | Evidence::reconstruction;

  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    bool any = false;
    for (std::size_t row = 0; row < score.size(); ++row) {
      any = any || seen.attention[row].queries > 0;
      score[row] = seen.attention[row].largest;
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
    detail::given_to_rows(block, rows, shared.any, score, [](float weight, int) { return weight; });
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

static_assert(AttentionSelector<Reconstruction>);

}  // namespace kvt::inline v0
