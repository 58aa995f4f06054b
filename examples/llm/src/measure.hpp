// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Fidelity: how far one next-token distribution is from another. Mean, Interval: of samples. Progress: how far long work is.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory_resource>
#include <span>
#include <string>
#include <vector>

namespace kvt_llm {

struct Distance {
  double kl = 0;  // KL(reference || other), nats
  bool same_top = false;
  double reference_nll = 0, other_nll = 0;  // of `target`, if there is one
};
Distance compare(std::span<const float> reference, std::span<const float> other, int target = -1);
double log_probability(std::span<const float> logits, int token);  // nats

struct Fidelity {
  std::vector<double> kl;
  double same_top = 0, nll_change = 0;  // sums

  void add(const Distance& d);
  void add(const Fidelity& of_other_tokens);
  double mean_kl() const;
  double kl_quantile(double q) const;  // nearest rank
  double same_top_share() const { return kl.empty() ? 0 : same_top / static_cast<double>(kl.size()); }
  double mean_nll_change() const { return kl.empty() ? 0 : nll_change / static_cast<double>(kl.size()); }
};

// Mean and standard error over samples.
struct Mean {
  double value = 0, error = 0;

  static Mean of(const std::vector<double>& x);
  // Of means that do not depend on one another.
  static Mean over(const std::vector<Mean>& parts);
};

// A mean or a share, and where it is with 95 % confidence.
struct Interval {
  double value = 0, low = 0, high = 0;

  // Of a mean: Student's t. From minus to plus infinity if there is but one sample.
  static Interval of_mean(const std::vector<double>& x);
  // Of a share: Wilson's score interval, which is none of a point if all samples agree.
  static Interval of_share(const std::vector<double>& zeros_and_ones);
  // Of the difference a - b of two shares of the same samples: Agresti and Min (Statistics in Medicine 24, 2005), which adds
  // half a sample to each of the four cells, so that it too is never a point.
  static Interval of_paired_shares(const std::vector<double>& a, const std::vector<double>& b);
};

// A bar on a terminal, a line now and then elsewhere; both on stderr.
class Progress {
 public:
  Progress(std::string what, long long total);
  ~Progress();
  void advance(long long steps);

 private:
  std::string what_;
  long long total_, done_ = 0;
  int shown_ = -1;
  bool terminal_;
  std::chrono::steady_clock::time_point start_;
};

// Counts what is allocated through it, so that a cache's own account can be checked.
class CountingResource : public std::pmr::memory_resource {
 public:
  long long outstanding() const { return outstanding_; }
  long long peak() const { return peak_; }  // the most that ever was, inside a call too

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override;
  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override;
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
  long long outstanding_ = 0, peak_ = 0;
};

double seconds();  // on a clock that does not go back
double median(std::vector<double> x);

}  // namespace kvt_llm
