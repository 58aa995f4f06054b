// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// AnyCache: a cache whose policies were chosen at run time; compose.hpp makes one from names.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvtailor/attend/plan.hpp"
#include "kvtailor/core/evidence.hpp"

namespace kvt::inline v0 {

class AnyAllocator;
class AnySelector;

// The calls of KvCache; see there.
class AnyCache {
 public:
  virtual ~AnyCache() = default;
  virtual const Geometry& geometry() const noexcept = 0;
  // Of a layer: all are alike, but for a MixedCache's.
  virtual LayerShape layer_shape(int layer) const noexcept {
    (void)layer;
    return geometry().layer();
  }
  virtual const CacheOptions& options() const noexcept = 0;
  virtual Status set_policies(const AnyAllocator& allocator, const AnySelector& selector) noexcept = 0;
  virtual Status encode(int layer, int kv_head) noexcept = 0;
  virtual Status append(int layer, const float* keys, const float* values, std::span<const int> positions) noexcept = 0;
  virtual EvidenceSet needs() const noexcept = 0;
  virtual bool wants_queries() const noexcept = 0;
  virtual Status observe(int layer, const float* queries, std::span<const int> positions,
                         const AttendOptions& attend) noexcept = 0;
  virtual Status observe_hidden(int layer, const float* before, const float* after, int n, int width) noexcept = 0;
  virtual void forget() noexcept = 0;
  virtual Status add_to_plan(int layer, const float* queries, std::span<const int> positions, const AttendOptions& attend,
                             float* out, AttendPlan& plan) const noexcept = 0;
  Status plan(int layer, const float* queries, std::span<const int> positions, const AttendOptions& attend, float* out,
              AttendPlan& plan) const noexcept {
    plan.clear();
    return add_to_plan(layer, queries, positions, attend, out, plan);
  }
  virtual Status scores(double share, std::vector<float>& out) const noexcept = 0;
  virtual Status compress(Retain retain) noexcept = 0;
  virtual Status flush() noexcept = 0;
  virtual Status truncate(int position) noexcept = 0;
  virtual Status fork(std::unique_ptr<AnyCache>& child) const noexcept = 0;
  virtual void clear() noexcept = 0;
  virtual Memory memory() const noexcept = 0;
  virtual double bits_per_element() const noexcept = 0;
  virtual int num_rows(int layer, int kv_head) const noexcept = 0;
  virtual std::span<const int> positions(int layer, int kv_head) const noexcept = 0;
  virtual int end_position(int layer) const noexcept = 0;
};

// The names of three policies, with parameters: allocator "adaptive:safeguard=0.1", selector
// "snap_kv:window=32,kernel=7,pool=max" or, around another, "chunk_kv:length=16(key_diff)", codec "turbo3/turbo2" (keys /
// values) or one name for both.
struct Composition {
  std::string allocator = "uniform";
  std::string selector = "sink_recent";
  std::string codec = "fp16";
};

struct MadeCache {
  std::unique_ptr<AnyCache> cache;  // null on failure
  Status status;
  std::string message;  // what is wrong, and what is known
};

}  // namespace kvt::inline v0
