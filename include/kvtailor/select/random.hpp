// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Random: any row is as good as any other. What a method has to beat.
//
// Score:   a number in [0, 1) that seed, layer, KV head and position give, the same on every machine.
// Needs:   positions.  Cost: O(rows).
// Source:  none: the floor of every comparison.
#pragma once

#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/random.hpp"

namespace kvt::inline v0 {

struct Random {
  static constexpr EvidenceSet needs = Evidence::positions;
  std::uint64_t seed = 0;

  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    const std::uint64_t own = of_head(seen.layer, seen.kv_head);
    for (std::size_t row = 0; row < score.size(); ++row) {
      score[row] = uniform_number(own, static_cast<std::uint64_t>(seen.positions[row]));
    }
    return success();
  }

  // The same on a device: see store/head_score.hpp.
  template <int dim, int warps>
  struct Shared {};
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory&, float* score) const {
    using Lanes = typename Block::Lanes;
    const std::uint64_t own = of_head(rows.layer, rows.kv_head);
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        for (int r = warp * Lanes::size + lane; r < rows.count; r += Block::warps * Lanes::size) {
          score[r] = uniform_number(own, static_cast<std::uint64_t>(rows.position(r)));
        }
      });
    });
  }

 private:
  KVT_HD std::uint64_t of_head(int layer, int kv_head) const {
    return mixed_bits(mixed_bits(seed, static_cast<std::uint64_t>(layer)), static_cast<std::uint64_t>(kv_head));
  }
};

static_assert(TokenSelector<Random>);

}  // namespace kvt::inline v0
