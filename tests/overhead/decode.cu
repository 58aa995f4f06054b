// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What DecodeWork costs over kernels written by hand for one format each, at head_dim 128: fp16 rows, and 4-bit codes. Those by
// hand read what it reads and compute what it computes, and know nothing of lanes, fragments, layouts or codecs: only the
// stored bytes are the same. decode_compare counts the instructions of the loops over slices; tests/cuda/test_decode.cu
// compares what they find.
#include "kvtailor/codec/turbo_quant.hpp"
#include "kvtailor/cuda/kv_cache.cuh"

namespace by_hand {

constexpr int dim = 128, warps = 8;
constexpr float none = -INFINITY, slack = 3;

// A block attends with eight vectors to all rows of one entry.
struct Step {
  const kvt::SlicePages* entry;  // [entries]
  const float *queries, *units;  // [entries, 8, dim] over [entries, 8]: in the basis of the keys, times log2(e) and their unit
  const float* levels;           // [16] of codes
  float value_unit;              // of a level
  float *max, *sum, *rows;       // [entries, 8], [entries, 8], [entries, 8, dim]
};

__device__ uint4 load(const std::byte* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}
__device__ unsigned pack(float low, float high) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ unsigned transpose(unsigned x) {
  unsigned y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
__device__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ void multiply(float4& d, uint4 a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d.x), "+f"(d.y), "+f"(d.z), "+f"(d.w)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ const std::byte* offset(const std::byte* base, int count, int bytes) {
  const std::byte* at;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(count), "r"(bytes), "l"(base));
  return at;
}
__device__ float low(unsigned both) {
  float x;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(both));
  return x;
}
__device__ float high(unsigned both) {
  float x;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(both));
  return x;
}

// Four bytes of codes as fp16 pairs: a byte's entry is 256 bytes from the next, and every lane has a copy of its own.
__device__ uint4 look_up(const char* table, unsigned codes, unsigned copy) {
  const auto at = [&](unsigned select) { return *reinterpret_cast<const unsigned*>(table + __byte_perm(codes, copy, select)); };
  return {at(0x5504), at(0x5514), at(0x5524), at(0x5534)};
}

constexpr int table_bytes = 256 * 256;  // of codes, dynamic shared memory

template <bool coded>
__global__ void __launch_bounds__(32 * warps, coded ? 1 : 2) decode(const Step to) {
  constexpr int rows_bytes = coded ? 2048 : 8192, slice_bytes = 2 * rows_bytes + (coded ? 128 : 0);
  extern __shared__ char table[];
  __shared__ float max_of[warps][8], sum_of[warps][8], rows_of[8][dim];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, e = blockIdx.x;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if constexpr (coded) {
    for (int k = threadIdx.x; k < 256 * 64; k += 32 * warps) {
      const int both = k / 64;
      reinterpret_cast<unsigned*>(table)[k] = pack(to.levels[both % 16], to.levels[both / 16]);
    }
  }
  unsigned query[dim / 16][2];
  for (int k = 0; k < dim / 16; ++k) {
    for (int i = 0; i < 2; ++i) {
      const float* const q = to.queries + (e * 8 + g) * dim + 16 * k + 8 * i + 2 * t;
      query[k][i] = pack(q[0], q[1]);
    }
  }
  __syncthreads();

  const kvt::SlicePages pages = to.entry[e];
  const int rows = *pages.rows, slices = (rows + 31) / 32, own = warp % 4, end = (slices - own + 3) / 4;
  const int partial = rows % 32 != 0 && (slices - 1) % 4 == own ? (slices - 1) / 4 : -1;
  int paged = pages.page != nullptr;
  unsigned copy = 4 * lane;
  asm volatile("" : "+r"(paged), "+r"(copy));  // to be kept, not found again for each slice
  const int stride = pages.page_bytes;
  const std::byte* const first = pages.pool + own * slice_bytes + lane * 16;
  const std::byte* const first_scale = pages.pool + own * slice_bytes + 2 * rows_bytes + g * 16;
  const float unit0 = to.units[e * 8 + 2 * t], unit1 = to.units[e * 8 + 2 * t + 1];
  float max0 = none, max1 = none, limit0 = none, limit1 = none, sum0 = 0, sum1 = 0;
  float4 out[dim / 16] = {};
  uint4 keys[4], values[4], scale;
  const auto number = [&](int page) { return paged ? pages.page[page] : page; };

  int page = warp / 4;
  const std::byte* at = nullptr;
  if (page < end) {
    at = offset(first, number(page), stride);
    if constexpr (coded) {
      for (int w = 0; w < 4; ++w) keys[w] = load(at + 512 * w);
      for (int w = 0; w < 4; ++w) values[w] = load(at + rows_bytes + 512 * w);
      scale = load(offset(first_scale, number(page), stride));
    }
  }
  while (page < end) {
    const int next_page = page + 2;
    const bool more = next_page < end;
    const std::byte *next = at, *next_scale;
    if (more) {
      const int n = number(next_page);
      next = offset(first, n, stride);
      if constexpr (coded) next_scale = offset(first_scale, n, stride);
    }
    float4 logit[2] = {};
    float of_value[4];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      for (int j = 0; j < 2; ++j) {
        uint4 a;
        if constexpr (coded) {
          const uint4 four = keys[2 * j + k / 4];
          const unsigned codes = k % 4 == 0 ? four.x : k % 4 == 1 ? four.y : k % 4 == 2 ? four.z : four.w;
          a = look_up(table, codes, copy);
        } else {
          a = load(at + 512 * (8 * j + k));
        }
        multiply(logit[j], a, query[k][0], query[k][1]);
      }
    }
    if constexpr (coded) {
      const float of_key[4] = {low(scale.x), high(scale.x), low(scale.y), high(scale.y)};
      for (int i = 0; i < 2; ++i) {
        of_value[2 * i] = low(i == 0 ? scale.z : scale.w);
        of_value[2 * i + 1] = high(i == 0 ? scale.z : scale.w);
      }
      if (more) {
        for (int w = 0; w < 4; ++w) keys[w] = load(next + 512 * w);
        scale = load(next_scale);
      }
      for (int j = 0; j < 2; ++j) {
        logit[j].x *= of_key[2 * j], logit[j].y *= of_key[2 * j];
        logit[j].z *= of_key[2 * j + 1], logit[j].w *= of_key[2 * j + 1];
      }
    }
    float top0 = fmaxf(fmaxf(logit[0].x, logit[0].z), fmaxf(logit[1].x, logit[1].z));
    float top1 = fmaxf(fmaxf(logit[0].y, logit[0].w), fmaxf(logit[1].y, logit[1].w));
    if (__any_sync(~0u, top0 * unit0 > limit0 || top1 * unit1 > limit1 || page == partial)) {
      if (page == partial) {
        const int left = rows % 32 - g;
        if (left <= 0) logit[0].x = logit[0].y = none;
        if (left <= 8) logit[0].z = logit[0].w = none;
        if (left <= 16) logit[1].x = logit[1].y = none;
        if (left <= 24) logit[1].z = logit[1].w = none;
        top0 = fmaxf(fmaxf(logit[0].x, logit[0].z), fmaxf(logit[1].x, logit[1].z));
        top1 = fmaxf(fmaxf(logit[0].y, logit[0].w), fmaxf(logit[1].y, logit[1].w));
      }
      if (__any_sync(~0u, top0 * unit0 > limit0 || top1 * unit1 > limit1)) {
        for (int mask = 4; mask < 32; mask *= 2) {
          top0 = fmaxf(top0, __shfl_xor_sync(~0u, top0, mask));
          top1 = fmaxf(top1, __shfl_xor_sync(~0u, top1, mask));
        }
        top0 = fmaxf(top0 * unit0, max0);
        top1 = fmaxf(top1 * unit1, max1);
        const float factor0 = top0 == max0 ? 1.f : exp2_of(max0 - top0), factor1 = top1 == max1 ? 1.f : exp2_of(max1 - top1);
        max0 = top0, max1 = top1, limit0 = top0 + slack, limit1 = top1 + slack;
        sum0 *= factor0, sum1 *= factor1;
#pragma unroll
        for (float4& x : out) x.x *= factor0, x.y *= factor1, x.z *= factor0, x.w *= factor1;
      }
    }
    unsigned weight[2][2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float4 w = {exp2_of(fmaf(logit[j].x, unit0, -max0)), exp2_of(fmaf(logit[j].y, unit1, -max1)),
                  exp2_of(fmaf(logit[j].z, unit0, -max0)), exp2_of(fmaf(logit[j].w, unit1, -max1))};
      sum0 += w.x + w.z;
      sum1 += w.y + w.w;
      if constexpr (coded) {
        w.x *= of_value[2 * j], w.y *= of_value[2 * j], w.z *= of_value[2 * j + 1], w.w *= of_value[2 * j + 1];
      }
      weight[j][0] = transpose(pack(w.x, w.y));
      weight[j][1] = transpose(pack(w.z, w.w));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        uint4 a;
        if constexpr (coded) {
          const uint4 four = values[2 * j + k / 4];
          const unsigned codes = k % 4 == 0 ? four.x : k % 4 == 1 ? four.y : k % 4 == 2 ? four.z : four.w;
          a = look_up(table + 128, codes, copy);
        } else {
          a = load(at + rows_bytes + 512 * (8 * j + k));
        }
        multiply(out[k], a, weight[j][0], weight[j][1]);
      }
    }
    if constexpr (coded) {
      if (more) {
        for (int w = 0; w < 4; ++w) values[w] = load(next + rows_bytes + 512 * w);
      }
    }
    at = next;
    page = next_page;
  }

  // The warps' states at one maximum.
  for (int mask = 4; mask < 32; mask *= 2) {
    sum0 += __shfl_xor_sync(~0u, sum0, mask);
    sum1 += __shfl_xor_sync(~0u, sum1, mask);
  }
  if (lane < 4) {
    max_of[warp][2 * lane] = max0, max_of[warp][2 * lane + 1] = max1;
    sum_of[warp][2 * lane] = sum0, sum_of[warp][2 * lane + 1] = sum1;
  }
  for (int k = threadIdx.x; k < 8 * dim; k += 32 * warps) rows_of[k / dim][k % dim] = 0;
  __syncthreads();
  float top[2] = {none, none};
  for (int c = 0; c < 2; ++c) {
    for (int w = 0; w < warps; ++w) top[c] = fmaxf(top[c], max_of[w][2 * t + c]);
  }
  const float factor0 = max0 == none ? 0.f : exp2_of(max0 - top[0]) * to.value_unit;
  const float factor1 = max1 == none ? 0.f : exp2_of(max1 - top[1]) * to.value_unit;
  for (int turn = 0; turn < warps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int k = 0; k < dim / 16; ++k) {
        rows_of[2 * t][16 * k + g] += out[k].x * factor0;
        rows_of[2 * t + 1][16 * k + g] += out[k].y * factor1;
        rows_of[2 * t][16 * k + g + 8] += out[k].z * factor0;
        rows_of[2 * t + 1][16 * k + g + 8] += out[k].w * factor1;
      }
    }
    __syncthreads();
  }
  for (int k = threadIdx.x; k < 8 * dim; k += 32 * warps) to.rows[e * 8 * dim + k] = rows_of[k / dim][k % dim];
  if (threadIdx.x < 8) {
    float most = none, total = 0;
    for (int w = 0; w < warps; ++w) most = fmaxf(most, max_of[w][threadIdx.x]);
    for (int w = 0; w < warps; ++w) {
      if (max_of[w][threadIdx.x] != none) total += sum_of[w][threadIdx.x] * exp2_of(max_of[w][threadIdx.x] - most);
    }
    to.max[e * 8 + threadIdx.x] = most;
    to.sum[e * 8 + threadIdx.x] = total;
  }
}

}  // namespace by_hand

template <class Codec>
using Composed = kvt::DecodeWork<Codec, Codec, false, 8, kvt::Half>;

void use_kernels(const void** kernels) {
  kernels[0] = reinterpret_cast<const void*>(&by_hand::decode<false>);
  kernels[1] = reinterpret_cast<const void*>(&by_hand::decode<true>);
  kernels[2] = reinterpret_cast<const void*>(&kvt::cuda::work_kernel<Composed<kvt::Dense<kvt::Half, by_hand::dim>>>);
  kernels[3] = reinterpret_cast<const void*>(&kvt::cuda::work_kernel<Composed<kvt::TurboQuant<4, by_hand::dim>>>);
}
