// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DeviceMoments: mean and covariance of queries before RoPE on a device, met in parts: QueryStatistics of
// store/layer_evidence.hpp is the host's. MomentsWork takes new queries of one layer in, by one block of threads for each query
// head.
#pragma once

#include "kvtailor/core/block_loops.hpp"
#include "kvtailor/core/device_rope.hpp"
#include "kvtailor/core/geometry.hpp"
#include "kvtailor/core/half.hpp"
#include "kvtailor/store/device_copy.hpp"

namespace kvt::inline v0 {

struct DeviceMoments {
  struct State {
    long long count;  // of queries
    float scale;      // AttendOptions::scale that came with them; not 0
  };
  State* state;    // [query heads]
  float* mean;     // [query heads, dim]
  float* squares;  // [query heads, dim * (dim + 1) / 2]: of differences from the mean, lower triangles
  int dim;

  KVT_HD static int row_at(int i) { return i * (i + 1) / 2; }  // of a triangle
  KVT_HD float* mean_of(long long h) const { return mean + h * dim; }
  KVT_HD float* squares_of(long long h) const { return squares + h * row_at(dim); }
  KVT_HD DeviceMoments from_head(int h) const { return {state + h, mean_of(h), squares_of(h), dim}; }
};

template <class T, int dim>
struct MomentsWork {
  static constexpr int warps = 8, blocks = 1, dynamic_bytes = 0, tile = 16;
  struct Shared {
    float row[tile][dim], sum[warps][dim];
    float mean[dim], step[dim];  // the part's own; what its mean adds to the squares of all
    int count[warps];
  };

  DeviceMoments to;      // from the layer's first query head on
  const T* queries;      // [n, heads, dim]
  const int* positions;  // [n]
  int n, heads;
  int sink_rows;           // queries at positions below are left out
  const DeviceRope* rope;  // of the layer
  float scale;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, std::byte*) const {
    using Lanes = typename Block::Lanes;
    const long long before = to.state[h].count;
    block.each_warp([&](const Lanes& lanes, int warp) {
      float *const row = shared.row[warp], *const sum = shared.sum[warp];
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) sum[d] = 0;
      });
      int count = 0;
      for (int i = warp; i < n; i += warps) {
        if (positions[i] < sink_rows) continue;
        load(lanes, h, i, row);
        lanes.each([&](int lane) {
          for (int d = lane; d < dim; d += Lanes::size) sum[d] += row[d];
        });
        ++count;
      }
      lanes.once([&] { shared.count[warp] = count; });
    });
    int own = 0;
    for (int w = 0; w < warps; ++w) own += shared.count[w];
    if (own == 0) return;
    const double total = static_cast<double>(before + own);
    detail::each_index(block, 0, dim, [&](int d) {
      double sum = 0;
      for (int w = 0; w < warps; ++w) sum += static_cast<double>(shared.sum[w][d]);
      float& mean = to.mean_of(h)[d];
      const double had = before > 0 ? static_cast<double>(mean) : 0, change = sum / own - had;
      shared.mean[d] = static_cast<float>(sum / own);
      shared.step[d] = static_cast<float>(change * std::sqrt(static_cast<double>(before) * own / total));
      mean = static_cast<float>(had + change * own / total);
    });
    float* const squares = to.squares_of(h);
    for (int first = 0; first < n; first += tile) {
      block.each_warp([&](const Lanes& lanes, int warp) {
        for (int t = warp; t < tile; t += warps) {
          float* const row = shared.row[t];
          const bool there = first + t < n && positions[first + t] >= sink_rows;
          if (there) load(lanes, h, first + t, row);
          lanes.each([&](int lane) {
            for (int d = lane; d < dim; d += Lanes::size) row[d] = there ? row[d] - shared.mean[d] : 0.f;
          });
        }
      });
      block.each_warp([&](const Lanes& lanes, int warp) {
        for (int i = warp; i < dim; i += warps) {
          float* const of_row = squares + DeviceMoments::row_at(i);
          lanes.each([&](int lane) {
            for (int j = lane; j <= i; j += Lanes::size) {
              float sum = first > 0 ? of_row[j] : shared.step[i] * shared.step[j] + (before > 0 ? of_row[j] : 0.f);
              for (int t = 0; t < tile; ++t) sum += shared.row[t][i] * shared.row[t][j];
              of_row[j] = sum;
            }
          });
        }
      });
    }
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp == 0) lanes.once([&] { to.state[h] = {before + own, scale}; });
    });
  }

 private:
  // Query i as before RoPE.
  template <class Lanes>
  KVT_HD void load(const Lanes& lanes, int h, int i, float* row) const {
    const T* const from = queries + (static_cast<long long>(i) * heads + h) * dim;
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) row[d] = to_float(from[d]);
    });
    rope->turn_back(lanes, row, positions[i]);
  }
};

// The memory of all this, of all query heads of a cache, or none.
template <class Device>
class DeviceQueryMoments {
 public:
  Status init(Device& device, const Geometry& geometry) {
    const auto heads = static_cast<std::size_t>(geometry.num_layers) * static_cast<std::size_t>(geometry.num_q_heads);
    const auto dim = static_cast<std::size_t>(geometry.head_dim);
    KVT_TRY(state_.allocate(device, heads));
    KVT_TRY(mean_.allocate(device, heads * dim));
    KVT_TRY(squares_.allocate(device, heads * (dim * (dim + 1) / 2)));
    device_ = &device;
    dim_ = geometry.head_dim;
    return forget();
  }
  DeviceMoments moments() const { return {state_.data(), mean_.data(), squares_.data(), dim_}; }
  long long bytes() const { return state_.bytes() + mean_.bytes() + squares_.bytes(); }
  Status forget() {
    return state_.size() == 0 ? success() : device_->clear(state_.data(), state_.size() * sizeof(*state_.data()));
  }
  // Into memory of its own.
  Status copy_to(DeviceQueryMoments& other) const {
    if (state_.size() == 0) return success();
    KVT_TRY(copy_array(*device_, state_, other.state_));
    KVT_TRY(copy_array(*device_, mean_, other.mean_));
    KVT_TRY(copy_array(*device_, squares_, other.squares_));
    other.device_ = device_;
    other.dim_ = dim_;
    return success();
  }

 private:
  Device* device_ = nullptr;
  DeviceArray<DeviceMoments::State, Device> state_;
  DeviceArray<float, Device> mean_, squares_;
  int dim_ = 0;
};

}  // namespace kvt::inline v0
