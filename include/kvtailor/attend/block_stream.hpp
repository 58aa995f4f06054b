// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Blocks of any codec on a device, byte for byte as the host has them: for codecs whose rows share something in a block.
//   BlockRecord   rows of a head that were encoded together
//   BlockStream   those of a head, one after another in pages
//   BlockLayout   of such a stream, for DecodeWork
//   BlockWarp     attention over pages of it by one warp, with fp32 products, or with tensor cores where BlockLanes has them
#pragma once

#include <limits>

#include "kvtailor/attend/block_products.hpp"
#include "kvtailor/codec/kv_codec.hpp"

namespace kvt::inline v0 {

// A header of 16 bytes, positions int32 [rows], the block of keys, that of values; each padded to 16 bytes.
struct BlockRecord {
  static constexpr int unit = 16, most_rows = 128;

  int rows, key_bytes, value_bytes, first_row;  // first_row: how many rows of the stream come before

  KVT_HD static constexpr int padded(int bytes) { return (bytes + unit - 1) / unit * unit; }
  KVT_HD static constexpr int positions_at() { return unit; }
  KVT_HD constexpr int keys_at() const { return unit + padded(4 * rows); }
  KVT_HD constexpr int values_at() const { return keys_at() + padded(key_bytes); }
  KVT_HD constexpr int bytes() const { return values_at() + padded(value_bytes); }
};
static_assert(sizeof(BlockRecord) == BlockRecord::unit);

namespace detail {

// What max_block_bytes(n) of any codec of a type is at most, where factors of low rank have levels.
template <class Codec>
struct MostBlockBytes {
  static constexpr int of(int n) {
    if constexpr (requires { Codec::most_block_bytes(n); }) {
      return Codec::most_block_bytes(n);
    } else {
      return Codec{}.max_block_bytes(n);
    }
  }
};
template <class Codec>
struct MostBlockBytes<Rotated<Codec>> : MostBlockBytes<Codec> {};
template <class Codec>
struct MostBlockBytes<Shifted<Codec>> {
  static constexpr int of(int n) { return Shifted<Codec>::mean_bytes + MostBlockBytes<Codec>::of(n); }
};
template <class... Codecs>
struct MostBlockBytes<OneOf<Codecs...>> {
  static constexpr int of(int n) { return std::max({MostBlockBytes<Codecs>::of(n)...}); }
};

}  // namespace detail

// Records follow one another and go on in the next page, so that a page's end wastes nothing. A page begins with the place of
// the first record that begins in it or later, so that warps may start at any page.
template <class KeyCodec, class ValueCodec>
struct BlockStream {
  static constexpr int page_bytes = 8192, room = page_bytes - BlockRecord::unit;  // room: for records, of a page
  // Of a block of keys or of values.
  static constexpr int most_part_bytes = (std::max(detail::MostBlockBytes<KeyCodec>::of(BlockRecord::most_rows),
                                                   detail::MostBlockBytes<ValueCodec>::of(BlockRecord::most_rows)) +
                                          63) /
                                         64 * 64;

  std::byte* pool;
  const int* page;  // [pages_of(*bytes)] a page's number in the pool
  int* bytes;       // of all records
  [[no_unique_address]] KeyCodec keys;
  [[no_unique_address]] ValueCodec values;

  KVT_HD static constexpr int pages_of(int bytes) { return (bytes + room - 1) / room; }

  KVT_HD KVT_INLINE std::byte* page_at(int p) const { return pool + static_cast<long long>(page[p]) * page_bytes; }
  // What lies at a multiple of four bytes of the stream, up to the next multiple of 16.
  KVT_HD KVT_INLINE std::byte* at(int offset) const { return page_at(offset / room) + BlockRecord::unit + offset % room; }
  KVT_HD KVT_INLINE int first_record(int p) const { return *reinterpret_cast<const int*>(page_at(p)); }
  KVT_HD KVT_INLINE BlockRecord record(int offset) const { return *reinterpret_cast<const BlockRecord*>(at(offset)); }
  KVT_HD KVT_INLINE int position(int offset, int row) const {
    return *reinterpret_cast<const int*>(at(offset + BlockRecord::positions_at() + 4 * row));
  }
  // Where the record of row r lies, which there is.
  KVT_HD int find(int r) const {
    int low = 0, high = pages_of(*bytes) - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2, offset = first_record(middle);
      if (offset < *bytes && record(offset).first_row <= r) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    for (int offset = first_record(low);;) {
      const BlockRecord own = record(offset);
      if (r < own.first_row + own.rows) return offset;
      offset += own.bytes();
    }
  }
  // f(offset, record) of those that begin in a page.
  template <class F>
  KVT_HD void each_record(int p, F&& f) const {
    const int last = *bytes < (p + 1) * room ? *bytes : (p + 1) * room;
    for (int offset = first_record(p); offset < last;) {
      const BlockRecord own = record(offset);
      f(offset, own);
      offset += own.bytes();
    }
  }

  // `count` bytes, and up to 15 more, out of the stream or into it; the other side is aligned to 16. A warp's share.
  template <class Lanes>
  KVT_HD void read(const Lanes& lanes, int offset, int count, std::byte* to, int warp = 0, int warps = 1) const {
    each_unit(lanes, count, warp, warps, [&](int k) { copy_unit(to + k, at(offset + k)); });
  }
  template <class Lanes>
  KVT_HD void write(const Lanes& lanes, int offset, int count, const std::byte* from, int warp = 0, int warps = 1) const {
    each_unit(lanes, count, warp, warps, [&](int k) { copy_unit(at(offset + k), from + k); });
  }
  // Says where the pages' first records are once one was written at `offset`, the last so far.
  template <class Lanes>
  KVT_HD void mark(const Lanes& lanes, int offset, int record_bytes) const {
    const int first = (offset + room - 1) / room, end = offset + record_bytes;
    lanes.each([&](int lane) {
      for (int p = first + lane; p * room < end; p += Lanes::size) {
        *reinterpret_cast<int*>(page_at(p)) = p * room == offset ? offset : end;
      }
    });
  }

  // All of a page, to the same one of another stream.
  template <class Lanes>
  KVT_HD void copy_page(const Lanes& lanes, int p, const BlockStream& to, int warp, int warps) const {
    each_unit(lanes, page_bytes, warp, warps, [&](int k) { copy_unit(to.page_at(p) + k, page_at(p) + k); });
  }

 private:
  template <class Lanes, class F>
  KVT_HD KVT_INLINE static void each_unit(const Lanes& lanes, int count, int warp, int warps, F&& f) {
    lanes.each([&](int lane) {
      const int step = warps * Lanes::size * BlockRecord::unit;
      for (int k = (warp * Lanes::size + lane) * BlockRecord::unit; k < count; k += step) f(k);
    });
  }
  KVT_HD KVT_INLINE static void copy_unit(std::byte* to, const std::byte* from) {
    std::memcpy(__builtin_assume_aligned(to, BlockRecord::unit), __builtin_assume_aligned(from, BlockRecord::unit),
                BlockRecord::unit);
  }
};

template <class KeyCodec, class ValueCodec>
struct BlockLayout {
  static_assert(KeyCodec::head_dim == ValueCodec::head_dim);
  using Key = KeyCodec;
  using Value = ValueCodec;
  using Pages = BlockStream<Key, Value>;
  static constexpr bool fragments = false, grouped = false;
  static constexpr int dim = Key::head_dim, basis = max_basis_dim<Value>, width = 8, most_rows = BlockRecord::most_rows;

  // What a warp has of its own.
  struct Memory {
    alignas(64) std::byte block[Pages::most_part_bytes];  // one of keys, then of values
    float logit[width][most_rows];                        // then weights
    float rows[width * basis];                            // weighted, of vectors one after another in the codec's basis
    float max[width], sum[width];
  };
  static constexpr int warp_bytes = static_cast<int>(sizeof(Memory));
  // What all warps share: vectors and their fragments; and tables of codes, where there is room for them.
  static constexpr int shared_bytes = width * (max_basis_dim<Key> + basis) * 4 + 16 * dim + 1024;
  template <class Codec>
  using RowsOf = std::conditional_t<(shared_kib >= 163), TensorRowsOf<Codec>, void>;
  using KeyRows = RowsOf<Key>;
  using ValueRows = RowsOf<Value>;
  using Keys = std::conditional_t<std::is_void_v<KeyRows>, void, CodeStrings<KeyRows, true>>;
  static constexpr bool tensor_keys = !std::is_void_v<KeyRows>, tensor_values = !std::is_void_v<ValueRows>,
                        packs_queries = tensor_keys;
  static constexpr int tables_bytes = tensor_keys || tensor_values ? 256 * table_stride : 0;
  // Without tables, what a block has on the smallest of multiprocessors (sm_86, sm_89).
  static constexpr int most_bytes = (tables_bytes > 0 ? shared_kib << 10 : 99 << 10) - shared_bytes - tables_bytes;
  static constexpr int warps = std::clamp(most_bytes / warp_bytes, 1, 8), table_bytes = tables_bytes + warps * warp_bytes;
  static_assert(table_bytes <= 128 << 10 || table_bytes <= most_bytes + tables_bytes,
                "a multiprocessor of the A100 has no room for blocks of so many bytes");

  KVT_HD static void fill_tables(std::byte* table, int thread, int threads) {
    if constexpr (tensor_keys) fill_table<CodeStrings<KeyRows, true>>(table, thread, threads);
    if constexpr (tensor_values) fill_table<CodeStrings<ValueRows, false>>(table + value_table_offset, thread, threads);
  }
};

// limited: whether a window, positions or a soft cap are looked at; otherwise every row is seen.
template <class Layout, class Lanes, bool limited>
class BlockWarp {
 public:
  using Stream = typename Layout::Pages;
  using Memory = typename Layout::Memory;
  using Queries = DecodeQueries<float>;  // vectors: [m, basis of the keys], in their basis, times scale and log2(e)
  static constexpr int width = Layout::width, basis = Layout::basis;

  // Attends to what begins in pages first, first + step, ... below last. table: Layout::table_bytes, its tables filled;
  // fragments: of the vectors, if there are tensor_keys.
  KVT_HD void run(const Lanes& lanes, const Stream& stream, const Queries& query, std::byte* table, int first, int last,
                  int step, int warp, const QueryFragments<Layout::dim>* fragments) {
    memory_ = reinterpret_cast<Memory*>(table + Layout::tables_bytes + warp * Layout::warp_bytes);
    table_ = table;
    fragments_ = fragments;
    length_ = basis_dim(stream.values);
    lanes.each([&](int lane) {
      for (int j = lane; j < width; j += Lanes::size) {
        memory_->max[j] = none;
        memory_->sum[j] = 0;
      }
      for (int d = lane; d < width * length_; d += Lanes::size) memory_->rows[d] = 0;
    });
    for (int p = first; p < last; p += step) {
      stream.each_record(p, [&](int offset, const BlockRecord& record) { attend(lanes, stream, offset, record, query); });
    }
  }
  // The maximum, and sum of 2^(logit - maximum), of each vector: max [width], sum [width].
  KVT_HD void store_state(const Lanes& lanes, float* max, float* sum) const {
    lanes.each([&](int lane) {
      for (int j = lane; j < width; j += Lanes::size) {
        max[j] = memory_->max[j];
        sum[j] = memory_->sum[j];
      }
    });
  }
  // rows [width, basis] = or += (if `add`) factor [width] times the weighted rows of each vector, in the codec's basis.
  KVT_HD void store_rows(const Lanes& lanes, const float* factor, bool add, float* rows) const {
    lanes.each([&](int lane) {
      for (int k = lane; k < width * basis; k += Lanes::size) {
        const int j = k / basis, d = k % basis;
        rows[k] = (d < length_ ? memory_->rows[j * length_ + d] * factor[j] : 0.f) + (add ? rows[k] : 0.f);
      }
    });
  }

 private:
  static constexpr float none = -std::numeric_limits<float>::infinity();

  KVT_HD void attend(const Lanes& lanes, const Stream& stream, int offset, const BlockRecord& record, const Queries& query) {
    if (limited && !any_seen(stream, offset, record, query)) return;
    float* const logits = memory_->logit[0];
    stream.read(lanes, offset + record.keys_at(), record.key_bytes, memory_->block);
    with<typename Layout::KeyRows>(lanes, table_, [&](const auto& own) {
      stream.keys.logits(own, memory_->block, record.rows, query.vectors, query.m, logits, Layout::most_rows);
    });
    for (int j = 0; j < query.m; ++j) to_weights(lanes, stream, offset, record.rows, query, j);
    stream.read(lanes, offset + record.values_at(), record.value_bytes, memory_->block);
    with<typename Layout::ValueRows>(lanes, table_ + value_table_offset, [&](const auto& own) {
      stream.values.accumulate(own, memory_->block, record.rows, logits, query.m, Layout::most_rows, memory_->rows);
    });
  }
  // f(lanes that read Rows), or the lanes as they are.
  template <class Rows, class F>
  KVT_HD void with(const Lanes& lanes, const std::byte* table, F&& f) const {
    if constexpr (std::is_void_v<Rows>) {
      f(lanes);
    } else {
      f(BlockLanes<Lanes, Rows>{lanes, table, fragments_});
    }
  }
  // Whether a vector may see a row; positions rise.
  KVT_HD static bool any_seen(const Stream& stream, int offset, const BlockRecord& record, const Queries& query) {
    const long long least = stream.position(offset, 0), most = stream.position(offset, record.rows - 1);
    for (int j = 0; j < query.m; ++j) {
      const long long own = query.position[j];
      if (least <= own && (query.window == 0 || most > own - query.window)) return true;
    }
    return false;
  }
  KVT_HD void to_weights(const Lanes& lanes, const Stream& stream, int offset, int rows, const Queries& query, int j) {
    float* const logit = memory_->logit[j];
    typename Lanes::template Reg<float> part;
    lanes.each([&](int lane) {
      part[lane] = none;
      for (int r = lane; r < rows; r += Lanes::size) {
        if constexpr (limited) {
          if (query.cap > 0) logit[r] = query.cap * std::tanh(logit[r] / query.cap);
          if (!query.sees(j, stream.position(offset, r))) logit[r] = none;
        }
        part[lane] = std::fmax(part[lane], logit[r]);
      }
    });
    const float before = memory_->max[j], top = std::fmax(before, lanes.max(part));
    const float factor = before == top ? 1.f : fast_exp2(before - top);
    lanes.each([&](int lane) {
      part[lane] = 0;
      for (int r = lane; r < rows; r += Lanes::size) {
        logit[r] = limited && top == none ? 0.f : fast_exp2(logit[r] - top);
        part[lane] += logit[r];
      }
      if (factor != 1.f) {
        for (int d = lane; d < length_; d += Lanes::size) memory_->rows[j * length_ + d] *= factor;
      }
    });
    const float sum = memory_->sum[j] * factor + lanes.sum(part);
    lanes.each([](int) {});  // all have read what is written now
    lanes.once([&] {
      memory_->max[j] = top;
      memory_->sum[j] = sum;
    });
  }

  Memory* memory_ = nullptr;
  const std::byte* table_ = nullptr;
  const QueryFragments<Layout::dim>* fragments_ = nullptr;
  int length_ = 0;  // elements of a sum
};

}  // namespace kvt::inline v0
