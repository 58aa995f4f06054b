// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See measure.hpp.
#include "measure.hpp"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
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
