// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Matrix fragments: what a warp does with registers alone, for Warp and, alike, for SimulatedWarp.
//   map         a function of a lane and its registers
//   mma         D += A B of 16 x 16, 16 x 8 and 16 x 8 elements, fp16 products and fp32 sums
//   transpose   of the 8 x 8 matrix of fp16 that a register of all lanes is
//   any, shuffle_xor, gather (a register of another lane), load_words
//
// Lane l holds, with g = l / 4 and t = l % 4 (PTX ISA, mma.m16n8k16 and movmatrix):
//   A (16 x 16)   register i, half h: row g + 8 (i % 2), column 2 t + 8 (i / 2) + h
//   B (16 x 8)    register i, half h: row 2 t + 8 i + h, column g
//   D (16 x 8)    element i: row g + 8 (i / 2), column 2 t + i % 2
//   8 x 8         half h: row g, column 2 t + h
// The simulated tensor core cuts addends to 24 bits below the largest and the sum to a float, both towards zero: no worse is
// known of a real one, and sums that are exact would hide what long ranges lose.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kvtailor/core/half.hpp"
#include "kvtailor/core/lanes.hpp"

namespace kvt::inline v0 {

struct Float4 {
  float x[4];
};

// fp16 `low` in the low half.
KVT_HD KVT_INLINE std::uint32_t pack_halves(float low, float high) {
#if defined(__CUDA_ARCH__)
  std::uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return from_float<Half>(low).bits | static_cast<std::uint32_t>(from_float<Half>(high).bits) << 16;
#endif
}
KVT_HD KVT_INLINE float low_half(std::uint32_t both) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(both));
  return x;
#else
  return to_float(Half{static_cast<std::uint16_t>(both & 0xffffu)});
#endif
}
KVT_HD KVT_INLINE float high_half(std::uint32_t both) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(both));
  return x;
#else
  return to_float(Half{static_cast<std::uint16_t>(both >> 16)});
#endif
}
// x 2^power as fp16 in both halves of a word, if it is a normal number of fp16, |x| < 2^11, or zero.
KVT_HD constexpr std::uint32_t both_halves(int x, int power) {
  if (x == 0) return 0;
  std::uint32_t size = static_cast<std::uint32_t>(x < 0 ? -x : x), exponent = static_cast<std::uint32_t>(power + 25);
  for (; size < 1024; size *= 2) --exponent;
  return ((x < 0 ? 0x8000u : 0u) | exponent << 10 | (size & 1023u)) * 0x10001u;
}
// a b and a b + c, of both halves, rounded once.
KVT_HD KVT_INLINE std::uint32_t multiply_halves(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  std::uint32_t out;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
#else
  return pack_halves(low_half(a) * low_half(b), high_half(a) * high_half(b));
#endif
}
KVT_HD KVT_INLINE std::uint32_t fma_halves(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
#if defined(__CUDA_ARCH__)
  std::uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
#else
  return pack_halves(std::fma(low_half(a), low_half(b), low_half(c)), std::fma(high_half(a), high_half(b), high_half(c)));
#endif
}
// 2^x within 2^-22 of itself; zero below -126.
KVT_HD KVT_INLINE float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.f ? 0.f : std::exp2(x);
#endif
}
// (x & mask) | set, in one instruction where there are two constants.
KVT_HD KVT_INLINE std::uint32_t and_or(std::uint32_t x, std::uint32_t mask, std::uint32_t set) {
#if defined(__CUDA_ARCH__)
  std::uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(x), "r"(mask), "r"(set));
  return out;
#else
  return (x & mask) | set;
#endif
}
KVT_HD KVT_INLINE std::uint32_t rotate_left(std::uint32_t x, int by) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_l(x, x, static_cast<unsigned>(by));
#else
  return std::rotl(x, by);
#endif
}
// The lower half of what both are, `high` above `low`, shifted to the right by up to 31.
KVT_HD KVT_INLINE std::uint32_t shift_right(std::uint32_t low, std::uint32_t high, int by) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, static_cast<unsigned>(by));
#else
  return static_cast<std::uint32_t>((static_cast<std::uint64_t>(high) << 32 | low) >> by);
#endif
}
// Byte `index` of x, times 256, plus `low`, which is below 256.
KVT_HD KVT_INLINE std::uint32_t byte_above(std::uint32_t x, int index, std::uint32_t low) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(x, low, 0x5504u | static_cast<unsigned>(index) << 4);
#else
  return (x >> (8 * index) & 0xffu) << 8 | low;
#endif
}
// Bytes `index` and index + 2 of x, 0 or 1, as the lower bytes of the halves of a word whose upper ones are those of `above`.
KVT_HD KVT_INLINE std::uint32_t bytes_below(std::uint32_t x, int index, std::uint32_t above) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(x, above, index == 0 ? 0x7250u : 0x7351u);
#else
  return (x >> (8 * index) & 0xff00ffu) | (above & 0xff00ff00u);
#endif
}
// from + count * bytes, by one instruction.
KVT_HD KVT_INLINE const std::byte* offset_by(const std::byte* from, int count, int bytes) {
#if defined(__CUDA_ARCH__)
  const std::byte* to;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(count), "r"(bytes), "l"(from));
  return to;
#else
  return from + static_cast<long long>(count) * bytes;
#endif
}
// Two halves: the low one of a or the high one, then that of b.
template <bool high_a, bool high_b>
KVT_HD KVT_INLINE std::uint32_t join_halves(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, (high_a ? 0x32u : 0x10u) | (high_b ? 0x7600u : 0x5400u));
#else
  return (high_a ? a >> 16 : a & 0xffffu) | (high_b ? b & 0xffff0000u : b << 16);
#endif
}

// ---- SimulatedWarp ----

template <class F, class... T>
auto map(const SimulatedWarp&, F&& f, const SimulatedWarp::Reg<T>&... x) {
  SimulatedWarp::Reg<decltype(f(0, x[0]...))> out;
  for (int lane = 0; lane < SimulatedWarp::size; ++lane) out[lane] = f(lane, x[lane]...);
  return out;
}
inline bool any(const SimulatedWarp&, const SimulatedWarp::Reg<bool>& x) {
  for (const bool one : x.value) {
    if (one) return true;
  }
  return false;
}
template <class T>
SimulatedWarp::Reg<T> shuffle_xor(const SimulatedWarp&, const SimulatedWarp::Reg<T>& x, int mask) {
  SimulatedWarp::Reg<T> out;
  for (int lane = 0; lane < SimulatedWarp::size; ++lane) out[lane] = x[lane ^ mask];
  return out;
}
template <class T>
SimulatedWarp::Reg<T> gather(const SimulatedWarp&, const SimulatedWarp::Reg<T>& x, const SimulatedWarp::Reg<int>& from) {
  SimulatedWarp::Reg<T> out;
  for (int lane = 0; lane < SimulatedWarp::size; ++lane) out[lane] = x[from[lane]];
  return out;
}
inline SimulatedWarp::Reg<std::uint32_t> transpose(const SimulatedWarp&, const SimulatedWarp::Reg<std::uint32_t>& x) {
  SimulatedWarp::Reg<std::uint32_t> out;
  const auto at = [&](int row, int column) { return x[row * 4 + column / 2] >> (column % 2 * 16) & 0xffffu; };
  for (int lane = 0; lane < SimulatedWarp::size; ++lane) {
    const int g = lane / 4, t = lane % 4;
    out[lane] = at(2 * t, g) | at(2 * t + 1, g) << 16;
  }
  return out;
}
inline void mma(const SimulatedWarp&, SimulatedWarp::Reg<Float4>& d, const SimulatedWarp::Reg<std::uint32_t> (&a)[4],
                const SimulatedWarp::Reg<std::uint32_t>& b0, const SimulatedWarp::Reg<std::uint32_t>& b1) {
  double left[16][16], right[16][8];
  const auto half = [](std::uint32_t both, int h) { return static_cast<double>(h == 0 ? low_half(both) : high_half(both)); };
  for (int lane = 0; lane < SimulatedWarp::size; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < 4; ++i) left[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + h] = half(a[i][lane], h);
      right[2 * t + h][g] = half(b0[lane], h);
      right[2 * t + 8 + h][g] = half(b1[lane], h);
    }
  }
  for (int lane = 0; lane < SimulatedWarp::size; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      double addend[17] = {static_cast<double>(d[lane].x[i])}, largest = std::fabs(addend[0]);
      for (int k = 0; k < 16; ++k) {
        addend[k + 1] = left[row][k] * right[k][column];
        largest = std::fmax(largest, std::fabs(addend[k + 1]));
      }
      double sum = 0;
      if (largest > 0 && std::isfinite(largest)) {
        const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
        for (const double x : addend) sum += std::trunc(x / unit) * unit;
      } else {
        for (const double x : addend) sum += x;
      }
      float out = static_cast<float>(sum);
      if (std::fabs(static_cast<double>(out)) > std::fabs(sum)) out = std::nextafter(out, 0.f);
      d[lane].x[i] = out;
    }
  }
}
// `words` (1, 2 or 4) from where a lane says, which is a multiple of their size.
template <int words>
void load_words(const SimulatedWarp&, const SimulatedWarp::Reg<const std::byte*>& from, SimulatedWarp::Reg<std::uint32_t>* to) {
  for (int lane = 0; lane < SimulatedWarp::size; ++lane) {
    for (int i = 0; i < words; ++i) std::memcpy(&to[i][lane], from[lane] + 4 * i, 4);
  }
}
// ---- Warp ----

#if defined(__CUDACC__)
template <class F, class... T>
KVT_HD KVT_INLINE auto map(const Warp&, F&& f, const Warp::Reg<T>&... x) {
#if defined(__CUDA_ARCH__)
  const int lane = static_cast<int>(threadIdx.x & 31u);
#else
  const int lane = 0;
#endif
  return Warp::Reg<decltype(f(0, x[0]...))>{f(lane, x[lane]...)};
}
KVT_HD KVT_INLINE bool any(const Warp&, const Warp::Reg<bool>& x) {
#if defined(__CUDA_ARCH__)
  return __any_sync(0xffffffffu, x.value) != 0;
#else
  return x.value;
#endif
}
template <class T>
KVT_HD KVT_INLINE Warp::Reg<T> shuffle_xor(const Warp&, const Warp::Reg<T>& x, [[maybe_unused]] int mask) {
#if defined(__CUDA_ARCH__)
  return {__shfl_xor_sync(0xffffffffu, x.value, mask)};
#else
  return x;
#endif
}
template <class T>
KVT_HD KVT_INLINE Warp::Reg<T> gather(const Warp&, const Warp::Reg<T>& x, [[maybe_unused]] const Warp::Reg<int>& from) {
#if defined(__CUDA_ARCH__)
  return {__shfl_sync(0xffffffffu, x.value, from.value)};
#else
  return x;
#endif
}
KVT_HD KVT_INLINE Warp::Reg<std::uint32_t> transpose(const Warp&, const Warp::Reg<std::uint32_t>& x) {
#if defined(__CUDA_ARCH__)
  Warp::Reg<std::uint32_t> out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out.value) : "r"(x.value));
  return out;
#else
  return x;
#endif
}
KVT_HD KVT_INLINE void mma(const Warp&, [[maybe_unused]] Warp::Reg<Float4>& d,
                           [[maybe_unused]] const Warp::Reg<std::uint32_t> (&a)[4],
                           [[maybe_unused]] const Warp::Reg<std::uint32_t>& b0,
                           [[maybe_unused]] const Warp::Reg<std::uint32_t>& b1) {
#if defined(__CUDA_ARCH__)
  float* const x = d.value.x;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
      : "r"(a[0].value), "r"(a[1].value), "r"(a[2].value), "r"(a[3].value), "r"(b0.value), "r"(b1.value));
#endif
}
template <int words>
KVT_HD KVT_INLINE void load_words(const Warp&, [[maybe_unused]] const Warp::Reg<const std::byte*>& from,
                                  [[maybe_unused]] Warp::Reg<std::uint32_t>* to) {
#if defined(__CUDA_ARCH__)
  // Stored bytes are read once: they need not displace what is in the nearest cache.
  const std::byte* const at = from.value;
  if constexpr (words == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0].value), "=r"(to[1].value), "=r"(to[2].value), "=r"(to[3].value)
                 : "l"(at));
  } else if constexpr (words == 2) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to[0].value), "=r"(to[1].value) : "l"(at));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0].value) : "l"(at));
  }
#endif
}
#endif

template <class Lanes, class Address>
KVT_HD KVT_INLINE Address offset(const Lanes& lanes, const Address& from, int bytes) {
  return map(
      lanes, [bytes](int, const std::byte* p) { return p + bytes; }, from);
}

}  // namespace kvt::inline v0
