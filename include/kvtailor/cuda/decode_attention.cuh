// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// decode_attention: one decode step of any number of heads on a stream.
//
// Lengths and page tables are read from device memory when the kernels run, and nothing is allocated, waited for or read back:
// a captured graph attends to whatever is there then.
#pragma once

#include <cuda_runtime.h>

#include "kvtailor/attend/split_decode.hpp"
#include "kvtailor/core/status.hpp"

namespace kvt::inline v0::cuda {

inline Status device_error(cudaError_t code, const char* text) {
  return {code == cudaErrorMemoryAllocation ? Errc::out_of_memory : Errc::device, static_cast<int>(code), text, 0, 0};
}

// Warps of a block, and blocks of a multiprocessor that registers are shared out among: 128, 168 or 255 a thread. Tables of
// codes are shared by the warps of a block, so there is one block where there are tables. ptxas reads entries far ahead, and
// spills where it has less room than here.
template <class Key, class Value, bool limited>
struct DecodeTuning {
  using Keys = typename FragmentsOf<Key>::type;
  using Values = typename FragmentsOf<Value>::type;
  static constexpr bool tables = Keys::table_entries + Values::table_entries > 0;
  static constexpr bool light = Keys::dim <= 128 && !tables && !limited;
  static constexpr int warps = Keys::dim <= 64 && tables ? 12 : 8, blocks = light ? 2 : 1;
};

template <class Key, class Value, bool limited, class T>
__global__ void __launch_bounds__(32 * DecodeTuning<Key, Value, limited>::warps, DecodeTuning<Key, Value, limited>::blocks)
    decode_kernel(DecodeStep<T> step) {
  constexpr int warps = DecodeTuning<Key, Value, limited>::warps;
  __shared__ DecodeShared<Key::head_dim, warps> shared;
  extern __shared__ std::byte table[];
  decode_block<Key, Value, limited>(ThreadBlock<warps>{}, step, static_cast<int>(blockIdx.x), shared, table);
}

// A warp for each vector of each entry: grid (entries, vectors).
template <class Value, class T>
__global__ void __launch_bounds__(32) finish_kernel(DecodeStep<T> body, DecodeStep<T> near, T* out) {
  constexpr int dim = Value::head_dim;
  __shared__ float scratch[dim], row[dim];
  const int e = static_cast<int>(blockIdx.x), vector = static_cast<int>(blockIdx.y);
  T* const to = out + (static_cast<long long>(e) * body.group + body.first_vector + vector) * dim;
  finish_vector<Value>(Warp{}, body, near, e, vector, scratch, row, to);
}

// Blocks of decode_kernel that fill the device at once, what SplitDecode::blocks is best set to.
template <class Key, class Value, bool limited, class T>
Status resident_blocks(int& blocks) {
  using Layout = SliceLayout<typename FragmentsOf<Key>::type, typename FragmentsOf<Value>::type>;
  const auto kernel = decode_kernel<Key, Value, limited, T>;
  int device = 0, multiprocessors = 0, each = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (code == cudaSuccess) {
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout::table_bytes);
  }
  if (code == cudaSuccess) {
    code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, 32 * DecodeTuning<Key, Value, limited>::warps,
                                                         static_cast<std::size_t>(Layout::table_bytes));
  }
  if (code != cudaSuccess) return device_error(code, "the kernels of this composition cannot run on this device");
  blocks = multiprocessors * each;
  return success();
}

// out [entries, group, dim]. Query heads of an entry are taken eight at a time, and use the same partial results one after
// another; first_vector is set here. `near` are the dense rows.
template <class Key, class Value, bool limited, class T>
Status decode_attention(DecodeStep<T> body, DecodeStep<T> near, T* out, cudaStream_t stream) {
  using Plain = Dense<Half, Key::head_dim>;
  using Layout = SliceLayout<typename FragmentsOf<Key>::type, typename FragmentsOf<Value>::type>;
  if (body.split.entries == 0) return success();
  for (int first = 0; first < body.group; first += 8) {
    body.first_vector = near.first_vector = first;
    decode_kernel<Key, Value, limited><<<static_cast<unsigned>(body.split.blocks),
                                         32 * DecodeTuning<Key, Value, limited>::warps, Layout::table_bytes, stream>>>(body);
    decode_kernel<Plain, Plain, limited>
        <<<static_cast<unsigned>(near.split.blocks), 32 * DecodeTuning<Plain, Plain, limited>::warps, 0, stream>>>(near);
    const dim3 vectors(static_cast<unsigned>(body.split.entries), static_cast<unsigned>(body.vectors()));
    finish_kernel<Value><<<vectors, 32, 0, stream>>>(body, near, out);
  }
  const cudaError_t code = cudaGetLastError();
  return code == cudaSuccess ? success() : device_error(code, "attention could not be launched");
}

}  // namespace kvt::inline v0::cuda
