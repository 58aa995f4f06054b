// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See measure.hpp.
#include "measure.hpp"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numbers>
#include <numeric>

namespace kvt_llm {

Distance compare(std::span<const float> reference, std::span<const float> other, int target) {
  const auto normaliser = [](std::span<const float> x) {
    const float top = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (const float v : x) sum += static_cast<double>(std::exp(v - top));
    return static_cast<double>(top) + std::log(sum);
  };
  const double a = normaliser(reference), b = normaliser(other);
  Distance d;
  for (std::size_t i = 0; i < reference.size(); ++i) {
    const double log_p = static_cast<double>(reference[i]) - a;
    d.kl += static_cast<double>(std::exp(static_cast<float>(log_p))) * (log_p - (static_cast<double>(other[i]) - b));
  }
  d.same_top = std::max_element(reference.begin(), reference.end()) - reference.begin() ==
               std::max_element(other.begin(), other.end()) - other.begin();
  if (target >= 0) {
    d.reference_nll = a - static_cast<double>(reference[static_cast<std::size_t>(target)]);
    d.other_nll = b - static_cast<double>(other[static_cast<std::size_t>(target)]);
  }
  return d;
}

double log_probability(std::span<const float> logits, int token) {
  const auto top = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - top);
  return static_cast<double>(logits[static_cast<std::size_t>(token)]) - top - std::log(sum);
}

void Fidelity::add(const Distance& d) {
  kl.push_back(d.kl);
  same_top += d.same_top;
  nll_change += d.other_nll - d.reference_nll;
}

void Fidelity::add(const Fidelity& of_other_tokens) {
  kl.insert(kl.end(), of_other_tokens.kl.begin(), of_other_tokens.kl.end());
  same_top += of_other_tokens.same_top;
  nll_change += of_other_tokens.nll_change;
}

double Fidelity::mean_kl() const {
  return kl.empty() ? 0 : std::accumulate(kl.begin(), kl.end(), 0.0) / static_cast<double>(kl.size());
}

double Fidelity::kl_quantile(double q) const {
  if (kl.empty()) return 0;
  auto sorted = kl;
  std::sort(sorted.begin(), sorted.end());
  return sorted[std::min(sorted.size() - 1, static_cast<std::size_t>(std::ceil(q * static_cast<double>(sorted.size()))) - 1)];
}

Mean Mean::of(const std::vector<double>& x) {
  const auto n = static_cast<double>(x.size());
  Mean m{std::accumulate(x.begin(), x.end(), 0.0) / n, 0};
  double squares = 0;
  for (const double v : x) squares += (v - m.value) * (v - m.value);
  if (n > 1) m.error = std::sqrt(squares / (n - 1) / n);
  return m;
}

Mean Mean::over(const std::vector<Mean>& parts) {
  Mean m;
  for (const Mean& p : parts) {
    m.value += p.value / static_cast<double>(parts.size());
    m.error += p.error * p.error;
  }
  m.error = std::sqrt(m.error) / static_cast<double>(parts.size());
  return m;
}

namespace {

constexpr double normal_975 = 1.959963984540054;

// The 97.5 % quantile of Student's t: exact for one and two degrees of freedom, else Abramowitz and Stegun 26.7.5, to .2 %.
double student_975(double freedom) {
  if (freedom == 1) return std::tan(0.475 * std::numbers::pi);
  if (freedom == 2) return 0.95 * std::sqrt(2 / (4 * 0.975 * 0.025));
  const double z = normal_975, q = z * z, v = freedom;
  return z * (1 + (q + 1) / (4 * v) + ((5 * q + 16) * q + 3) / (96 * v * v) +
              (((3 * q + 19) * q + 17) * q - 15) / (384 * v * v * v) +
              ((((79 * q + 776) * q + 1482) * q - 1920) * q - 945) / (92160 * v * v * v * v));
}

}  // namespace

Interval Interval::of_mean(const std::vector<double>& x) {
  const Mean m = Mean::of(x);
  const double half =
      x.size() > 1 ? student_975(static_cast<double>(x.size() - 1)) * m.error : std::numeric_limits<double>::infinity();
  return {m.value, m.value - half, m.value + half};
}

Interval Interval::of_share(const std::vector<double>& x) {
  const auto n = static_cast<double>(x.size());
  const double share = std::accumulate(x.begin(), x.end(), 0.0) / n, q = normal_975 * normal_975;
  const double middle = (share + q / (2 * n)) / (1 + q / n);
  const double half = normal_975 / (1 + q / n) * std::sqrt(share * (1 - share) / n + q / (4 * n * n));
  return {share, std::max(0.0, middle - half), std::min(1.0, middle + half)};
}

Interval Interval::of_paired_shares(const std::vector<double>& a, const std::vector<double>& b) {
  const auto n = static_cast<double>(a.size());
  double first = 0, second = 0;  // samples in which the one alone is 1
  for (std::size_t i = 0; i < a.size(); ++i) {
    first += a[i] > b[i];
    second += b[i] > a[i];
  }
  const double middle = (first - second) / (n + 2);
  const double half = normal_975 / (n + 2) * std::sqrt(first + second + 1 - (first - second) * (first - second) / (n + 2));
  return {(first - second) / n, std::max(-1.0, middle - half), std::min(1.0, middle + half)};
}

Progress::Progress(std::string what, long long total)
    : what_(std::move(what)), total_(total), terminal_(isatty(2) != 0), start_(std::chrono::steady_clock::now()) {}

void Progress::advance(long long steps) {
  done_ += steps;
  const int percent = total_ > 0 ? static_cast<int>(100 * done_ / total_) : 100;
  if (percent == shown_ || (!terminal_ && percent / 50 == shown_ / 50 && shown_ >= 0)) return;
  shown_ = percent;
  const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const double rate = elapsed > 0 ? static_cast<double>(done_) / elapsed : 0;
  const double left = rate > 0 ? static_cast<double>(total_ - done_) / rate : 0;
  if (terminal_) {
    char bar[31] = {};
    for (int i = 0; i < 30; ++i) bar[i] = i < percent * 30 / 100 ? '#' : '.';
    std::fprintf(stderr, "\r%-28s [%s] %3d%%  %.0f/s  %.0f s left \033[K", what_.c_str(), bar, percent, rate, left);
  } else if (percent < 100) {
    std::fprintf(stderr, "%s: %d%%, %.0f/s\n", what_.c_str(), percent, rate);
  }
}

Progress::~Progress() {
  if (terminal_) std::fprintf(stderr, "\r\033[K");
}

void* CountingResource::do_allocate(std::size_t bytes, std::size_t alignment) {
  void* const p = std::pmr::new_delete_resource()->allocate(bytes, alignment);
  outstanding_ += static_cast<long long>(bytes);
  peak_ = std::max(peak_, outstanding_);
  return p;
}

void CountingResource::do_deallocate(void* p, std::size_t bytes, std::size_t alignment) {
  outstanding_ -= static_cast<long long>(bytes);
  std::pmr::new_delete_resource()->deallocate(p, bytes, alignment);
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> x) {
  if (x.empty()) return 0;
  std::sort(x.begin(), x.end());
  return x.size() % 2 == 1 ? x[x.size() / 2] : 0.5 * (x[x.size() / 2 - 1] + x[x.size() / 2]);
}

}  // namespace kvt_llm
