// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// BlockRef: an encoded block in memory. BlockList: blocks that belong to no head yet.
// A block is one allocation: the key block, padding to 64 bytes, the value block. It is never written again.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory_resource>
#include <span>
#include <vector>

#include "kvtailor/store/buffer.hpp"

namespace kvt::inline v0 {

struct BlockRef {
  std::byte* data = nullptr;
  int rows = 0;
  int key_bytes = 0;
  int value_offset = 0;  // from data
  int value_bytes = 0;

  const std::byte* keys() const { return data; }
  const std::byte* values() const { return data + value_offset; }
  std::size_t allocated_bytes() const { return allocated_bytes(key_bytes, value_bytes); }
  static std::size_t allocated_bytes(int key_bytes, int value_bytes) {
    return padded(key_bytes) + static_cast<std::size_t>(value_bytes);
  }
  static std::size_t padded(int bytes) {
    return (static_cast<std::size_t>(bytes) + storage_alignment - 1) / storage_alignment * storage_alignment;
  }
  void free(std::pmr::memory_resource* memory) const noexcept {
    memory->deallocate(data, allocated_bytes(), storage_alignment);
  }
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
      BlockRef& block = blocks_.back();
      block.data =
          static_cast<std::byte*>(memory_->allocate(BlockRef::allocated_bytes(key_bytes, value_bytes), storage_alignment));
      block.rows = rows;
      block.key_bytes = key_bytes;
      block.value_offset = static_cast<int>(BlockRef::padded(key_bytes));
      block.value_bytes = value_bytes;
      std::memset(block.data + key_bytes, 0, static_cast<std::size_t>(block.value_offset - key_bytes));
      return block;
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
