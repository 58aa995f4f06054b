// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Lane groups: an algorithm is written once over a group of lanes that run it together.
//   Serial         one lane: the host
//   Warp           32 lanes of a CUDA warp
//   SimulatedWarp  the same 32 lanes run one after another on the host, so that device code is tested without a device
// Lane l of a group of n owns elements l, l + n, l + 2n, ... Between two each() calls all lanes have finished the first.
// A value a lane owns is a Reg<T>, read and written as reg[lane] inside each().
// Blocks of warps, alike: ThreadBlock and SimulatedBlock. Between two each_warp() calls all warps have finished the first; a
// value a warp owns is a PerWarp<T>.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>

#include "kvtailor/core/config.hpp"

namespace kvt::inline v0 {

// Memory that will be needed, to be asked for in steps of so many bytes.
struct Ahead {
  const char* from = nullptr;
  int step_bytes = 0;

  Ahead after(int steps) const { return {from + steps * step_bytes, step_bytes}; }
  KVT_INLINE void ask([[maybe_unused]] int step) const {
#if defined(__GNUC__)
    for (int i = 0; i < step_bytes; i += 64) __builtin_prefetch(from + step * step_bytes + i, 0, 2);
#endif
  }
};

struct Serial {
  static constexpr int size = 1;
  template <class T>
  struct Reg {
    T value;
    KVT_HD KVT_INLINE T& operator[](int) { return value; }
    KVT_HD KVT_INLINE const T& operator[](int) const { return value; }
  };
  template <class F>
  KVT_HD KVT_INLINE void each(F&& f) const {
    f(0);
  }
  // Runs on one lane.
  template <class F>
  KVT_HD KVT_INLINE void once(F&& f) const {
    f();
  }
  template <class T>
  KVT_HD KVT_INLINE T sum(Reg<T>& x) const {
    return x.value;
  }
  template <class T>
  KVT_HD KVT_INLINE T max(Reg<T>& x) const {
    return x.value;
  }
  KVT_HD KVT_INLINE void exclusive_scan(Reg<int>& x) const { x.value = 0; }
  // Bit l is whether f(l).
  template <class F>
  KVT_HD KVT_INLINE std::uint32_t ballot(F&& f) const {
    return f(0) ? 1 : 0;
  }
  template <class T>
  KVT_HD KVT_INLINE T shuffle(Reg<T>& x, int) const {
    return x.value;
  }
  // Says where a block is being read: see SerialReader.
  template <int>
  KVT_HD KVT_INLINE void reads_tile(const void*) const {}
  Ahead ahead(const void*, int) const { return {}; }
  // use(make()): see SerialReader.
  template <class Make, class Use>
  void with(const float*, Make&& make, Use&& use) const {
    use(make());
  }
};

// Memory for what is made of queries, once for all blocks that meet them.
struct QueryMemory {
  static constexpr int places = 2;

  std::byte* memory;  // aligned to 64
  int place_bytes;    // a multiple of 64
  const float* queries[places] = {};
  const void* type[places] = {};

  // What make() made of queries before, or makes now; null if there is no room for it.
  template <class T, class Make>
  const T* find(const float* of, Make&& make) {
    static_assert(std::is_trivially_destructible_v<T> && alignof(T) <= 64);
    static constexpr char own_type = 0;
    for (int i = 0; i < places; ++i) {
      std::byte* const at = memory + i * place_bytes;
      if (queries[i] == of && type[i] == &own_type) return std::launder(reinterpret_cast<const T*>(at));
      if (queries[i] != nullptr || sizeof(T) > static_cast<std::size_t>(place_bytes)) continue;
      queries[i] = of;
      type[i] = &own_type;
      return ::new (at) T(make());
    }
    return nullptr;
  }
};

// One lane that knows which block is read after this one, and while it works asks for what it will need: bit by bit, since
// memory answers some dozen requests at once, and whoever makes more has to wait.
class SerialReader : public Serial {
  std::uintptr_t end_, bytes_, jump_;
  QueryMemory* kept_;

 public:
  // Of a block, and the one that follows, or null.
  SerialReader(const std::byte* block, int bytes, const std::byte* next, QueryMemory& kept)
      : end_(address(block) + static_cast<std::uintptr_t>(bytes)),
        bytes_(static_cast<std::uintptr_t>(bytes)),
        jump_(next == nullptr ? 0 : address(next) - end_),
        kept_(&kept) {}
  // Of n rows that are read one after the other: see ReadAhead.
  template <int row_bytes>
  KVT_INLINE void plan(const void* rows, int n, int (&end)[2], std::ptrdiff_t (&distance)[2]) const {
    constexpr int ahead = 8192;
    const auto own = static_cast<std::ptrdiff_t>(end_ - address(rows)) - ahead;
    const std::ptrdiff_t split = own <= 0 ? 0 : own / row_bytes;
    end[0] = split < n ? static_cast<int>(split) : n;
    distance[0] = ahead;
    distance[1] = ahead + static_cast<std::ptrdiff_t>(jump_);
  }
  // `count` bytes of a block that is read more than once: the same place of the next one.
  template <int count>
  KVT_INLINE void reads_tile([[maybe_unused]] const void* at) const {
#if defined(__GNUC__)
    std::uintptr_t next = address(at) + bytes_;
    next += next < end_ ? 0 : jump_;
    // NOLINTNEXTLINE(performance-no-int-to-ptr): nothing need be there.
    for (std::uintptr_t i = 0; i < count; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(next + i), 0, 2);
#endif
  }
  // The same for those who ask by themselves.
  Ahead ahead(const void* at, int step_bytes) const {
    const std::uintptr_t next = address(at) + bytes_;
    // NOLINTNEXTLINE(performance-no-int-to-ptr): nothing need be there.
    return {reinterpret_cast<const char*>(next + (next < end_ ? 0 : jump_)), step_bytes};
  }
  // use(what make() makes of queries), which stay as they are as long as blocks are read.
  template <class Make, class Use>
  void with(const float* queries, Make&& make, Use&& use) const {
    const auto* const made = kept_->find<decltype(make())>(queries, make);
    made != nullptr ? use(*made) : use(make());
  }

 private:
  static std::uintptr_t address(const void* at) { return reinterpret_cast<std::uintptr_t>(at); }
};

// How far ahead memory is asked for rows that are read one after the other: rows up to end[0], then those up to end[1], if any,
// by a distance each, so that nothing is decided for each row. It is asked for into the second cache, which waits for more
// lines at once than the first.
template <class Lanes, int row_bytes>
struct ReadAhead {
  static constexpr bool knows = std::is_base_of_v<SerialReader, Lanes>;
  static constexpr int stretches = knows ? 2 : 1;
  int end[stretches];
  std::ptrdiff_t distance[stretches] = {};

  KVT_HD KVT_INLINE ReadAhead([[maybe_unused]] const Lanes& lanes, [[maybe_unused]] const void* rows, int n) {
    for (int& each : end) each = n;
    if constexpr (knows) lanes.template plan<row_bytes>(rows, n, end, distance);
  }
  // Before `count` rows of a stretch are read.
  template <int count>
  KVT_HD KVT_INLINE void ask([[maybe_unused]] const void* row, [[maybe_unused]] int stretch) const {
#if defined(__GNUC__) && !defined(__CUDA_ARCH__)
    if constexpr (knows) {
      const char* const at = static_cast<const char*>(row) + distance[stretch];
      for (int i = 0; i < count * row_bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    }
#endif
  }
};

struct SimulatedWarp {
  static constexpr int size = 32;
  template <class T>
  struct Reg {
    T value[size];
    T& operator[](int lane) { return value[lane]; }
    const T& operator[](int lane) const { return value[lane]; }
  };
  template <class F>
  void each(F&& f) const {
    for (int lane = 0; lane < size; ++lane) f(lane);
  }
  template <class F>
  void once(F&& f) const {
    f();
  }
  // The order of additions is that of the device's butterfly, so that both round alike.
  template <class T>
  T sum(Reg<T>& x) const {
    for (int step = size / 2; step > 0; step /= 2) {
      for (int lane = 0; lane < step; ++lane) x.value[lane] += x.value[lane + step];
    }
    return x.value[0];
  }
  template <class T>
  T max(Reg<T>& x) const {
    T best = x.value[0];
    for (int lane = 1; lane < size; ++lane) best = x.value[lane] > best ? x.value[lane] : best;
    return best;
  }
  void exclusive_scan(Reg<int>& x) const {
    int total = 0;
    for (int lane = 0; lane < size; ++lane) {
      const int own = x.value[lane];
      x.value[lane] = total;
      total += own;
    }
  }
  template <class F>
  std::uint32_t ballot(F&& f) const {
    std::uint32_t set = 0;
    for (int lane = 0; lane < size; ++lane) set |= (f(lane) ? 1u : 0u) << lane;
    return set;
  }
  template <class T>
  T shuffle(Reg<T>& x, int lane) const {
    return x.value[lane];
  }
};

template <int num_warps>
struct SimulatedBlock {
  using Lanes = SimulatedWarp;
  static constexpr int warps = num_warps;
  template <class T>
  struct PerWarp {
    T value[num_warps];
    T& operator[](int warp) { return value[warp]; }
  };
  template <class F>
  void each_warp(F&& f) const {
    for (int warp = 0; warp < num_warps; ++warp) f(SimulatedWarp{}, warp);
  }
};

// What a lane holds of a row of `head_dim` elements: element i of lane l is row element i * lanes + l.
template <int head_dim, int lanes>
struct LaneRow {
  static constexpr int length = (head_dim + lanes - 1) / lanes;
  float x[length];
};

#if defined(__CUDACC__)
struct Warp {
  static constexpr int size = 32;
  template <class T>
  struct Reg {
    T value;
    __host__ __device__ T& operator[](int) { return value; }
    __host__ __device__ const T& operator[](int) const { return value; }
  };
  template <class F>
  __host__ __device__ void each(F&& f) const {
#if defined(__CUDA_ARCH__)
    f(static_cast<int>(threadIdx.x & 31u));
    __syncwarp();
#endif
  }
  template <class F>
  __host__ __device__ void once(F&& f) const {
#if defined(__CUDA_ARCH__)
    if ((threadIdx.x & 31u) == 0) f();
    __syncwarp();
#endif
  }
  template <class T>
  __host__ __device__ T sum(Reg<T>& x) const {
#if defined(__CUDA_ARCH__)
    for (int step = 16; step > 0; step /= 2) x.value += __shfl_xor_sync(0xffffffffu, x.value, step);
#endif
    return x.value;
  }
  template <class T>
  __host__ __device__ T max(Reg<T>& x) const {
#if defined(__CUDA_ARCH__)
    for (int step = 16; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(0xffffffffu, x.value, step);
      x.value = other > x.value ? other : x.value;
    }
#endif
    return x.value;
  }
  __host__ __device__ void exclusive_scan(Reg<int>& x) const {
#if defined(__CUDA_ARCH__)
    const int lane = static_cast<int>(threadIdx.x & 31u);
    const int own = x.value;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, x.value, step);
      if (lane >= step) x.value += other;
    }
    x.value -= own;
#endif
  }
  template <class F>
  __host__ __device__ std::uint32_t ballot([[maybe_unused]] F&& f) const {
#if defined(__CUDA_ARCH__)
    return __ballot_sync(0xffffffffu, f(static_cast<int>(threadIdx.x & 31u)));
#else
    return 0;
#endif
  }
  template <class T>
  __host__ __device__ T shuffle(Reg<T>& x, int lane) const {
#if defined(__CUDA_ARCH__)
    return __shfl_sync(0xffffffffu, x.value, lane);
#else
    return x.value;
#endif
  }
};

template <int num_warps>
struct ThreadBlock {
  using Lanes = Warp;
  static constexpr int warps = num_warps;
  template <class T>
  struct PerWarp {
    T value;
    __host__ __device__ T& operator[](int) { return value; }
  };
  template <class F>
  __host__ __device__ void each_warp(F&& f) const {
#if defined(__CUDA_ARCH__)
    // The shuffle tells the compiler that the warp takes one way, so that what all lanes share lies in uniform registers.
    f(Warp{}, __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32u), 0));
    __syncthreads();
#endif
  }
};
#endif

}  // namespace kvt::inline v0
