// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DecodePlan: attention of a batch of sequences, of any lengths, in one set of launches: of a query each, or of chunks.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "kvtailor/store/device_cache.hpp"

namespace kvt::inline v0 {

// T: of queries and outputs.
template <class Codec, class Device, class T>
class DecodePlan {
 public:
  using Cache = DeviceCache<Codec, Device>;
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  using Plain = typename Cache::Plain;
  using Pages = typename Cache::Body;
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
    std::vector<SlicePages> host_near;  // [layers, entries]
    std::vector<Pages> host;
    for (int layer = 0; layer < geometry.num_layers; ++layer) {
      for (const Cache* cache : caches) {
        const auto own_near = cache->host_near(layer);
        const auto own = cache->host_body(layer);
        host_near.insert(host_near.end(), own_near.begin(), own_near.end());
        host.insert(host.end(), own.begin(), own.end());
      }
    }
    DeviceArray<SlicePages, Device> near_pages;
    DeviceArray<Pages, Device> pages;
    Side body, near;
    KVT_TRY(body.template count_blocks<Key, Value>(device));
    KVT_TRY(near.template count_blocks<Plain, Plain>(device));
    KVT_TRY(near_pages.allocate(device, layers * entries));
    KVT_TRY(pages.allocate(device, layers * entries));
    KVT_TRY(body.init(device, items, static_cast<std::size_t>(width), max_basis_dim<Value>));
    KVT_TRY(near.init(device, items, static_cast<std::size_t>(width), head_dim));
    KVT_TRY(device.copy_to(near_pages.data(), host_near.data(), host_near.size() * sizeof(SlicePages)));
    KVT_TRY(device.copy_to(pages.data(), host.data(), host.size() * sizeof(Pages)));
    device_ = &device;
    geometry_ = geometry;
    entries_ = static_cast<int>(entries);
    max_queries_ = max_queries;
    near_pages_ = std::move(near_pages);
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
    const auto step = [&](const auto* pages, const Side& side, int blocks) {
      return DecodeStep<T, std::remove_cvref_t<decltype(*pages)>>{
          .entry = pages + layer * static_cast<std::ptrdiff_t>(entries_),
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
             k == wide ? widest
                       : 8 > (*device_, step(pages_.data(), body_, body_.blocks[k]),
                              step(near_pages_.data(), near_, near_.blocks[k]), out);
    };
    if (widest > 8 && static_cast<long long>(n) * geometry_.group_size() > 8) return launch(Is<wide>{});
    if (positions != nullptr || options.soft_cap > 0) return launch(Is<limited>{});
    return launch(Is<all_seen>{});
  }
  long long workspace_bytes() const { return near_pages_.bytes() + pages_.bytes() + body_.bytes() + near_.bytes(); }

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
  DeviceArray<SlicePages, Device> near_pages_;  // [layers, entries]
  DeviceArray<Pages, Device> pages_;
  Side body_, near_;
};

}  // namespace kvt::inline v0
