// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// BlockRef: an encoded block in memory. BlockList: blocks that belong to no head yet.
// A block is one allocation: the key block, padding to 64 bytes, the value block. It is never written again, but where a cut
// finds no memory for a smaller one.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory_resource>
#include <mutex>
#include <span>
#include <vector>

#include "kvtailor/store/buffer.hpp"

namespace kvt::inline v0 {

struct BlockRef {
  std::byte* data = nullptr;
  int rows = 0;
  int key_bytes = 0;
  int value_bytes = 0;
  int allocated_bytes = 0;

  const std::byte* keys() const { return data; }
  int value_offset() const { return padded(key_bytes); }  // from data
  const std::byte* values() const { return data + value_offset(); }
  int used_bytes() const { return bytes_of(key_bytes, value_bytes); }
  static int bytes_of(int key_bytes, int value_bytes) { return padded(key_bytes) + value_bytes; }
  static int padded(int bytes) {
    constexpr int unit = storage_alignment;
    return (bytes + unit - 1) / unit * unit;
  }
  // Its contents are not set, but for the padding. Throws what the resource throws.
  static BlockRef make(std::pmr::memory_resource* memory, int rows, int key_bytes, int value_bytes) {
    BlockRef block;
    block.allocated_bytes = bytes_of(key_bytes, value_bytes);
    block.data = static_cast<std::byte*>(memory->allocate(static_cast<std::size_t>(block.allocated_bytes), storage_alignment));
    block.shape(rows, key_bytes, value_bytes);
    return block;
  }
  // Within what is allocated.
  void shape(int new_rows, int new_key_bytes, int new_value_bytes) noexcept {
    KVT_ASSERT(bytes_of(new_key_bytes, new_value_bytes) <= allocated_bytes);
    rows = new_rows;
    key_bytes = new_key_bytes;
    value_bytes = new_value_bytes;
    std::memset(data + key_bytes, 0, static_cast<std::size_t>(value_offset() - key_bytes));
  }
  void fill(const std::byte* from_keys, const std::byte* from_values) const noexcept {
    std::memcpy(data, from_keys, static_cast<std::size_t>(key_bytes));
    std::memcpy(data + value_offset(), from_values, static_cast<std::size_t>(value_bytes));
  }
  void free(std::pmr::memory_resource* memory) const noexcept {
    memory->deallocate(data, static_cast<std::size_t>(allocated_bytes), storage_alignment);
  }
};

// A memory resource that one thread uses at a time.
class LockedResource : public std::pmr::memory_resource {
 public:
  LockedResource(std::pmr::memory_resource* memory, std::mutex& lock) noexcept : memory_(memory), lock_(lock) {}

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    const std::lock_guard held(lock_);
    return memory_->allocate(bytes, alignment);
  }
  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override {
    const std::lock_guard held(lock_);
    memory_->deallocate(p, bytes, alignment);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

  std::pmr::memory_resource* memory_;
  std::mutex& lock_;
};

// Room for a block before its size is known. Codecs are promised blocks that begin at a multiple of 64 bytes.
class AlignedBytes {
 public:
  explicit AlignedBytes(int bytes = 0) { grow(bytes); }
  void grow(int bytes) {
    const auto lines = static_cast<std::size_t>(BlockRef::padded(bytes)) / storage_alignment;
    if (lines > lines_.size()) lines_.resize(lines);
  }
  std::byte* data() { return reinterpret_cast<std::byte*>(lines_.data()); }

 private:
  struct alignas(storage_alignment) Line {
    std::byte bytes[storage_alignment];
  };
  std::vector<Line> lines_;
};

// Gives its blocks back to the resource unless they are taken out. Throws what the resource and operator new throw.
class BlockList {
 public:
  explicit BlockList(std::pmr::memory_resource* memory) noexcept : memory_(memory) {}
  BlockList(BlockList&&) noexcept = default;
  BlockList& operator=(BlockList&&) = delete;
  ~BlockList() {
    for (const BlockRef& block : blocks_) block.free(memory_);
  }

  // A new block at the end; its contents are not set, but for the padding. The reference is good until the next call.
  BlockRef& add(int rows, int key_bytes, int value_bytes) {
    blocks_.emplace_back();  // room first: nothing is lost if there is none
    try {
      return blocks_.back() = BlockRef::make(memory_, rows, key_bytes, value_bytes);
    } catch (...) {
      blocks_.pop_back();
      throw;
    }
  }
  std::span<const BlockRef> blocks() const noexcept { return blocks_; }
  // The blocks now belong to somebody else.
  void release() noexcept { blocks_.clear(); }

 private:
  std::pmr::memory_resource* memory_;
  std::vector<BlockRef> blocks_;
};

}  // namespace kvt::inline v0
