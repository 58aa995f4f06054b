// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// RebuiltHead: the marked rows of a head, made beside it, so that a cut of many heads happens wholly or not at all.
//
// Every buffer is exactly as large as needed. Rows of the body keep their bytes: blocks that lose no row change hands, and of
// the others rows are copied where the codec's rows do not depend on one another, or erased where they do.
#pragma once

#include "kvtailor/store/head_store.hpp"

namespace kvt::inline v0 {

template <class Codec>
class RebuiltHead {
 public:
  using Head = HeadStore<Codec>;

  // mark [num_rows]: zero drops a row. With `seal`, all but the newest `recent_rows` rows are encoded too, `block_rows`
  // together. Throws what the resource and operator new throw.
  RebuiltHead(const Head& old, std::span<const unsigned char> mark, bool seal, int recent_rows, int block_rows)
      : next_(old.codec_, old.memory_), fresh_(old.memory_), stays_(old.blocks().size(), 0) {
    const int sinks = old.sink().rows(), body = old.body_rows(), recents = old.recent().rows();
    const unsigned char* const body_mark = mark.data() + sinks;
    const unsigned char* const recent_mark = body_mark + body;
    const int first_dense = seal ? std::max(0, recents - recent_rows) : 0;
    next_.sink_.reserve(count(mark.data(), sinks));
    next_.recent_.reserve(count(recent_mark + first_dense, recents - first_dense));
    next_.positions_.reserve(static_cast<std::size_t>(count(mark.data(), old.num_rows())));
    for (int row = 0; row < sinks; ++row) {
      if (mark[static_cast<std::size_t>(row)] != 0) next_.sink_.push(old.sink(), row);
    }
    for (int row = first_dense; row < recents; ++row) {
      if (recent_mark[row] != 0) next_.recent_.push(old.recent(), row);
    }
    for (std::size_t row = 0; row < mark.size(); ++row) {
      if (mark[row] != 0) next_.positions_.push(&old.positions()[row], 1);
    }

    std::vector<int> sealed;
    for (int row = 0; row < first_dense; ++row) {
      if (recent_mark[row] != 0) sealed.push_back(row);
    }
    bool packed = false;
    if constexpr (Codec::can_be_row_wise) {
      packed = old.codec().row_wise();
      if (packed) pack(old, body_mark, sealed, block_rows);
    }
    if (!packed) {
      erase(old, body_mark);
      encode(old, sealed, block_rows, fresh_);
      append_fresh();
    }
    next_.blocks_.reserve(blocks_.size());
  }

  // Takes the place of the store it was made from.
  void commit(Head& old) noexcept {
    for (std::size_t i = 0; i < stays_.size(); ++i) {
      if (stays_[i] == 0) old.blocks_[i].free(old.memory_);
    }
    old.blocks_.resize(0);
    next_.blocks_.push(blocks_.data(), blocks_.size());
    fresh_.release();
    old = std::move(next_);
  }

 private:
  static int count(const unsigned char* mark, int n) {
    return static_cast<int>(n - std::count(mark, mark + n, static_cast<unsigned char>(0)));
  }
  static void encode(const Head& old, std::span<const int> rows, int block_rows, BlockList& out) {
    const auto most = static_cast<std::size_t>(block_rows);
    for (std::size_t at = 0; at < rows.size(); at += most) old.encode(rows.subspan(at, std::min(most, rows.size() - at)), out);
  }
  void keep(const Head& old, std::size_t i) {
    blocks_.push_back(old.blocks()[i]);
    stays_[i] = 1;
  }
  // Lists what fresh_ has gained.
  void append_fresh() {
    blocks_.insert(blocks_.end(), fresh_.blocks().begin() + static_cast<std::ptrdiff_t>(listed_), fresh_.blocks().end());
    listed_ = fresh_.blocks().size();
  }

  // Blocks stay apart.
  void erase(const Head& old, const unsigned char* mark) {
    for (std::size_t i = 0; i < old.blocks().size(); ++i) {
      const BlockRef& block = old.blocks()[i];
      const int survivors = count(mark, block.rows);
      if (survivors == block.rows) {
        keep(old, i);
      } else if (survivors > 0) {
        old.erase(block, mark, survivors, fresh_);
        append_fresh();
      }
      mark += block.rows;
    }
  }

  // Survivors move up: from the first block that is short or loses a row on, all go into full blocks, the last one apart.
  void pack(const Head& old, const unsigned char* mark, const std::vector<int>& sealed, int block_rows) {
    std::size_t i = 0;
    for (; i < old.blocks().size(); ++i) {
      const int rows = old.blocks()[i].rows;
      if (rows != block_rows || count(mark, rows) != rows) break;
      keep(old, i);
      mark += rows;
    }
    BlockList encoded(old.memory_);
    encode(old, sealed, block_rows, encoded);
    struct Row {
      const BlockRef* block;
      int row;
    };
    std::vector<Row> rows;
    for (; i < old.blocks().size(); ++i) {
      const BlockRef& block = old.blocks()[i];
      for (int row = 0; row < block.rows; ++row) {
        if (mark[row] != 0) rows.push_back({&block, row});
      }
      mark += block.rows;
    }
    for (const BlockRef& block : encoded.blocks()) {
      for (int row = 0; row < block.rows; ++row) rows.push_back({&block, row});
    }
    const auto& [keys, values] = old.codec_;
    for (std::size_t at = 0; at < rows.size();) {
      const int n = static_cast<int>(std::min(rows.size() - at, static_cast<std::size_t>(block_rows)));
      BlockRef& block = fresh_.add(n, keys.max_block_bytes(n), values.max_block_bytes(n));
      for (int row = 0; row < n; ++row, ++at) {
        const BlockRef& from = *rows[at].block;
        keys.copy_row(from.keys(), from.rows, rows[at].row, block.data, n, row);
        values.copy_row(from.values(), from.rows, rows[at].row, block.data + block.value_offset, n, row);
      }
    }
    append_fresh();
  }

  Head next_;                         // zones and positions; its table of blocks is filled by commit()
  BlockList fresh_;                   // blocks the old store does not have
  std::vector<BlockRef> blocks_;      // those that stay and fresh ones, in order
  std::vector<unsigned char> stays_;  // [blocks of the old store]
  std::size_t listed_ = 0;            // of fresh_
};

}  // namespace kvt::inline v0
