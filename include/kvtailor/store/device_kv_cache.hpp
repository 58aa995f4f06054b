// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DeviceKvCache: a device cache composed with policies that decide which rows stay.
//
//   KVT_TRY(cache.compress(Retain::ratio(0.25)));   // after prefill, between chunks, or while decoding
//   KVT_TRY(cache.reserve(1));                      // what was reserved before is gone
//
// compress() waits for the device, and takes memory while it runs: five bytes for each row of each head.
#pragma once

#include "kvtailor/budget/request.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/store/device_cache.hpp"
#include "kvtailor/store/head_score.hpp"

namespace kvt::inline v0 {

// A token selector with a side for the device: see store/head_score.hpp.
template <class S>
concept DeviceTokenSelector = TokenSelector<S> && requires {
  sizeof(typename S::template Shared<64, 8>);
};

template <class Budget, class Selector, class Codec, class Device>
class DeviceKvCache : public DeviceCache<Codec, Device> {
  static_assert(BudgetAllocator<Budget>, "the first policy is a budget allocator");
  static_assert(DeviceTokenSelector<Selector>, "the token selector has no side for devices");
  using Rows = DeviceCache<Codec, Device>;
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;

 public:
  Status init(Device& device, typename Rows::Pool& pool, const Geometry& geometry, const DeviceCacheOptions& options = {},
              const Budget& budget = {}, const Selector& selector = {}) {
    KVT_TRY(Rows::init(device, pool, geometry, options));
    budget_ = budget;
    selector_ = selector;
    return success();
  }

  // Keeps so many rows: the budget allocator says how many of each head, the token selector which. Sink rows and the newest
  // recent_rows always stay, in number as in kind. A budget of rows or a ratio is met exactly; bytes are not exceeded: what
  // falls is pages of 128 rows of a head, and the dense zone and tables stay as they are.
  Status compress(Retain retain) {
    std::vector<int> near, body;
    KVT_TRY(this->read_rows(near, body));
    const Geometry& geometry = this->geometry();
    const DeviceCacheOptions& options = this->options();
    const std::size_t heads = near.size();
    std::vector<int> seen(heads), floor(heads), keep(heads), dense(heads);  // dense: rows that will not be encoded
    long long rows = 0, floor_rows = 0, stride = 1;
    for (std::size_t h = 0; h < heads; ++h) {
      const int sinks = std::min(near[h], options.sink_rows);
      seen[h] = near[h] + body[h];
      floor[h] = sinks + std::min(options.recent_rows, seen[h] - sinks);
      dense[h] = sinks + std::min(options.recent_rows, near[h] - sinks);
      rows += seen[h];
      floor_rows += floor[h];
      stride = std::max<long long>(stride, this->most_rows(static_cast<int>(h)));
    }
    BudgetRequest want{0, geometry.num_layers, geometry.num_kv_heads, seen, floor, {}};
    KVT_TRY(resolve_rows(retain, geometry.num_heads(), rows, floor_rows, this->memory().total(), want.total));

    Device& device = *this->device();
    const auto places = heads * static_cast<std::size_t>(stride);
    DeviceArray<float, Device> scores;
    DeviceArray<unsigned char, Device> marks;
    DeviceArray<int, Device> kept;
    KVT_TRY(scores.allocate(device, places));
    KVT_TRY(marks.allocate(device, places));
    KVT_TRY(kept.allocate(device, heads));
    const DeviceHeads all = this->all_heads();
    KVT_TRY(device.launch(ScoreWork<Key, Value, Selector>{all, selector_, scores.data(), stride}, geometry.num_heads()));
    std::vector<float> seen_scores;
    if constexpr (EvidenceSet(Budget::needs).has(Evidence::scores)) {
      std::vector<float> padded(places);
      KVT_TRY(device.copy_from(padded.data(), scores.data(), places * sizeof(float)));
      for (std::size_t h = 0; h < heads; ++h) {
        const auto first = padded.begin() + static_cast<std::ptrdiff_t>(h) * stride;
        seen_scores.insert(seen_scores.end(), first, first + seen[h]);
      }
      want.scores = seen_scores;
    }
    if (retain.unit == Retain::Unit::bytes) {
      KVT_TRY(fit_bytes(budget_, retain.amount, rows, floor_rows, want, keep, [&](std::span<const int> counts) {
        std::size_t pages = 0;
        for (std::size_t h = 0; h < heads; ++h) pages += Rows::pages_of(counts[h] - dense[h]);
        return this->memory_with_pages(pages).total();
      }));
    }
    KVT_TRY(allocate_rows(budget_, want, keep));
    KVT_TRY(device.copy_to(kept.data(), keep.data(), heads * sizeof(int)));
    KVT_TRY(device.launch(MarkWork{all, kept.data(), scores.data(), marks.data(), stride}, geometry.num_heads()));
    KVT_TRY(this->cut(marks.data(), stride));
    return this->refresh();
  }
  // As DeviceCache::fork(), policies too.
  Status fork(DeviceKvCache& child) const {
    KVT_TRY(Rows::fork(child));
    child.budget_ = budget_;
    child.selector_ = selector_;
    return success();
  }

 private:
  Budget budget_ = {};
  Selector selector_ = {};
};

}  // namespace kvt::inline v0
