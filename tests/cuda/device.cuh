// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What the device tests share. Device and host are compiled without contraction of products and sums, so that a warp and
// the simulated warp, which do the same operations in the same order, have to give the same bits.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kvtailor/kvtailor.cuh"

namespace device {

inline void check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(result));
  std::exit(1);
}

inline bool present() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// What main() returns.
inline int result(int failures) {
  if (failures != 0) return 1;
  if (present()) return 0;
  std::puts("skipped: no CUDA device");
  return 77;
}

// An array on the device; poisoned where it has no values yet.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    check(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice), "copy to the device");
  }
  explicit Array(std::size_t size) : size_(size) {
    check(cudaMalloc(&data_, bytes()), "allocation");
    check(cudaMemset(data_, 0xff, bytes()), "poison");
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data_); }
  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> out(size_);
    check(cudaMemcpy(out.data(), data_, bytes(), cudaMemcpyDeviceToHost), "copy from the device");
    return out;
  }

 private:
  std::size_t bytes() const { return size_ * sizeof(T); }
  std::size_t size_;
  T* data_ = nullptr;
};

inline void finish_kernel() {
  check(cudaGetLastError(), "launch");
  check(cudaDeviceSynchronize(), "kernel");
}

}  // namespace device
