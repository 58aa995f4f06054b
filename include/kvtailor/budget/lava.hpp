// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Lava: layers whose scores are spread over many rows keep more; within a layer, heads with the highest scores.
//
// Rule:    rows that are not protected are shared out between layers in proportion to the entropy of the layer's scores, scaled
//          to the sum one, over the logarithm of their number. In a layer, the highest scores say how many rows a head would
//          have; it is given (1 - even) of that and `even` of an equal share.
// Needs:   scores, comparable between the heads of a layer: LavaScore.  Cost: O(rows log rows).
// Source:  LAVa, Shen et al., arXiv 2509.09754; even is floor_alpha of the authors' code. Scores below zero, which LavaScore
// does
//          not have, are raised by the lowest of the layer.
#pragma once

#include <cmath>
#include <limits>
#include <new>

#include "kvtailor/budget/apportion.hpp"
#include "kvtailor/budget/top_rows.hpp"
#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

struct Lava {
  static constexpr EvidenceSet needs = Evidence::scores;
  double even = 0.5;  // 0 .. 1

  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept try {
    if (!(even >= 0 && even <= 1)) return error(Errc::bad_value, "even is {}; it must be between 0 and 1", even);
    const auto layers = static_cast<std::size_t>(want.num_layers), heads = static_cast<std::size_t>(want.num_kv_heads);
    std::vector<double> entropy(layers);
    std::vector<std::int64_t> free_rows(layers), share(layers), none(layers);
    std::int64_t left = want.total;
    const float* scores = want.scores.data();
    for (std::size_t h = 0, at = 0; h < keep.size(); ++h) {
      free_rows[h / heads] += want.seen[h] - want.floor[h];
      left -= want.floor[h];
      at += static_cast<std::size_t>(want.seen[h]);
      if (h % heads + 1 < heads) continue;
      entropy[h / heads] = std::max(1e-9, spread({scores, at}));
      scores += at;
      at = 0;
    }
    apportion(left, entropy, none, free_rows, share);
    std::vector<double> weight(heads);
    std::vector<std::int64_t> lower(heads), upper(heads), own(heads);
    scores = want.scores.data();
    for (std::size_t l = 0; l < layers; ++l) {
      const std::size_t first = l * heads;
      std::copy_n(want.floor.begin() + static_cast<std::ptrdiff_t>(first), heads,
                  keep.begin() + static_cast<std::ptrdiff_t>(first));
      scores = give_to_highest(want, first, first + heads, share[l], scores, keep);
      for (std::size_t h = 0; h < heads; ++h) {
        const int by_score = keep[first + h] - want.floor[first + h];
        weight[h] = std::max(1e-9, (1 - even) * by_score + even * static_cast<double>(share[l]) / static_cast<double>(heads));
        upper[h] = want.seen[first + h] - want.floor[first + h];
      }
      apportion(share[l], weight, lower, upper, own);
      for (std::size_t h = 0; h < heads; ++h) keep[first + h] = want.floor[first + h] + static_cast<int>(own[h]);
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while sharing out a budget");
  }

 private:
  // Entropy of a layer's scores over the logarithm of their number, 0 .. 1. Protected rows have infinity and rows of a
  // selector's window the largest float: they stay whatever the others score, and are left out.
  static double spread(std::span<const float> scores) {
    const auto counts = [](float s) { return std::fabs(s) < std::numeric_limits<float>::max(); };
    double least = 0, total = 0, sum = 0;
    std::size_t n = 0;
    for (const float s : scores) {
      if (counts(s)) least = std::min(least, static_cast<double>(s)), ++n;
    }
    for (const float s : scores) {
      if (counts(s)) total += static_cast<double>(s) - least;
    }
    if (n < 2) return 0;
    if (!(total > 0)) return 1;
    for (const float s : scores) {
      const double p = counts(s) ? (static_cast<double>(s) - least) / total : 0;
      if (p > 0) sum -= p * std::log(p);
    }
    return sum / std::log(static_cast<double>(n));
  }
};

static_assert(BudgetAllocator<Lava>);

}  // namespace kvt::inline v0
