// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// BlockLanes: a warp that multiplies rows of a block by tensor cores, for codecs whose rows share something.
//
// Such a codec hands its residual to the lanes it was given, and rows ask these whether they can do better than one row after
// another: see RowCodec. The block lies in memory that the warp shares, as the host has it. Sixteen rows at a time, a lane
// takes its strings out of tiles, or out of the rows after the last tile: see CodeStrings.
//
// Error: as DecodeWarp's.
#pragma once

#include "kvtailor/attend/code_strings.hpp"
#include "kvtailor/attend/decode_warp.hpp"
#include "kvtailor/codec/rotated.hpp"
#include "kvtailor/codec/shifted.hpp"

namespace kvt::inline v0 {

template <PlainCodec Residual>
struct LowRank;  // whose header takes long to compile

namespace detail {

// The rows of a block of a codec that tensor cores read, or void.
template <class Codec>
struct TensorRows {
  using type = void;
};
template <int bits, int dim, int window, class Scale>
requires(Trellis<bits, dim, window, Scale>::tiled&& dim % 16 == 0 && dim * bits / 8 >= window - bits &&
         window > bits) struct TensorRows<Trellis<bits, dim, window, Scale>> {
  using type = Trellis<bits, dim, window, Scale>;
};
template <int bits, int dim, NormCorrection correction, class Scale>
requires(LloydMax<bits, dim, correction, Scale>::tiled&& dim % 16 == 0 &&
         (bits == 1 || bits == 2 || bits == 4)) struct TensorRows<LloydMax<bits, dim, correction, Scale>> {
  using type = LloydMax<bits, dim, correction, Scale>;
};
template <class Codec>
struct TensorRows<Rotated<Codec>> : TensorRows<Codec> {};
template <class Codec>
struct TensorRows<Shifted<Codec>> : TensorRows<Codec> {};
template <class Codec>
struct TensorRows<LowRank<Codec>> : TensorRows<Codec> {};

}  // namespace detail

template <class Codec>
using TensorRowsOf = typename detail::TensorRows<Codec>::type;

// Rows: codes that have strings.
template <class Base, class Rows>
struct BlockLanes : Base {
  static constexpr int dim = Rows::head_dim, across = dim / 16;
  template <class T>
  using Reg = typename Base::template Reg<T>;
  using Keys = CodeStrings<Rows, true>;
  using Values = CodeStrings<Rows, false>;

  const std::byte* table;              // filled with copies of its entries
  const QueryFragments<dim>* queries;  // of keys: those that logits_of() is given, packed for Keys

  // As Rows::logits(), of up to eight vectors.
  KVT_HD void logits_of(const Rows&, const std::byte* block, int n, const float*, int m, float* out, int stride) const {
    const Place<Keys> place(lanes(), block, n);
    KVT_LOOP_ON_DEVICE
    for (int first = 0; first < n; first += 16) {
      Reg<std::uint32_t> string[Keys::strings][words<Keys>];
      load<Keys>(place, n, first, string);
      Reg<Float4> logit = map(lanes(), [](int) { return Float4{{0, 0, 0, 0}}; });
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < across; ++k) {
        Reg<std::uint32_t> a[4];
        unpack<Keys>(string, k, a);
        const auto part = [&](int i) { return map(lanes(), [&](int lane) { return queries->word[k][i][lane]; }); };
        mma(lanes(), logit, a, part(0), part(1));
      }
      map(
          lanes(),
          [&](int lane, const Float4& x) {
            for (int i = 0; i < 4; ++i) {
              const int row = first + lane / 4 + i / 2 * 8, vector = lane % 4 * 2 + i % 2;
              if (row >= n || vector >= m) continue;
              out[vector * stride + row] = x.x[i] * (queries->unit[vector] * Keys::unit) * scale_of(block, row);
            }
            return 0;
          },
          logit);
    }
    this->each([](int) {});  // what lanes have written is for all
  }
  // As Rows::accumulate(), of up to eight vectors. Weights are at most 1: times a scale they are numbers of fp16.
  KVT_HD void accumulate_of(const Rows&, const std::byte* block, int n, const float* weights, int m, int stride,
                            float* acc) const {
    Reg<Float4> sum[across];
    KVT_UNROLL_ON_DEVICE
    for (auto& each : sum) each = map(lanes(), [](int) { return Float4{{0, 0, 0, 0}}; });
    const Place<Values> place(lanes(), block, n);
    KVT_LOOP_ON_DEVICE
    for (int first = 0; first < n; first += 16) {
      Reg<std::uint32_t> string[Values::strings][words<Values>];
      load<Values>(place, n, first, string);
      const auto part = [&](int i) {
        return map(lanes(), [&](int lane) {
          const auto weight = [&](int row) {
            return row < n && lane / 4 < m ? weights[lane / 4 * stride + row] * scale_of(block, row) : 0.f;
          };
          const int row = first + 2 * (lane % 4) + 8 * i;
          return pack_halves(weight(row), weight(row + 1));
        });
      };
      const Reg<std::uint32_t> weight[2] = {part(0), part(1)};
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < across; ++k) {
        Reg<std::uint32_t> a[4];
        unpack<Values>(string, k, a);
        mma(lanes(), sum[k], a, weight[0], weight[1]);
      }
    }
    this->each([](int) {});  // other lanes have written what is added to
    KVT_UNROLL_ON_DEVICE
    for (int k = 0; k < across; ++k) {
      map(
          lanes(),
          [&](int lane, const Float4& x) {
            for (int i = 0; i < 4; ++i) {
              const int vector = lane % 4 * 2 + i % 2;
              if (vector < m) acc[vector * dim + Values::template place<false>(lane, k, i / 2, 0).dim] += x.x[i] * Values::unit;
            }
            return 0;
          },
          sum[k]);
    }
    this->each([](int) {});
  }

 private:
  // Of a string, and of what follows it.
  template <class Strings>
  static constexpr int words = (Strings::string_bits + Strings::reach + 31) / 32;

  KVT_HD KVT_INLINE const Base& lanes() const { return *this; }

  template <class Strings>
  KVT_HD KVT_INLINE void unpack(const Reg<std::uint32_t> (&string)[Strings::strings][words<Strings>], int k,
                                Reg<std::uint32_t> (&a)[4]) const {
    Strings::unpack_strings(
        lanes(), [&](int r, int m) KVT_INLINE_LAMBDA { return string[r][m < words<Strings> ? m : 0]; }, k, table, a);
  }
  // Where a lane finds its strings, of any rows.
  template <class Strings>
  struct Place {
    static constexpr int count = words<Strings> + (Strings::string_bits % 32 == 0 ? 0 : 1);  // words that hold one
    const std::byte* codes;
    Reg<int> word[count];  // bytes from a row's first word in a tile; the ring is closed

    KVT_HD KVT_INLINE Place(const Base& lanes, const std::byte* block, int n) : codes(block + Rows::scale_bytes * n) {
      constexpr int ring_words = Rows::code_bytes / 4;
      KVT_UNROLL_ON_DEVICE
      for (int w = 0; w < count; ++w) {
        word[w] = map(lanes, [w](int lane) {
          return (Strings::part_of(lane) * Strings::string_bits / 32 + w) % ring_words * 4 * Rows::tile_rows;
        });
      }
    }
  };
  // Strings of the rows from `first` on; in place of those that are not there, the last one's.
  template <class Strings>
  KVT_HD KVT_INLINE void load(const Place<Strings>& place, int n, int first,
                              Reg<std::uint32_t> (&to)[Strings::strings][words<Strings>]) const {
    constexpr bool whole_words = Strings::string_bits % 32 == 0;
    Reg<std::uint32_t> from[Strings::strings][Place<Strings>::count];
    const auto each = [&](auto at) KVT_INLINE_LAMBDA {
      KVT_UNROLL_ON_DEVICE
      for (int r = 0; r < Strings::strings; ++r) {
        KVT_UNROLL_ON_DEVICE
        for (int w = 0; w < Place<Strings>::count; ++w) {
          from[r][w] = map(
              lanes(), [&](int lane, int word) { return word_at(at(lane, r, word)); }, place.word[w]);
        }
      }
    };
    if (first + 16 <= n) {  // tiles, whose rows are constants apart
      const std::byte* const tiles = place.codes + first * Rows::code_bytes;
      each([&](int lane, int r, int word) KVT_INLINE_LAMBDA {
        const int row = Strings::row_of(lane, r) - Strings::row_of(lane, 0), tile = row / Rows::tile_rows;
        return tiles + (4 * Strings::row_of(lane, 0) + word) +
               (tile * Rows::tile_rows * Rows::code_bytes + row % Rows::tile_rows * 4);
      });
    } else {
      each([&](int lane, int r, int word) KVT_INLINE_LAMBDA {
        const int wanted = first + Strings::row_of(lane, r), row = wanted < n ? wanted : n - 1;
        const int tile = row / Rows::tile_rows * Rows::tile_rows;
        const bool in_tile = tile + Rows::tile_rows <= n;
        return place.codes +
               (in_tile ? tile * Rows::code_bytes + 4 * (row - tile) + word : row * Rows::code_bytes + word / Rows::tile_rows);
      });
    }
    KVT_UNROLL_ON_DEVICE
    for (int r = 0; r < Strings::strings; ++r) {
      KVT_UNROLL_ON_DEVICE
      for (int m = 0; m < words<Strings>; ++m) {
        if constexpr (whole_words) {
          to[r][m] = from[r][m];
        } else {
          to[r][m] = map(
              lanes(),
              [](int lane, std::uint32_t low, std::uint32_t high) {
                return shift_right(low, high, Strings::part_of(lane) * Strings::string_bits % 32);
              },
              from[r][m], from[r][m + 1]);
        }
      }
    }
  }
  // Scales of a byte may leave codes anywhere. What follows is read too, and is memory of the warp.
  KVT_HD KVT_INLINE static std::uint32_t word_at(const std::byte* at) {
#if defined(__CUDA_ARCH__)
    const unsigned place = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(at)) % 4;
    const auto* const words = reinterpret_cast<const std::uint32_t*>(at - place);
    return shift_right(words[0], words[1], static_cast<int>(8 * place));
#else
    std::uint32_t word;
    std::memcpy(&word, at, sizeof word);
    return word;
#endif
  }
  // Of a row, without the unit of its codes.
  KVT_HD KVT_INLINE static float scale_of(const std::byte* block, int row) {
    typename Keys::Scale scale;
    std::memcpy(&scale, block + Rows::scale_bytes * row, sizeof scale);
    return near_float(scale);
  }
};

}  // namespace kvt::inline v0
