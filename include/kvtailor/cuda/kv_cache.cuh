// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The device cache on CUDA: see store/device_cache.hpp, device_kv_cache.hpp and decode_plan.hpp for what it does and how it is
// called.
#pragma once

#include "kvtailor/cuda/device.cuh"
#include "kvtailor/store/decode_plan.hpp"
#include "kvtailor/store/device_kv_cache.hpp"

namespace kvt::inline v0::cuda {

template <class Codec>
using PagePool = kvt::PagePool<Codec, Device>;
template <class BudgetAllocator, class TokenSelector, class StorageCodec>
using KvCache = kvt::DeviceKvCache<BudgetAllocator, TokenSelector, StorageCodec, Device>;
template <class Codec, class T>
using DecodePlan = kvt::DecodePlan<Codec, Device, T>;

}  // namespace kvt::inline v0::cuda
