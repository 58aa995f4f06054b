// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DeviceCache: the keys and values of one sequence on a device. PagePool: the pages of encoded rows that sequences share.
// DecodePlan (decode_plan.hpp) attends to a batch of them.
//
//   cuda::Device device(stream);
//   KVT_TRY(pool.init(device, 4096));                                   // once
//   KVT_TRY(cache.init(device, pool, geometry));                        // each sequence
//   KVT_TRY(plan.init(device, caches));                                 // each batch
//   KVT_TRY(cache.reserve(1));                                          // each step, or for many ahead
//   KVT_TRY(cache.append(layer, keys, values, positions, 1));           // each layer of each step
//   KVT_TRY(plan.attend(layer, queries, positions, {}, out));           // or n queries a sequence, if init() was told
//   KVT_TRY(cache.cut(keep, stride));                                   // drops rows; refresh() gives their pages back
//   KVT_TRY(cache.fork(other));                                         // another sequence with the same beginning
//   KVT_TRY(cache.download(host));                                      // to a cache of the host; upload(host) is the way back
//
// append(), attend(), cut() and truncate() allocate nothing, wait for nothing and read nothing back: lengths are counted on the
// device, and a step can be captured in a graph. Pointers to rows, positions, queries and outputs are of the device. Nothing
// can be said there of elements that are not finite or do not fit the type of dense rows: the engine must not give such.
// Failure: every call that returns a Status other than success leaves the cache as it was, unless a kernel failed.
//
// Codecs: any. Rows that decode one by one (LaneRowCodec) lie in pages of 128; where keys and values have fragments for tensor
// cores (LayoutOf), queries and weights are rounded to fp16, elsewhere all products and sums are fp32. Where rows share
// something in a block, and where each head has its own codec (OneOf), the blocks are those of the host, byte for byte, one
// after another in pages of 8 KiB.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <vector>

#include "kvtailor/codec/kv_codec.hpp"
#include "kvtailor/core/device.hpp"
#include "kvtailor/core/geometry.hpp"
#include "kvtailor/store/head_work.hpp"
#include "kvtailor/store/host_pages.hpp"
#include "kvtailor/store/stream_work.hpp"

namespace kvt::inline v0 {

namespace detail {

// As far as the host sees: sink logits are of the device.
inline Status check_options(const Geometry& geometry, const AttendOptions& options) {
  if (!std::isfinite(options.scale) || !std::isfinite(options.soft_cap) || options.soft_cap < 0 || options.window < 0) {
    return error(Errc::bad_value, "scale, soft cap and window must be finite, and the latter two not negative");
  }
  if (!options.sink_logits.empty() && options.sink_logits.size() != static_cast<std::size_t>(geometry.num_q_heads)) {
    return error(Errc::bad_shape, "there are {} sink logits for {} query heads",
                 static_cast<double>(options.sink_logits.size()), geometry.num_q_heads);
  }
  return success();
}

}  // namespace detail

namespace detail {

template <class Codec, bool in_blocks>
struct ScratchOf {
  using type = std::byte;  // none is allocated
};
template <class Codec>
struct ScratchOf<Codec, true> {
  using type = StreamScratch<Codec>;
};

}  // namespace detail

template <class Codec, class Device>
class PagePool {
 public:
  using Layout = LayoutOf<typename Codec::key_type, typename Codec::value_type>;
  static constexpr long long page_bytes = [] {
    if constexpr (requires { Layout::bytes; }) {
      return SlicePages::bytes_of_page(Layout::bytes);
    } else {
      return static_cast<long long>(Layout::Pages::page_bytes);
    }
  }();

  // `pages` of page_bytes each: 128 rows of one head, or of a stream of blocks; what was in the pool is gone.
  Status init(Device& device, int pages) {
    if (pages < 1) return error(Errc::bad_shape, "a pool of {} pages holds nothing", pages);
    std::vector<int> free;
    for (int p = pages; p-- > 0;) free.push_back(p);
    KVT_TRY(memory_.allocate(device, static_cast<std::size_t>(pages) * page_bytes));
    free_ = std::move(free);
    return success();
  }
  std::byte* data() const { return memory_.data(); }
  int free_pages() const { return static_cast<int>(free_.size()); }
  int take() {
    const int page = free_.back();
    free_.pop_back();
    return page;
  }
  void give_back(std::span<const int> pages) { free_.insert(free_.end(), pages.begin(), pages.end()); }

 private:
  DeviceArray<std::byte, Device> memory_;
  std::vector<int> free_;
};

struct DeviceCacheOptions {
  int sink_rows = 4;      // first rows of the text: dense
  int recent_rows = 32;   // newest rows: dense. The dense zone grows by a block of 128 rows before its oldest is encoded
  int max_append = 512;   // rows of one append at most
  int max_rows = 131072;  // rows of the sequence at most: room in the page tables, four bytes for a page of a head
  // What only some policies need to know of the model, as in CacheOptions; the arrays outlive the cache. Those of weights are
  // of the device, the others of the host.
  std::span<const Rope> ropes = {};                           // one for all layers, or one a layer
  std::span<const OutputProjection> output_projections = {};  // one a layer
};

template <class Codec, class Device>
class DeviceCache {
 public:
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  static constexpr int head_dim = Codec::head_dim;
  using Plain = typename Codec::near_type;
  using Pool = PagePool<Codec, Device>;
  using Body = typename LayoutOf<Key, Value>::Pages;  // SlicePages or BlockStream
  static constexpr bool in_blocks = lies_in_blocks<Codec>;
  static_assert(head_dim <= 256, "a device has no kernels for head dims above 256; the host has");
  static_assert(
      !in_blocks || (HasBlockEncoder<Key> && HasBlockEncoder<Value>),
      "a device encodes blocks by a BlockEncoder (codec/block_encode.hpp), and this codec has none; that of LowRank is "
      "in codec/low_rank_work.hpp");

  DeviceCache() = default;
  DeviceCache(const DeviceCache&) = delete;
  DeviceCache& operator=(const DeviceCache&) = delete;
  ~DeviceCache() { release(); }

  // Device and pool must outlive the cache. Heads may have codecs of their own, where rows lie in blocks: head_codecs
  // [num_layers, num_kv_heads], or empty for the one codec of the cache.
  Status init(Device& device, Pool& pool, const Geometry& geometry, const DeviceCacheOptions& options = {},
              const Codec& codec = {}, std::span<const Codec> head_codecs = {}) {
    KVT_TRY(check_shape(geometry, options));
    const auto heads = static_cast<std::size_t>(geometry.num_heads());
    if (!head_codecs.empty() && (!in_blocks || head_codecs.size() != heads)) {
      return error(Errc::bad_shape, "there are codecs for {} heads; the cache has {}, and only blocks are of one's own codec",
                   static_cast<double>(head_codecs.size()), geometry.num_heads());
    }
    KVT_TRY(codec.validate());
    for (const Codec& each : head_codecs) KVT_TRY(each.validate());
    int record = 0;  // the most bytes of one
    if constexpr (in_blocks) {
      for (const Codec& each : head_codecs.empty() ? std::span(&codec, 1) : head_codecs) {
        KVT_TRY(check_block(each));
        record = std::max(record, most_record_bytes(each.keys, each.values));
      }
      // A record's place is an int.
      if (static_cast<double>(options.max_rows) / SlicePages::page_rows * record > 1 << 30) {
        return error(Errc::bad_shape, "max_rows is {}; that many rows of a head may take a gibibyte", options.max_rows);
      }
    }
    const auto near_pages = static_cast<std::size_t>(DeviceCache::near_pages(options));
    const std::size_t table = table_pages(options, record);
    DeviceArray<std::byte, Device> dense;
    DeviceArray<int, Device> counts, tables;
    DeviceArray<SlicePages, Device> near_entries;
    DeviceArray<Body, Device> entries;
    DeviceArray<Scratch, Device> scratch;
    KVT_TRY(dense.allocate(device, heads * near_pages * static_cast<std::size_t>(near_page_bytes)));
    KVT_TRY(counts.allocate(device, num_counts * heads));
    KVT_TRY(tables.allocate(device, heads * table));
    KVT_TRY(near_entries.allocate(device, heads));
    KVT_TRY(entries.allocate(device, heads));
    if constexpr (in_blocks) KVT_TRY(scratch.allocate(device, static_cast<std::size_t>(geometry.num_kv_heads)));
    std::vector<SlicePages> host_near(heads);
    std::vector<Body> host(heads);
    for (std::size_t h = 0; h < heads; ++h) {
      host_near[h] = {dense.data() + h * near_pages * static_cast<std::size_t>(near_page_bytes), nullptr, counts.data() + h,
                      near_page_bytes};
      int* const pages = tables.data() + h * table;
      if constexpr (in_blocks) {
        const Codec& own = head_codecs.empty() ? codec : head_codecs[h];
        host[h] = {pool.data(), pages, counts.data() + 2 * heads + h, own.keys, own.values};
      } else {
        host[h] = {pool.data(), pages, counts.data() + heads + h, Pool::page_bytes};
      }
    }
    KVT_TRY(device.clear(counts.data(), num_counts * heads * sizeof(int)));
    KVT_TRY(device.copy_to(near_entries.data(), host_near.data(), heads * sizeof(SlicePages)));
    KVT_TRY(device.copy_to(entries.data(), host.data(), heads * sizeof(Body)));
    release();
    device_ = &device;
    pool_ = &pool;
    geometry_ = geometry;
    options_ = options;
    dense_ = std::move(dense);
    counts_ = std::move(counts);
    tables_ = std::move(tables);
    near_entries_ = std::move(near_entries);
    entries_ = std::move(entries);
    scratch_ = std::move(scratch);
    host_near_ = std::move(host_near);
    host_entries_ = std::move(host);
    codec_ = codec;
    pages_.assign(heads, {});
    bound_.assign(heads, 0);
    room_.assign(heads, 0);
    appended_.assign(static_cast<std::size_t>(geometry.num_layers), 0);
    newest_ = appended_;
    short_ends_.assign(heads, {});
    encoded_.assign(heads, 0);
    stream_bytes_.assign(heads, 0);
    uneven_ = 0;
    return success();
  }

  const Geometry& geometry() const { return geometry_; }
  const DeviceCacheOptions& options() const { return options_; }
  // Rows a head has at most: all it was given since the last refresh(), and what it had then.
  int most_rows(int layer, int kv_head) const { return most_rows(layer * geometry_.num_kv_heads + kv_head); }

  // Takes the pages that `rows` more rows of every head may need from the pool. Nothing is taken if it has too few.
  Status reserve(int rows) {
    KVT_TRY(check_layer(0));
    const long long most = static_cast<long long>(*std::max_element(bound_.begin(), bound_.end())) + rows;
    if (rows < 0 || most > options_.max_rows) {
      return error(Errc::bad_shape, "{} rows are too many for a cache with max_rows {}", static_cast<double>(most),
                   options_.max_rows);
    }
    KVT_TRY(take_pages(rows));
    for (std::size_t h = 0; h < room_.size(); ++h) room_[h] = std::max(room_[h], bound_[h] + rows);
    return success();
  }

  // Adds n rows [n, num_kv_heads, head_dim] at positions [n], which increase, and encodes the oldest dense rows first if there
  // are too many. Room for them was reserved.
  template <class T>
  Status append(int layer, const T* keys, const T* values, const int* positions, int n) {
    KVT_TRY(check_layer(layer));
    if (n < 0 || n > options_.max_append) {
      return error(Errc::bad_shape, "{} rows are appended at once; max_append is {}", n, options_.max_append);
    }
    if (n == 0) return success();
    if (keys == nullptr || values == nullptr || positions == nullptr)
      return error(Errc::bad_shape, "a pointer to rows is null");
    const auto first = static_cast<std::size_t>(layer * geometry_.num_kv_heads);
    for (std::size_t h = first; h < first + kv_heads(); ++h) {
      if (bound_[h] + n > room_[h]) {
        return error(Errc::out_of_memory, "a head may have {} rows then, and {} are reserved; call reserve()", bound_[h] + n,
                     room_[h]);
      }
    }
    if constexpr (in_blocks) {
      KVT_TRY(
          device_->launch(AppendBlocksWork<Codec, T>{stream_heads(layer), keys, values, positions, n, geometry_.num_kv_heads},
                          geometry_.num_kv_heads));
    } else {
      KVT_TRY(device_->launch(AppendWork<Codec, T>{heads(layer), keys, values, positions, n, geometry_.num_kv_heads},
                              geometry_.num_kv_heads));
    }
    count(layer, n);
    return success();
  }
  // A captured append was run again for all layers: counts its rows.
  void replayed(int n) {
    for (int layer = 0; layer < geometry_.num_layers; ++layer) count(layer, n);
  }

  // Drops rows of all heads and encodes what is left of the dense ones, but the newest. keep [num_layers, num_kv_heads,
  // stride], on the device: row r of a head, in the order of positions, stays if its mark is not zero. Sink rows and the newest
  // recent_rows stay in any case. Codes of rows that stay do not change.
  Status cut(const unsigned char* keep, long long stride) {
    KVT_TRY(prepare_cut(keep, stride));
    return cut_rows(keep, stride);
  }
  // Drops the rows at `position` and after it. What a head may have stays as it was until refresh().
  Status truncate(int position) {
    KVT_TRY(check_layer(0));
    KVT_TRY(make_uneven());
    return each_layer([&](int layer, int count) {
      if constexpr (in_blocks) {
        return device_->launch(TruncateBlocksWork<Codec>{stream_heads(layer), position}, count);
      } else {
        return device_->launch(TruncateWork<Codec>{heads(layer), position}, count);
      }
    });
  }
  // Makes `child` a copy that lives on its own, with pages of the same pool; what was reserved is not copied. The child's own
  // rows are gone then; it keeps them if there is no room for the copy.
  Status fork(DeviceCache& child) const {
    KVT_TRY(check_layer(0));
    if (&child == this) return error(Errc::bad_shape, "a cache cannot be a copy of itself");
    long long more = 0;
    for (const auto& pages : pages_) more += static_cast<long long>(pages.size());
    const bool same_pool = child.pool_ == pool_;
    for (const auto& pages : child.pages_) more -= same_pool ? static_cast<long long>(pages.size()) : 0;
    if (more > pool_->free_pages()) return no_pages(more);
    KVT_TRY(child.init(*device_, *pool_, geometry_, options_, codec_, head_codecs()));
    child.uneven_ = uneven_;
    child.encoded_ = encoded_;
    child.stream_bytes_ = stream_bytes_;
    child.appended_ = appended_;
    child.newest_ = newest_;
    child.short_ends_ = short_ends_;
    for (std::size_t h = 0; h < pages_.size(); ++h) KVT_TRY(child.take_pages(h, pages_[h].size()));
    child.bound_ = child.room_ = bound_;
    return each_layer([&](int layer, int count) {
      if constexpr (in_blocks) {
        return device_->launch(ForkBlocksWork<Codec>{stream_heads(layer), child.stream_heads(layer)}, count);
      } else {
        return device_->launch(ForkWork<Codec>{heads(layer), child.heads(layer)}, count);
      }
    });
  }
  // Waits for the device, reads how many rows heads have, and gives the pages back that they do not need. What was reserved and
  // not used is gone.
  Status refresh() {
    std::vector<int> near, body;
    KVT_TRY(read_rows(near, body));
    if constexpr (in_blocks) {
      KVT_TRY(device_->copy_from(stream_bytes_.data(), stream_bytes(), stream_bytes_.size() * sizeof(int)));
      encoded_ = body;
      uneven_ = 0;
    }
    for (std::size_t h = 0; h < bound_.size(); ++h) {
      bound_[h] = room_[h] = near[h] + body[h];
      const auto pages = std::max(pages_for(h, bound_[h]), in_blocks ? 0 : pages_of(body[h]));
      if (pages_[h].size() <= pages) continue;
      pool_->give_back(std::span(pages_[h]).subspan(pages));
      pages_[h].resize(pages);
    }
    return success();
  }

  // Takes the rows of a cache of the host with this codec, of whatever policies, in place of all there are: codes, scales,
  // dense rows and positions as they are. Observed queries stay behind. The caches have one geometry, the same codec for each
  // head, and as many sink and recent rows. New pages come from the pool, which has to have enough; plans of this cache stay
  // good. Where a copy fails rows are lost.
  template <class Host>
  Status upload(const Host& host) noexcept {
    KVT_TRY(check_counterpart(host));
    return guarded([&] {
      const std::size_t heads = pages_.size();
      std::vector<int> rows(num_counts * heads), table(tables_.size());  // rows: as counts_
      std::vector<std::vector<int>> near_pages(heads), body_pages = pages_, ends(heads);
      long long more = 0;
      int uneven = uneven_;
      for (std::size_t h = 0; h < heads; ++h) {
        const auto& store = store_of(host, h);
        const int encoded = store.body_rows(), dense = store.num_rows() - encoded;
        if (dense > most_dense(options_)) {
          return error(Errc::bad_shape, "a head has {} dense rows, and on the device at most {}; flush() encodes them", dense,
                       most_dense(options_));
        }
        if (store.num_rows() > options_.max_rows) {
          return error(Errc::bad_shape, "a head has {} rows; max_rows is {}", store.num_rows(), options_.max_rows);
        }
        rows[h] = dense;
        rows[heads + h] = encoded;
        near_pages[h] = near_numbers(h, dense);
        if constexpr (in_blocks) {
          long long bytes = 0;
          for (const BlockRef& block : store.blocks()) {
            if (block.rows > BlockRecord::most_rows) {
              return error(Errc::bad_shape, "a block has {} rows; on a device at most {} are together", block.rows,
                           BlockRecord::most_rows);
            }
            if (std::max(block.key_bytes, block.value_bytes) > Body::most_part_bytes) {
              return error(Errc::bad_shape, "a block has {} bytes, and a device has room for {}",
                           std::max(block.key_bytes, block.value_bytes), Body::most_part_bytes);
            }
            bytes += BlockRecord{block.rows, block.key_bytes, block.value_bytes, 0}.bytes();
          }
          if (bytes > 1 << 30 || static_cast<std::size_t>(Body::pages_of(static_cast<int>(bytes))) > table.size() / heads) {
            return error(Errc::bad_shape, "blocks of a head take {} bytes, too many for max_rows {}",
                         static_cast<double>(bytes), options_.max_rows);
          }
          rows[2 * heads + h] = static_cast<int>(bytes);
        } else if (encoded % SlicePages::page_rows != 0) {
          uneven = 1;
        }
        more += std::max(0LL, static_cast<long long>(pages_with(rows, h)) - static_cast<long long>(pages_[h].size()));
        int end = 0;
        for (const BlockRef& block : store.blocks()) {
          end += block.rows;
          if (block.rows < host.options().block_rows) ends[h].push_back(end);
        }
      }
      if (more > pool_->free_pages()) return no_pages(more);
      // Pages that are taken for nothing go back.
      struct Taken {
        Pool& pool;
        std::vector<int> pages = {};
        ~Taken() { pool.give_back(pages); }
      } taken{*pool_};
      taken.pages.reserve(static_cast<std::size_t>(more));
      for (std::size_t h = 0; h < heads; ++h) {
        const std::size_t had = pages_[h].size();
        body_pages[h].resize(pages_with(rows, h));
        for (std::size_t i = had; i < body_pages[h].size(); ++i) {
          taken.pages.push_back(pool_->take());
          body_pages[h][i] = taken.pages.back();
        }
        // The table is good for the rows there are until they are counted anew.
        const auto entry = table.begin() + static_cast<std::ptrdiff_t>(h * (table.size() / heads));
        std::copy(pages_[h].begin(), pages_[h].end(), entry);
        std::copy(body_pages[h].begin(), body_pages[h].end(), entry);
      }
      HostPages near(near_pages, near_page_bytes), body(body_pages, Pool::page_bytes);
      for (std::size_t h = 0; h < heads; ++h) {
        if constexpr (in_blocks) {
          int bytes = 0;
          const Codec& own = store_of(host, h).codec();
          dense_to_slices(store_of(host, h), near.head(h));
          blocks_to_stream(store_of(host, h), Body{body.head(h).pool, body.head(h).page, &bytes, own.keys, own.values});
        } else {
          rows_to_slices(store_of(host, h), near.head(h), body.head(h));
        }
      }
      KVT_TRY(device_->copy_to(tables_.data(), table.data(), table.size() * sizeof(int)));
      KVT_TRY(near.write(*device_, dense_.data()));
      KVT_TRY(body.write(*device_, pool_->data()));
      KVT_TRY(device_->copy_to(counts_.data(), rows.data(), rows.size() * sizeof(int)));
      taken.pages.clear();
      for (std::size_t h = 0; h < heads; ++h) {
        const std::size_t kept = std::min(pages_[h].size(), body_pages[h].size());
        pool_->give_back(std::span(pages_[h]).subspan(kept));
        bound_[h] = room_[h] = rows[h] + rows[heads + h];
      }
      for (std::size_t l = 0; l < appended_.size(); ++l) appended_[l] = static_cast<int>(host.appended(static_cast<int>(l)));
      std::fill(newest_.begin(), newest_.end(), 0);
      pages_.swap(body_pages);
      if constexpr (in_blocks) {
        uneven_ = 0;
        std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>(heads), heads, encoded_.begin());
        std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>(2 * heads), heads, stream_bytes_.begin());
      } else {
        short_ends_.swap(ends);
        uneven_ = uneven;
      }
      return success();
    });
  }
  // Gives the rows to a cache of the host, likewise: it has no other rows then, and no observed queries. Waits for the device.
  // What a cache was given by upload() comes back in the same blocks; otherwise all but a head's last have block_rows rows.
  template <class Host>
  Status download(Host& host) const noexcept {
    KVT_TRY(check_counterpart(host));
    return guarded([&] {
      const std::size_t heads = pages_.size();
      std::vector<int> counts(num_counts * heads);
      KVT_TRY(device_->copy_from(counts.data(), counts_.data(), counts.size() * sizeof(int)));
      const int *const dense = counts.data(), *const encoded = dense + heads;
      std::vector<std::vector<int>> near_pages(heads), body_pages = pages_;
      for (std::size_t h = 0; h < heads; ++h) {
        near_pages[h] = near_numbers(h, dense[h]);
        body_pages[h].resize(pages_with(counts, h));
      }
      HostPages near(near_pages, near_page_bytes), body(body_pages, Pool::page_bytes);
      KVT_TRY(near.read(*device_, dense_.data()));
      KVT_TRY(body.read(*device_, pool_->data()));
      return host.assign(std::vector<long long>(appended_.begin(), appended_.end()), [&](std::size_t h, auto& store) {
        if constexpr (in_blocks) {
          const Body& own = host_entries_[h];
          rows_from_stream(near.head(h), dense[h],
                           Body{body.head(h).pool, body.head(h).page, &counts[2 * heads + h], own.keys, own.values},
                           host.options(), store);
        } else {
          rows_from_slices(near.head(h), dense[h], body.head(h), encoded[h], short_ends_[h], host.options(), store);
        }
        return success();
      });
    });
  }

  // Of the device: dense rows and pages as payload, tables and counts as index.
  Memory memory() const {
    std::size_t pages = 0;
    for (const auto& own : pages_) pages += own.size();
    return memory_with_pages(pages);
  }

  // Heads of a layer, on the device and as the host remembers them.
  const SlicePages* near(int layer) const { return near_entries_.data() + layer * geometry_.num_kv_heads; }
  const Body* body(int layer) const { return entries_.data() + layer * geometry_.num_kv_heads; }
  std::span<const SlicePages> host_near(int layer) const {
    return std::span(host_near_).subspan(static_cast<std::size_t>(layer) * kv_heads(), kv_heads());
  }
  std::span<const Body> host_body(int layer) const {
    return std::span(host_entries_).subspan(static_cast<std::size_t>(layer) * kv_heads(), kv_heads());
  }

 protected:
  static Status check_shape(const Geometry& geometry, const DeviceCacheOptions& options) {
    KVT_TRY(geometry.validate());
    if (geometry.head_dim != head_dim) {
      return error(Errc::bad_shape, "head_dim is {}; this cache was composed for {}", geometry.head_dim, head_dim);
    }
    if (options.sink_rows < 0 || options.sink_rows > 1 << 16 || options.recent_rows < 0 || options.recent_rows > 1 << 16) {
      return error(Errc::bad_shape, "sink_rows and recent_rows are {} and {}; they must be from 0 to 65536", options.sink_rows,
                   options.recent_rows);
    }
    if (options.max_append < 1 || options.max_append > 1 << 16) {
      return error(Errc::bad_shape, "max_append is {}; it must be from 1 to {}", options.max_append, 1 << 16);
    }
    if (options.max_rows < 1 || options.max_rows > 1 << 24) {
      return error(Errc::bad_shape, "max_rows is {}; it must be from 1 to {}", options.max_rows, 1 << 24);
    }
    return success();
  }
  Status check_layer(int layer) const {
    if (layer >= 0 && layer < geometry_.num_layers) return success();
    return error(Errc::bad_shape, "layer is {}; the cache has {}", layer, geometry_.num_layers);
  }
  Device* device() const { return device_; }
  // Rows of each layer, ever: those that truncate() took back too, of which only the device knows how many they were.
  std::vector<long long> appended() const { return {appended_.begin(), appended_.end()}; }
  HeadsOf<Codec> all_heads() const { return layer_heads(0); }
  // A cut in two steps: only the first can fail, unless a kernel does.
  Status prepare_cut(const unsigned char* keep, long long stride) {
    KVT_TRY(check_layer(0));
    if (keep == nullptr) return error(Errc::bad_shape, "the pointer to the marks is null");
    const int most = *std::max_element(bound_.begin(), bound_.end());
    if (stride < most)
      return error(Errc::bad_shape, "there are marks for {} rows; a head may have {}", static_cast<double>(stride), most);
    KVT_TRY(make_uneven());
    return success();
  }
  Status cut_rows(const unsigned char* keep, long long stride) {
    return each_layer([&](int layer, int count) {
      if constexpr (in_blocks) {
        return device_->launch(CutBlocksWork<Codec>{stream_heads(layer), keep + layer * count * stride, stride}, count);
      } else {
        return device_->launch(CutWork<Codec>{heads(layer), keep, stride}, count);
      }
    });
  }
  // Those of a layer, and all after them.
  HeadsOf<Codec> layer_heads(int layer) const {
    if constexpr (in_blocks) {
      return stream_heads(layer);
    } else {
      return heads(layer);
    }
  }
  // Whether the rows of a layer come one by one.
  bool decodes(int layer) const { return newest_[static_cast<std::size_t>(layer)] == 1; }
  int most_rows(int head) const { return bound_[static_cast<std::size_t>(head)]; }
  static std::size_t pages_of(int rows) {
    return static_cast<std::size_t>((rows + SlicePages::page_rows - 1) / SlicePages::page_rows);
  }
  Memory memory_with_pages(std::size_t pages) const {
    Memory m;
    m.payload_bytes = dense_.bytes() + static_cast<long long>(pages) * Pool::page_bytes;
    m.index_bytes = counts_.bytes() + tables_.bytes() + near_entries_.bytes() + entries_.bytes() + scratch_.bytes();
    for (const int rows : appended_) {
      m.dense_fp16_bytes += static_cast<long long>(rows) * geometry_.num_kv_heads * head_dim * 2 * 2;
    }
    return m;
  }
  // Waits for the device: dense and encoded rows of every head.
  Status read_rows(std::vector<int>& near, std::vector<int>& body) const {
    KVT_TRY(check_layer(0));
    std::vector<int> rows(2 * bound_.size());
    KVT_TRY(device_->copy_from(rows.data(), counts_.data(), rows.size() * sizeof(int)));
    const auto middle = rows.begin() + static_cast<std::ptrdiff_t>(bound_.size());
    near.assign(rows.begin(), middle);
    body.assign(middle, rows.end());
    return success();
  }

 private:
  using Scratch = typename detail::ScratchOf<Codec, in_blocks>::type;
  static constexpr std::size_t num_counts = in_blocks ? 3 : 2;
  static constexpr long long near_page_bytes = SlicePages::bytes_of_page(DenseLayoutOf<Plain>::bytes);

  // Dense rows of a head at most, and pages for them.
  static int most_dense(const DeviceCacheOptions& options) {
    return options.sink_rows + options.recent_rows + SlicePages::page_rows - 1 + options.max_append;
  }
  static int near_pages(const DeviceCacheOptions& options) { return static_cast<int>(pages_of(most_dense(options))); }
  std::size_t kv_heads() const { return static_cast<std::size_t>(geometry_.num_kv_heads); }
  template <class Host>
  Status check_counterpart(const Host& host) const noexcept {
    static_assert(std::is_same_v<typename Host::codec_type, Codec>, "rows are exchanged between caches of one codec");
    KVT_TRY(check_layer(0));
    if (!(host.geometry() == geometry_)) return error(Errc::bad_shape, "the caches have different geometries");
    if (host.options().sink_rows != options_.sink_rows) {
      return error(Errc::bad_shape, "sink_rows is {} on the host and {} on the device", host.options().sink_rows,
                   options_.sink_rows);
    }
    if (host.options().recent_rows != options_.recent_rows) {
      return error(Errc::bad_shape, "recent_rows is {} on the host and {} on the device", host.options().recent_rows,
                   options_.recent_rows);
    }
    if constexpr (in_blocks) {
      for (std::size_t h = 0; h < pages_.size(); ++h) {
        const Codec& other = store_of(host, h).codec();
        if (same_choice(other.keys, host_entries_[h].keys) && same_choice(other.values, host_entries_[h].values)) continue;
        return error(Errc::bad_value, "head {} has another codec on the host than on the device", static_cast<double>(h));
      }
    }
    return success();
  }
  template <class F>
  static Status guarded(F&& f) noexcept try {
    return f();
  } catch (...) {
    return error(Errc::out_of_memory, "out of memory; the caches are as they were");
  }
  template <class Host>
  decltype(auto) store_of(const Host& host, std::size_t h) const {
    return host.store(static_cast<int>(h / kv_heads()), static_cast<int>(h % kv_heads()));
  }
  // Pages of a head's dense rows, counted from the first head's.
  std::vector<int> near_numbers(std::size_t h, int rows) const {
    std::vector<int> numbers(pages_of(rows));
    std::iota(numbers.begin(), numbers.end(), static_cast<int>(h) * near_pages(options_));
    return numbers;
  }
  // Heads from the first of a layer on.
  DeviceHeads heads(int layer) const {
    const int first = layer * geometry_.num_kv_heads;
    const SlicePages* pages = nullptr;
    if constexpr (!in_blocks) pages = body(layer);
    return {
        near(layer),         pages, counts_.data() + first, counts_.data() + geometry_.num_heads() + first, options_.sink_rows,
        options_.recent_rows};
  }
  StreamHeads<Codec> stream_heads(int layer) const requires in_blocks { return {heads(layer), body(layer), scratch_.data()}; }
  // Launches for all heads: f(layer, heads). Streams are changed a layer at a time, which scratch memory is enough for.
  template <class F>
  Status each_layer(F&& f) const {
    if constexpr (in_blocks) {
      for (int layer = 0; layer < geometry_.num_layers; ++layer) KVT_TRY(f(layer, geometry_.num_kv_heads));
      return success();
    } else {
      return f(0, geometry_.num_heads());
    }
  }
  std::vector<Codec> head_codecs() const {
    std::vector<Codec> all;
    if constexpr (in_blocks) {
      for (const Body& each : host_entries_) all.push_back({each.keys, each.values});
    }
    return all;
  }
  // Of a head's codec, for a whole block.
  static int most_record_bytes(const Key& keys, const Value& values) {
    constexpr int n = BlockRecord::most_rows;
    return BlockRecord{n, keys.max_block_bytes(n), values.max_block_bytes(n), 0}.bytes();
  }
  // Whether blocks of a codec have room where a device works on them.
  static Status check_block(const Codec& codec) {
    const int keys = codec.keys.max_block_bytes(SlicePages::page_rows),
              values = codec.values.max_block_bytes(SlicePages::page_rows);
    if (std::max(keys, values) <= Body::most_part_bytes) return success();
    return error(Errc::bad_value, "a block of 128 rows may take {} bytes, and a device has room for {}: factors of 16 bits?",
                 std::max(keys, values), static_cast<double>(Body::most_part_bytes));
  }
  template <class Part>
  static bool same_choice(const Part& a, const Part& b) {
    if constexpr (requires { a.index; }) {
      return a.index == b.index;
    } else {
      return true;
    }
  }
  int* stream_bytes() const { return counts_.data() + 2 * geometry_.num_heads(); }
  void count(int layer, int n) {
    appended_[static_cast<std::size_t>(layer)] += n;
    newest_[static_cast<std::size_t>(layer)] = n;
    for (std::size_t h = 0; h < kv_heads(); ++h) bound_[static_cast<std::size_t>(layer) * kv_heads() + h] += n;
  }
  // Pages of a head with so many rows. While only whole blocks have been encoded, there is no page that is not full; a cut
  // makes a block that is shorter. Of a stream there is what was counted, and room for what may have been encoded since.
  std::size_t pages_for(std::size_t h, int rows) const {
    const int body = std::max(0, rows - options_.sink_rows - options_.recent_rows);
    if constexpr (in_blocks) {
      const long long blocks = std::max(0, body - encoded_[h]) / SlicePages::page_rows + uneven_;
      const long long bytes = stream_bytes_[h] + blocks * most_record_bytes(host_entries_[h].keys, host_entries_[h].values);
      return static_cast<std::size_t>((bytes + Body::room - 1) / Body::room);
    } else {
      return uneven_ != 0 ? pages_of(body) : static_cast<std::size_t>(body / SlicePages::page_rows);
    }
  }
  // Pages of head h with such counts.
  std::size_t pages_with(const std::vector<int>& counts, std::size_t h) const {
    const std::size_t heads = pages_.size();
    if constexpr (in_blocks) {
      return static_cast<std::size_t>(Body::pages_of(counts[2 * heads + h]));
    } else {
      return pages_of(counts[heads + h]);
    }
  }
  static std::size_t table_pages(const DeviceCacheOptions& options, [[maybe_unused]] int record) {
    if constexpr (in_blocks) {
      const long long blocks = options.max_rows / SlicePages::page_rows + 8;
      return static_cast<std::size_t>(blocks * record / Body::room + 1);
    } else {
      return pages_of(options.max_rows);
    }
  }
  // Takes the pages that a cut may need, which can end with a block that is not whole.
  Status make_uneven() {
    const int before = uneven_;
    uneven_ = in_blocks ? uneven_ + 1 : 1;
    if (const Status status = take_pages(0); !status.ok()) {
      uneven_ = before;
      return status;
    }
    forget_blocks();
    return success();
  }
  // Those for `rows` more rows of every head, or none.
  Status take_pages(int rows) {
    long long more = 0;
    const std::size_t table = tables_.size() / pages_.size();
    for (std::size_t h = 0; h < pages_.size(); ++h) {
      const std::size_t wanted = pages_for(h, bound_[h] + rows);
      if (in_blocks && wanted > table) {
        return error(Errc::out_of_memory, "a head may have {} pages then, and its table has room for {}; refresh() counts them",
                     static_cast<double>(wanted), static_cast<double>(table));
      }
      more += std::max(0LL, static_cast<long long>(wanted) - static_cast<long long>(pages_[h].size()));
    }
    if (more > pool_->free_pages()) return no_pages(more);
    for (std::size_t h = 0; h < pages_.size(); ++h) KVT_TRY(take_pages(h, pages_for(h, bound_[h] + rows)));
    return success();
  }
  // As many pages of a head as are wanted. One that is taken for nothing, since a copy fails, goes back.
  Status take_pages(std::size_t h, std::size_t wanted) {
    const std::size_t table = tables_.size() / pages_.size(), had = pages_[h].size();
    wanted = std::min(table, wanted);
    if (wanted <= had) return success();
    while (pages_[h].size() < wanted) pages_[h].push_back(pool_->take());
    const Status copied =
        device_->copy_to(tables_.data() + h * table + had, pages_[h].data() + had, (wanted - had) * sizeof(int));
    if (copied.ok()) return success();
    pool_->give_back(std::span(pages_[h]).subspan(had));
    pages_[h].resize(had);
    return copied;
  }
  Status no_pages(long long needed) const {
    return error(Errc::out_of_memory, "{} pages are needed; the pool has {} left", static_cast<double>(needed),
                 pool_->free_pages());
  }
  void forget_blocks() {
    for (auto& ends : short_ends_) ends.clear();
  }
  void release() {
    for (const auto& pages : pages_) pool_->give_back(pages);
    pages_.clear();
  }

  Device* device_ = nullptr;
  Pool* pool_ = nullptr;
  Geometry geometry_ = {};
  DeviceCacheOptions options_ = {};
  DeviceArray<std::byte, Device> dense_;
  DeviceArray<int, Device> counts_;               // dense rows [heads], encoded rows [heads], bytes of a stream [heads]
  DeviceArray<int, Device> tables_;               // [heads, table_pages()]
  DeviceArray<SlicePages, Device> near_entries_;  // [heads]
  DeviceArray<Body, Device> entries_;             // [heads]
  DeviceArray<Scratch, Device> scratch_;          // [num_kv_heads], of streams
  std::vector<SlicePages> host_near_;
  std::vector<Body> host_entries_;
  Codec codec_ = {};
  std::vector<std::vector<int>> pages_;       // [heads]
  std::vector<int> bound_, room_;             // rows of a head [heads] at most, and those there are pages for
  std::vector<int> appended_, newest_;        // rows of a layer [layers], ever and in the last append
  int uneven_ = 0;                            // the last page of a head may not be full; of streams, cuts since refresh()
  std::vector<int> encoded_, stream_bytes_;   // of streams [heads] at the last refresh()
  std::vector<std::vector<int>> short_ends_;  // [heads] rows after which short blocks of the host ended, until rows are dropped
};

}  // namespace kvt::inline v0
