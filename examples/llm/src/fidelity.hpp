// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// How far one distribution over the next token is from another.
#pragma once

#include <span>
#include <vector>

namespace kvt::llm {

void log_softmax(std::span<const float> logits, std::vector<double>& out);

int top_token(std::span<const float> logits);

// KL(p || q) in nats, both given as log probabilities.
double kl_divergence(std::span<const double> log_p, std::span<const double> log_q);

// The value below which the share `rank` of all values lies (nearest rank); 0 without values.
double percentile(std::vector<double> values, double rank);

// The reference's distribution at one position.
struct Expected {
  explicit Expected(std::span<const float> logits);

  std::span<const float> logits;  // as given: they must outlive this object
  std::vector<double> log_p;
  int top = 0;
};

// Compares a model's distributions with the reference's at the same positions.
class Fidelity {
 public:
  // `next` is the token that really follows, or -1 where there is none.
  void add(const Expected& expected, std::span<const float> logits, int next);

  int positions() const { return static_cast<int>(kl_.size()); }
  double mean_kl() const;
  double percentile_kl(double rank) const { return percentile(kl_, rank); }
  double same_top() const;           // share of positions
  double nll_change() const;         // mean over positions with a next token, nats
  double max_difference() const { return max_difference_; }  // of any logit; NaN if there is one

 private:
  std::vector<double> kl_;
  std::vector<double> log_q_;
  int same_top_ = 0;
  int with_next_ = 0;
  double nll_change_ = 0;
  double max_difference_ = 0;
};

}  // namespace kvt::llm
