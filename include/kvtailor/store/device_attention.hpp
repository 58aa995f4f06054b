// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DeviceAttention: what observed queries gave each row, kept on a device; RowAttention is the host's. What is done to it, by
// one block of threads a head:
//   GiveWork           weights of new queries of one layer are added, or the largest kept
//   CutGivenWork       what rows were given stays with those that a cut keeps
//   TruncateGivenWork  rows that are gone have nothing
//
// A row takes eight bytes, for as many as the cache may have: a number that selectors go by, and of how many queries it is.
#pragma once

#include "kvtailor/store/device_copy.hpp"
#include "kvtailor/store/head_score.hpp"

namespace kvt::inline v0 {

// One block for each KV head of a layer. largest: the largest weight of any query and query head, instead of the sum of all.
template <class Codec, bool largest>
struct GiveWork {
  using Rows = ScoredRows<Codec>;
  using Window = WindowMass<Rows, largest>;
  static constexpr int warps = Rows::warps, blocks = Window::blocks, dynamic_bytes = Window::dynamic_bytes;
  using Shared = typename Window::Shared;

  HeadsOf<Codec> heads;  // of the layer, as all that follows
  int num_kv_heads;
  DeviceQueries queries;
  DeviceAttention to;
  const float* sink_logits;  // [query heads] or null

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, std::byte* table) const {
    const DeviceEvidence nothing{};
    const Rows rows(heads, num_kv_heads, h, table, nothing);
    float* const weight = to.weight_of(h);
    int* const seen = to.queries_of(h);
    const int given = to.given[h];
    Window::fill_table(block, table);
    detail::each_index(block, given, rows.count, [&](int r) {
      weight[r] = 0;
      seen[r] = 0;
    });
    for (int g = 0; g < queries.group; ++g) {
      const Window window{rows,  queries, h,    shared,
                          table, weight,  true, sink_logits != nullptr ? sink_logits + h * queries.group + g : nullptr};
      window.of_query_head(block, g);
    }
    const int sliding = queries.state[h].sliding, size = queries.state[h].size;
    detail::each_index(block, 0, rows.count, [&](int r) {
      const int at = rows.position(r);
      seen[r] += (sliding > 0 ? queries_before(h, at + sliding) : size) - queries_before(h, at);
    });
    block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
      if (warp == 0) lanes.once([&] { to.given[h] = rows.count; });
    });
  }

 private:
  // Queries before a position.
  KVT_HD int queries_before(int h, int at) const {
    int first = 0, last = queries.state[h].size;
    while (first < last) {
      const int middle = (first + last) / 2;
      if (queries.position(h, middle) < at) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }
};

// One block for each head, before its rows are cut by the same marks: see CutWork.
struct CutGivenWork {
  static constexpr int warps = 1, blocks = 1, dynamic_bytes = 0;
  struct Shared {};

  DeviceHeads heads;
  const unsigned char* keep;  // [heads, stride]
  long long stride;
  DeviceAttention of;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared&, std::byte*) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int) {
      const detail::StayingRows stay(heads, h, keep + h * stride);
      const int given = of.given[h];
      float* const weight = of.weight_of(h);
      int* const seen = of.queries_of(h);
      int left = 0;
      for (int first = 0; first < given; first += Lanes::size) {
        typename Lanes::template Reg<int> own, before, queries;
        typename Lanes::template Reg<float> was;
        lanes.each([&](int lane) {
          const int r = first + lane;
          own[lane] = before[lane] = 0;
          if (r >= given) return;
          own[lane] = before[lane] = stay.row(r) ? 1 : 0;
          was[lane] = weight[r];
          queries[lane] = seen[r];
        });
        lanes.exclusive_scan(before);
        lanes.each([&](int lane) {
          if (own[lane] == 0) return;
          weight[left + before[lane]] = was[lane];
          seen[left + before[lane]] = queries[lane];
        });
        left += lanes.shuffle(before, Lanes::size - 1) + lanes.shuffle(own, Lanes::size - 1);
      }
      lanes.once([&] { of.given[h] = left; });
    });
  }
};

// One block for each head, once its rows are truncated.
struct TruncateGivenWork {
  static constexpr int warps = 1, blocks = 1, dynamic_bytes = 0;
  struct Shared {};

  DeviceHeads heads;
  DeviceAttention of;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared&, std::byte*) const {
    block.each_warp([&](const typename Block::Lanes& lanes, int) {
      lanes.once([&] {
        const int rows = heads.near_rows[h] + heads.body_rows[h];
        if (rows < of.given[h]) of.given[h] = rows;
      });
    });
  }
};

// The memory of all this, of all heads of a cache, or none.
template <class Device>
class DeviceRowAttention {
 public:
  Status init(Device& device, const Geometry& geometry, int max_rows) {
    const auto heads = static_cast<std::size_t>(geometry.num_heads());
    KVT_TRY(weight_.allocate(device, heads * static_cast<std::size_t>(max_rows)));
    KVT_TRY(queries_.allocate(device, heads * static_cast<std::size_t>(max_rows)));
    KVT_TRY(given_.allocate(device, heads));
    device_ = &device;
    max_rows_ = max_rows;
    return forget();
  }
  DeviceAttention attention() const { return {weight_.data(), queries_.data(), given_.data(), max_rows_}; }
  long long bytes() const { return weight_.bytes() + queries_.bytes() + given_.bytes(); }
  Status forget() { return given_.size() == 0 ? success() : device_->clear(given_.data(), given_.size() * sizeof(int)); }
  Status truncated(const DeviceHeads& heads) {
    return given_.size() == 0 ? success()
                              : device_->launch(TruncateGivenWork{heads, attention()}, static_cast<int>(given_.size()));
  }
  Status cut(const DeviceHeads& heads, const unsigned char* keep, long long stride) {
    if (given_.size() == 0) return success();
    return device_->launch(CutGivenWork{heads, keep, stride, attention()}, static_cast<int>(given_.size()));
  }
  // Into memory of its own.
  Status copy_to(DeviceRowAttention& other) const {
    if (given_.size() == 0) return success();
    KVT_TRY(copy_array(*device_, weight_, other.weight_));
    KVT_TRY(copy_array(*device_, queries_, other.queries_));
    KVT_TRY(copy_array(*device_, given_, other.given_));
    other.device_ = device_;
    other.max_rows_ = max_rows_;
    return success();
  }

 private:
  Device* device_ = nullptr;
  DeviceArray<float, Device> weight_;
  DeviceArray<int, Device> queries_, given_;
  int max_rows_ = 0;
};

}  // namespace kvt::inline v0
