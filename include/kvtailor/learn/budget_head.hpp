// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// BudgetHead: which share of its rows each head keeps, for any share asked for on the whole, as something that has a gradient.
//
//   g_h = outer . silu(inner [e_h ; logit(retention)] + bias) + slope_h logit(retention) + start_h
//   share_h = low + (high - low) sigmoid(g_h + level), with the level at which the mean of the shares is the retention
//
// e_h is an embedding of the head, learned. The bounds hold and the mean is met exactly, whatever the parameters are.
// Gradients are those of the solved equation: with p_h = (high - low) sigmoid' and a gradient by the shares, that by g_h is
// p_h (by_h - sum by p / sum p).
//
// Source:  LKV, arXiv 2605.06676: budgets over all heads from learned embeddings of heads. Its layers and how it keeps the
//          budget were not published: these are ours.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

template <class T>
class BudgetHead {
 public:
  static constexpr T low = 0, high = 1;

  BudgetHead() = default;
  // width: of an embedding; hidden: of the layer that all heads share.
  BudgetHead(int num_heads, int width, int hidden)
      : heads_(static_cast<std::size_t>(num_heads)),
        width_(static_cast<std::size_t>(width)),
        hidden_(static_cast<std::size_t>(hidden)),
        parameters_(size_of(num_heads, width, hidden), T(0)) {}

  static std::size_t size_of(int num_heads, int width, int hidden) {
    const auto heads = static_cast<std::size_t>(num_heads), w = static_cast<std::size_t>(width);
    return heads * (w + 2) + static_cast<std::size_t>(hidden) * (w + 3);
  }
  int num_heads() const { return static_cast<int>(heads_); }
  int width() const { return static_cast<int>(width_); }
  int hidden() const { return static_cast<int>(hidden_); }

  // One after another: embeddings [heads, width], slope [heads], start [heads], inner [hidden, width + 1], bias [hidden],
  // outer [hidden].
  std::span<T> parameters() { return parameters_; }
  std::span<const T> parameters() const { return parameters_; }

  // shares [heads]; retention above 0 and below 1. O(heads * hidden * width).
  Status shares(T retention, std::span<T> shares) const {
    if (shares.size() != heads_) {
      return error(Errc::bad_shape, "there are {} heads and shares for {}", static_cast<double>(heads_),
                   static_cast<double>(shares.size()));
    }
    if (!(retention > T(0) && retention < T(1))) {
      return error(Errc::bad_budget, "a retention of {}; it must be above 0 and below 1", static_cast<double>(retention));
    }
    std::vector<T> hidden(hidden_);
    T least = std::numeric_limits<T>::max(), most = std::numeric_limits<T>::lowest();
    for (std::size_t h = 0; h < heads_; ++h) {
      shares[h] = utility(h, logit(retention), hidden);
      if (!std::isfinite(shares[h])) return error(Errc::bad_value, "the budget of a head is NaN or infinite");
      least = std::min(least, shares[h]);
      most = std::max(most, shares[h]);
    }
    // Where every head has the retention, or more, and where none has.
    T under = logit(retention) - most, over = logit(retention) - least;
    for (int step = 0; step < 2 * std::numeric_limits<T>::digits; ++step) {
      const T level = under + (over - under) / 2;
      if (level == under || level == over) break;
      T sum = 0;
      for (std::size_t h = 0; h < heads_; ++h) sum += share_of(shares[h] + level);
      (sum > retention * static_cast<T>(heads_) ? over : under) = level;
    }
    for (std::size_t h = 0; h < heads_; ++h) shares[h] = share_of(shares[h] + under + (over - under) / 2);
    return success();
  }

  // by_shares [heads] is the gradient of a loss by what shares() gave; that by the parameters is added to `to`.
  void add_gradient(T retention, std::span<const T> shares, std::span<const T> by_shares, std::span<T> to) const {
    const T at = logit(retention);
    T all = 0, mean = 0;
    for (std::size_t h = 0; h < heads_; ++h) {
      all += slope_of(shares[h]);
      mean += slope_of(shares[h]) * by_shares[h];
    }
    mean = all > 0 ? mean / all : 0;
    std::vector<T> hidden(hidden_);
    for (std::size_t h = 0; h < heads_; ++h) {
      const T by = slope_of(shares[h]) * (by_shares[h] - mean);
      utility(h, at, hidden);
      const T* const e = parameters_.data() + h * width_;
      T* const to_e = to.data() + h * width_;
      to[slope_at() + h] += by * at;
      to[start_at() + h] += by;
      for (std::size_t i = 0; i < hidden_; ++i) {
        const T gate = 1 / (1 + std::exp(-hidden[i])), out = parameters_[outer_at() + i];
        to[outer_at() + i] += by * hidden[i] * gate;
        const T inner = by * out * gate * (1 + hidden[i] * (1 - gate));
        const std::size_t row = inner_at() + i * (width_ + 1);
        for (std::size_t d = 0; d < width_; ++d) {
          to[row + d] += inner * e[d];
          to_e[d] += inner * parameters_[row + d];
        }
        to[row + width_] += inner * at;
        to[bias_at() + i] += inner;
      }
    }
  }

 private:
  std::size_t slope_at() const { return heads_ * width_; }
  std::size_t start_at() const { return slope_at() + heads_; }
  std::size_t inner_at() const { return start_at() + heads_; }
  std::size_t bias_at() const { return inner_at() + hidden_ * (width_ + 1); }
  std::size_t outer_at() const { return bias_at() + hidden_; }

  static T logit(T share) { return std::log(share / (1 - share)); }
  static T share_of(T g) { return low + (high - low) / (1 + std::exp(-g)); }
  static T slope_of(T share) { return (share - low) * (high - share) / (high - low); }

  // g of a head, and what goes into silu.
  T utility(std::size_t h, T at, std::span<T> hidden) const {
    const T* const p = parameters_.data();
    T sum = p[slope_at() + h] * at + p[start_at() + h];
    for (std::size_t i = 0; i < hidden_; ++i) {
      const T* const row = p + inner_at() + i * (width_ + 1);
      T x = p[bias_at() + i] + row[width_] * at;
      for (std::size_t d = 0; d < width_; ++d) x += row[d] * p[h * width_ + d];
      hidden[i] = x;
      sum += p[outer_at() + i] * x / (1 + std::exp(-x));
    }
    return sum;
  }

  std::size_t heads_ = 0, width_ = 0, hidden_ = 0;
  std::vector<T> parameters_;
};

}  // namespace kvt::inline v0
