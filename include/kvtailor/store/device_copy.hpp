// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// CopyWordsWork: from one array of a device to another.
#pragma once

#include <cstdint>

#include "kvtailor/core/device.hpp"

namespace kvt::inline v0 {

struct CopyWordsWork {
  static constexpr int warps = 8, blocks = 1, dynamic_bytes = 0;
  struct Shared {};

  const std::uint32_t* from;
  std::uint32_t* to;
  long long count;
  int parts;  // that are launched

  template <class Block>
  KVT_HD void operator()(const Block& block, int part, Shared&, std::byte*) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        const long long step = static_cast<long long>(parts) * warps * Lanes::size;
        for (long long i = (static_cast<long long>(part) * warps + warp) * Lanes::size + lane; i < count; i += step) {
          to[i] = from[i];
        }
      });
    });
  }
};

// Into an array of its own.
template <class T, class Device>
Status copy_array(Device& device, const DeviceArray<T, Device>& from, DeviceArray<T, Device>& to) {
  static_assert(sizeof(T) % 4 == 0);
  KVT_TRY(to.allocate(device, from.size()));
  const long long words = from.bytes() / 4;
  const int parts = static_cast<int>(words < 1 << 20 ? (words + 1023) / 1024 : 1024);
  return parts == 0 ? success()
                    : device.launch(CopyWordsWork{reinterpret_cast<const std::uint32_t*>(from.data()),
                                                  reinterpret_cast<std::uint32_t*>(to.data()), words, parts},
                                    parts);
}

}  // namespace kvt::inline v0
