// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DeviceQueries: the last queries of each KV head's group, kept on a device for a token selector. What is done to them, by one
// block of threads a head:
//   ObserveWork           new queries of one layer take the place of the oldest
//   TruncateQueriesWork   queries from a position on are forgotten
//   CopyQueriesWork       all are copied
//
// Rings as on the host (store/query_window.hpp), whose beginning and size lie on the device too, so that observe() can be
// captured in a graph. A head has its own copy of the positions and of the options: no block waits for another.
#pragma once

#include <span>
#include <vector>

#include "kvtailor/core/device.hpp"
#include "kvtailor/core/geometry.hpp"
#include "kvtailor/core/half.hpp"

namespace kvt::inline v0 {

struct DeviceQueries {
  struct State {
    int first, size;        // slot of the oldest query, and how many there are
    int sliding;            // AttendOptions::window that came with the queries
    float scale, soft_cap;  // the same; scale is not 0
  };
  float* queries;  // [heads, window, group, dim]
  int* positions;  // [heads, window]
  State* state;    // [heads]
  int window, group, dim;

  KVT_HD long long width() const { return static_cast<long long>(group) * dim; }
  KVT_HD int slot(int h, int i) const { return (state[h].first + i) % window; }
  // Query i of head h, the oldest first: [group, dim].
  KVT_HD float* query(int h, int i) const { return at_slot(h, slot(h, i)); }
  KVT_HD int& position(int h, int i) const { return positions[static_cast<long long>(h) * window + slot(h, i)]; }
  KVT_HD float* at_slot(int h, int slot) const { return queries + (static_cast<long long>(h) * window + slot) * width(); }
  DeviceQueries from_head(int h) const {
    return {at_slot(h, 0), positions + static_cast<long long>(h) * window, state + h, window, group, dim};
  }
};

// One block for each KV head of a layer. T is Half, BFloat16 or float.
template <class T>
struct ObserveWork {
  static constexpr int warps = 8, blocks = 1, dynamic_bytes = 0;
  struct Shared {};

  DeviceQueries to;
  const T* queries;      // [n, num_heads, group, dim]
  const int* positions;  // [n]
  int n, num_heads;
  DeviceQueries::State options;  // first and size are not looked at

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared&, std::byte*) const {
    using Lanes = typename Block::Lanes;
    const int size = to.state[h].size, fresh = n < to.window ? n : to.window;
    const int over = size + fresh > to.window ? size + fresh - to.window : 0, first = to.slot(h, over);
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int i = warp; i < fresh; i += warps) {
        const long long row = n - fresh + i;
        const T* const from = queries + (row * num_heads + h) * to.width();
        float* const query = to.query(h, size + i);
        lanes.each([&](int lane) {
          for (long long d = lane; d < to.width(); d += Lanes::size) query[d] = to_float(from[d]);
        });
        lanes.once([&] { to.position(h, size + i) = positions[row]; });
      }
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp != 0) return;
      lanes.once([&] { to.state[h] = {first, size + fresh - over, options.sliding, options.scale, options.soft_cap}; });
    });
  }
};

// One block for each head.
struct TruncateQueriesWork {
  static constexpr int warps = 1, blocks = 1, dynamic_bytes = 0;
  struct Shared {};

  DeviceQueries of;
  int at;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared&, std::byte*) const {
    block.each_warp([&](const typename Block::Lanes& lanes, int) {
      lanes.once([&] {
        int size = of.state[h].size;
        while (size > 0 && of.position(h, size - 1) >= at) --size;
        of.state[h].size = size;
      });
    });
  }
};

// One block for each head, to a window of the same size.
struct CopyQueriesWork {
  static constexpr int warps = 8, blocks = 1, dynamic_bytes = 0;
  struct Shared {};

  DeviceQueries from, to;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared&, std::byte*) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int i = warp; i < from.state[h].size; i += warps) {
        const int slot = from.slot(h, i);
        const float* const source = from.at_slot(h, slot);
        float* const target = to.at_slot(h, slot);
        lanes.each([&](int lane) {
          for (long long d = lane; d < from.width(); d += Lanes::size) target[d] = source[d];
        });
        lanes.once([&] {
          const long long place = static_cast<long long>(h) * from.window + slot;
          to.positions[place] = from.positions[place];
        });
      }
      if (warp == 0) lanes.once([&] { to.state[h] = from.state[h]; });
    });
  }
};

// The memory of all this, of all heads of a cache. One that was not given any has no queries, and nothing to do.
template <class Device>
class DeviceQueryWindow {
 public:
  Status init(Device& device, const Geometry& geometry, int window) {
    if (window > max_window)
      return error(Errc::bad_value, "window is {}; a device keeps at most {} queries", window, max_window);
    return allocate(device, geometry.num_heads(), window, geometry.group_size(), geometry.head_dim);
  }
  DeviceQueries queries() const { return {queries_.data(), positions_.data(), state_.data(), window_, group_, dim_}; }
  long long bytes() const { return queries_.bytes() + positions_.bytes() + state_.bytes(); }

  // Whether there are queries of every layer, but of those that need none: chosen_before [layers] is not 0 there, or empty.
  // Waits for the device.
  Status check_seen(int kv_heads, std::span<const int> chosen_before) const {
    std::vector<DeviceQueries::State> state(state_.size());
    KVT_TRY(device_->copy_from(state.data(), state_.data(), state.size() * sizeof(DeviceQueries::State)));
    for (std::size_t h = 0; h < state.size(); ++h) {
      const std::size_t layer = h / static_cast<std::size_t>(kv_heads);
      if (state[h].size > 0 || (!chosen_before.empty() && chosen_before[layer] > 0)) continue;
      return error(Errc::no_evidence, "the token selector has seen {} queries of layer {}; call observe() before compress()", 0,
                   static_cast<double>(layer));
    }
    return success();
  }
  Status truncate(int position) {
    return heads() == 0 ? success() : device_->launch(TruncateQueriesWork{queries(), position}, heads());
  }
  Status forget() {
    return heads() == 0 ? success() : device_->clear(state_.data(), state_.size() * sizeof(DeviceQueries::State));
  }
  // Into memory of its own.
  Status copy_to(DeviceQueryWindow& other) const {
    if (heads() == 0) return success();
    KVT_TRY(other.allocate(*device_, heads(), window_, group_, dim_));
    return device_->launch(CopyQueriesWork{queries(), other.queries()}, heads());
  }

 private:
  static constexpr int max_window = 1 << 16;
  int heads() const { return static_cast<int>(state_.size()); }
  Status allocate(Device& device, int heads, int window, int group, int dim) {
    const auto slots = static_cast<std::size_t>(heads) * static_cast<std::size_t>(window);
    KVT_TRY(queries_.allocate(device, slots * static_cast<std::size_t>(group) * static_cast<std::size_t>(dim)));
    KVT_TRY(positions_.allocate(device, slots));
    KVT_TRY(state_.allocate(device, static_cast<std::size_t>(heads)));
    device_ = &device;
    window_ = window;
    group_ = group;
    dim_ = dim;
    return forget();
  }

  Device* device_ = nullptr;
  DeviceArray<float, Device> queries_;
  DeviceArray<int, Device> positions_;
  DeviceArray<DeviceQueries::State, Device> state_;
  int window_ = 0, group_ = 0, dim_ = 0;
};

}  // namespace kvt::inline v0
