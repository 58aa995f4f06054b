// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "fidelity.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>

namespace kvt::llm {

void log_softmax(std::span<const float> logits, std::vector<double>& out) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - top);
  const double log_sum = top + std::log(sum);
  out.resize(logits.size());
  std::transform(logits.begin(), logits.end(), out.begin(), [&](float logit) { return logit - log_sum; });
}

int top_token(std::span<const float> logits) {
  return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

double kl_divergence(std::span<const double> log_p, std::span<const double> log_q) {
  double kl = 0;
  for (std::size_t i = 0; i < log_p.size(); ++i) kl += std::exp(log_p[i]) * (log_p[i] - log_q[i]);
  return kl;
}

double percentile(std::vector<double> values, double rank) {
  if (values.empty()) return 0;
  const double last = static_cast<double>(values.size()) - 1;
  const double nearest = std::clamp(std::ceil(rank * static_cast<double>(values.size())) - 1, 0., last);
  const auto it = values.begin() + static_cast<std::ptrdiff_t>(nearest);
  std::nth_element(values.begin(), it, values.end());
  return *it;
}

Expected::Expected(std::span<const float> reference) : logits(reference), top(top_token(reference)) {
  log_softmax(reference, log_p);
}

void Fidelity::add(const Expected& expected, std::span<const float> logits, int next) {
  log_softmax(logits, log_q_);
  kl_.push_back(kl_divergence(expected.log_p, log_q_));
  same_top_ += top_token(logits) == expected.top ? 1 : 0;
  if (next >= 0) {
    const auto token = static_cast<std::size_t>(next);
    nll_change_ += expected.log_p[token] - log_q_[token];
    ++with_next_;
  }
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(logits[i]) - expected.logits[i]);
    if (!(difference <= max_difference_)) max_difference_ = difference;
  }
}

double Fidelity::mean_kl() const {
  return kl_.empty() ? 0 : std::accumulate(kl_.begin(), kl_.end(), 0.) / static_cast<double>(kl_.size());
}

double Fidelity::same_top() const { return kl_.empty() ? 0 : same_top_ / static_cast<double>(kl_.size()); }

double Fidelity::nll_change() const { return with_next_ == 0 ? 0 : nll_change_ / with_next_; }

}  // namespace kvt::llm
