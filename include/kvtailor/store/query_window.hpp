// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// QueryWindow: the last queries of one layer, kept for a token selector. A ring: the newest takes the place of the oldest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kvtailor/store/buffer.hpp"

namespace kvt::inline v0 {

class QueryWindow {
 public:
  explicit QueryWindow(std::pmr::memory_resource* memory) noexcept : queries_(memory), positions_(memory) {}

  std::size_t size() const noexcept { return size_; }
  std::size_t window() const noexcept { return positions_.size(); }
  // Of the newest query, or -1.
  int last_position() const noexcept { return size_ == 0 ? -1 : positions_[slot(size_ - 1)]; }
  long long used_bytes() const noexcept { return static_cast<long long>(size_ * (width_ * sizeof(float) + sizeof(int))); }
  long long allocated_bytes() const noexcept { return queries_.allocated_bytes() + positions_.allocated_bytes(); }

  // Adds n queries [n, width] and keeps the last `window`. Window and width are the same in every call between two
  // release(). Throws what the resource throws, and has not changed then.
  void push(const float* queries, std::span<const int> positions, std::size_t width, std::size_t window) {
    queries_.reserve(window * width);
    positions_.reserve(window);
    width_ = width;
    queries_.resize(window * width);
    positions_.resize(window);
    for (std::size_t i = positions.size() - std::min(positions.size(), window); i < positions.size(); ++i) {
      if (size_ == window) {
        first_ = (first_ + 1) % window;
        --size_;
      }
      const std::size_t to = slot(size_++);
      std::copy_n(queries + i * width, width, queries_.data() + to * width);
      positions_[to] = positions[i];
    }
  }
  // What is kept of it by a window of another size: a twin that takes its place. Throws what the resource throws.
  QueryWindow resized(std::pmr::memory_resource* memory, std::size_t window) const {
    QueryWindow twin(memory);
    if (size_ == 0 || window == 0) return twin;
    std::vector<float> queries;
    std::vector<int> positions;
    unroll(queries, positions);
    twin.push(queries.data(), positions, width_, window);
    return twin;
  }
  // Forgets the queries at `position` and after it.
  void truncate(int position) noexcept {
    while (size_ > 0 && last_position() >= position) --size_;
  }
  void release() noexcept {
    queries_.release();
    positions_.release();
    first_ = size_ = 0;
  }
  // Oldest first: queries [size, width] and positions [size].
  void unroll(std::vector<float>& queries, std::vector<int>& positions) const {
    queries.resize(size_ * width_);
    positions.resize(size_);
    for (std::size_t i = 0; i < size_; ++i) {
      std::copy_n(queries_.data() + slot(i) * width_, width_, queries.data() + i * width_);
      positions[i] = positions_[slot(i)];
    }
  }

 private:
  std::size_t slot(std::size_t i) const noexcept { return (first_ + i) % positions_.size(); }

  Buffer<float> queries_;  // [window, width]
  Buffer<int> positions_;  // [window]
  std::size_t width_ = 0, first_ = 0, size_ = 0;
};

}  // namespace kvt::inline v0
