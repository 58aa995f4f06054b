// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Every kernel as an engine would instantiate it, for tools/kernel_report to look at. Nothing runs. On the host a list of their
// names: list_kernel<Work>() is there before.
#include "kvtailor/codec/turbo_quant.hpp"
#if defined(__CUDACC__)
#include "kvtailor/cuda/kv_cache.cuh"
#else
#include "kvtailor/store/device_kv_cache.hpp"
#endif
#include "kvtailor/select/key_diff.hpp"
#include "kvtailor/select/sink_recent.hpp"
#include "kvtailor/select/snap_kv.hpp"

namespace {

using namespace kvt;

template <int bits, int dim>
struct CodecOf {
  using type = TurboQuant<bits, dim>;
};
template <int dim>
struct CodecOf<16, dim> {
  using type = Dense<Half, dim>;
};

template <class Work>
void use([[maybe_unused]] const void** kernels) {
#if defined(__CUDACC__)
  kernels[0] = reinterpret_cast<const void*>(&cuda::work_kernel<Work>);
#else
  list_kernel<Work>();
#endif
}
template <int key_bits, int value_bits, int dim>
void use_pair(const void** kernels) {
  using Key = typename CodecOf<key_bits, dim>::type;
  using Value = typename CodecOf<value_bits, dim>::type;
  use<DecodeWork<Key, Value, false, 8, Half>>(kernels);
  use<DecodeWork<Key, Value, true, 8, Half>>(kernels);
  if constexpr (dim <= 128) use<DecodeWork<Key, Value, true, 16, Half>>(kernels);
  use<FinishWork<Value, Half>>(kernels);
  if constexpr (dim == 64 || dim == 128 || dim == 256) {  // these take a third of the registers there are, and long to compile
    use<AppendWork<Key, Value, Half>>(kernels);
    use<CutWork<Key, Value>>(kernels);
    use<TruncateWork<Key, Value>>(kernels);
    if constexpr (key_bits == value_bits) {  // look at keys only
      use<ScoreWork<Key, Value, KeyDiff>>(kernels);
      use<ScoreWork<Key, Value, SnapKv>>(kernels);
    }
    if constexpr (key_bits == 2) {  // copies bytes; looks at positions
      use<ForkWork<Key, Value>>(kernels);
      use<ScoreWork<Key, Value, SinkRecent>>(kernels);
    }
  }
}
template <int dim>
void use_dim(const void** kernels) {
  use_pair<1, 1, dim>(kernels);
  use_pair<2, 2, dim>(kernels);
  use_pair<3, 3, dim>(kernels);
  use_pair<4, 4, dim>(kernels);
  use_pair<5, 5, dim>(kernels);
  use_pair<6, 6, dim>(kernels);
  use_pair<3, 2, dim>(kernels);
  use_pair<4, 3, dim>(kernels);
  use_pair<16, 16, dim>(kernels);
}

}  // namespace

void use_kernels(const void** kernels) {
  use<CountWork<Half>>(kernels);
  use<MarkWork>(kernels);
  use<ObserveWork<Half>>(kernels);
  use<TruncateQueriesWork>(kernels);
  use<CopyQueriesWork>(kernels);
  use_dim<64>(kernels);
  use_dim<80>(kernels);
  use_dim<96>(kernels);
  use_dim<112>(kernels);
  use_dim<128>(kernels);
  use_dim<192>(kernels);
  use_dim<256>(kernels);
}
