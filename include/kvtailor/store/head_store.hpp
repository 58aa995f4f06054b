// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// HeadStore: the rows of one KV head, in three zones, oldest first.
//   sink    the first rows of the text, dense
//   body    encoded blocks
//   recent  the newest rows, dense
// A block is one allocation: the key block, padding to 64 bytes, the value block. It is never written again.
// Functions that can run out of memory say so by their result and leave the store as it was.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "kvtailor/codec/kv_codec.hpp"
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
  std::size_t allocated_bytes() const { return static_cast<std::size_t>(value_offset + value_bytes); }
};

template <class Codec>
class HeadStore {
 public:
  using Near = typename Codec::near_type;
  static constexpr int head_dim = Codec::head_dim;

  HeadStore(const Codec* codec, std::pmr::memory_resource* memory) noexcept
      : codec_(codec),
        memory_(memory),
        sink_keys_(memory),
        sink_values_(memory),
        recent_keys_(memory),
        recent_values_(memory),
        blocks_(memory),
        positions_(memory) {}
  HeadStore(HeadStore&&) noexcept = default;
  HeadStore& operator=(HeadStore&& other) noexcept {
    free_blocks();
    codec_ = other.codec_;
    memory_ = other.memory_;
    sink_keys_ = std::move(other.sink_keys_);
    sink_values_ = std::move(other.sink_values_);
    recent_keys_ = std::move(other.recent_keys_);
    recent_values_ = std::move(other.recent_values_);
    blocks_ = std::move(other.blocks_);
    positions_ = std::move(other.positions_);
    return *this;
  }
  ~HeadStore() { free_blocks(); }

  int num_rows() const { return static_cast<int>(positions_.size()); }
  int sink_rows() const { return static_cast<int>(sink_keys_.size()) / Near::row_bytes; }
  int recent_rows() const { return static_cast<int>(recent_keys_.size()) / Near::row_bytes; }
  int body_rows() const { return num_rows() - sink_rows() - recent_rows(); }
  std::span<const BlockRef> blocks() const { return {blocks_.data(), blocks_.size()}; }
  std::span<const int> positions() const { return {positions_.data(), positions_.size()}; }
  const std::byte* sink_keys() const { return sink_keys_.data(); }
  const std::byte* sink_values() const { return sink_values_.data(); }
  const std::byte* recent_keys() const { return recent_keys_.data(); }
  const std::byte* recent_values() const { return recent_values_.data(); }
  void set_codec(const Codec* codec) { codec_ = codec; }

  // What rows and blocks hold (first) and what was allocated for them (second).
  struct Bytes {
    long long payload = 0, index = 0, allocated = 0;
  };
  Bytes bytes() const {
    Bytes sum;
    for (const Buffer<std::byte>* zone : {&sink_keys_, &sink_values_, &recent_keys_, &recent_values_}) {
      sum.payload += zone->used_bytes();
      sum.allocated += zone->allocated_bytes();
    }
    for (const BlockRef& block : blocks()) {
      sum.payload += block.key_bytes + block.value_bytes;
      sum.allocated += static_cast<long long>(block.allocated_bytes());
    }
    sum.index = positions_.used_bytes() + blocks_.used_bytes();
    sum.allocated += positions_.allocated_bytes() + blocks_.allocated_bytes();
    return sum;
  }
  // What a rebuilt store of this shape takes at most.
  static long long bytes_bound(const Codec& codec, int dense_rows, int body_rows, int block_rows) {
    const auto block = [&](int n) {
      return n == 0 ? 0ll : pad(codec.keys.max_block_bytes(n)) + codec.values.max_block_bytes(n);
    };
    const long long full = body_rows / block_rows;
    const int rest = body_rows % block_rows;
    return 2ll * dense_rows * Near::row_bytes + 4ll * (dense_rows + body_rows) + full * block(block_rows) + block(rest) +
           (full + (rest != 0)) * static_cast<long long>(sizeof(BlockRef));
  }

  // All rows in order, as the codecs give them back; either output may be null. [num_rows, head_dim]
  void decode(float* keys, float* values) const {
    const Near near{};
    std::int64_t at = 0;
    const auto dense = [&](const Buffer<std::byte>& k, const Buffer<std::byte>& v, int rows) {
      for (int row = 0; row < rows; ++row, at += head_dim) {
        if (keys != nullptr) near.decode(k.data(), rows, row, keys + at);
        if (values != nullptr) near.decode(v.data(), rows, row, values + at);
      }
    };
    dense(sink_keys_, sink_values_, sink_rows());
    for (const BlockRef& block : blocks()) {
      for (int row = 0; row < block.rows; ++row, at += head_dim) {
        if (keys != nullptr) codec_->keys.decode(block.keys(), block.rows, row, keys + at);
        if (values != nullptr) codec_->values.decode(block.values(), block.rows, row, values + at);
      }
    }
    dense(recent_keys_, recent_values_, recent_rows());
  }

  // -- append, in two steps -------------------------------------------------------------------------------------------

  // Encodes the oldest `count` blocks of the recent zone into `out`; the store itself does not change.
  [[nodiscard]] bool encode_oldest(int count, int block_rows, std::vector<BlockRef>& out) const {
    for (int i = 0; i < count; ++i) {
      BlockRef block;
      if (!encode_recent(i * block_rows, block_rows, nullptr, block)) return false;
      out.push_back(block);
    }
    return true;
  }
  [[nodiscard]] bool reserve(int new_sink, int new_recent, int new_blocks, int encoded_rows) {
    const auto grow = [](Buffer<std::byte>& buffer, int rows, int minus, bool slack) {
      const auto wanted = buffer.size() + static_cast<std::size_t>(rows) * Near::row_bytes;
      // Rows that leave for the body make room in place.
      return buffer.reserve(wanted - std::min(wanted, static_cast<std::size_t>(minus) * Near::row_bytes), slack);
    };
    return grow(sink_keys_, new_sink, 0, false) && grow(sink_values_, new_sink, 0, false) &&
           grow(recent_keys_, new_recent, encoded_rows, true) && grow(recent_values_, new_recent, encoded_rows, true) &&
           blocks_.reserve(blocks_.size() + static_cast<std::size_t>(new_blocks), true) &&
           positions_.reserve(positions_.size() + static_cast<std::size_t>(new_sink + new_recent), true);
  }
  // Commits; needs encode_oldest() and reserve() before it.
  void adopt_oldest(std::span<const BlockRef> fresh) {
    std::size_t rows = 0;
    for (const BlockRef& block : fresh) rows += static_cast<std::size_t>(block.rows);
    blocks_.push(fresh.data(), fresh.size());
    recent_keys_.drop_front(rows * Near::row_bytes);
    recent_values_.drop_front(rows * Near::row_bytes);
  }
  void push_row(bool sink, const float* key, const float* value, int position) {
    push_dense(sink ? sink_keys_ : recent_keys_, key);
    push_dense(sink ? sink_values_ : recent_values_, value);
    positions_.push(&position, 1);
  }
  void free_block(const BlockRef& block) const { memory_->deallocate(block.data, block.allocated_bytes(), storage_alignment); }

  // -- rebuild, in two steps ------------------------------------------------------------------------------------------

  // A store with the marked rows only, every buffer exactly as large as needed. With `seal`, all but the newest `recent_rows`
  // dense rows are encoded. Rows of the body keep their bytes; leading blocks that do not change are shared until commit().
  [[nodiscard]] bool rebuild(std::span<const unsigned char> mark, bool seal, int recent_rows_kept, int block_rows,
                             HeadStore& next) const {
    const int rows = num_rows(), sinks = sink_rows(), recents = recent_rows(), body = body_rows();
    const unsigned char* const recent_mark = mark.data() + sinks + body;
    const int first_dense = seal ? std::max(0, recents - recent_rows_kept) : 0;
    int kept = 0, kept_sinks = 0, kept_recents = 0, kept_sealed = 0;
    for (int row = 0; row < rows; ++row) kept += mark[static_cast<std::size_t>(row)] != 0;
    for (int row = 0; row < sinks; ++row) kept_sinks += mark[static_cast<std::size_t>(row)] != 0;
    for (int row = 0; row < recents; ++row) (row < first_dense ? kept_sealed : kept_recents) += recent_mark[row] != 0;

    const auto dense_bytes = [](int n) { return static_cast<std::size_t>(n) * Near::row_bytes; };
    if (!next.sink_keys_.reserve(dense_bytes(kept_sinks)) || !next.sink_values_.reserve(dense_bytes(kept_sinks)) ||
        !next.recent_keys_.reserve(dense_bytes(kept_recents)) || !next.recent_values_.reserve(dense_bytes(kept_recents)) ||
        !next.positions_.reserve(static_cast<std::size_t>(kept))) {
      return false;
    }
    // The body: what there is, then what is encoded now.
    std::vector<BlockRef> sources(blocks().begin(), blocks().end());
    Pending temporary{this, {}}, result{this, {}};
    std::vector<unsigned char> body_mark(mark.begin() + sinks, mark.begin() + sinks + body);
    for (int at = 0; kept_sealed > 0 && at < first_dense; at += block_rows) {
      const int n = std::min(block_rows, first_dense - at);
      BlockRef block;
      const int survivors =
          static_cast<int>(std::count_if(recent_mark + at, recent_mark + at + n, [](auto m) { return m != 0; }));
      if (survivors == 0) continue;
      if (!encode_recent(at, n, recent_mark + at, block)) return false;
      temporary.blocks.push_back(block);
      sources.push_back(block);
      body_mark.insert(body_mark.end(), static_cast<std::size_t>(survivors), static_cast<unsigned char>(1));
    }
    if (!pack(sources, body_mark, block_rows, result.blocks)) {
      // What pack() passed on unchanged still belongs to `temporary`.
      std::erase_if(result.blocks, [&](const BlockRef& b) { return temporary.has(b); });
      return false;
    }
    if (!next.blocks_.reserve(result.blocks.size())) {
      std::erase_if(result.blocks, [&](const BlockRef& b) { return temporary.has(b); });
      return false;
    }
    next.blocks_.push(result.blocks.data(), result.blocks.size());
    result.blocks.clear();
    std::erase_if(temporary.blocks, [&](const BlockRef& b) { return next.owns(b); });
    for (int row = 0; row < sinks; ++row) {
      if (mark[static_cast<std::size_t>(row)] != 0) next.copy_dense(sink_keys_, sink_values_, row, true);
    }
    for (int row = first_dense; row < recents; ++row) {
      if (recent_mark[row] != 0) next.copy_dense(recent_keys_, recent_values_, row, false);
    }
    for (int row = 0; row < rows; ++row) {
      if (mark[static_cast<std::size_t>(row)] != 0) next.positions_.push(&positions_[static_cast<std::size_t>(row)], 1);
    }
    return true;
  }
  // Takes the place of this store; blocks both hold change hands.
  void commit(HeadStore&& next) noexcept {
    disown(next);
    *this = std::move(next);
  }
  // Gives up a rebuilt store that is not committed.
  void discard(HeadStore&& next) const noexcept { next.disown(*this); }

  [[nodiscard]] bool copy_to(HeadStore& other) const {
    const auto copy = [](const Buffer<std::byte>& from, Buffer<std::byte>& to) {
      if (!to.reserve(from.size())) return false;
      to.push(from.data(), from.size());
      return true;
    };
    if (!copy(sink_keys_, other.sink_keys_) || !copy(sink_values_, other.sink_values_) ||
        !copy(recent_keys_, other.recent_keys_) || !copy(recent_values_, other.recent_values_) ||
        !other.positions_.reserve(positions_.size()) || !other.blocks_.reserve(blocks_.size())) {
      return false;
    }
    other.positions_.push(positions_.data(), positions_.size());
    for (const BlockRef& block : blocks()) {
      BlockRef twin = block;
      twin.data = other.allocate(block.allocated_bytes());
      if (twin.data == nullptr) return false;
      std::memcpy(twin.data, block.data, block.allocated_bytes());
      other.blocks_.push(&twin, 1);
    }
    return true;
  }

 private:
  static constexpr long long pad(long long bytes) { return (bytes + 63) / 64 * 64; }

  // Blocks nobody holds yet: given back unless they are taken out first.
  struct Pending {
    const HeadStore* store;
    std::vector<BlockRef> blocks;
    ~Pending() {
      for (const BlockRef& block : blocks) {
        if (!store->owns(block)) store->free_block(block);
      }
    }
    bool has(const BlockRef& block) const {
      return std::any_of(blocks.begin(), blocks.end(), [&](const BlockRef& b) { return b.data == block.data; });
    }
  };

  bool owns(const BlockRef& block) const {
    for (const BlockRef& own : blocks()) {
      if (own.data == block.data) return true;
    }
    return false;
  }
  // Forgets every block that `other` holds too.
  void disown(const HeadStore& other) {
    std::size_t left = 0;
    // Shared blocks lead both tables.
    std::size_t shared = 0;
    while (shared < blocks_.size() && shared < other.blocks_.size() && blocks_[shared].data == other.blocks_[shared].data) {
      ++shared;
    }
    for (std::size_t i = shared; i < blocks_.size(); ++i) blocks_[left++] = blocks_[i];
    blocks_.resize(left);
  }
  void free_blocks() {
    for (const BlockRef& block : blocks()) free_block(block);
    blocks_.resize(0);
  }
  std::byte* allocate(std::size_t bytes) const {
    try {
      return static_cast<std::byte*>(memory_->allocate(bytes, storage_alignment));
    } catch (...) {
      return nullptr;
    }
  }
  [[nodiscard]] bool new_block(int rows, int key_bytes, int value_bytes, BlockRef& out) const {
    out.rows = rows;
    out.key_bytes = key_bytes;
    out.value_offset = static_cast<int>(pad(key_bytes));
    out.value_bytes = value_bytes;
    out.data = allocate(out.allocated_bytes());
    if (out.data == nullptr) return false;
    std::memset(out.data + key_bytes, 0, static_cast<std::size_t>(out.value_offset - key_bytes));
    return true;
  }
  void push_dense(Buffer<std::byte>& zone, const float* row) {
    const std::size_t at = zone.size();
    zone.resize(at + Near::row_bytes);
    Near{}.encode(row, 1, zone.data() + at);
  }
  void copy_dense(const Buffer<std::byte>& keys, const Buffer<std::byte>& values, int row, bool sink) {
    const auto at = static_cast<std::size_t>(row) * Near::row_bytes;
    (sink ? sink_keys_ : recent_keys_).push(keys.data() + at, Near::row_bytes);
    (sink ? sink_values_ : recent_values_).push(values.data() + at, Near::row_bytes);
  }
  // Encodes the marked rows (null: all) among recent rows first .. first + n - 1.
  [[nodiscard]] bool encode_recent(int first, int n, const unsigned char* mark, BlockRef& out) const {
    std::vector<float> keys, values;
    int count = 0;
    const Near near{};
    for (int row = 0; row < n; ++row) {
      if (mark != nullptr && mark[row] == 0) continue;
      keys.resize(static_cast<std::size_t>(count + 1) * head_dim);
      values.resize(keys.size());
      near.decode(recent_keys_.data(), 0, first + row, keys.data() + static_cast<std::size_t>(count) * head_dim);
      near.decode(recent_values_.data(), 0, first + row, values.data() + static_cast<std::size_t>(count) * head_dim);
      ++count;
    }
    struct alignas(storage_alignment) Line {
      std::byte bytes[storage_alignment];
    };
    const auto lines = [](int bytes) { return static_cast<std::size_t>(pad(bytes)) / storage_alignment; };
    std::vector<Line> key_block(lines(codec_->keys.max_block_bytes(count)));
    std::vector<Line> value_block(lines(codec_->values.max_block_bytes(count)));
    const int key_bytes = codec_->keys.encode(keys.data(), count, key_block.data()->bytes);
    const int value_bytes = codec_->values.encode(values.data(), count, value_block.data()->bytes);
    if (!new_block(count, key_bytes, value_bytes, out)) return false;
    std::memcpy(out.data, key_block.data(), static_cast<std::size_t>(key_bytes));
    std::memcpy(out.data + out.value_offset, value_block.data(), static_cast<std::size_t>(value_bytes));
    return true;
  }

  // The marked rows of `sources`, packed into blocks of block_rows where rows do not depend on one another, else block by
  // block.
  [[nodiscard]] bool pack(const std::vector<BlockRef>& sources, const std::vector<unsigned char>& mark, int block_rows,
                          std::vector<BlockRef>& result) const {
    std::size_t source = 0;
    const unsigned char* at = mark.data();
    const auto survivors = [](const unsigned char* m, int n) {
      return static_cast<int>(std::count_if(m, m + n, [](auto x) { return x != 0; }));
    };
    // Leading blocks that stay as they are.
    for (; source < blocks_.size(); ++source) {
      const BlockRef& block = sources[source];
      if (survivors(at, block.rows) != block.rows || (Codec::row_wise && block.rows != block_rows)) break;
      result.push_back(block);
      at += block.rows;
    }
    if constexpr (Codec::row_wise) {
      int left = 0;
      const unsigned char* m = at;
      for (std::size_t s = source; s < sources.size(); m += sources[s].rows, ++s) left += survivors(m, sources[s].rows);
      int row = 0;
      while (left > 0) {
        const int n = std::min(left, block_rows);
        BlockRef block;
        if (!new_block(n, codec_->keys.max_block_bytes(n), codec_->values.max_block_bytes(n), block)) return false;
        result.push_back(block);
        for (int to = 0; to < n; ++row) {
          while (row == sources[source].rows) {
            at += row;
            row = 0;
            ++source;
          }
          if (at[row] == 0) continue;
          const BlockRef& from = sources[source];
          codec_->keys.copy_row(from.keys(), from.rows, row, block.data, n, to);
          codec_->values.copy_row(from.values(), from.rows, row, block.data + block.value_offset, n, to);
          ++to;
        }
        left -= n;
      }
    } else {
      for (; source < sources.size(); at += sources[source].rows, ++source) {
        const BlockRef& from = sources[source];
        const int n = survivors(at, from.rows);
        if (n == 0) continue;
        if (n == from.rows && source >= blocks_.size()) {
          result.push_back(from);
          continue;
        }
        std::vector<std::byte> keys(static_cast<std::size_t>(codec_->keys.max_block_bytes(from.rows)));
        std::vector<std::byte> values(static_cast<std::size_t>(codec_->values.max_block_bytes(from.rows)));
        const int key_bytes = codec_->keys.erase(from.keys(), from.rows, at, keys.data());
        const int value_bytes = codec_->values.erase(from.values(), from.rows, at, values.data());
        BlockRef block;
        if (!new_block(n, key_bytes, value_bytes, block)) return false;
        std::memcpy(block.data, keys.data(), static_cast<std::size_t>(key_bytes));
        std::memcpy(block.data + block.value_offset, values.data(), static_cast<std::size_t>(value_bytes));
        result.push_back(block);
      }
    }
    return true;
  }

  const Codec* codec_;
  std::pmr::memory_resource* memory_;
  Buffer<std::byte> sink_keys_, sink_values_, recent_keys_, recent_values_;
  Buffer<BlockRef> blocks_;
  Buffer<int> positions_;
};

}  // namespace kvt::inline v0
