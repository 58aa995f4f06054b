// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// cuda::Device: a stream of the engine, as the device that caches work on. Never waits for the device but in copy_from(). While
// the stream is captured, it launches kernels and nothing else: what allocates or copies returns a Status, and the capture
// lives.
#pragma once

#include <cuda_runtime.h>

#include <memory_resource>

#include "kvtailor/core/device.hpp"

namespace kvt::inline v0::cuda {

template <class Work>
__global__ void __launch_bounds__(32 * Work::warps, Work::blocks) work_kernel(const Work work) {
  __shared__ typename Work::Shared shared;
  extern __shared__ std::byte dynamic[];
  work(ThreadBlock<Work::warps>{}, static_cast<int>(blockIdx.x), shared, dynamic);
}

class Device {
 public:
  // memory: of the device, for this stream alone or in its order; where it throws, there is none left. It must outlive what
  // was allocated. Null: cudaMallocAsync().
  explicit Device(cudaStream_t stream = nullptr, std::pmr::memory_resource* memory = nullptr)
      : stream_(stream), memory_(memory) {}
  cudaStream_t stream() const { return stream_; }

  Status allocate(std::size_t bytes, void** to) {
    KVT_TRY(not_captured());
    if (memory_ == nullptr) return check(cudaMallocAsync(to, bytes, stream_), "the device gave no memory");
    try {
      *to = memory_->allocate(bytes, alignment);
      return success();
    } catch (...) {
      return check(cudaErrorMemoryAllocation, "the engine gave no memory of the device");
    }
  }
  void free(void* memory, std::size_t bytes) noexcept {
    if (memory_ != nullptr) {
      memory_->deallocate(memory, bytes, alignment);
    } else {
      (void)cudaFreeAsync(memory, stream_);
    }
  }
  Status copy_to(void* to, const void* from, std::size_t bytes) {
    KVT_TRY(not_captured());
    return check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "a copy to the device failed");
  }
  // Waits until it is there.
  Status copy_from(void* to, const void* from, std::size_t bytes) {
    KVT_TRY(not_captured());
    KVT_TRY(check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "a copy from the device failed"));
    return check(cudaStreamSynchronize(stream_), "the work of the stream failed");
  }
  Status clear(void* to, std::size_t bytes) {
    return check(cudaMemsetAsync(to, 0, bytes, stream_), "memory of the device could not be cleared");
  }
  template <class Work>
  Status launch(const Work& work, int blocks) {
    if constexpr (Work::dynamic_bytes > 0) KVT_TRY(allow<Work>());
    if (blocks > 0) {
      work_kernel<Work><<<static_cast<unsigned>(blocks), 32 * Work::warps, Work::dynamic_bytes, stream_>>>(work);
    }
    return check(cudaGetLastError(), "a kernel could not be launched");
  }
  // Blocks of a work that run at once.
  template <class Work>
  Status resident_blocks(int& blocks) {
    int device = 0, multiprocessors = 0, each = 0;
    KVT_TRY(check(cudaGetDevice(&device), "there is no device"));
    KVT_TRY(check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "the device is unknown"));
    if constexpr (Work::dynamic_bytes > 0) KVT_TRY(allow<Work>());
    KVT_TRY(
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, work_kernel<Work>, 32 * Work::warps, Work::dynamic_bytes),
              "there is no kernel for this device"));
    blocks = multiprocessors * each;
    if (blocks < 1) return error(Errc::device, "a kernel needs more shared memory than a multiprocessor has");
    return success();
  }

 private:
  static Status check(cudaError_t code, const char* text) {
    if (code == cudaSuccess) return success();
    return {code == cudaErrorMemoryAllocation ? Errc::out_of_memory : Errc::device, static_cast<int>(code), text, 0, 0};
  }
  Status not_captured() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    KVT_TRY(check(cudaStreamIsCapturing(stream_, &status), "the state of the stream is unknown"));
    return check(status == cudaStreamCaptureStatusNone ? cudaSuccess : cudaErrorStreamCaptureUnsupported,
                 "the stream is being captured: only append(), observe(), attend(), cut() and truncate() may be called, with "
                 "room reserved");
  }
  template <class Work>
  static Status allow() {
    return check(cudaFuncSetAttribute(work_kernel<Work>, cudaFuncAttributeMaxDynamicSharedMemorySize, Work::dynamic_bytes),
                 "a kernel needs more shared memory than the device has");
  }
  static constexpr std::size_t alignment = 256;
  cudaStream_t stream_;
  std::pmr::memory_resource* memory_;
};

}  // namespace kvt::inline v0::cuda
