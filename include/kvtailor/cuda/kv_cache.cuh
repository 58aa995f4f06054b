// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The device cache on CUDA: see store/device_cache.hpp for what it does and how it is called.
#pragma once

#include "kvtailor/cuda/device.cuh"
#include "kvtailor/store/device_cache.hpp"

namespace kvt::inline v0::cuda {

template <class Codec>
using PagePool = kvt::PagePool<Codec, Device>;
template <class Codec>
using KvCache = kvt::DeviceCache<Codec, Device>;
template <class Codec, class T>
using DecodePlan = kvt::DecodePlan<Codec, Device, T>;

}  // namespace kvt::inline v0::cuda
