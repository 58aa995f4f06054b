// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Between a cache of a device and one of the host, on the host:
//   HostPages   pages of a device, copied a run at a time
//   SliceRows   32 rows, as slices of a device have them and one by one, as blocks of the host do
#pragma once

#include <algorithm>
#include <vector>

#include "kvtailor/attend/split_decode.hpp"

namespace kvt::inline v0 {

// In the order they have in the device's memory, so that pages that are neighbours there, of whatever heads, are one copy.
class HostPages {
 public:
  // pages [heads]: the numbers of a head's pages, in the order of its rows. Throws what operator new throws.
  HostPages(const std::vector<std::vector<int>>& pages, long long page_bytes) : page_bytes_(page_bytes) {
    for (const auto& own : pages) numbers_.insert(numbers_.end(), own.begin(), own.end());
    std::sort(numbers_.begin(), numbers_.end());
    for (const auto& own : pages) {
      first_.push_back(places_.size());
      for (const int page : own) {
        places_.push_back(static_cast<int>(std::lower_bound(numbers_.begin(), numbers_.end(), page) - numbers_.begin()));
      }
    }
    bytes_.resize(numbers_.size() * static_cast<std::size_t>(page_bytes));
  }
  SlicePages head(std::size_t h) { return {bytes_.data(), places_.data() + first_[h], nullptr, page_bytes_}; }

  // All pages from, or to, memory of the device that begins with page 0.
  template <class Device>
  Status read(Device& device, const std::byte* from) {
    return each_run([&](std::byte* here, long long there, std::size_t n) { return device.copy_from(here, from + there, n); });
  }
  template <class Device>
  Status write(Device& device, std::byte* to) {
    return each_run([&](const std::byte* here, long long there, std::size_t n) { return device.copy_to(to + there, here, n); });
  }

 private:
  template <class Copy>
  Status each_run(Copy&& copy) {
    for (std::size_t first = 0, end = 0; first < numbers_.size(); first = end) {
      while (++end < numbers_.size() && numbers_[end] == numbers_[end - 1] + 1) {
      }
      const auto page = static_cast<std::size_t>(page_bytes_);
      KVT_TRY(copy(bytes_.data() + first * page, numbers_[first] * page_bytes_, (end - first) * page));
    }
    return success();
  }

  long long page_bytes_;
  std::vector<int> numbers_;        // rising
  std::vector<int> places_;         // of pages in bytes_, of one head after another
  std::vector<std::size_t> first_;  // [heads] in places_
  std::vector<std::byte> bytes_;    // zeros at first
};

// Rows as their codecs encode them alone.
template <class Key, class Value>
struct SliceRows {
  using Layout = LayoutOf<Key, Value>;
  static constexpr int dim = Key::head_dim;

  alignas(16) std::byte keys[slice_rows][Key::row_bytes];
  alignas(16) std::byte values[slice_rows][Value::row_bytes];
  int positions[slice_rows];

  void read(const SlicePages& pages, int slice, int count) {
    const std::byte* const from = pages.at(slice, Layout::bytes);
    int elements[slice_rows][dim];
    Layout::template read<true>(from, elements);
    for (int r = 0; r < count; ++r) FragmentsOf<Key>::pack(elements[r], keys[r]);
    Layout::template read<false>(from, elements);
    for (int r = 0; r < count; ++r) {
      FragmentsOf<Value>::pack(elements[r], values[r]);
      if constexpr (Layout::Keys::scaled) std::memcpy(keys[r], from + Layout::key_scale_at(r), sizeof(Half));
      if constexpr (Layout::Values::scaled) std::memcpy(values[r], from + Layout::value_scale_at(r), sizeof(Half));
      positions[r] = pages.positions(slice, Layout::bytes)[r];
    }
  }
  // To a slice of zeros.
  void write(const SlicePages& pages, int slice, int count) const {
    std::byte* const to = pages.at(slice, Layout::bytes);
    int elements[slice_rows][dim] = {};
    for (int r = 0; r < count; ++r) FragmentsOf<Key>::unpack(keys[r], elements[r]);
    Layout::template write<true>(elements, to);
    for (int r = 0; r < count; ++r) {
      FragmentsOf<Value>::unpack(values[r], elements[r]);
      if constexpr (Layout::Keys::scaled) std::memcpy(to + Layout::key_scale_at(r), keys[r], sizeof(Half));
      if constexpr (Layout::Values::scaled) std::memcpy(to + Layout::value_scale_at(r), values[r], sizeof(Half));
      pages.positions(slice, Layout::bytes)[r] = positions[r];
    }
    Layout::template write<false>(elements, to);
  }
};

}  // namespace kvt::inline v0
