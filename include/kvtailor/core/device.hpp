// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Work for a device, and a device to try it on.
//
// A Work is what a kernel does, as a plain value that is copied to the device:
//   warps, blocks       of a block of threads, and blocks that a multiprocessor should have room for
//   Shared              memory that the warps of a block share
//   dynamic_bytes       more of it, whose size would be too large for a type; 0 if none
//   work(block, index, shared, dynamic)   what block `index` does, written over ThreadBlock and SimulatedBlock alike
//
// A Device has allocate, free, copy_to, copy_from, clear, launch and resident_blocks. All work in the order of one stream, and
// but for free return a Status. cuda::Device (cuda/device.cuh) is a CUDA stream; SimulatedDevice runs the same work on the
// host.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "kvtailor/core/lanes.hpp"
#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

// Memory on it is poisoned when it is new, and counted. Allocations fail from the one numbered fail_at on, if that is not 0.
class SimulatedDevice {
 public:
  long long allocated_bytes = 0, allocations = 0, fail_at = 0, launches = 0;

  Status allocate(std::size_t bytes, void** to) {
    ++allocations;
    if (fail_at != 0 && allocations >= fail_at)
      return error(Errc::out_of_memory, "the device has no memory for {} bytes", static_cast<double>(bytes));
    *to = ::operator new (bytes, std::align_val_t{256}, std::nothrow);
    if (*to == nullptr)
      return error(Errc::out_of_memory, "there is no memory to simulate {} bytes of a device", static_cast<double>(bytes));
    std::memset(*to, 0xff, bytes);
    allocated_bytes += static_cast<long long>(bytes);
    return success();
  }
  void free(void* memory, std::size_t bytes) noexcept {
    if (memory == nullptr) return;
    ::operator delete (memory, std::align_val_t{256});
    allocated_bytes -= static_cast<long long>(bytes);
  }
  Status copy_to(void* to, const void* from, std::size_t bytes) { return copy_from(to, from, bytes); }
  Status copy_from(void* to, const void* from, std::size_t bytes) {
    if (bytes != 0) std::memcpy(to, from, bytes);
    return success();
  }
  Status clear(void* to, std::size_t bytes) {
    if (bytes != 0) std::memset(to, 0, bytes);
    return success();
  }
  template <class Work>
  Status launch(const Work& work, int blocks) {
    ++launches;
#if defined(KVT_ON_SIMULATED_LAUNCH)
    KVT_ON_SIMULATED_LAUNCH(Work);  // a test that wants to know what ran
#endif
    const auto shared = std::make_unique<typename Work::Shared>();
    std::vector<std::uint32_t> dynamic(static_cast<std::size_t>(Work::dynamic_bytes / 4 + 1));
    for (int index = 0; index < blocks; ++index) {
      std::memset(static_cast<void*>(shared.get()), 0xff, sizeof *shared);
      std::memset(dynamic.data(), 0xff, static_cast<std::size_t>(Work::dynamic_bytes));
      work(SimulatedBlock<Work::warps>{}, index, *shared, reinterpret_cast<std::byte*>(dynamic.data()));
    }
    return success();
  }
  // Blocks of a work that run at once.
  template <class Work>
  Status resident_blocks(int& blocks) {
    blocks = 3;
    return success();
  }
};

// Memory of a device that is given back with its owner.
template <class T, class Device>
class DeviceArray {
 public:
  DeviceArray() = default;
  DeviceArray(DeviceArray&& other) noexcept { swap(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    DeviceArray gone;
    gone.swap(other);
    swap(gone);
    return *this;
  }
  ~DeviceArray() {
    if (device_ != nullptr) device_->free(data_, size_ * sizeof(T));
  }
  // In place of what there was; unchanged if there is no memory.
  Status allocate(Device& device, std::size_t size) {
    DeviceArray fresh;
    if (size != 0) {
      void* memory = nullptr;
      KVT_TRY(device.allocate(size * sizeof(T), &memory));
      fresh.device_ = &device;
      fresh.data_ = static_cast<T*>(memory);
      fresh.size_ = size;
    }
    swap(fresh);
    return success();
  }
  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  long long bytes() const { return static_cast<long long>(size_ * sizeof(T)); }

 private:
  void swap(DeviceArray& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  Device* device_ = nullptr;
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace kvt::inline v0
