// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Buffer: a growable array of plain values from a memory resource, which knows what it allocated. Only reserve() and
// shrink() allocate.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory_resource>
#include <span>
#include <type_traits>
#include <utility>

#include "kvtailor/core/config.hpp"

namespace kvt::inline v0 {

inline constexpr std::size_t storage_alignment = 64;

template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit Buffer(std::pmr::memory_resource* memory = nullptr) noexcept : memory_(memory) {}
  Buffer(Buffer&& other) noexcept
      : memory_(other.memory_),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      release();
      memory_ = other.memory_;
      data_ = std::exchange(other.data_, nullptr);
      size_ = std::exchange(other.size_, 0);
      capacity_ = std::exchange(other.capacity_, 0);
    }
    return *this;
  }
  ~Buffer() { release(); }

  T* data() noexcept { return data_; }
  const T* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }
  std::span<const T> span() const noexcept { return {data_, size_}; }
  T& operator[](std::size_t i) noexcept { return data_[i]; }
  const T& operator[](std::size_t i) const noexcept { return data_[i]; }
  long long used_bytes() const noexcept { return static_cast<long long>(size_ * sizeof(T)); }
  long long allocated_bytes() const noexcept { return static_cast<long long>(capacity_ * sizeof(T)); }

  // Grows to exactly n, or by half when `slack`. Throws what the resource throws, and has not changed then.
  void reserve(std::size_t n, bool slack = false) {
    if (n <= capacity_) return;
    const std::size_t wanted = slack && capacity_ + capacity_ / 2 > n ? capacity_ + capacity_ / 2 : n;
    move_to(wanted);
  }
  // Gives back what is not in use, unless there is no memory to move to: then nothing changes and the answer is false.
  bool shrink() noexcept try {
    if (size_ == 0) {
      release();
    } else if (size_ < capacity_) {
      move_to(size_);
    }
    return true;
  } catch (...) {
    return false;
  }
  // Within the capacity; new elements are not set.
  void resize(std::size_t n) noexcept {
    KVT_ASSERT(n <= capacity_);
    size_ = n;
  }
  void push(const T* from, std::size_t n) noexcept {
    KVT_ASSERT(size_ + n <= capacity_);
    if (n != 0) std::memcpy(data_ + size_, from, n * sizeof(T));
    size_ += n;
  }
  void drop_front(std::size_t n) noexcept {
    if (n != 0 && n < size_) std::memmove(data_, data_ + n, (size_ - n) * sizeof(T));
    size_ -= n;
  }
  // Keeps the groups of `width` elements whose mark is not zero.
  void keep(const unsigned char* mark, std::size_t width = 1) noexcept {
    std::size_t kept = 0;
    for (std::size_t at = 0; at < size_; at += width) {
      if (*mark++ == 0) continue;
      if (kept < at) std::memcpy(data_ + kept, data_ + at, width * sizeof(T));
      kept += width;
    }
    size_ = kept;
  }
  void release() noexcept {
    if (data_ != nullptr) memory_->deallocate(data_, capacity_ * sizeof(T), storage_alignment);
    data_ = nullptr;
    size_ = capacity_ = 0;
  }

 private:
  void move_to(std::size_t capacity) {
    T* const fresh = static_cast<T*>(memory_->allocate(capacity * sizeof(T), storage_alignment));
    if (size_ != 0) std::memcpy(fresh, data_, size_ * sizeof(T));
    const std::size_t size = size_;
    release();
    data_ = fresh;
    size_ = size;
    capacity_ = capacity;
  }

  std::pmr::memory_resource* memory_;
  T* data_ = nullptr;
  std::size_t size_ = 0, capacity_ = 0;
};

}  // namespace kvt::inline v0
