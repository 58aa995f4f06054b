// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DeviceCache: the keys and values of one sequence on a device. PagePool: the pages of encoded rows that sequences share.
// DecodePlan: attention of a batch of sequences, of any lengths, in one set of launches: of a query each, or of chunks.
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
// Codecs: those whose rows decode one by one (LaneRowCodec). Where keys and values have fragments for tensor cores (LayoutOf),
// queries and weights are rounded to fp16; elsewhere all products and sums are fp32.
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

template <class Codec, class Device>
class PagePool {
 public:
  using Layout = LayoutOf<typename Codec::key_type, typename Codec::value_type>;
  static constexpr long long page_bytes = SlicePages::bytes_of_page(Layout::bytes);

  // `pages` of 128 rows of one head each; what was in the pool is gone.
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
  int max_rows = 131072;  // rows of the sequence at most: room in the page tables, four bytes for 128 rows of a head
};

template <class Codec, class Device>
class DeviceCache {
 public:
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  static constexpr int head_dim = Codec::head_dim;
  static_assert(LaneRowCodec<Key> && LaneRowCodec<Value>, "a device encodes and reads rows one by one; this codec cannot");
  using Plain = typename Codec::near_type;
  using Pool = PagePool<Codec, Device>;

  DeviceCache() = default;
  DeviceCache(const DeviceCache&) = delete;
  DeviceCache& operator=(const DeviceCache&) = delete;
  ~DeviceCache() { release(); }

  // Device and pool must outlive the cache.
  Status init(Device& device, Pool& pool, const Geometry& geometry, const DeviceCacheOptions& options = {}) {
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
    constexpr int page = SlicePages::page_rows;
    const auto heads = static_cast<std::size_t>(geometry.num_heads());
    const auto near_pages = static_cast<std::size_t>(DeviceCache::near_pages(options));
    const auto table = static_cast<std::size_t>((options.max_rows + page - 1) / page);
    DeviceArray<std::byte, Device> dense;
    DeviceArray<int, Device> counts, tables;
    DeviceArray<SlicePages, Device> entries;
    KVT_TRY(dense.allocate(device, heads * near_pages * static_cast<std::size_t>(near_page_bytes)));
    KVT_TRY(counts.allocate(device, 2 * heads));
    KVT_TRY(tables.allocate(device, heads * table));
    KVT_TRY(entries.allocate(device, 2 * heads));
    std::vector<SlicePages> host(2 * heads);
    for (std::size_t h = 0; h < heads; ++h) {
      host[h] = {dense.data() + h * near_pages * static_cast<std::size_t>(near_page_bytes), nullptr, counts.data() + h,
                 near_page_bytes};
      host[heads + h] = {pool.data(), tables.data() + h * table, counts.data() + heads + h, Pool::page_bytes};
    }
    KVT_TRY(device.clear(counts.data(), 2 * heads * sizeof(int)));
    KVT_TRY(device.copy_to(entries.data(), host.data(), host.size() * sizeof(SlicePages)));
    release();
    device_ = &device;
    pool_ = &pool;
    geometry_ = geometry;
    options_ = options;
    dense_ = std::move(dense);
    counts_ = std::move(counts);
    tables_ = std::move(tables);
    entries_ = std::move(entries);
    host_entries_ = std::move(host);
    pages_.assign(heads, {});
    bound_.assign(heads, 0);
    room_.assign(heads, 0);
    appended_.assign(static_cast<std::size_t>(geometry.num_layers), 0);
    short_ends_.assign(heads, {});
    uneven_ = false;
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
    KVT_TRY(device_->launch(AppendWork<Codec, T>{heads(layer), keys, values, positions, n, geometry_.num_kv_heads},
                            geometry_.num_kv_heads));
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
    KVT_TRY(check_layer(0));
    if (keep == nullptr) return error(Errc::bad_shape, "the pointer to the marks is null");
    const int most = *std::max_element(bound_.begin(), bound_.end());
    if (stride < most)
      return error(Errc::bad_shape, "there are marks for {} rows; a head may have {}", static_cast<double>(stride), most);
    const bool before = uneven_;
    uneven_ = true;
    if (const Status status = take_pages(0); !status.ok()) {
      uneven_ = before;
      return status;
    }
    forget_blocks();
    return device_->launch(CutWork<Codec>{heads(0), keep, stride}, geometry_.num_heads());
  }
  // Drops the rows at `position` and after it. What a head may have stays as it was until refresh().
  Status truncate(int position) {
    KVT_TRY(check_layer(0));
    const bool before = uneven_;
    uneven_ = true;
    if (const Status status = take_pages(0); !status.ok()) {
      uneven_ = before;
      return status;
    }
    forget_blocks();
    return device_->launch(TruncateWork<Codec>{heads(0), position}, geometry_.num_heads());
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
    KVT_TRY(child.init(*device_, *pool_, geometry_, options_));
    child.uneven_ = uneven_;
    child.appended_ = appended_;
    child.short_ends_ = short_ends_;
    for (std::size_t h = 0; h < pages_.size(); ++h) KVT_TRY(child.take_pages(h, pages_[h].size()));
    child.bound_ = child.room_ = bound_;
    return device_->launch(ForkWork<Codec>{heads(0), child.heads(0)}, geometry_.num_heads());
  }
  // Waits for the device, reads how many rows heads have, and gives the pages back that they do not need. What was reserved and
  // not used is gone.
  Status refresh() {
    std::vector<int> near, body;
    KVT_TRY(read_rows(near, body));
    for (std::size_t h = 0; h < bound_.size(); ++h) {
      bound_[h] = room_[h] = near[h] + body[h];
      const auto pages = std::max(pages_for(bound_[h]), pages_of(body[h]));
      if (pages_[h].size() <= pages) continue;
      pool_->give_back(std::span(pages_[h]).subspan(pages));
      pages_[h].resize(pages);
    }
    return success();
  }

  // Takes the rows of a cache of the host with this codec, of whatever policies, in place of all there are: codes, scales,
  // dense rows and positions as they are. Observed queries stay behind. The caches have one geometry, and as many sink and
  // recent rows. New pages come from the pool, which has to have enough; plans of this cache stay good. Where a copy fails rows
  // are lost.
  template <class Host>
  Status upload(const Host& host) noexcept {
    KVT_TRY(check_counterpart(host));
    return guarded([&] {
      const std::size_t heads = pages_.size();
      std::vector<int> rows(2 * heads), table(tables_.size());  // rows: dense [heads], encoded [heads]
      std::vector<std::vector<int>> near_pages(heads), body_pages = pages_, ends(heads);
      long long more = 0;
      bool uneven = uneven_;
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
        more += std::max(0LL, static_cast<long long>(pages_of(encoded)) - static_cast<long long>(pages_[h].size()));
        uneven = uneven || encoded % SlicePages::page_rows != 0;
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
        body_pages[h].resize(pages_of(rows[heads + h]));
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
      for (std::size_t h = 0; h < heads; ++h) rows_to_slices(store_of(host, h), near.head(h), body.head(h));
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
      pages_.swap(body_pages);
      short_ends_.swap(ends);
      uneven_ = uneven;
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
      std::vector<int> dense, encoded;
      KVT_TRY(read_rows(dense, encoded));
      std::vector<std::vector<int>> near_pages(heads), body_pages = pages_;
      for (std::size_t h = 0; h < heads; ++h) {
        near_pages[h] = near_numbers(h, dense[h]);
        body_pages[h].resize(pages_of(encoded[h]));
      }
      HostPages near(near_pages, near_page_bytes), body(body_pages, Pool::page_bytes);
      KVT_TRY(near.read(*device_, dense_.data()));
      KVT_TRY(body.read(*device_, pool_->data()));
      return host.assign(std::vector<long long>(appended_.begin(), appended_.end()), [&](std::size_t h, auto& store) {
        rows_from_slices(near.head(h), dense[h], body.head(h), encoded[h], short_ends_[h], host.options(), store);
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
  const SlicePages* near(int layer) const { return entries_.data() + layer * geometry_.num_kv_heads; }
  const SlicePages* body(int layer) const { return near(layer) + geometry_.num_heads(); }
  std::span<const SlicePages> host_near(int layer) const {
    return std::span(host_entries_).subspan(static_cast<std::size_t>(layer * geometry_.num_kv_heads), kv_heads());
  }
  std::span<const SlicePages> host_body(int layer) const {
    return std::span(host_entries_)
        .subspan(static_cast<std::size_t>(geometry_.num_heads() + layer * geometry_.num_kv_heads), kv_heads());
  }

 protected:
  Status check_layer(int layer) const {
    if (layer >= 0 && layer < geometry_.num_layers) return success();
    return error(Errc::bad_shape, "layer is {}; the cache has {}", layer, geometry_.num_layers);
  }
  Device* device() const { return device_; }
  DeviceHeads all_heads() const { return heads(0); }
  int most_rows(int head) const { return bound_[static_cast<std::size_t>(head)]; }
  static std::size_t pages_of(int rows) {
    return static_cast<std::size_t>((rows + SlicePages::page_rows - 1) / SlicePages::page_rows);
  }
  Memory memory_with_pages(std::size_t pages) const {
    Memory m;
    m.payload_bytes = dense_.bytes() + static_cast<long long>(pages) * Pool::page_bytes;
    m.index_bytes = counts_.bytes() + tables_.bytes() + entries_.bytes();
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
    return {near(layer),        body(layer),         counts_.data() + first, counts_.data() + geometry_.num_heads() + first,
            options_.sink_rows, options_.recent_rows};
  }
  void count(int layer, int n) {
    appended_[static_cast<std::size_t>(layer)] += n;
    for (std::size_t h = 0; h < kv_heads(); ++h) bound_[static_cast<std::size_t>(layer) * kv_heads() + h] += n;
  }
  // Pages of a head with so many rows. While only whole blocks have been encoded, there is no page that is not full.
  std::size_t pages_for(int rows) const {
    const int body = std::max(0, rows - options_.sink_rows - options_.recent_rows);
    return uneven_ ? pages_of(body) : static_cast<std::size_t>(body / SlicePages::page_rows);
  }
  // Those for `rows` more rows of every head, or none.
  Status take_pages(int rows) {
    long long more = 0;
    for (std::size_t h = 0; h < pages_.size(); ++h) {
      more += std::max(0LL, static_cast<long long>(pages_for(bound_[h] + rows)) - static_cast<long long>(pages_[h].size()));
    }
    if (more > pool_->free_pages()) return no_pages(more);
    for (std::size_t h = 0; h < pages_.size(); ++h) KVT_TRY(take_pages(h, pages_for(bound_[h] + rows)));
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
  DeviceArray<int, Device> counts_;          // dense rows [heads], encoded rows [heads]
  DeviceArray<int, Device> tables_;          // [heads, max_rows / 128]
  DeviceArray<SlicePages, Device> entries_;  // dense [heads], encoded [heads]
  std::vector<SlicePages> host_entries_;
  std::vector<std::vector<int>> pages_;       // [heads]
  std::vector<int> bound_, room_;             // rows of a head [heads] at most, and those there are pages for
  std::vector<int> appended_;                 // rows of a layer [layers], ever
  bool uneven_ = false;                       // the last page of a head may not be full
  std::vector<std::vector<int>> short_ends_;  // [heads] rows after which short blocks of the host ended, until rows are dropped
};

// T: of queries and outputs.
template <class Codec, class Device, class T>
class DecodePlan {
 public:
  using Cache = DeviceCache<Codec, Device>;
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  using Plain = typename Cache::Plain;
  static constexpr int head_dim = Codec::head_dim;

  // The caches of a batch, of one geometry; they must outlive the plan, and init() comes again after theirs. max_queries: of a
  // sequence in one attend(), for which there is room then: 8 head_dim bytes for each of their vectors (TurboQuantUnbiased:
  // 12).
  Status init(Device& device, std::span<const Cache* const> caches, int max_queries = 1) {
    if (caches.empty()) return error(Errc::bad_shape, "a batch of no caches");
    const Geometry& geometry = caches[0]->geometry();
    KVT_TRY(geometry.validate());
    int most_rows = 1;
    for (const Cache* cache : caches) {
      if (!(cache->geometry() == geometry)) return error(Errc::bad_shape, "the caches of a batch have different geometries");
      most_rows = std::max(most_rows, cache->options().max_rows);
    }
    if (max_queries < 1 || max_queries > 1 << 16) {
      return error(Errc::bad_shape, "max_queries is {}; it must be from 1 to {}", max_queries, 1 << 16);
    }
    const auto entries = caches.size() * static_cast<std::size_t>(geometry.num_kv_heads);
    const auto layers = static_cast<std::size_t>(geometry.num_layers);
    const long long vectors = static_cast<long long>(max_queries) * geometry.group_size();
    const int width = vectors > 8 ? widest : 8;
    const auto items = entries * static_cast<std::size_t>((vectors + width - 1) / width);
    // Slices of all items are counted in an int.
    if (const double slices = static_cast<double>(items) * (most_rows / slice_rows + 1); slices > 1 << 30) {
      return error(Errc::bad_shape, "{} queries of each sequence may read {} slices of 32 rows; there must be fewer",
                   max_queries, slices);
    }
    std::vector<SlicePages> host;  // dense [layers, entries], encoded
    for (const bool near : {true, false}) {
      for (int layer = 0; layer < geometry.num_layers; ++layer) {
        for (const Cache* cache : caches) {
          const auto own = near ? cache->host_near(layer) : cache->host_body(layer);
          host.insert(host.end(), own.begin(), own.end());
        }
      }
    }
    DeviceArray<SlicePages, Device> pages;
    Side body, near;
    KVT_TRY(body.template count_blocks<Key, Value>(device));
    KVT_TRY(near.template count_blocks<Plain, Plain>(device));
    KVT_TRY(pages.allocate(device, 2 * layers * entries));
    KVT_TRY(body.init(device, items, static_cast<std::size_t>(width), max_basis_dim<Value>));
    KVT_TRY(near.init(device, items, static_cast<std::size_t>(width), head_dim));
    KVT_TRY(device.copy_to(pages.data(), host.data(), host.size() * sizeof(SlicePages)));
    device_ = &device;
    geometry_ = geometry;
    entries_ = static_cast<int>(entries);
    max_queries_ = max_queries;
    pages_ = std::move(pages);
    body_ = std::move(body);
    near_ = std::move(near);
    return success();
  }

  // One decode step: a query of each sequence, queries and out [sequences, num_q_heads, head_dim]. positions [sequences] are
  // those of the queries; rows after them are not seen. They may be null where there is no window and no row is later. Sink
  // logits are of the device too: the span is not looked into here.
  Status attend(int layer, const T* queries, const int* positions, const AttendOptions& options, T* out) {
    return attend(layer, queries, positions, 1, options, out);
  }
  // n queries of each sequence, queries and out [sequences, n, num_q_heads, head_dim], positions [sequences, n] in any order.
  // Their keys and values were appended. query_start [sequences + 1], on the device: where sequences have other numbers of
  // queries, none or n at most, those of sequence s are query_start[s] up to query_start[s + 1] of all; or null.
  Status attend(int layer, const T* queries, const int* positions, int n, const AttendOptions& options, T* out,
                const int* query_start = nullptr) {
    if (device_ == nullptr || layer < 0 || layer >= geometry_.num_layers) {
      return error(Errc::bad_shape, "layer is {}; the plan has {}", layer, geometry_.num_layers);
    }
    if (n < 1 || n > max_queries_) {
      return error(Errc::bad_shape, "there are {} queries a sequence; they must be from 1 to {}, as init() was told", n,
                   max_queries_);
    }
    if (queries == nullptr || out == nullptr) return error(Errc::bad_shape, "a pointer to queries or outputs is null");
    KVT_TRY(detail::check_options(geometry_, options));
    if (positions == nullptr && options.window > 0) return error(Errc::bad_shape, "a window needs positions");
    if (positions == nullptr && n > 1) return error(Errc::bad_shape, "a chunk of {} queries needs positions", n);
    const auto step = [&](const Side& side, bool near, int blocks) {
      return DecodeStep<T>{
          .entry = pages_.data() + ((near ? 0 : geometry_.num_layers) + layer) * static_cast<std::ptrdiff_t>(entries_),
          .entries = entries_,
          .kv_heads = geometry_.num_kv_heads,
          .split = {side.first_slice.data(), 0, blocks},
          .seen = side.seen.data(),
          .partials = {side.max.data(), side.sum.data(), side.rows.data()},
          .queries = queries,
          .position = positions,
          .query_start = query_start,
          .n = n,
          .group = geometry_.group_size(),
          .window = options.window,
          .scale = options.scale != 0 ? options.scale : 1.f / std::sqrt(static_cast<float>(head_dim)),
          .cap = options.soft_cap,
          .sink_logits = options.sink_logits.empty() ? nullptr : options.sink_logits.data(),
          .width = 0};
    };
    const auto launch = [&](auto kind) {
      constexpr Kind k = decltype(kind)::value;
      return launch_decode < Codec, k != all_seen,
             k == wide ? widest : 8 > (*device_, step(body_, false, body_.blocks[k]), step(near_, true, near_.blocks[k]), out);
    };
    if (widest > 8 && static_cast<long long>(n) * geometry_.group_size() > 8) return launch(Is<wide>{});
    if (positions != nullptr || options.soft_cap > 0) return launch(Is<limited>{});
    return launch(Is<all_seen>{});
  }
  long long workspace_bytes() const { return pages_.bytes() + body_.bytes() + near_.bytes(); }

 private:
  // Kernels: for vectors that see all rows, for up to eight vectors, and for more.
  enum Kind { all_seen, limited, wide };
  template <Kind kind>
  using Is = std::integral_constant<Kind, kind>;
  static constexpr int widest = widest_decode<Key, Value>;

  // Slices counted and partial results, of encoded or of dense rows; used by one layer after another.
  struct Side {
    DeviceArray<int, Device> first_slice;
    DeviceArray<SeenSlices, Device> seen;
    DeviceArray<float, Device> max, sum, rows;
    int blocks[3] = {};  // of each kind

    template <class K, class V>
    Status count_blocks(Device& device) {
      KVT_TRY(device.template resident_blocks<DecodeWork<K, V, false, 8, T>>(blocks[all_seen]));
      KVT_TRY(device.template resident_blocks<DecodeWork<K, V, true, 8, T>>(blocks[limited]));
      return device.template resident_blocks<DecodeWork<K, V, true, widest, T>>(blocks[wide]);
    }
    // row: elements of a partial result.
    Status init(Device& device, std::size_t items, std::size_t width, std::size_t row) {
      const auto vectors = (items + static_cast<std::size_t>(*std::max_element(blocks, blocks + 3))) * width;
      KVT_TRY(first_slice.allocate(device, items + 1));
      KVT_TRY(seen.allocate(device, items));
      KVT_TRY(max.allocate(device, vectors));
      KVT_TRY(sum.allocate(device, vectors));
      return rows.allocate(device, vectors * row);
    }
    long long bytes() const { return first_slice.bytes() + seen.bytes() + max.bytes() + sum.bytes() + rows.bytes(); }
  };

  Device* device_ = nullptr;
  Geometry geometry_ = {};
  int entries_ = 0, max_queries_ = 0;
  DeviceArray<SlicePages, Device> pages_;
  Side body_, near_;
};

}  // namespace kvt::inline v0
