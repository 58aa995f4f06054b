// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// SqueezeAttention: layers whose attention changes the hidden state least keep fewer rows.
//
// Rule:    layers fall into three groups by the mean cosine of the hidden state before and after attention (k-means, begun at
// the
//          least, middle and largest cosine); those of the highest group are given `share` of an even budget, and what they
//          give up goes to all others alike.
// Needs:   layer similarity: the engine calls observe_hidden().  Cost: O(heads log heads).
// Source:  SqueezeAttention, Wang et al., arXiv 2404.04793, whose code states the smaller budget as a share of the prompt.
#pragma once

#include <array>
#include <cmath>
#include <new>

#include "kvtailor/budget/apportion.hpp"
#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

struct SqueezeAttention {
  static constexpr EvidenceSet needs = Evidence::layer_similarity;
  double share = 0.35;  // 0 .. 1

  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept try {
    if (!(share >= 0 && share <= 1)) return error(Errc::bad_value, "share is {}; it must be between 0 and 1", share);
    if (want.similarity.size() != static_cast<std::size_t>(want.num_layers)) {
      return error(Errc::no_evidence, "SqueezeAttention knows the hidden states of {} of {} layers",
                   static_cast<double>(want.similarity.size()), want.num_layers);
    }
    const std::vector<bool> lazy = highest_group(want.similarity);
    const auto layers = static_cast<double>(lazy.size());
    const auto squeezed = static_cast<double>(std::count(lazy.begin(), lazy.end(), true));
    const double rest = squeezed < layers ? (layers - squeezed * share) / (layers - squeezed) : 1;
    std::vector<double> weight(keep.size());
    for (std::size_t h = 0; h < weight.size(); ++h) {
      const bool less = squeezed < layers && lazy[h / static_cast<std::size_t>(want.num_kv_heads)];
      weight[h] = std::max(1e-9, less ? share : rest);
    }
    apportion(want, weight, keep);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }

 private:
  static std::vector<bool> highest_group(std::span<const float> similarity) {
    const auto [low, high] = std::minmax_element(similarity.begin(), similarity.end());
    std::array<double, 3> centre = {static_cast<double>(*low), (static_cast<double>(*low) + static_cast<double>(*high)) / 2,
                                    static_cast<double>(*high)};
    const auto group = [&](float x) {
      std::size_t nearest = 0;
      for (std::size_t k = 1; k < 3; ++k) {
        if (std::fabs(static_cast<double>(x) - centre[k]) < std::fabs(static_cast<double>(x) - centre[nearest])) nearest = k;
      }
      return nearest;
    };
    for (int step = 0; step < 100; ++step) {  // far more than it takes
      std::array<double, 3> sum = {}, count = {};
      for (const float x : similarity) sum[group(x)] += static_cast<double>(x), ++count[group(x)];
      std::array<double, 3> next = centre;
      for (std::size_t k = 0; k < 3; ++k) {
        if (count[k] > 0) next[k] = sum[k] / count[k];
      }
      if (next == centre) break;
      centre = next;
    }
    std::vector<bool> lazy;
    for (const float x : similarity) lazy.push_back(group(x) == 2);
    return lazy;
  }
};

static_assert(BudgetAllocator<SqueezeAttention>);

}  // namespace kvt::inline v0
