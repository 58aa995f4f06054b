// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// KeyDiff: keys that differ from the others are kept.
//
// Score:   -cos(k_j, mean over i of k_i / |k_i|), on stored (post-RoPE) keys.
// Needs:   keys.  Cost: O(rows * head_dim).
// Source:  KeyDiff, Park et al., arXiv 2504.15364.
#pragma once

#include <algorithm>
#include <cmath>

#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

struct KeyDiff {
  static constexpr EvidenceSet needs = Evidence::keys;

  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    const int n = seen.num_rows();
    const int dim = seen.head_dim;
    float* const mean = seen.scratch.data();
    std::fill(mean, mean + dim, 0.f);
    for (int row = 0; row < n; ++row) {
      const float* const key = seen.keys.data() + static_cast<std::int64_t>(row) * dim;
      const float inverse = inverse_norm(key, dim);
      for (int d = 0; d < dim; ++d) mean[d] += key[d] * inverse;
    }
    const float mean_inverse = inverse_norm(mean, dim);
    for (int row = 0; row < n; ++row) {
      const float* const key = seen.keys.data() + static_cast<std::int64_t>(row) * dim;
      double product = 0;
      for (int d = 0; d < dim; ++d) product += static_cast<double>(key[d]) * static_cast<double>(mean[d]);
      score[static_cast<std::size_t>(row)] =
          static_cast<float>(-product * static_cast<double>(inverse_norm(key, dim)) * static_cast<double>(mean_inverse));
    }
    return success();
  }

 private:
  // A zero row has no direction: its cosine counts as zero.
  static float inverse_norm(const float* x, int dim) {
    double square = 0;
    for (int d = 0; d < dim; ++d) square += static_cast<double>(x[d]) * static_cast<double>(x[d]);
    return square > 1e-60 ? static_cast<float>(1.0 / std::sqrt(square)) : 0.f;
  }
};

static_assert(TokenSelector<KeyDiff>);

}  // namespace kvt::inline v0
