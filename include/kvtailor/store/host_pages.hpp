// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Between a cache of a device and one of the host, on the host:
//   HostPages   pages of a device, copied a run at a time
//   SliceRows   32 rows, as slices of a device have them and one by one, as blocks of the host do
//   rows_to_slices(), rows_from_slices()   the rows of a head
#pragma once

#include <algorithm>
#include <vector>

#include "kvtailor/attend/split_decode.hpp"
#include "kvtailor/store/head_store.hpp"

namespace kvt::inline v0 {

// In the order they have in the device's memory, so that pages that are neighbours there, of whatever heads, are one copy.
class HostPages {
 public:
  // pages [heads]: the numbers of a head's pages, in the order of its rows. Throws what operator new throws.
  HostPages(const std::vector<std::vector<int>>& pages, long long page_bytes) : page_bytes_(page_bytes) {
    for (const auto& own : pages) numbers_.insert(numbers_.end(), own.begin(), own.end());
    std::sort(numbers_.begin(), numbers_.end());
    for (const auto& own : pages) {
      first_.push_back(places_.size());
      for (const int page : own) {
        places_.push_back(static_cast<int>(std::lower_bound(numbers_.begin(), numbers_.end(), page) - numbers_.begin()));
      }
    }
    bytes_.resize(numbers_.size() * static_cast<std::size_t>(page_bytes));
  }
  SlicePages head(std::size_t h) { return {bytes_.data(), places_.data() + first_[h], nullptr, static_cast<int>(page_bytes_)}; }

  // All pages from, or to, memory of the device that begins with page 0.
  template <class Device>
  Status read(Device& device, const std::byte* from) {
    return each_run([&](std::byte* here, long long there, std::size_t n) { return device.copy_from(here, from + there, n); });
  }
  template <class Device>
  Status write(Device& device, std::byte* to) {
    return each_run([&](const std::byte* here, long long there, std::size_t n) { return device.copy_to(to + there, here, n); });
  }

 private:
  template <class Copy>
  Status each_run(Copy&& copy) {
    for (std::size_t first = 0, end = 0; first < numbers_.size(); first = end) {
      while (++end < numbers_.size() && numbers_[end] == numbers_[end - 1] + 1) {
      }
      const auto page = static_cast<std::size_t>(page_bytes_);
      KVT_TRY(copy(bytes_.data() + first * page, numbers_[first] * page_bytes_, (end - first) * page));
    }
    return success();
  }

  long long page_bytes_;
  std::vector<int> numbers_;        // rising
  std::vector<int> places_;         // of pages in bytes_, of one head after another
  std::vector<std::size_t> first_;  // [heads] in places_
  std::vector<std::byte> bytes_;    // zeros at first
};

// Rows as their codecs encode them alone.
template <class Key, class Value>
struct SliceRows {
  using Layout = LayoutOf<Key, Value>;
  static constexpr int dim = Key::head_dim;

  alignas(16) std::byte keys[slice_rows][Key::row_bytes];
  alignas(16) std::byte values[slice_rows][Value::row_bytes];
  int positions[slice_rows];

  void read(const SlicePages& pages, int slice, int count) {
    const std::byte* const from = pages.at(slice, Layout::bytes);
    for (int r = 0; r < count; ++r) positions[r] = pages.positions(slice, Layout::bytes)[r];
    if constexpr (!Layout::fragments) {
      for (int r = 0; r < count; ++r) {
        Key{}.copy_row(from + r * Key::row_bytes, 1, 0, keys[r], 1, 0);
        Value{}.copy_row(from + Layout::values_at + r * Value::row_bytes, 1, 0, values[r], 1, 0);
      }
    } else {
      read_fragments(from, count);
    }
  }
  // To a slice of zeros.
  void write(const SlicePages& pages, int slice, int count) const {
    std::byte* const to = pages.at(slice, Layout::bytes);
    for (int r = 0; r < count; ++r) pages.positions(slice, Layout::bytes)[r] = positions[r];
    if constexpr (!Layout::fragments) {
      for (int r = 0; r < count; ++r) {
        Key{}.copy_row(keys[r], 1, 0, to + r * Key::row_bytes, 1, 0);
        Value{}.copy_row(values[r], 1, 0, to + Layout::values_at + r * Value::row_bytes, 1, 0);
      }
    } else {
      write_fragments(to, count);
    }
  }

 private:
  void read_fragments(const std::byte* from, int count) {
    int elements[slice_rows][dim];
    Layout::template read<true>(from, elements);
    for (int r = 0; r < count; ++r) FragmentsOf<Key>::pack(elements[r], keys[r]);
    Layout::template read<false>(from, elements);
    for (int r = 0; r < count; ++r) {
      FragmentsOf<Value>::pack(elements[r], values[r]);
      for (int k = 0; k < Layout::Keys::scale_bytes; ++k) {
        keys[r][FragmentsOf<Key>::scale_at(k)] = from[Layout::template scale_at<true>(r, k)];
      }
      for (int k = 0; k < Layout::Values::scale_bytes; ++k) {
        values[r][FragmentsOf<Value>::scale_at(k)] = from[Layout::template scale_at<false>(r, k)];
      }
    }
  }
  void write_fragments(std::byte* to, int count) const {
    int elements[slice_rows][dim] = {};
    for (int r = 0; r < count; ++r) FragmentsOf<Key>::unpack(keys[r], elements[r]);
    Layout::template write<true>(elements, to);
    for (int r = 0; r < count; ++r) {
      FragmentsOf<Value>::unpack(values[r], elements[r]);
      Layout::write_scales(
          to, r, [&](int k) { return keys[r][FragmentsOf<Key>::scale_at(k)]; },
          [&](int k) { return values[r][FragmentsOf<Value>::scale_at(k)]; });
    }
    Layout::template write<false>(elements, to);
  }
};

template <class Codec>
using PlainRows = SliceRows<typename Codec::near_type, typename Codec::near_type>;

// Dense rows, to slices of zeros.
template <class Codec>
void dense_to_slices(const HeadStore<Codec>& store, const SlicePages& near) {
  const auto positions = store.positions();
  const int sinks = store.sink().rows(), encoded = store.body_rows(), dense = store.num_rows() - encoded;
  PlainRows<Codec> plain;
  for (int at = 0; at < dense; ++at) {
    const auto& zone = at < sinks ? store.sink() : store.recent();
    const std::size_t from = zone.bytes_of(at < sinks ? at : at - sinks);
    const int row = at % slice_rows;
    std::memcpy(plain.keys[row], zone.keys.data() + from, sizeof plain.keys[row]);
    std::memcpy(plain.values[row], zone.values.data() + from, sizeof plain.values[row]);
    plain.positions[row] = positions[static_cast<std::size_t>(at < sinks ? at : at + encoded)];
    if (row + 1 == slice_rows || at + 1 == dense) plain.write(near, at / slice_rows, row + 1);
  }
}

// Blocks, to an empty stream with as many pages as they need.
template <class Codec, class Stream>
void blocks_to_stream(const HeadStore<Codec>& store, const Stream& to) {
  const Serial lanes;
  const int* position = store.positions().data() + store.sink().rows();
  std::vector<std::byte> padded;  // since reading goes by 16 bytes
  const auto write = [&](int offset, int count, const std::byte* from) {
    padded.assign(static_cast<std::size_t>(BlockRecord::padded(count)), std::byte{0});
    std::copy_n(from, count, padded.begin());
    to.write(lanes, offset, count, padded.data());
  };
  *to.bytes = 0;
  int rows = 0;
  for (const BlockRef& block : store.blocks()) {
    const BlockRecord record{block.rows, block.key_bytes, block.value_bytes, rows};
    const int offset = *to.bytes;
    to.mark(lanes, offset, record.bytes());
    write(offset, static_cast<int>(sizeof record), reinterpret_cast<const std::byte*>(&record));
    write(offset + BlockRecord::positions_at(), 4 * block.rows, reinterpret_cast<const std::byte*>(position));
    write(offset + record.keys_at(), block.key_bytes, block.keys());
    write(offset + record.values_at(), block.value_bytes, block.values());
    position += block.rows;
    rows += block.rows;
    *to.bytes += record.bytes();
  }
}

// Dense and encoded rows, to slices of zeros.
template <class Codec>
void rows_to_slices(const HeadStore<Codec>& store, const SlicePages& near, const SlicePages& body) {
  dense_to_slices(store, near);
  const auto positions = store.positions();
  const int sinks = store.sink().rows(), encoded = store.body_rows();
  const auto& [keys, values] = store.codec();
  SliceRows<typename Codec::key_type, typename Codec::value_type> coded;
  int at = 0;
  for (const BlockRef& block : store.blocks()) {
    for (int i = 0; i < block.rows; ++i, ++at) {
      const int row = at % slice_rows;
      keys.copy_row(block.keys(), block.rows, i, coded.keys[row], 1, 0);
      values.copy_row(block.values(), block.rows, i, coded.values[row], 1, 0);
      coded.positions[row] = positions[static_cast<std::size_t>(sinks + at)];
      if (row + 1 == slice_rows || at + 1 == encoded) coded.write(body, at / slice_rows, row + 1);
    }
  }
}

// Dense rows of a head, and room for the positions of all.
template <class Codec>
struct DenseRows {
  std::vector<std::byte> keys, values;
  std::vector<int> positions;

  DenseRows(const SlicePages& near, int dense, int sinks, int encoded) : positions(static_cast<std::size_t>(dense + encoded)) {
    PlainRows<Codec> plain;
    for (int first = 0; first < dense; first += slice_rows) {
      const int n = std::min(slice_rows, dense - first);
      plain.read(near, first / slice_rows, n);
      keys.insert(keys.end(), plain.keys[0], plain.keys[n]);
      values.insert(values.end(), plain.values[0], plain.values[n]);
      for (int r = 0; r < n; ++r) {
        const int at = first + r;
        positions[static_cast<std::size_t>(at < sinks ? at : at + encoded)] = plain.positions[r];
      }
    }
  }
};

// Fills an empty store with the blocks of a stream. Throws what the resource and operator new throw.
template <class Codec, class Stream>
void rows_from_stream(const SlicePages& near, int dense, const Stream& from, const CacheOptions& options,
                      HeadStore<Codec>& store) {
  const Serial lanes;
  const int sinks = std::min(dense, options.sink_rows);
  std::vector<int> position;
  std::vector<std::byte> padded;  // since reading goes by 16 bytes
  BlockList blocks(options.memory);
  const auto read = [&](int offset, int count, std::byte* to) {
    padded.resize(static_cast<std::size_t>(BlockRecord::padded(count)));
    from.read(lanes, offset, count, padded.data());
    std::copy_n(padded.begin(), count, to);
  };
  for (int offset = 0; offset < *from.bytes;) {
    const BlockRecord record = from.record(offset);
    const BlockRef& block = blocks.add(record.rows, record.key_bytes, record.value_bytes);
    read(offset + record.keys_at(), record.key_bytes, block.data);
    read(offset + record.values_at(), record.value_bytes, block.data + block.value_offset());
    for (int r = 0; r < record.rows; ++r) position.push_back(from.position(offset, r));
    offset += record.bytes();
  }
  DenseRows<Codec> rows(near, dense, sinks, static_cast<int>(position.size()));
  std::copy(position.begin(), position.end(), rows.positions.begin() + sinks);
  store.assign(rows.positions, sinks, blocks, rows.keys.data(), rows.values.data());
}

// Fills an empty store: blocks of block_rows rows, but that a block ends after the rows `ends`. Throws what the resource and
// operator new throw.
template <class Codec>
void rows_from_slices(const SlicePages& near, int dense, const SlicePages& body, int encoded, std::span<const int> ends,
                      const CacheOptions& options, HeadStore<Codec>& store) {
  const int sinks = std::min(dense, options.sink_rows);
  DenseRows<Codec> rows(near, dense, sinks, encoded);
  const auto& [keys, values] = store.codec();
  SliceRows<typename Codec::key_type, typename Codec::value_type> coded;
  BlockList blocks(options.memory);
  BlockRef block;
  auto end = ends.begin();
  for (int at = 0, first = 0; at < encoded; ++at) {
    const int row = at % slice_rows;
    if (row == 0) coded.read(body, at / slice_rows, std::min(slice_rows, encoded - at));
    if (at == first + block.rows) {
      while (end != ends.end() && *end <= at) ++end;
      const int n = std::min((end != ends.end() ? std::min(*end, encoded) : encoded) - at, options.block_rows);
      block = blocks.add(n, keys.max_block_bytes(n), values.max_block_bytes(n));
      first = at;
    }
    keys.copy_row(coded.keys[row], 1, 0, block.data, block.rows, at - first);
    values.copy_row(coded.values[row], 1, 0, block.data + block.value_offset(), block.rows, at - first);
    rows.positions[static_cast<std::size_t>(sinks + at)] = coded.positions[row];
  }
  store.assign(rows.positions, sinks, blocks, rows.keys.data(), rows.values.data());
}

}  // namespace kvt::inline v0
