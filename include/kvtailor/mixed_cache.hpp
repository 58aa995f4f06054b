// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// MixedCache: layers that differ in head dim or in their number of heads behind one AnyCache. Layers of one shape share a
// cache.
//
//   const kvt::MadeCache made = kvt::MixedCache::make(
//       shapes, options, [&](const kvt::Geometry& geometry, const kvt::CacheOptions& told, std::span<const int> layers) {
//         return kvt::make_cache(names, geometry, told);
//       });
//
// A budget is divided among the shapes: rows and ratios alike, bytes in proportion to what each takes. Allocators share out
// within one shape, and policies from files have to be of it.
// Failure: as in KvCache, but that truncate() and flush(), which fail for want of memory alone, may have done a part of the
//          shapes then; they can be called again. compress() keeps a copy of all shapes but the largest until it is through.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "kvtailor/any_cache.hpp"
#include "kvtailor/budget/any_allocator.hpp"
#include "kvtailor/core/check.hpp"
#include "kvtailor/select/any_selector.hpp"

namespace kvt::inline v0 {

class MixedCache final : public AnyCache {
 public:
  // shapes: of each layer. make(geometry, options, layers) composes the cache of some of them, whose numbers, increasing,
  // `layers` are; what it makes is returned as it is if there is one shape only.
  template <class Make>
  static MadeCache make(std::span<const LayerShape> shapes, const CacheOptions& options, const Make& make) {
    MadeCache made;
    const auto layout = std::make_shared<Layout>(shapes);
    made.status = layout->take(options);
    std::vector<std::unique_ptr<AnyCache>> caches;
    for (const Part& part : layout->parts) {
      if (!made.status.ok()) break;
      CacheOptions told = options;
      if (layout->parts.size() > 1) {
        if (options.ropes.size() > 1) told.ropes = part.ropes;
        told.output_projections = part.projections;
      }
      const LayerShape& shape = part.shape;
      MadeCache one =
          make(Geometry{static_cast<int>(part.layers.size()), shape.num_kv_heads, shape.num_q_heads, shape.head_dim}, told,
               std::span<const int>(part.layers));
      if (!one.status.ok() || layout->parts.size() == 1) return one;
      caches.push_back(std::move(one.cache));
    }
    if (made.status.ok()) made.cache.reset(new MixedCache(layout, std::move(caches)));
    made.message = made.status.message();
    return made;
  }

  // All layers, and the most that one of them has of anything.
  const Geometry& geometry() const noexcept override { return layout_->geometry; }
  LayerShape layer_shape(int layer) const noexcept override { return layout_->parts[place(layer).part].shape; }
  const CacheOptions& options() const noexcept override { return caches_.front()->options(); }

  Status set_policies(const AnyAllocator& allocator, const AnySelector& selector) noexcept override {
    const EvidenceSet wanted = needs_of(allocator) | needs_of(selector);
    for (const auto& cache : caches_) {
      KVT_TRY(detail::check_model(cache->geometry(), cache->options(), wanted));
      KVT_TRY(check_policy(selector, cache->geometry()));
      KVT_TRY(check_policy(allocator, cache->geometry()));
    }
    for (const auto& cache : caches_) KVT_TRY(cache->set_policies(allocator, selector));
    return success();
  }
  Status encode(int layer, int kv_head) noexcept override {
    KVT_TRY(check_layer(layer));
    // Whoever goes by geometry() asks for heads that some layers lack.
    if (kv_head >= layer_shape(layer).num_kv_heads && kv_head < geometry().num_kv_heads) return success();
    return cache_of(layer).encode(place(layer).layer, kv_head);
  }
  Status append(int layer, const float* keys, const float* values, std::span<const int> positions) noexcept override {
    KVT_TRY(check_layer(layer));
    return cache_of(layer).append(place(layer).layer, keys, values, positions);
  }
  EvidenceSet needs() const noexcept override { return caches_.front()->needs(); }
  bool wants_queries() const noexcept override { return caches_.front()->wants_queries(); }
  Status observe(int layer, const float* queries, std::span<const int> positions,
                 const AttendOptions& attend) noexcept override {
    KVT_TRY(check_layer(layer));
    return cache_of(layer).observe(place(layer).layer, queries, positions, attend);
  }
  Status observe_hidden(int layer, const float* before, const float* after, int n, int width) noexcept override {
    KVT_TRY(check_layer(layer));
    return cache_of(layer).observe_hidden(place(layer).layer, before, after, n, width);
  }
  void forget() noexcept override {
    for (const auto& cache : caches_) cache->forget();
  }
  Status add_to_plan(int layer, const float* queries, std::span<const int> positions, const AttendOptions& attend, float* out,
                     AttendPlan& plan) const noexcept override {
    KVT_TRY(check_layer(layer));
    return cache_of(layer).add_to_plan(place(layer).layer, queries, positions, attend, out, plan);
  }

  Status scores(double share, std::vector<float>& out) const noexcept override try {
    std::vector<std::vector<float>> of_part(caches_.size());
    for (std::size_t p = 0; p < caches_.size(); ++p) KVT_TRY(caches_[p]->scores(share, of_part[p]));
    std::vector<std::ptrdiff_t> at(caches_.size());
    std::vector<float> made;
    for (int l = 0; l < geometry().num_layers; ++l) {
      const std::size_t p = place(l).part;
      const auto from = of_part[p].begin() + at[p];
      const auto rows = static_cast<std::ptrdiff_t>(rows_of(l));
      made.insert(made.end(), from, from + rows);
      at[p] += rows;
    }
    out = std::move(made);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while rows are scored");
  }

  Status compress(Retain retain) noexcept override try {
    std::vector<std::size_t> smaller_first(caches_.size());
    std::iota(smaller_first.begin(), smaller_first.end(), std::size_t{0});
    const auto bytes = [&](std::size_t p) { return caches_[p]->memory().total(); };
    std::sort(smaller_first.begin(), smaller_first.end(),
              [&](std::size_t a, std::size_t b) { return std::pair(bytes(a), a) < std::pair(bytes(b), b); });
    const auto all = static_cast<double>(memory().total());
    std::vector<Retain> amounts;
    for (const std::size_t p : smaller_first) {
      const double share = retain.unit == Retain::Unit::bytes && all > 0 ? static_cast<double>(bytes(p)) / all : 1;
      amounts.push_back({retain.unit, retain.amount * share});
    }
    std::vector<std::unique_ptr<AnyCache>> before(caches_.size());
    for (std::size_t i = 0; i < smaller_first.size(); ++i) {
      AnyCache& cache = *caches_[smaller_first[i]];
      Status status = i + 1 < smaller_first.size() ? cache.fork(before[i]) : success();
      if (status.ok()) status = cache.compress(amounts[i]);
      if (status.ok()) continue;
      for (std::size_t done = 0; done < i; ++done) caches_[smaller_first[done]] = std::move(before[done]);
      return status;
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while a cache is cut");
  }
  Status flush() noexcept override {
    for (const auto& cache : caches_) KVT_TRY(cache->flush());
    return success();
  }
  Status truncate(int position) noexcept override {
    for (const auto& cache : caches_) KVT_TRY(cache->truncate(position));
    return success();
  }
  Status fork(std::unique_ptr<AnyCache>& child) const noexcept override try {
    std::vector<std::unique_ptr<AnyCache>> twins(caches_.size());
    for (std::size_t p = 0; p < caches_.size(); ++p) KVT_TRY(caches_[p]->fork(twins[p]));
    child.reset(new MixedCache(layout_, std::move(twins)));
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while copying a cache");
  }
  void clear() noexcept override {
    for (const auto& cache : caches_) cache->clear();
  }

  Memory memory() const noexcept override {
    Memory sum;
    for (const auto& cache : caches_) {
      const Memory one = cache->memory();
      sum.payload_bytes += one.payload_bytes;
      sum.index_bytes += one.index_bytes;
      sum.evidence_bytes += one.evidence_bytes;
      sum.slack_bytes += one.slack_bytes;
      sum.dense_fp16_bytes += one.dense_fp16_bytes;
    }
    return sum;
  }
  double bits_per_element() const noexcept override {
    double bits = 0, all = 0;
    for (std::size_t p = 0; p < caches_.size(); ++p) {
      double rows = 0;
      for (const int l : layout_->parts[p].layers) rows += static_cast<double>(rows_of(l));
      const double elements = rows * layout_->parts[p].shape.head_dim;
      bits += caches_[p]->bits_per_element() * elements;
      all += elements;
    }
    return all > 0 ? bits / all : 0;
  }
  // None of a head that a layer lacks.
  int num_rows(int layer, int kv_head) const noexcept override {
    return kv_head < layer_shape(layer).num_kv_heads ? cache_of(layer).num_rows(place(layer).layer, kv_head) : 0;
  }
  std::span<const int> positions(int layer, int kv_head) const noexcept override {
    if (kv_head >= layer_shape(layer).num_kv_heads) return {};
    return cache_of(layer).positions(place(layer).layer, kv_head);
  }
  int end_position(int layer) const noexcept override { return cache_of(layer).end_position(place(layer).layer); }

 private:
  struct Part {
    LayerShape shape;
    std::vector<int> layers;
    std::vector<Rope> ropes;
    std::vector<OutputProjection> projections;
  };
  struct Place {
    std::size_t part;
    int layer;  // of the part
  };
  // Shared with forks, whose options point into it.
  struct Layout {
    explicit Layout(std::span<const LayerShape> shapes) {
      int group = 0;
      for (const LayerShape& shape : shapes) {
        auto part = std::find_if(parts.begin(), parts.end(), [&](const Part& p) { return p.shape == shape; });
        if (part == parts.end()) part = parts.insert(part, {shape, {}, {}, {}});
        places.push_back({static_cast<std::size_t>(part - parts.begin()), static_cast<int>(part->layers.size())});
        part->layers.push_back(static_cast<int>(places.size()) - 1);
        group = std::max(group, shape.num_kv_heads > 0 ? shape.num_q_heads / shape.num_kv_heads : 0);
        geometry.num_kv_heads = std::max(geometry.num_kv_heads, shape.num_kv_heads);
        geometry.head_dim = std::max(geometry.head_dim, shape.head_dim);
      }
      geometry.num_layers = static_cast<int>(shapes.size());
      geometry.num_q_heads = geometry.num_kv_heads * group;
    }
    // To each part what is of its layers.
    Status take(const CacheOptions& options) {
      if (parts.empty()) return error(Errc::bad_shape, "a cache of {} layers", 0);
      const std::size_t layers = places.size();
      if (options.ropes.size() > 1 && options.ropes.size() != layers) {
        return error(Errc::bad_shape, "there are {} ropes; it must be one, or one for each of {} layers",
                     static_cast<double>(options.ropes.size()), static_cast<double>(layers));
      }
      if (!options.output_projections.empty() && options.output_projections.size() != layers) {
        return error(Errc::bad_shape, "there are {} output projections; it must be one for each of {} layers",
                     static_cast<double>(options.output_projections.size()), static_cast<double>(layers));
      }
      for (Part& part : parts) {
        for (const int l : part.layers) {
          if (options.ropes.size() > 1) part.ropes.push_back(options.ropes[static_cast<std::size_t>(l)]);
          if (!options.output_projections.empty())
            part.projections.push_back(options.output_projections[static_cast<std::size_t>(l)]);
        }
      }
      return success();
    }
    std::vector<Part> parts;
    std::vector<Place> places;  // of each layer
    Geometry geometry;
  };

  MixedCache(std::shared_ptr<const Layout> layout, std::vector<std::unique_ptr<AnyCache>> caches)
      : layout_(std::move(layout)), caches_(std::move(caches)) {}

  const Place& place(int layer) const noexcept { return layout_->places[static_cast<std::size_t>(layer)]; }
  AnyCache& cache_of(int layer) const noexcept { return *caches_[place(layer).part]; }
  Status check_layer(int layer) const noexcept {
    if (layer >= 0 && layer < geometry().num_layers) return success();
    return error(Errc::bad_shape, "layer {}; the cache has {}", layer, geometry().num_layers);
  }
  long long rows_of(int layer) const noexcept {
    long long rows = 0;
    for (int h = 0; h < layer_shape(layer).num_kv_heads; ++h) rows += num_rows(layer, h);
    return rows;
  }

  std::shared_ptr<const Layout> layout_;
  std::vector<std::unique_ptr<AnyCache>> caches_;  // of the parts
};

}  // namespace kvt::inline v0
