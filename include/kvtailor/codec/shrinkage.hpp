// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// eOptShrink: how many singular values of a block stand above its noise, and how much of each is signal.
//
// Model: block = low rank + noise, the noise coloured along rows and columns by factors nobody knows. lambda: the squared
// singular values, descending, [min(n, d)]; n rows of d = head_dim elements.
// Source: eOptShrink, arXiv 2207.03466 (D-transform, section 3), as eOptShrinkQ, arXiv 2605.02905, uses it on a block of the
// cache. Where published descriptions differ, the margin is relative and the last term of m2 has the sign of the authors' code.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "kvtailor/core/config.hpp"

namespace kvt::inline v0 {

enum class Shrinkage {
  none,       // truncation: singular values as they are
  frobenius,  // least squared error
  operator_norm,
  nuclear,
};

class NoiseFit {
 public:
  // Finds the edge of the noise and the rank: the values more than a relative margin d^(-1/3) above the edge (BBP transition).
  KVT_HD NoiseFit(std::span<const double> lambda, int n, int d) : lambda_(lambda), beta_(ratio(n, d)) {
    const int p = static_cast<int>(lambda.size());
    // 2k values beside the spikes have to be noise; a block too small for one has rank 0.
    const double c = d > 15 ? std::min(1 / 2.01, 1 / std::log(std::log(static_cast<double>(d)))) : 1 / 2.01;
    k_ = std::min(static_cast<int>(std::pow(static_cast<double>(d), c)), (p - 1) / 3);
    if (k_ < 1 || !(lambda[0] > 0)) return;
    const double next = at(k_), far = at(2 * k_);
    edge_ = next + (next - far) / tail_factor;
    const double margin = 1 + std::pow(static_cast<double>(d), -1.0 / 3);
    while (rank_ < p - 2 * k_ - 1 && at(rank_) > margin * edge_) ++rank_;
  }

  KVT_HD int rank() const { return rank_; }
  KVT_HD double edge() const { return edge_; }
  KVT_HD int window() const { return k_; }  // k of the papers

  // The singular value of the signal behind value i < rank(), at most what was observed.
  KVT_HD double shrink(int i, Shrinkage kind) const {
    const double observed = std::sqrt(at(i));
    return kind == Shrinkage::none ? observed : std::clamp(shrunk(at(i), kind), 0.0, observed);
  }

 private:
  static constexpr double tail_factor = 0.58740105196819947;  // 2^(2/3) - 1: the edge of a spectrum falls like x^(2/3)

  KVT_HD static double ratio(int n, int d) { return static_cast<double>(std::min(n, d)) / std::max(n, d); }
  KVT_HD double at(int i) const { return lambda_[static_cast<std::size_t>(i)]; }

  // The values below the spikes, after k imputed ones where the spikes displaced noise.
  KVT_HD double noise(int j) const {
    if (j >= k_) return at(rank_ + j);
    const double next = at(rank_ + k_), far = at(rank_ + 2 * k_);
    return next + (1 - std::pow((j + 1.0) / k_, 2.0 / 3)) * (next - far) / tail_factor;
  }
  KVT_HD double shrunk(double x, Shrinkage kind) const {
    const int count = static_cast<int>(lambda_.size()) - rank_;
    double m1 = 0, slope1 = 0;
    for (int j = 0; j < count; ++j) {
      const double gap = std::max(x - noise(j), 1e-12 * x);
      m1 -= 1 / gap;
      slope1 += 1 / (gap * gap);
    }
    m1 /= count;
    slope1 /= count;
    const double m2 = -(1 - beta_) / x + beta_ * m1;
    const double slope2 = (1 - beta_) / (x * x) + beta_ * slope1;
    const double transform = x * m1 * m2;
    const double slope = m1 * m2 + x * slope1 * m2 + x * m1 * slope2;
    const double signal = 1 / std::sqrt(transform);
    const double left = m1 * transform / slope, right = m2 * transform / slope;  // squared overlaps of the singular vectors
    if (!(left > 0 && right > 0 && std::isfinite(signal))) return std::sqrt(x);
    switch (kind) {
      case Shrinkage::operator_norm:
        return signal;
      case Shrinkage::nuclear:
        return signal * std::fabs(std::sqrt(left * right) - std::sqrt(std::max(0.0, 1 - left) * std::max(0.0, 1 - right)));
      default:
        return signal * std::sqrt(left * right);
    }
  }

  std::span<const double> lambda_;
  double beta_, edge_ = 0;
  int k_ = 0, rank_ = 0;
};

}  // namespace kvt::inline v0
