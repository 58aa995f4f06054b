// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A memory resource that counts what is asked of it: the figures of memory printed here are measured, not computed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory_resource>

namespace kvt::llm {

class CountingResource final : public std::pmr::memory_resource {
 public:
  long long bytes() const { return bytes_; }
  long long peak() const { return peak_; }

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    void* memory = std::pmr::new_delete_resource()->allocate(bytes, alignment);
    bytes_ += static_cast<long long>(bytes);
    peak_ = std::max(peak_, bytes_);
    return memory;
  }
  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
    std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
    bytes_ -= static_cast<long long>(bytes);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }

  long long bytes_ = 0;
  long long peak_ = 0;
};

}  // namespace kvt::llm
