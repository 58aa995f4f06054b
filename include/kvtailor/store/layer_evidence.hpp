// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// LayerEvidence: what policies want to know of a layer beside its rows. Only what they need is kept; observe() collects it, and
// a cut uses it up, but for the attention that rows were given, which stays with them as long as they stay.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kvtailor/core/evidence.hpp"
#include "kvtailor/store/query_window.hpp"

namespace kvt::inline v0 {

// Mean and covariance of one layer's queries before RoPE, met in parts: see Chan, Golub and LeVeque, 1979.
class QueryStatistics {
 public:
  explicit QueryStatistics(std::pmr::memory_resource* memory) noexcept : mean_(memory), squares_(memory) {}

  long long count() const noexcept { return count_; }
  long long used_bytes() const noexcept { return mean_.used_bytes() + squares_.used_bytes(); }
  long long allocated_bytes() const noexcept { return mean_.allocated_bytes() + squares_.allocated_bytes(); }

  // Room for `heads` query heads. Throws what the resource throws, and has not changed then.
  void reserve(int heads, int dim) {
    const auto h = static_cast<std::size_t>(heads), d = static_cast<std::size_t>(dim);
    mean_.reserve(h * d);
    squares_.reserve(h * (d * (d + 1) / 2));
    if (count_ > 0) return;
    mean_.resize(h * d);
    squares_.resize(h * (d * (d + 1) / 2));
    std::fill_n(mean_.data(), mean_.size(), 0.f);
    std::fill_n(squares_.data(), squares_.size(), 0.f);
  }
  // Queries [n, heads, dim] of places that were reserved. They are used up.
  void add(float* queries, long long n, int heads, int dim) noexcept {
    if (n == 0) return;
    const auto total = static_cast<double>(count_ + n);
    for (int h = 0; h < heads; ++h) {
      float* const mean = mean_.data() + static_cast<std::ptrdiff_t>(h) * dim;
      float* const squares = squares_.data() + static_cast<std::ptrdiff_t>(h) * dim * (dim + 1) / 2;
      const auto query = [&](long long i) { return queries + (i * heads + h) * dim; };
      // The part's own mean is written over its first query only once it has been taken from all.
      for (int d = 0; d < dim; ++d) {
        double sum = 0;
        for (long long i = 0; i < n; ++i) sum += static_cast<double>(query(i)[d]);
        const double own = sum / static_cast<double>(n), change = own - static_cast<double>(mean[d]);
        for (long long i = 0; i < n; ++i) query(i)[d] -= static_cast<float>(own);
        step_[d] = static_cast<float>(change * std::sqrt(static_cast<double>(count_) * static_cast<double>(n) / total));
        mean[d] += static_cast<float>(change * static_cast<double>(n) / total);
      }
      const auto add_square = [&](const float* x) {
        float* to = squares;
        for (int d = 0; d < dim; to += ++d) {
          const float by = x[d];
          for (int e = 0; e <= d; ++e) to[e] += by * x[e];
        }
      };
      for (long long i = 0; i < n; ++i) add_square(query(i));
      add_square(step_);
    }
    count_ += n;
  }
  // Of query heads first .. first + group - 1: mean [group, dim], covariance [group, dim, dim].
  void unpack(int first, int group, int dim, std::vector<float>& mean, std::vector<float>& covariance) const {
    const auto g = static_cast<std::size_t>(group), d = static_cast<std::size_t>(dim);
    mean.assign(mean_.data() + static_cast<std::size_t>(first) * d, mean_.data() + (static_cast<std::size_t>(first) + g) * d);
    covariance.resize(g * d * d);
    const float* from = squares_.data() + static_cast<std::size_t>(first) * (d * (d + 1) / 2);
    const float share = 1.f / static_cast<float>(count_);
    for (std::size_t k = 0; k < g; ++k) {
      float* const to = covariance.data() + k * d * d;
      for (std::size_t i = 0; i < d; ++i) {
        for (std::size_t j = 0; j <= i; ++j) to[i * d + j] = to[j * d + i] = *from++ * share;
      }
    }
  }
  void release() noexcept {
    mean_.release();
    squares_.release();
    count_ = 0;
  }
  void copy_to(QueryStatistics& other) const {
    other.mean_.reserve(mean_.size());
    other.squares_.reserve(squares_.size());
    other.mean_.push(mean_.data(), mean_.size());
    other.squares_.push(squares_.data(), squares_.size());
    other.count_ = count_;
  }

 private:
  Buffer<float> mean_;     // [heads, dim]
  Buffer<float> squares_;  // [heads, dim * (dim + 1) / 2]: of differences from the mean, lower triangles
  long long count_ = 0;
  float step_[256] = {};
};

class LayerEvidence {
 public:
  using Attention = std::pmr::vector<Buffer<RowAttention>>;

  explicit LayerEvidence(std::pmr::memory_resource* memory) : queries(memory), statistics(memory), attention(memory) {}
  LayerEvidence(LayerEvidence&&) noexcept = default;
  LayerEvidence& operator=(LayerEvidence&&) = default;

  QueryWindow queries;
  QueryStatistics statistics;
  Attention attention;   // [num_kv_heads] once something was observed; rows after the last observed have none
  AttendOptions attend;  // of the queries
  int end = 0;           // one past the last observed position
  double similarity = 0;
  long long compared = 0;  // rows whose hidden states make it

  long long used_bytes() const noexcept {
    long long bytes = queries.used_bytes() + statistics.used_bytes();
    for (const auto& head : attention) bytes += head.used_bytes();
    return bytes + static_cast<long long>(attention.size() * sizeof(attention[0]));
  }
  long long allocated_bytes() const noexcept {
    long long bytes = queries.allocated_bytes() + statistics.allocated_bytes();
    for (const auto& head : attention) bytes += head.allocated_bytes();
    return bytes + static_cast<long long>(attention.capacity() * sizeof(attention[0]));
  }
  // What was given to the rows of a head, [rows].
  void attention_of(std::size_t kv_head, std::size_t rows, std::vector<RowAttention>& to) const {
    to.assign(rows, {});
    if (kv_head < attention.size()) std::copy_n(attention[kv_head].data(), attention[kv_head].size(), to.begin());
  }
  // Forgets what a cut has used up.
  void used_up() noexcept {
    queries.release();
    statistics.release();
    end = 0;
    similarity = 0;
    compared = 0;
  }
  // Of a cut: mark [num_kv_heads][rows]. What rows were given is cut where it lies; shrink() gives back what is left over, as
  // far as there is memory to move to.
  void keep_rows(const std::vector<unsigned char>* mark) noexcept {
    for (auto& head : attention) head.keep((mark++)->data());
  }
  void shrink() noexcept {
    for (auto& head : attention) (void)head.shrink();
  }
  // Forgets all.
  void release() noexcept {
    used_up();
    for (auto& head : attention) head.release();
  }
  // Forgets the queries at `position` and after it that are kept one by one; what they gave to rows that stay remains.
  void truncate(int position) noexcept {
    queries.truncate(position);
    end = std::min(end, position);
  }
  // Fills fresh evidence.
  void copy_to(LayerEvidence& other) const {
    auto* const memory = other.attention.get_allocator().resource();
    other.queries = queries.resized(memory, queries.window());
    statistics.copy_to(other.statistics);
    for (const auto& head : attention) {
      Buffer<RowAttention>& twin = other.attention.emplace_back(memory);
      twin.reserve(head.size());
      twin.push(head.data(), head.size());
    }
    other.attend = attend;
    other.end = end;
    other.similarity = similarity;
    other.compared = compared;
  }
};

}  // namespace kvt::inline v0
