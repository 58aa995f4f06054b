// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// BlockEncoder:    a block of any codec, encoded by one block of threads. Caches do so.
// encode_blocks(): many of them, for those who keep blocks by themselves.
//
// Bytes are laid out as the host does it. They are the host's own where those do not depend on the lane group (Dense, GroupInt,
// PerChannelInt, Trellis, and Shifted of these); LloydMax sums up a row in another order, and the last bit of a scale or a code
// at a border may differ; for LowRank see low_rank_work.hpp.
// A BlockEncoder has:
//   warps      of a block of threads; more have nothing to do
//   Shared     memory that they share
//   Memory     more of it, which may be too large for a static size; may be empty
//   encode(block, codec, rows, n, out, shared, memory)
//              encodes rows [n, head_dim] of finite numbers, n in 1 .. max_rows, into out [codec.max_block_bytes(n)]. Rows and
//              `out` are memory that all threads see; rows are overwritten. Returns the bytes, the same on every thread.
//              Afterwards rows, shared and memory may be used again at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "kvtailor/codec/kv_codec.hpp"
#include "kvtailor/codec/per_channel_int.hpp"
#include "kvtailor/codec/rotated.hpp"
#include "kvtailor/codec/shifted.hpp"
#include "kvtailor/core/device.hpp"

namespace kvt::inline v0 {

template <class Codec, int max_rows>
struct BlockEncoder;
template <class Codec>
concept HasBlockEncoder = requires {
  sizeof(BlockEncoder<Codec, 1>);
};

namespace detail {

inline constexpr int most_encoder_warps = 16;

// Memory for any one of some types, none of which has to be constructed.
template <class... Types>
struct RoomFor {
  alignas(Types...) std::byte bytes[std::max({sizeof(Types)...})];
  template <class T>
  KVT_HD T& as() {
    return *reinterpret_cast<T*>(bytes);
  }
};

}  // namespace detail

// Rows that are encoded one by one: a warp each, as many at once as have room.
template <LaneRowCodec Codec, int max_rows>
struct BlockEncoder<Codec, max_rows> {
  static constexpr int warps = std::clamp(8704 / Codec::scratch_floats, 1, detail::most_encoder_warps);
  struct Shared {};
  struct Memory {
    float scratch[warps][Codec::scratch_floats];
  };

  template <class Block>
  KVT_HD static int encode(const Block& block, const Codec& codec, float* rows, int n, std::byte* out, Shared&,
                           Memory& memory) {
    static_assert(Block::warps >= warps);
    block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
      if (warp >= warps) return;
      for (int row = warp; row < n; row += warps) {
        codec.encode_row(lanes, rows + row * Codec::head_dim, out, n, row, memory.scratch[warp]);
      }
    });
    return codec.max_block_bytes(n);
  }
};

template <int bits, int dim, int max_rows>
struct BlockEncoder<PerChannelInt<bits, dim>, max_rows> {
  static constexpr int warps = detail::most_encoder_warps;
  struct Shared {};
  struct Memory {};

  template <class Block>
  KVT_HD static int encode(const Block& block, const PerChannelInt<bits, dim>& codec, float* rows, int n, std::byte* out,
                           Shared&, Memory&) {
    return codec.encode(block, rows, n, out);
  }
};

template <class Codec, int max_rows>
struct BlockEncoder<Shifted<Codec>, max_rows> {
  using Rest = BlockEncoder<Codec, max_rows>;
  static constexpr int warps = Rest::warps;
  using Shared = typename Rest::Shared;
  using Memory = typename Rest::Memory;

  template <class Block>
  KVT_HD static int encode(const Block& block, const Shifted<Codec>& codec, float* rows, int n, std::byte* out, Shared& shared,
                           Memory& memory) {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        for (int d = warp * Lanes::size + lane; d < Codec::head_dim; d += Block::warps * Lanes::size) {
          Shifted<Codec>::shift(rows, n, d, out);
        }
      });
    });
    constexpr int mean_bytes = Shifted<Codec>::mean_bytes;
    return mean_bytes + Rest::encode(block, codec.codec, rows, n, out + mean_bytes, shared, memory);
  }
};

// Of a codec whose rows share something; others rotate a row before they encode it.
template <class Codec, int max_rows>
requires(!LaneRowCodec<Rotated<Codec>>) struct BlockEncoder<Rotated<Codec>, max_rows> {
  using Plain = BlockEncoder<Codec, max_rows>;
  static constexpr int warps = Plain::warps;
  using Shared = typename Plain::Shared;
  union Memory {
    float row[warps][Codec::head_dim];
    typename Plain::Memory plain;
  };

  template <class Block>
  KVT_HD static int encode(const Block& block, const Rotated<Codec>& codec, float* rows, int n, std::byte* out, Shared& shared,
                           Memory& memory) {
    detail::load_rows<Rotated<Codec>>(block, rows, n, memory.row, rows);
    return Plain::encode(block, codec, rows, n, out, shared, memory.plain);
  }
};

template <class... Codecs, int max_rows>
struct BlockEncoder<OneOf<Codecs...>, max_rows> {
  static constexpr int warps = std::max({BlockEncoder<Codecs, max_rows>::warps...});
  using Shared = detail::RoomFor<typename BlockEncoder<Codecs, max_rows>::Shared...>;
  using Memory = detail::RoomFor<typename BlockEncoder<Codecs, max_rows>::Memory...>;

  template <class Block>
  KVT_HD static int encode(const Block& block, const OneOf<Codecs...>& codec, float* rows, int n, std::byte* out,
                           Shared& shared, Memory& memory) {
    return codec.visit([&](const auto& chosen) {
      using Own = BlockEncoder<std::remove_cvref_t<decltype(chosen)>, max_rows>;
      return Own::encode(block, chosen, rows, n, out, shared.template as<typename Own::Shared>(),
                         memory.template as<typename Own::Memory>());
    });
  }
};

// A block of threads for each block of rows. T is Half, BFloat16 or float.
template <class Codec, int max_rows, class T>
struct EncodeBlocksWork {
  using Encoder = BlockEncoder<Codec, max_rows>;
  using Shared = typename Encoder::Shared;
  using Memory = typename Encoder::Memory;
  static constexpr int dim = Codec::head_dim, warps = Encoder::warps, blocks = 1,
                       dynamic_bytes = static_cast<int>(sizeof(Memory));
  static_assert(dynamic_bytes <= 152 << 10, "a multiprocessor of the A100 has no room for blocks of so many rows");

  Codec codec;
  const T* rows;   // [blocks, n, dim]
  float* scratch;  // [blocks, n, dim]
  int n;
  std::byte* out;  // block i at i * stride
  long long stride;
  int* bytes;  // [blocks], of each block

  template <class Block>
  KVT_HD void operator()(const Block& block, int index, Shared& shared, std::byte* dynamic) const {
    using Lanes = typename Block::Lanes;
    const T* const from = rows + static_cast<long long>(index) * n * dim;
    float* const own = scratch + static_cast<long long>(index) * n * dim;
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        for (int i = warp * Lanes::size + lane; i < n * dim; i += warps * Lanes::size) own[i] = to_float(from[i]);
      });
    });
    const int size = Encoder::encode(block, codec, own, n, out + index * stride, shared, *reinterpret_cast<Memory*>(dynamic));
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp == 0) lanes.once([&] { bytes[index] = size; });
    });
  }
};

// Encodes `blocks` blocks of n <= max_rows rows each, all in memory of the device: rows [blocks, n, head_dim]; block i to
// out + i * stride, its size to bytes[i]; scratch [blocks, n, head_dim]. stride >= codec.max_block_bytes(n). Rows are finite
// and no longer than codec.max_row_norm(), as on the host; others come back finite.
template <int max_rows, class Codec, class T, class Device>
Status encode_blocks(Device& device, const Codec& codec, const T* rows, int blocks, int n, float* scratch, std::byte* out,
                     long long stride, int* bytes) {
  KVT_TRY(validate(codec));
  if (blocks < 0 || n < 1 || n > max_rows)
    return error(Errc::bad_shape, "blocks of {} rows; {} is the most", static_cast<double>(n), max_rows);
  if (stride < codec.max_block_bytes(n))
    return error(Errc::bad_shape, "{} bytes for blocks that may take {}", static_cast<double>(stride),
                 static_cast<double>(codec.max_block_bytes(n)));
  return device.launch(EncodeBlocksWork<Codec, max_rows, T>{codec, rows, scratch, n, out, stride, bytes}, blocks);
}

}  // namespace kvt::inline v0
