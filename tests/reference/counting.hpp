// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A memory resource that counts what is out, and the most that ever was, and fails when it is told to.
#pragma once

#include <algorithm>
#include <memory_resource>
#include <new>

namespace reference {

class Counting : public std::pmr::memory_resource {
 public:
  long long outstanding = 0, peak = 0;
  int until_failure = -1;  // allocations that still succeed; -1: all

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (until_failure == 0) throw std::bad_alloc();
    if (until_failure > 0) --until_failure;
    void* const p = std::pmr::new_delete_resource()->allocate(bytes, alignment);
    outstanding += static_cast<long long>(bytes);
    peak = std::max(peak, outstanding);
    return p;
  }
  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override {
    outstanding -= static_cast<long long>(bytes);
    std::pmr::new_delete_resource()->deallocate(p, bytes, alignment);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

}  // namespace reference
