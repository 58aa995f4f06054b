// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// HeadCut: rows leave many heads, in all of them or in none, and no row is in memory twice for long.
//
// Heads of a new form beside all the old ones would take twice the memory. So add() makes what can fail, which is small: blocks
// of the rows that are encoded now. commit() then cuts one head after another where it lies and moves what is left into memory
// of the right size, a buffer or a block at a time; what finds none stays where it is, and the difference is slack.
//
// Rows of the body keep their bytes: of blocks that lose a row they are copied where the codec's rows do not depend on one
// another, or erased where they do.
#pragma once

#include "kvtailor/store/head_store.hpp"

namespace kvt::inline v0 {

template <class Codec>
class HeadCut {
 public:
  using Head = HeadStore<Codec>;

  // With `move`, blocks that lose nothing get new memory too, so that all that is left lies together: a resource can give back
  // to the system what lay between, and not only to those who ask next.
  HeadCut(int recent_rows, int block_rows, bool move) noexcept
      : recent_rows_(recent_rows), block_rows_(block_rows), move_(move) {}

  // mark [num_rows]: zero drops a row. With `seal`, all but the newest `recent_rows` rows are encoded too, `block_rows`
  // together. The head must not change before commit(), which uses the mark up. Throws what the resource and operator new
  // throw.
  void add(Head& head, std::span<unsigned char> mark, bool seal) {
    const int recents = head.recent().rows(), first = head.num_rows() - recents;
    const int sealed = seal ? std::max(0, recents - recent_rows_) : 0;
    std::vector<int> rows;
    for (int row = 0; row < sealed; ++row) {
      if (mark[static_cast<std::size_t>(first + row)] != 0) rows.push_back(row);
    }
    Part& part = parts_.emplace_back(
        Part{&head, mark, sealed, static_cast<int>(rows.size()), BlockList(head.memory_), {}, Buffer<BlockRef>(head.memory_)});
    head.encode(rows, block_rows_, part.fresh);
    part.blocks.assign(head.blocks().begin(), head.blocks().end());
    part.blocks.insert(part.blocks.end(), part.fresh.blocks().begin(), part.fresh.blocks().end());
    std::size_t most = 0;
    for (const BlockRef& block : part.blocks) {
      most += static_cast<std::size_t>((block.rows + block_rows_ - 1) / block_rows_);  // in full blocks
      keys_.grow(head.codec_.keys.max_block_bytes(block.rows));
      values_.grow(head.codec_.values.max_block_bytes(block.rows));
    }
    part.table.reserve(most);
  }

  void commit() noexcept {
    for (Part& part : parts_) cut(part);
    // Where memory was short, others have given some back since.
    for (const Part& part : parts_) {
      if (!part.tight) continue;
      try {
        HeadCut again(recent_rows_, block_rows_, false);
        const auto all = part.mark.first(part.head->positions().size());
        std::fill(all.begin(), all.end(), static_cast<unsigned char>(1));
        again.add(*part.head, all, false);
        again.cut(again.parts_.front());
      } catch (...) {
      }
    }
  }

 private:
  struct Part {
    Head* head;
    std::span<unsigned char> mark;
    int sealed, encoded;           // the oldest recent rows, which leave; those of them that `fresh` holds
    BlockList fresh;               // owns its blocks until they are the head's
    std::vector<BlockRef> blocks;  // the head's, and those of `fresh`
    Buffer<BlockRef> table;        // room for those that are left
    bool tight = false;            // there was not all the memory that was asked for
  };

  static int count(const unsigned char* mark, int n) {
    return static_cast<int>(n - std::count(mark, mark + n, static_cast<unsigned char>(0)));
  }

  void cut(Part& part) noexcept {
    Head& head = *part.head;
    unsigned char* const mark = part.mark.data();
    const int sinks = head.sink_.rows(), recent = sinks + head.body_rows();
    head.positions_.keep(mark);
    head.sink_.keep(mark);
    head.recent_.drop_front(part.sealed);
    head.recent_.keep(mark + recent + part.sealed);
    std::fill_n(mark + recent, part.encoded, static_cast<unsigned char>(1));  // in the body now
    part.fresh.release();
    for (const bool done : {head.positions_.shrink(), head.sink_.shrink(), head.recent_.shrink()}) part.tight |= !done;

    const BlockRef* block = part.blocks.data();
    unsigned char* rest = mark + sinks;
    if constexpr (Codec::can_be_row_wise) {
      if (head.codec().row_wise()) pack(part, block, rest);
    }
    erase(part, block, rest);
    head.blocks_ = std::move(part.table);
    part.tight |= !head.blocks_.shrink();
  }

  // A block that loses no row and has the memory it needs, no more.
  static bool stays(const BlockRef& block, const unsigned char* mark) {
    return count(mark, block.rows) == block.rows && block.used_bytes() == block.allocated_bytes;
  }
  static BlockRef make(Part& part, int rows, int key_bytes, int value_bytes) noexcept try {
    return BlockRef::make(part.head->memory_, rows, key_bytes, value_bytes);
  } catch (...) {
    part.tight = true;
    return {};
  }

  // A block that loses nothing.
  void keep(Part& part, const BlockRef& block) noexcept {
    BlockRef next = block;
    if (move_) {
      try {
        next = BlockRef::make(part.head->memory_, block.rows, block.key_bytes, block.value_bytes);
        next.fill(block.keys(), block.values());
        block.free(part.head->memory_);
      } catch (...) {  // it is as good where it is
      }
    }
    part.table.push(&next, 1);
  }

  // Blocks stay apart.
  void erase(Part& part, const BlockRef* block, const unsigned char* mark) noexcept {
    const auto& [keys, values] = part.head->codec_;
    for (const BlockRef* const end = part.blocks.data() + part.blocks.size(); block != end; mark += block++->rows) {
      if (stays(*block, mark)) {
        keep(part, *block);
        continue;
      }
      const int left = count(mark, block->rows);
      BlockRef next = *block;
      if (left > 0) {
        const int key_bytes = keys.erase(block->keys(), block->rows, mark, keys_.data());
        const int value_bytes = values.erase(block->values(), block->rows, mark, values_.data());
        const BlockRef moved = make(part, left, key_bytes, value_bytes);
        if (moved.data != nullptr) next = moved;
        next.shape(left, key_bytes, value_bytes);
        next.fill(keys_.data(), values_.data());
      }
      if (left > 0) part.table.push(&next, 1);
      if (left == 0 || next.data != block->data) block->free(part.head->memory_);
    }
  }

  // Survivors move up: from the first block that is short or loses a row on, all go into full blocks, the last one apart, as
  // far as memory goes. `block` and its marks are set to what is left to erase().
  void pack(Part& part, const BlockRef*& block, unsigned char*& mark) noexcept {
    int left = part.head->body_rows();  // as the zones are cut already
    const BlockRef* const end = part.blocks.data() + part.blocks.size();
    while (block != end && block->rows == block_rows_ && stays(*block, mark)) {
      keep(part, *block);
      left -= block->rows;
      mark += block++->rows;
    }
    const auto& [keys, values] = part.head->codec_;
    for (int row = 0; left > 0;) {
      const int n = std::min(left, block_rows_);
      const BlockRef next = make(part, n, keys.max_block_bytes(n), values.max_block_bytes(n));
      if (next.data == nullptr) break;
      for (int k = 0; k < n; ++row) {
        for (; row == block->rows; row = 0) {
          block->free(part.head->memory_);
          mark += block++->rows;
        }
        if (mark[row] == 0) continue;
        keys.copy_row(block->keys(), block->rows, row, next.data, n, k);
        values.copy_row(block->values(), block->rows, row, next.data + next.value_offset(), n, k);
        mark[row] = 0;
        ++k;
      }
      part.table.push(&next, 1);
      left -= n;
    }
  }

  int recent_rows_, block_rows_;
  bool move_;
  std::vector<Part> parts_;
  AlignedBytes keys_, values_;  // of the largest block
};

}  // namespace kvt::inline v0
