// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// KeyNorm: short keys are kept; they tend to get the most attention.
//
// Score:   -|k_j|, Euclidean, on stored keys.
// Needs:   keys.  Cost: O(rows * head_dim).
// Source:  Devoto et al., arXiv 2406.11430.
#pragma once

#include <cmath>

#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

struct KeyNorm {
  static constexpr EvidenceSet needs = Evidence::keys;

  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    const float* key = seen.keys.data();
    for (float& own : score) {
      own = -std::sqrt(dot(key, key, seen.head_dim));
      key += seen.head_dim;
    }
    return success();
  }
};

static_assert(TokenSelector<KeyNorm>);

}  // namespace kvt::inline v0
