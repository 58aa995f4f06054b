// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What codecs share.
//   PlainBasis  of those that store rows in the basis they come in
//   RowCodec    of those whose rows decode one by one: the layout of a block, and attention on it, on every lane group
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kvtailor/codec/integer_rows.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/geometry.hpp"
#include "kvtailor/core/half.hpp"
#include "kvtailor/core/lanes.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

template <int head_dim, int lanes>
KVT_HD KVT_INLINE float lane_dot(const LaneRow<head_dim, lanes>& row, const float* q, int lane) {
  if constexpr (lanes == 1) {
    return dot<head_dim>(row.x, q);
  } else {
    float total = 0;
    for (int i = 0; i < LaneRow<head_dim, lanes>::length; ++i) {
      const int d = i * lanes + lane;
      if (d < head_dim) total += row.x[i] * q[d];
    }
    return total;
  }
}

namespace detail {

KVT_HD KVT_INLINE int count_bits(std::uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __popc(x);
#else
  return std::popcount(x);
#endif
}

template <class Lanes>
KVT_HD KVT_INLINE void copy_bytes(const Lanes& lanes, const std::byte* from, int count, std::byte* to) {
  if constexpr (Lanes::size == 1) {
    std::memcpy(to, from, static_cast<std::size_t>(count));
  } else {
    lanes.each([&](int lane) {
      for (int i = lane; i < count; i += Lanes::size) to[i] = from[i];
    });
  }
}

// f(row, how many marked rows are before it) of each marked row of n, a lane each; returns how many there are.
template <class Lanes, class F>
KVT_HD KVT_INLINE int each_marked(const Lanes& lanes, const unsigned char* marks, int n, F&& f) {
  int done = 0;
  for (int first = 0; first < n; first += Lanes::size) {
    const std::uint32_t marked = lanes.ballot([&](int lane) { return first + lane < n && marks[first + lane] != 0; });
    lanes.each([&](int lane) {
      if ((marked >> lane & 1) != 0) f(first + lane, done + count_bits(marked & ((1u << lane) - 1)));
    });
    done += count_bits(marked);
  }
  return done;
}
template <class Lanes>
KVT_HD KVT_INLINE int count_marked(const Lanes& lanes, const unsigned char* marks, int n) {
  return each_marked(lanes, marks, n, [](int, int) {});
}

}  // namespace detail

namespace detail {

// Lanes that attend to blocks of rows by themselves.
template <class Lanes, class Rows>
concept ReadsRows = requires(const Lanes& lanes, const Rows& rows, const std::byte* block, const float* in, float* out) {
  lanes.logits_of(rows, block, 1, in, 1, out, 1);
  lanes.accumulate_of(rows, block, 1, in, 1, 1, out);
};

}  // namespace detail

template <int dim>
struct PlainBasis {
  static_assert(is_supported_head_dim(dim), "head_dim must be 40, 64, 80, 96, 112, 128, 192, 256 or 512");
  static constexpr bool plain = true;
  static constexpr int head_dim = dim;
  static constexpr int max_block_rows = 1 << 16;

  template <class Lanes>
  KVT_HD void prepare(const Lanes& lanes, const float* q, float scale, float* prepared) const noexcept {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) prepared[d] = q[d] * scale;
    });
  }
  template <class Lanes>
  KVT_HD void finish(const Lanes& lanes, float* acc, float* out) const noexcept {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) out[d] += acc[d];
    });
  }
};

// A codec that can store what a rotation gives it.
template <class C>
concept PlainCodec = StorageCodec<C> && C::plain;

// A block of n rows is scale_bytes of each row, then code_bytes of each row. Those of eight rows are a tile, if the codec is
// `tiled`: words of four bytes of the first row, the second, ..., the eighth, then the next word of each; see tile_place().
// Rows that are left after the last tile lie one after the other. So a register takes the same elements of eight rows, and a
// row of a block of its own is whole. Self supplies
//   load<lanes>(block, n, row, lane, LaneRow&)         a row without its scale
//   row_scale(block, row)
//   encode_row(lanes, x, block, n, row, scratch)       row x [dim] by all lanes; scratch [scratch_floats] is memory all lanes
//                                                      see and may begin with x
// Rows are `basis` elements in the codec's basis; a codec with more than dim of them decodes for itself. One whose elements are
// small integers times a scale may have a type Integers, made of (block, n), and the host attends to those: see
// integer_rows.hpp. Lanes that know how to read its rows attend to them by themselves: see BlockLanes.
template <class Self, int dim, int scale_size, int code_size, int basis = dim>
struct RowCodec : PlainBasis<dim> {
  static constexpr int scale_bytes = scale_size, code_bytes = code_size, row_bytes = scale_bytes + code_bytes;
  static constexpr int tile_rows = 8;
  static constexpr bool tiled = code_bytes % 4 == 0;
  static constexpr int tile_unit = 4;  // bytes of a row that stay together in a tile
  // Where byte j of a row's codes lies in a tile.
  KVT_HD static constexpr int tile_place(int j, int row) { return (j / 4 * tile_rows + row) * 4 + j % 4; }
  static constexpr int scratch_floats = dim;  // Self may ask for more

  KVT_HD constexpr int max_block_bytes(int n) const { return n * row_bytes; }
  int encode(const float* rows, int n, std::byte* block) const {
    float scratch[Self::scratch_floats];
    for (int row = 0; row < n; ++row) {
      self().encode_row(Serial{}, rows + static_cast<long long>(row) * dim, block, n, row, scratch);
    }
    return n * row_bytes;
  }
  KVT_HD void decode(const std::byte* block, int n, int row, float* out) const noexcept requires(basis == dim) {
    LaneRow<dim, 1> x;
    self().template load<1>(block, n, row, 0, x);
    const float scale = self().row_scale(block, row);
    for (int d = 0; d < dim; ++d) out[d] = x.x[d] * scale;
  }
  KVT_HD void copy_row(const std::byte* from, int n, int row, std::byte* to, int to_n, int to_row) const noexcept {
    std::memcpy(to + scale_bytes * to_row, from + scale_bytes * row, scale_bytes);
    copy_codes(code_bytes_of(from, n, row), code_bytes_of(to, to_n, to_row));
  }
  // The same by all lanes.
  template <class Lanes>
  KVT_HD void copy_row(const Lanes& lanes, const std::byte* from, int n, int row, std::byte* to, int to_n, int to_row) const {
    const auto target = code_bytes_of(to, to_n, to_row);
    const auto source = code_bytes_of(from, n, row);
    lanes.each([&](int lane) {
      for (int k = lane; k < scale_bytes; k += Lanes::size) to[scale_bytes * to_row + k] = from[scale_bytes * row + k];
      for (int k = lane; k < code_bytes; k += Lanes::size) target[k] = source[k];
    });
  }
  // Packs the marked rows of a block into `to`; returns the bytes they take.
  int erase(const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    return erase(Serial{}, block, n, keep, to);
  }
  // The same by all lanes, which see both blocks. Each copies rows of its own: in tiles those of eight lanes lie side by side.
  template <class Lanes>
  KVT_HD int erase(const Lanes& lanes, const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    const int kept = detail::count_marked(lanes, keep, n);
    detail::each_marked(lanes, keep, n, [&](int row, int next) { copy_row(block, n, row, to, kept, next); });
    return kept * row_bytes;
  }

  // A row in the codec's basis, out [basis]: its first dim elements are the row turned, if at all.
  template <class Lanes>
  KVT_HD void row_of(const Lanes& lanes, const std::byte* block, int n, int row, float* out) const noexcept {
    const float scale = self().row_scale(block, row);
    lanes.each([&](int lane) {
      LaneRow<basis, Lanes::size> x;
      self().template load<Lanes::size>(block, n, row, lane, x);
      for (int d = lane; d < basis; d += Lanes::size) out[d] = scale * x.x[d / Lanes::size];
    });
    if constexpr (basis != dim) self().to_rotated(lanes, out);
  }

  template <class Lanes>
  KVT_HD void logits(const Lanes& lanes, const std::byte* block, int n, const float* prepared, int m, float* out,
                     int stride) const noexcept {
#if defined(KVT_HOST_AVX2)
    if constexpr (Lanes::size == 1 && Self::tiled && requires { typename Self::Integers; }) {
      using Integers = typename Self::Integers;
      lanes.template reads_tile<scale_bytes * detail::most_integer_rows>(block);
      return detail::integer_logits(self(), lanes, Integers{block, n}, n, prepared, m, out, stride);
    }
#endif
    if constexpr (detail::ReadsRows<Lanes, Self>) {
      return lanes.logits_of(self(), block, n, prepared, m, out, stride);
    }
    if (m < 1) return;  // and compilers need not ask again for each row
    const std::byte* const codes = block + scale_bytes * n;
    const ReadAhead<Lanes, code_bytes> ahead(lanes, codes, n);
    int row = 0;
    for (int stretch = 0; stretch < ahead.stretches; ++stretch) {
      for (; row < ahead.end[stretch]; ++row) {
        ahead.template ask<1>(codes + static_cast<long long>(row) * code_bytes, stretch);
        typename Lanes::template Reg<LaneRow<basis, Lanes::size>> x;
        lanes.each([&](int lane) { self().template load<Lanes::size>(block, n, row, lane, x[lane]); });
        const float scale = self().row_scale(block, row);
        for (int j = 0; j < m; ++j) {
          typename Lanes::template Reg<float> part;
          lanes.each([&](int lane) { part[lane] = lane_dot(x[lane], prepared + j * basis, lane); });
          const float logit = lanes.sum(part) * scale;
          lanes.once([&] { out[j * stride + row] = logit; });
        }
      }
    }
  }
  template <class Lanes>
  KVT_HD void accumulate(const Lanes& lanes, const std::byte* block, int n, const float* weights, int m, int stride,
                         float* acc) const noexcept {
#if defined(KVT_HOST_AVX2)
    if constexpr (Lanes::size == 1 && Self::tiled && requires { typename Self::Integers; }) {
      using Integers = typename Self::Integers;
      lanes.template reads_tile<scale_bytes * detail::most_integer_rows>(block);
      return detail::integer_sums(self(), lanes, Integers{block, n}, n, weights, m, stride, acc);
    }
#endif
    if constexpr (detail::ReadsRows<Lanes, Self>) {
      return lanes.accumulate_of(self(), block, n, weights, m, stride, acc);
    }
    if (m < 1) return;
    int row = 0;
    if constexpr (Lanes::size == 1) {
      // Four rows for each pass over the sums, which are read and written less often.
      const std::byte* const codes = block + scale_bytes * n;
      const ReadAhead<Lanes, code_bytes> ahead(lanes, codes, n / 4 * 4);
      for (int stretch = 0; stretch < ahead.stretches; ++stretch) {
        for (; row < ahead.end[stretch]; row += 4) {
          ahead.template ask<4>(codes + static_cast<long long>(row) * code_bytes, stretch);
          alignas(64) LaneRow<basis, 1> x[4];
          KVT_UNROLL
          for (int r = 0; r < 4; ++r) self().template load<1>(block, n, row + r, 0, x[r]);
          float scale[4];
          for (int r = 0; r < 4; ++r) scale[r] = self().row_scale(block, row + r);
          for (int j = 0; j < m; ++j) {
            const float* const w = weights + j * stride + row;
            const float weight[4] = {w[0] * scale[0], w[1] * scale[1], w[2] * scale[2], w[3] * scale[3]};
            add_rows<basis>(acc + j * basis, weight, x[0].x, x[1].x, x[2].x, x[3].x);
          }
        }
      }
    }
    for (; row < n; ++row) {
      typename Lanes::template Reg<LaneRow<basis, Lanes::size>> x;
      lanes.each([&](int lane) { self().template load<Lanes::size>(block, n, row, lane, x[lane]); });
      const float scale = self().row_scale(block, row);
      for (int j = 0; j < m; ++j) {
        const float weight = weights[j * stride + row] * scale;
        float* const to = acc + j * basis;
        lanes.each([&](int lane) {
          for (int i = 0; i < LaneRow<basis, Lanes::size>::length; ++i) {
            const int d = i * Lanes::size + lane;
            if (basis % Lanes::size == 0 || d < basis) to[d] += weight * x[lane].x[i];
          }
        });
      }
    }
  }

 protected:
  // The codes of a row: byte j is [j]. They lie in a tile, or one after the other.
  template <class Byte>
  struct RowBytes {
    Byte* first;
    int row;  // of the tile; below zero if there is none
    KVT_HD KVT_INLINE Byte& operator[](int j) const { return first[row < 0 ? j : Self::tile_place(j, row)]; }
  };
  // A pointer, or RowBytes of a tiled codec.
  KVT_HD KVT_INLINE static auto code_bytes_of(const std::byte* block, int n, int row) {
    return bytes_of(reinterpret_cast<const unsigned char*>(block), n, row);
  }
  KVT_HD KVT_INLINE static auto code_bytes_of(std::byte* block, int n, int row) {
    return bytes_of(reinterpret_cast<unsigned char*>(block), n, row);
  }
  // The codes of a row, by units; in one piece where there are no tiles, whose bytes need not be whole units.
  template <class From, class To>
  KVT_HD KVT_INLINE static void copy_codes(const From& from, const To& to) {
    constexpr int unit = Self::tiled ? Self::tile_unit : code_bytes;
    for (int j = 0; j < code_bytes; j += unit) std::memcpy(&to[j], &from[j], unit);
  }
  // The codes of a row in one piece.
  struct OwnCodes {
    alignas(4) unsigned char bytes[code_bytes];
    KVT_HD KVT_INLINE OwnCodes(const std::byte* block, int n, int row) { copy_codes(code_bytes_of(block, n, row), +bytes); }
  };

#if defined(KVT_HOST_AVX2)
  // The tiles of a block of n rows. Rows after the last one are put into a tile, with zeros.
  class Tiles {
    alignas(32) unsigned char last_[tile_rows * code_bytes];

   public:
    static constexpr int tile_bytes = tile_rows * code_bytes;
    Tiles(const std::byte* from, int rows) : block(from), n(rows) {
      if (n % tile_rows == 0) return;
      std::memset(last_, 0, sizeof last_);
      for (int row = n / tile_rows * tile_rows; row < n; ++row) {
        const unsigned char* const own = plain(row);
        for (int j = 0; j < code_bytes; j += Self::tile_unit) {
          std::memcpy(last_ + Self::tile_place(j, row % tile_rows), own + j, Self::tile_unit);
        }
      }
    }
    KVT_INLINE const unsigned char* tile(int row) const { return row + tile_rows <= n ? plain(row) : last_; }

   protected:
    const std::byte* block;
    int n;

   private:
    KVT_INLINE const unsigned char* plain(int row) const {
      return reinterpret_cast<const unsigned char*>(block) + scale_bytes * n + static_cast<long long>(row) * code_bytes;
    }
  };
#endif

 private:
  template <class Byte>
  KVT_HD KVT_INLINE static auto bytes_of(Byte* block, int n, int row) {
    Byte* const first = block + scale_bytes * n;
    if constexpr (Self::tiled) {
      const int tile = row / tile_rows * tile_rows;
      if (tile + tile_rows <= n) return RowBytes<Byte>{first + static_cast<long long>(tile) * code_bytes, row % tile_rows};
      return RowBytes<Byte>{first + static_cast<long long>(row) * code_bytes, -1};
    } else {
      return first + static_cast<long long>(row) * code_bytes;
    }
  }
  KVT_HD KVT_INLINE const Self& self() const { return static_cast<const Self&>(*this); }
};

}  // namespace kvt::inline v0
