// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What every header needs to know about the compiler. A user may define KVT_ASSERT before the first include.
#pragma once

#if defined(__CUDACC__)
#define KVT_HD __host__ __device__
// A host-device template may be instantiated with a host-only callee on the host alone; nvcc warns about it all the same.
#pragma nv_diag_suppress 20011, 20014
#else
#define KVT_HD
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define KVT_SANITIZED
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KVT_SANITIZED
#endif

// The second belongs after the parameters of a lambda. Under a sanitizer straight code of thousands of instructions would take
// minutes to compile.
#if !defined(__GNUC__)
#define KVT_INLINE inline
#define KVT_INLINE_LAMBDA
#elif defined(KVT_SANITIZED)
#define KVT_INLINE inline __attribute__((always_inline))
#define KVT_INLINE_LAMBDA
#else
#define KVT_INLINE inline __attribute__((always_inline))
#define KVT_INLINE_LAMBDA __attribute__((always_inline))
#endif

// KiB of shared memory that a block of threads may have on every architecture that this is compiled for.
namespace kvt::inline v0 {
inline constexpr int shared_kib = [] {
  int least = 163;
#if defined(__CUDA_ARCH_LIST__)
  least = 227;
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    const int own = arch == 800 || arch == 870 ? 163 : arch >= 900 && arch < 1200 ? 227 : 99;
    least = own < least ? own : least;
  }
#endif
  return least;
}();
}  // namespace kvt::inline v0

// Before a loop of constant length that is to become straight code.
#if defined(__CUDA_ARCH__)
#define KVT_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define KVT_UNROLL _Pragma("GCC unroll 64")
#else
#define KVT_UNROLL
#endif

// The same where registers of the device have to be named by constants, and the simulation has none; and its opposite.
#if defined(__CUDA_ARCH__)
#define KVT_UNROLL_ON_DEVICE _Pragma("unroll")
#define KVT_LOOP_ON_DEVICE _Pragma("unroll 1")
#else
#define KVT_UNROLL_ON_DEVICE
#define KVT_LOOP_ON_DEVICE
#endif

// Internal invariants only: nothing an engine or a file can cause. Off in release builds.
#if !defined(KVT_ASSERT)
#if defined(NDEBUG)
#define KVT_ASSERT(condition) ((void)0)
#else
#include <cassert>
#define KVT_ASSERT(condition) assert(condition)
#endif
#endif
