// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// HeadStore: the rows of one KV head, in three zones, oldest first.
//   sink    the first rows of the text, dense
//   body    encoded blocks
//   recent  the newest rows, dense
// What allocates may throw, and leaves the store as it was; what changes the store does not allocate.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "kvtailor/codec/kv_codec.hpp"
#include "kvtailor/store/block.hpp"
#include "kvtailor/store/buffer.hpp"

namespace kvt::inline v0 {

template <class Near>
struct DenseZone {
  Buffer<std::byte> keys, values;

  explicit DenseZone(std::pmr::memory_resource* memory) noexcept : keys(memory), values(memory) {}
  int rows() const noexcept { return static_cast<int>(keys.size()) / Near::row_bytes; }
  void reserve(int rows, bool slack = false) {
    keys.reserve(bytes_of(rows), slack);
    values.reserve(bytes_of(rows), slack);
  }
  void push(const float* key, const float* value) noexcept {
    const std::size_t at = keys.size();
    keys.resize(at + Near::row_bytes);
    values.resize(at + Near::row_bytes);
    Near{}.encode(key, 1, keys.data() + at);
    Near{}.encode(value, 1, values.data() + at);
  }
  // Rows [n, row_bytes] that are encoded.
  void push(const std::byte* from_keys, const std::byte* from_values, int n) noexcept {
    keys.push(from_keys, bytes_of(n));
    values.push(from_values, bytes_of(n));
  }
  void push(const DenseZone& from) noexcept { push(from.keys.data(), from.values.data(), from.rows()); }
  void drop_front(int rows) noexcept {
    keys.drop_front(bytes_of(rows));
    values.drop_front(bytes_of(rows));
  }
  // Keeps the rows whose mark is not zero.
  void keep(const unsigned char* mark) noexcept {
    keys.keep(mark, Near::row_bytes);
    values.keep(mark, Near::row_bytes);
  }
  bool shrink() noexcept {
    const bool both = keys.shrink();
    return values.shrink() && both;
  }
  // Either output may be null.
  void decode(int row, float* key, float* value) const noexcept {
    if (key != nullptr) Near{}.decode(keys.data(), rows(), row, key);
    if (value != nullptr) Near{}.decode(values.data(), rows(), row, value);
  }
  static std::size_t bytes_of(int rows) noexcept { return static_cast<std::size_t>(rows) * Near::row_bytes; }
};

template <class Codec>
class HeadCut;

template <class Codec>
class HeadStore {
 public:
  using Near = typename Codec::near_type;
  using Zone = DenseZone<Near>;
  static constexpr int head_dim = Codec::head_dim;

  HeadStore(const Codec& codec, std::pmr::memory_resource* memory) noexcept
      : codec_(codec), memory_(memory), sink_(memory), recent_(memory), blocks_(memory), positions_(memory) {}
  HeadStore(HeadStore&&) noexcept = default;
  HeadStore& operator=(HeadStore&& other) noexcept {
    if (this == &other) return *this;
    free_blocks();
    codec_ = other.codec_;
    memory_ = other.memory_;
    sink_ = std::move(other.sink_);
    recent_ = std::move(other.recent_);
    blocks_ = std::move(other.blocks_);
    positions_ = std::move(other.positions_);
    return *this;
  }
  ~HeadStore() { free_blocks(); }

  int num_rows() const noexcept { return static_cast<int>(positions_.size()); }
  int body_rows() const noexcept { return num_rows() - sink_.rows() - recent_.rows(); }
  const Zone& sink() const noexcept { return sink_; }
  const Zone& recent() const noexcept { return recent_; }
  std::span<const BlockRef> blocks() const noexcept { return blocks_.span(); }
  std::span<const int> positions() const noexcept { return positions_.span(); }
  const Codec& codec() const noexcept { return codec_; }

  // What rows and blocks hold, and what was allocated for them.
  struct Bytes {
    long long payload = 0, index = 0, allocated = 0;
  };
  Bytes bytes() const noexcept {
    Bytes sum;
    for (const Buffer<std::byte>* zone : {&sink_.keys, &sink_.values, &recent_.keys, &recent_.values}) {
      sum.payload += zone->used_bytes();
      sum.allocated += zone->allocated_bytes();
    }
    for (const BlockRef& block : blocks()) {
      sum.payload += block.key_bytes + block.value_bytes;
      sum.allocated += block.allocated_bytes;
    }
    sum.index = positions_.used_bytes() + blocks_.used_bytes();
    sum.allocated += positions_.allocated_bytes() + blocks_.allocated_bytes();
    return sum;
  }
  // What the store takes at most once only the marked rows, mark [num_rows], are left and all but the newest `recent_rows`
  // are encoded; sink and recent rows are marked.
  long long bytes_bound(std::span<const unsigned char> mark, int recent_rows, int block_rows) const noexcept {
    const auto block = [](int key_bytes, int value_bytes) {
      return BlockRef::bytes_of(key_bytes, value_bytes) + static_cast<long long>(sizeof(BlockRef));
    };
    const auto encoded = [&](int n) {
      return n == 0 ? 0ll : block(codec_.keys.max_block_bytes(n), codec_.values.max_block_bytes(n));
    };
    const auto kept = static_cast<int>(std::count_if(mark.begin(), mark.end(), [](unsigned char k) { return k != 0; }));
    const int dense = sink_.rows() + std::min(recent_rows, recent_.rows());
    long long sum = 2ll * dense * Near::row_bytes + 4ll * kept;
    int fresh = kept - dense;  // rows of blocks that will be made
    if (!codec_.row_wise()) {
      const unsigned char* at = mark.data() + sink_.rows();
      for (const BlockRef& one : blocks()) {
        const auto left = static_cast<int>(one.rows - std::count(at, at + one.rows, static_cast<unsigned char>(0)));
        at += one.rows;
        fresh -= left;
        if (left == 0) continue;
        sum += block(std::min(one.key_bytes, erased_bytes_bound(codec_.keys, one.keys(), one.rows, left)),
                     std::min(one.value_bytes, erased_bytes_bound(codec_.values, one.values(), one.rows, left)));
      }
    }
    return sum + fresh / block_rows * encoded(block_rows) + encoded(fresh % block_rows);
  }

  // All rows in order, as the codecs give them back; either output may be null. [num_rows, head_dim]
  void decode(float* keys, float* values) const noexcept {
    const auto next = [&] {
      if (keys != nullptr) keys += head_dim;
      if (values != nullptr) values += head_dim;
    };
    for (int row = 0; row < sink_.rows(); ++row, next()) sink_.decode(row, keys, values);
    for (const BlockRef& block : blocks()) {
      for (int row = 0; row < block.rows; ++row, next()) {
        if (keys != nullptr) codec_.keys.decode(block.keys(), block.rows, row, keys);
        if (values != nullptr) codec_.values.decode(block.values(), block.rows, row, values);
      }
    }
    for (int row = 0; row < recent_.rows(); ++row, next()) recent_.decode(row, keys, values);
  }

  // Encodes rows of the recent zone, in this order, `block_rows` together, into new blocks of `out`.
  void encode(std::span<const int> rows, int block_rows, BlockList& out) const {
    std::vector<float> keys, values;
    AlignedBytes key_block, value_block;
    while (!rows.empty()) {
      const auto n = std::min(rows.size(), static_cast<std::size_t>(block_rows));
      const int count = static_cast<int>(n);
      keys.resize(n * head_dim);
      values.resize(n * head_dim);
      for (std::size_t i = 0; i < n; ++i) {
        recent_.decode(rows[i], keys.data() + i * head_dim, values.data() + i * head_dim);
      }
      key_block.grow(codec_.keys.max_block_bytes(count));
      value_block.grow(codec_.values.max_block_bytes(count));
      const int key_bytes = codec_.keys.encode(keys.data(), count, key_block.data());
      const int value_bytes = codec_.values.encode(values.data(), count, value_block.data());
      out.add(count, key_bytes, value_bytes).fill(key_block.data(), value_block.data());
      rows = rows.subspan(n);
    }
  }

  // -- append ---------------------------------------------------------------------------------------------------------

  // Room for new rows once the oldest `encoded` recent rows have left for `new_blocks` blocks of the body.
  void reserve(int new_sink, int new_recent, int new_blocks, int encoded) {
    if (new_sink > 0) sink_.reserve(sink_.rows() + new_sink);
    recent_.reserve(recent_.rows() - encoded + new_recent, true);
    blocks_.reserve(blocks_.size() + static_cast<std::size_t>(new_blocks), true);
    positions_.reserve(positions_.size() + static_cast<std::size_t>(new_sink + new_recent), true);
  }
  // Blocks that hold the oldest recent rows take their place.
  void adopt_oldest(BlockList& fresh) noexcept {
    for (const BlockRef& block : fresh.blocks()) {
      blocks_.push(&block, 1);
      recent_.drop_front(block.rows);
    }
    fresh.release();
  }
  void push_row(bool sink, const float* key, const float* value, int position) noexcept {
    (sink ? sink_ : recent_).push(key, value);
    positions_.push(&position, 1);
  }

  // Fills an empty store: the first `sinks` dense rows, those of `body`, and the other dense ones. positions [all rows]; keys
  // and values of dense rows are encoded, one after another.
  void assign(std::span<const int> positions, int sinks, BlockList& body, const std::byte* keys, const std::byte* values) {
    auto recents = static_cast<int>(positions.size()) - sinks;
    for (const BlockRef& block : body.blocks()) recents -= block.rows;
    sink_.reserve(sinks);
    recent_.reserve(recents);
    positions_.reserve(positions.size());
    blocks_.reserve(body.blocks().size());
    sink_.push(keys, values, sinks);
    recent_.push(keys + Zone::bytes_of(sinks), values + Zone::bytes_of(sinks), recents);
    positions_.push(positions.data(), positions.size());
    blocks_.push(body.blocks().data(), body.blocks().size());
    body.release();
  }
  // Fills an empty store of the same codec.
  void copy_to(HeadStore& other) const {
    other.sink_.reserve(sink_.rows());
    other.recent_.reserve(recent_.rows());
    other.positions_.reserve(positions_.size());
    other.blocks_.reserve(blocks_.size());
    BlockList twins(other.memory_);
    for (const BlockRef& block : blocks()) {
      twins.add(block.rows, block.key_bytes, block.value_bytes).fill(block.keys(), block.values());
    }
    other.sink_.push(sink_);
    other.recent_.push(recent_);
    other.positions_.push(positions_.data(), positions_.size());
    other.blocks_.push(twins.blocks().data(), twins.blocks().size());
    twins.release();
  }

 private:
  friend class HeadCut<Codec>;

  void free_blocks() noexcept {
    for (const BlockRef& block : blocks()) block.free(memory_);
    blocks_.resize(0);
  }

  [[no_unique_address]] Codec codec_;
  std::pmr::memory_resource* memory_;
  Zone sink_, recent_;
  Buffer<BlockRef> blocks_;
  Buffer<int> positions_;
};

}  // namespace kvt::inline v0
