// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// SoftTopK: how many rows stay, and which, as something that has a gradient.
//
//   m_j = sigmoid((s_j - threshold) / temperature), with the threshold at which the m_j add up to `count`
//
// As the temperature goes to zero m becomes the mask of the `count` highest scores; at zero it is that mask, of equal scores
// the earlier first, and a part of a row where the count is no whole number. Gradients are those of the solved equation: with
// w_j = m_j (1 - m_j) / temperature and a gradient g of a loss by m,
//   by s_i: w_i (g_i - mean)   by count: mean   by temperature: -sum over j of w_j (g_j - mean) (s_j - threshold) / temperature
// where mean = sum g_j w_j / sum w_j.
//
// Source:  LKV, arXiv 2605.06676, has a differentiable top-k between budgets and scores. Which one was not published: this is
//          ours.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

template <class T>
struct SoftTopK {
  T temperature = 1;  // in units of scores; 0 or more
  T threshold = 0;    // solved for by the last choose()

  // mask[j], 0 .. 1, adds up to count. scores [n], finite; count 0 .. n. O(n) for each bit of T; at temperature 0 O(n log n).
  Status choose(std::span<const T> scores, T count, std::span<T> mask) {
    const std::size_t n = scores.size();
    if (mask.size() != n) {
      return error(Errc::bad_shape, "there are {} scores and a mask of {} rows", static_cast<double>(n),
                   static_cast<double>(mask.size()));
    }
    if (!(temperature >= 0) || !std::isfinite(temperature)) {
      return error(Errc::bad_value, "the temperature is {}; it must be finite and not below zero",
                   static_cast<double>(temperature));
    }
    if (!(count >= 0 && count <= static_cast<T>(n))) {
      return error(Errc::bad_budget, "{} rows are to stay of {}", static_cast<double>(count), static_cast<double>(n));
    }
    T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::lowest();
    for (const T s : scores) {
      if (!std::isfinite(s)) return error(Errc::bad_value, "a score is {}; it must be finite", static_cast<double>(s));
      low = std::min(low, s);
      high = std::max(high, s);
    }
    if (n == 0) return success();
    if (temperature == 0) {
      choose_hard(scores, count, mask);
      return success();
    }
    // Wide enough that all rows stay, or none, to the last bit.
    const T reach = -2 * temperature * std::log(std::numeric_limits<T>::epsilon());
    low -= reach;
    high += reach;
    for (int step = 0; step < 2 * std::numeric_limits<T>::digits; ++step) {
      threshold = low + (high - low) / 2;
      if (threshold == low || threshold == high) break;
      T sum = 0;
      for (const T s : scores) sum += weight(s);
      (sum > count ? low : high) = threshold;
    }
    for (std::size_t j = 0; j < n; ++j) mask[j] = weight(scores[j]);
    return success();
  }

  struct Gradient {
    T count = 0, temperature = 0;
  };
  // Of what choose() gave for these scores at a temperature above zero: by_mask [n] is the gradient of a loss by the mask; that
  // by the scores is added to by_scores [n].
  Gradient add_gradient(std::span<const T> scores, std::span<const T> mask, std::span<const T> by_mask,
                        std::span<T> by_scores) const {
    T all = 0, mean = 0;
    for (std::size_t j = 0; j < mask.size(); ++j) {
      const T w = slope(mask[j]);
      all += w;
      mean += w * by_mask[j];
    }
    // Where no row is undecided there is no slope.
    mean = all > 0 ? mean / all : 0;
    Gradient by{mean, 0};
    for (std::size_t j = 0; j < mask.size(); ++j) {
      const T own = slope(mask[j]) * (by_mask[j] - mean);
      by_scores[j] += own;
      by.temperature -= own * (scores[j] - threshold) / temperature;
    }
    return by;
  }

 private:
  T weight(T score) const { return 1 / (1 + std::exp((threshold - score) / temperature)); }
  T slope(T m) const { return m * (1 - m) / temperature; }
  void choose_hard(std::span<const T> scores, T count, std::span<T> mask) {
    std::vector<std::size_t> order(scores.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
    for (const std::size_t j : order) {
      mask[j] = std::clamp(count, T{0}, T{1});
      if (mask[j] > 0) threshold = scores[j];
      count -= mask[j];
    }
  }
};

}  // namespace kvt::inline v0
