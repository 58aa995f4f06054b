// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Every kernel as an engine would instantiate it, for tools/kernel_report to look at. Nothing runs. On the host a list of their
// names: list_kernel<Work>() is there before.
#include "kvtailor/codec/group_int.hpp"
#include "kvtailor/codec/kivi.hpp"
#include "kvtailor/codec/low_rank_work.hpp"
#include "kvtailor/codec/shifted.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant.hpp"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"
#if defined(__CUDACC__)
#include "kvtailor/cuda/kv_cache.cuh"
#else
#include "kvtailor/store/decode_plan.hpp"
#include "kvtailor/store/device_kv_cache.hpp"
#endif
#include "kvtailor/select/caote.hpp"
#include "kvtailor/select/chunk_kv.hpp"
#include "kvtailor/select/critical_kv.hpp"
#include "kvtailor/select/expected_attention.hpp"
#include "kvtailor/select/heavy_hitter.hpp"
#include "kvtailor/select/key_diff.hpp"
#include "kvtailor/select/key_norm.hpp"
#include "kvtailor/select/lag_kv.hpp"
#include "kvtailor/select/last_query.hpp"
#include "kvtailor/select/lava_score.hpp"
#include "kvtailor/select/leverage.hpp"
#include "kvtailor/select/reconstruction.hpp"
#include "kvtailor/select/sink_recent.hpp"
#include "kvtailor/select/snap_kv.hpp"
#include "kvtailor/select/value_norm.hpp"

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
template <class Key, class Value>
void use_decode(const void** kernels) {
  use<DecodeWork<Key, Value, false, 8, Half>>(kernels);
  use<DecodeWork<Key, Value, true, 8, Half>>(kernels);
  if constexpr (widest_decode<Key, Value> == 16) use<DecodeWork<Key, Value, true, 16, Half>>(kernels);
  use<FinishWork<Value, Half, typename LayoutOf<Key, Value>::Pages>>(kernels);
}
template <class Codec>
void use_rows(const void** kernels) {
  use<AppendWork<Codec, Half>>(kernels);
  use<CutWork<Codec>>(kernels);
}
template <class Codec>
void use_scores(const void** kernels) {
  use<ScoreWork<Codec, KeyDiff>>(kernels);
  use<ScoreWork<Codec, SnapKv>>(kernels);
}
// f.operator()<Selector>() of those that do more than KeyDiff and SnapKv: with values, RoPE, projections, moments.
template <class F>
void each_selector(F&& f) {
  f.template operator()<LastQuery>();
  f.template operator()<ValueNorm<KeyNorm>>();
  f.template operator()<CriticalKv<SnapKv>>();
  f.template operator()<Caote<SnapKv>>();
  f.template operator()<LavaScore>();
  f.template operator()<LagKv>();
  f.template operator()<Leverage>();
  f.template operator()<ExpectedAttention>();
  f.template operator()<HeavyHitter>();
  f.template operator()<Reconstruction>();
}
// Where rows lie as fragments, one by one with the longest there are, and in blocks.
using SelectedFragments = KvCodec<TurboQuant<3, 128>>;
using SelectedRows = KvCodec<TurboQuantUnbiased<3, 256>>;
using SelectedBlocks = KvCodec<KiviKeys<2, 64>, KiviValues<2, 64>>;
template <class Codec>
void use_selectors(const void** kernels) {
  each_selector([&]<class Selector>() { use<ScoreWork<Codec, Selector>>(kernels); });
  use<GiveWork<Codec, false>>(kernels);
  use<GiveWork<Codec, true>>(kernels);
  use<LayerEndsWork<Codec>>(kernels);
  use<MomentsWork<Half, Codec::head_dim>>(kernels);
}
template <int key_bits, int value_bits, int dim>
void use_pair(const void** kernels) {
  using Key = typename CodecOf<key_bits, dim>::type;
  using Value = typename CodecOf<value_bits, dim>::type;
  using Codec = KvCodec<Key, Value>;
  use_decode<Key, Value>(kernels);
  // These take a third of the registers there are, and long to compile. Keys and values come one after the other.
  if constexpr (key_bits == value_bits && (dim == 64 || dim == 128 || dim == 256)) {
    use_rows<Codec>(kernels);
    use_scores<Codec>(kernels);
    if constexpr (key_bits == 2) {  // copy bytes; look at positions
      use<TruncateWork<Codec>>(kernels);
      use<ForkWork<Codec>>(kernels);
      use<ScoreWork<Codec, SinkRecent>>(kernels);
      use<JoinWork<Codec, ChunkKv<KeyDiff>>>(kernels);
    }
  }
}
// Without fragments: most of what there is to do does not depend on the codec.
template <class Key, class Value = Key>
void use_plain(const void** kernels) {
  using Codec = KvCodec<Key, Value>;
  use_decode<Key, Value>(kernels);
  use_rows<Codec>(kernels);
  if constexpr (Key::head_dim >= 128) use_scores<Codec>(kernels);
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
// Between those: what takes the most registers, and rows without codes.
template <int dim>
void use_odd_dim(const void** kernels) {
  use_pair<4, 3, dim>(kernels);
  use_pair<6, 6, dim>(kernels);
  use_pair<16, 16, dim>(kernels);
}

// In blocks.
template <class Key, class Value = Key>
void use_blocks(const void** kernels) {
  using Codec = KvCodec<Key, Value, Half>;
  using Pages = typename LayoutOf<Key, Value>::Pages;
  use<CountWork<Half, Pages>>(kernels);
  use_decode<Key, Value>(kernels);
  use<AppendBlocksWork<Codec, Half>>(kernels);
  use<CutBlocksWork<Codec>>(kernels);
  use<MeasureBlocksWork<Codec>>(kernels);
  use<TruncateBlocksWork<Codec>>(kernels);
  use<ForkBlocksWork<Codec>>(kernels);
  use_scores<Codec>(kernels);
}
template <int bits, int dim>
using Short = LloydMax<bits, dim, NormCorrection::least_squares, LogScale>;
// Every kind of codec that heads may choose from.
template <int dim>
using Chosen = OneOf<Rotated<LowRank<Short<3, dim>>>, TurboQuantUnbiased<3, dim>, Rotated<Shifted<Short<2, dim>>>, Q8_0<dim>>;

template <class Residual>
void use_low_rank(const void** kernels) {
  use<EncodeBlocksWork<Rotated<LowRank<Residual>>, 128, Half>>(kernels);
}

}  // namespace

void use_kernels(const void** kernels) {
  use<CountWork<Half>>(kernels);
  use<MarkWork>(kernels);
  use<SafeRowsWork>(kernels);
  use<ShareRowsWork>(kernels);
  use<ObserveWork<Half>>(kernels);
  use<TruncateQueriesWork>(kernels);
  use<CopyQueriesWork>(kernels);
  use<CutGivenWork>(kernels);
  use<TruncateGivenWork>(kernels);
  use<CopyWordsWork>(kernels);
  use_selectors<SelectedFragments>(kernels);
  use_selectors<SelectedRows>(kernels);
  use_selectors<SelectedBlocks>(kernels);
  use_low_rank<LloydMax<2, 64>>(kernels);
  use_low_rank<Trellis<2, 128>>(kernels);
  use_low_rank<Trellis<4, 256>>(kernels);
  use_dim<64>(kernels);
  use_odd_dim<80>(kernels);
  use_odd_dim<96>(kernels);
  use_odd_dim<112>(kernels);
  use_dim<128>(kernels);
  use_odd_dim<192>(kernels);
  use_dim<256>(kernels);
  use_plain<Dense<float, 256>>(kernels);
  use_plain<Dense<BFloat16, 64>>(kernels);
  use_plain<Q8_0<128>, Q4_0<128>>(kernels);
  use_decode<Q5_0<128>, Q5_0<128>>(kernels);
  use_decode<Q4_1<128>, Rotated<Trellis<3, 128>>>(kernels);
  use_decode<TurboQuant<6, 128>, KiviValues<2, 128>>(kernels);
  use_decode<Q8_0<256>, Q4_1<256>>(kernels);
  use_plain<Rotated<Q4_1<64>>, Q5_0<64>>(kernels);
  use_plain<TurboQuant<4, 40>>(kernels);
  use_plain<TurboQuantUnbiased<3, 256>>(kernels);
  use_decode<Rotated<Trellis<2, 128, 6>>, Rotated<Trellis<2, 128, 6>>>(kernels);
  use_plain<Rotated<Trellis<2, 128>>>(kernels);
  use_decode<Rotated<Trellis<3, 128>>, TurboQuant<4, 128>>(kernels);
  use_decode<Rotated<Trellis<2, 64>>, Rotated<Trellis<1, 64>>>(kernels);
  use_decode<Rotated<Trellis<4, 256>>, Rotated<Trellis<3, 256>>>(kernels);
  use_blocks<Rotated<LowRank<Trellis<2, 128>>>, Rotated<LowRank<Short<2, 128>>>>(kernels);
  use_decode<Rotated<LowRank<Short<3, 64>>>, Rotated<Shifted<Trellis<2, 64, 6>>>>(kernels);
  use_blocks<KiviKeys<2, 64>, KiviValues<2, 64>>(kernels);
  use_blocks<Chosen<256>>(kernels);
}
