// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// SinkRecent: the first rows and the newest rows matter, nothing between.
//
// Score:   rows at the first num_sinks places of the text above all, then newer above older.
// Needs:   positions.  Cost: O(rows).
// Source:  StreamingLLM, Xiao et al., arXiv 2309.17453. Differs from it: keys keep their positions.
#pragma once

#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

struct SinkRecent {
  static constexpr EvidenceSet needs = Evidence::positions;
  int num_sinks = 4;  // rows at positions 0 .. num_sinks - 1

  Status check() const noexcept {
    if (num_sinks < 0) return error(Errc::bad_value, "num_sinks is {}; it must be zero or more", num_sinks);
    return success();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    KVT_TRY(check());
    const int n = seen.num_rows();
    // The index, not the position: fp32 holds it exactly up to 16 million rows.
    for (int row = 0; row < n; ++row) {
      score[static_cast<std::size_t>(row)] =
          static_cast<float>(seen.positions[static_cast<std::size_t>(row)] < num_sinks ? 2 * n - row : row);
    }
    return success();
  }

  // The same on a device: see store/head_score.hpp.
  template <int dim, int warps>
  struct Shared {};
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory&, float* score) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        for (int r = warp * Lanes::size + lane; r < rows.count; r += Block::warps * Lanes::size) {
          score[r] = static_cast<float>(rows.position(r) < num_sinks ? 2 * rows.count - r : r);
        }
      });
    });
  }
};

static_assert(TokenSelector<SinkRecent>);

}  // namespace kvt::inline v0
