// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// GroupInt: equidistant levels, and one fp16 scale for 32 elements of a row.
//   Q4_0, Q4_1, Q5_0, Q5_1, Q8_0   ggml's formats of these names, byte for byte
//
// Block:   n rows of ceil(head_dim / 32) groups: Half scale; Half least, if asymmetric; then the codes, see IntCodes. If
//          head_dim is no multiple of 32 (ggml has no such rows), the last group is shorter: of 8 or 16 elements, laid out
//          alike. In tiles of eight rows, if head_dim is a multiple of 32: the fp16 numbers of the rows, for each group, one
//          after the other; then the codes, by words of four bytes.
// Value:   asymmetric  least + scale * code
//          symmetric   scale * (code - 2^(bits - 1)), where the element of largest magnitude, whatever its sign, has code 0
//          8 bits      symmetric: scale * code, code -127 .. 127 in two's complement
// Error:   of an element, half a step, and what fp16 does to the levels: 2^-11 of the largest magnitude in the group
//          (asymmetric: of |least| + largest - least), or 2^-25 of each fp16 number, times the code, where that is more.
//          Symmetric levels of fewer than 8 bits end a step before minus the largest, and elements there are up to a step off.
// Cost:    head_dim * bits / 8 bytes and 2 (symmetric) or 4 for each group. Codes are the same with and without FMA.
// Source:  ggml, quantize_row_*_ref.
#pragma once

#include <cmath>
#include <cstring>

#include "kvtailor/codec/int_codes.hpp"
#include "kvtailor/codec/row_wise.hpp"

namespace kvt::inline v0 {

enum class IntRange {
  symmetric,   // levels around zero
  asymmetric,  // levels from the least to the largest element
};

template <int bits, int dim, IntRange range>
struct GroupInt
    : RowCodec<GroupInt<bits, dim, range>, dim, 0, (dim + 31) / 32 * (range == IntRange::symmetric ? 2 : 4) + dim * bits / 8> {
  static constexpr bool symmetric = range == IntRange::symmetric;
  static constexpr int group_size = 32;
  static constexpr int last_size = dim % group_size;  // of the group that is shorter, if there is one
  static constexpr int header_bytes = symmetric ? 2 : 4;
  static constexpr int group_bytes = header_bytes + group_size * bits / 8;
  static constexpr bool tiled = last_size == 0;
  static constexpr int tile_unit = 2;
  KVT_HD static constexpr int tile_place(int j, int row) {
    const int group = j / group_bytes, at = j % group_bytes - header_bytes;  // below zero in the header
    if (at < 0) return ((group * header_bytes + at + header_bytes) / 2 * 8 + row) * 2 + j % 2;
    const int code = group * (group_bytes - header_bytes) + at;
    return tile_codes + (code / 4 * 8 + row) * 4 + code % 4;
  }

  // fp16 numbers of a row, a scale, or it and the least element, for each group, and byte k of them in a row alone.
  static constexpr int num_groups = (dim + group_size - 1) / group_size, scale_numbers = num_groups * header_bytes / 2;
  KVT_HD static constexpr int scale_at(int k) { return k / header_bytes * group_bytes + k % header_bytes; }
  // Codes of a row alone, and the element that one stands for, by byte k of the numbers.
  KVT_HD static int code_at(const unsigned char* row, int d) {
    const unsigned char* const codes = row + d / group_size * group_bytes + header_bytes;
    return d < dim - last_size ? Codes<group_size>::at(codes, d % group_size) : Codes<last_codes>::at(codes, d % group_size);
  }
  static void set_codes(const int* codes, unsigned char* row) {
    float whole[dim];
    for (int d = 0; d < dim; ++d) whole[d] = static_cast<float>(codes[d]);
    for (int g = 0; g < num_groups; ++g) {
      unsigned char* const to = row + g * group_bytes + header_bytes;
      g < dim / group_size ? Codes<group_size>::pack(Serial{}, whole + g * group_size, to)
                           : Codes<last_codes>::pack(Serial{}, whole + g * group_size, to);
    }
  }
  template <class Numbers>
  KVT_HD static float value_of(int code, Numbers&& byte, int d) {
    unsigned char header[header_bytes];
    for (int j = 0; j < header_bytes; ++j) header[j] = byte(d / group_size * header_bytes + j);
    return Header(header).value(code);
  }

  // Scale and least element must fit in fp16.
  static constexpr double max_row_norm() {
    return static_cast<double>(Half::max) * (!symmetric ? 1 : bits == 8 ? 127 : 1 << (bits - 1));
  }

  template <class Lanes>
  KVT_HD void encode_row(const Lanes& lanes, const float* x, std::byte* block, int n, int row, float* scratch) const {
    const auto to = GroupInt::code_bytes_of(block, n, row);
    const auto group = [&](int first) { return GroupBytes<decltype(to)>{to, first / group_size * group_bytes}; };
    for (int g = 0; g < dim / group_size; ++g) {
      encode_group<group_size>(lanes, x + g * group_size, group(g * group_size), scratch + g * group_size);
    }
    if constexpr (last_size > 0) {
      constexpr int first = dim - last_size;
      encode_group<last_size>(lanes, x + first, group(first), scratch + first);
    }
  }

  template <int lanes>
  KVT_HD KVT_INLINE void load(const std::byte* block, int n, int row, int lane, LaneRow<dim, lanes>& to) const {
    if constexpr (lanes == 1) {
      const typename GroupInt::OwnCodes own(block, n, row);
      for (int g = 0; g < dim / group_size; ++g) load_group<group_size>(own.bytes + g * group_bytes, to.x + g * group_size);
      if constexpr (last_size > 0) {
        constexpr int first = dim - last_size;
        load_group<last_size>(own.bytes + first / group_size * group_bytes, to.x + first);
      }
    } else {
      const auto from = GroupInt::code_bytes_of(block, n, row);
      for (int i = 0; i < LaneRow<dim, lanes>::length; ++i) {
        const int d = i * lanes + lane;
        const GroupBytes<decltype(from)> group{from, d / group_size * group_bytes};
        const GroupBytes<decltype(from)> codes{from, group.first + header_bytes};
        if (d < dim - last_size) {
          to.x[i] = Header(group).value(Codes<group_size>::at(codes, d % group_size));
        } else if (d < dim) {
          if constexpr (last_size > 0) to.x[i] = Header(group).value(Codes<last_size>::at(codes, d % group_size));
        } else {
          to.x[i] = 0;
        }
      }
    }
  }
  KVT_HD KVT_INLINE float row_scale(const std::byte*, int) const { return 1.f; }

 private:
  template <int n>
  using Codes = detail::IntCodes<bits, n>;
  using Levels = detail::IntLevels<bits>;
  static constexpr int half = 1 << (bits - 1), last_codes = last_size > 0 ? last_size : group_size;
  static constexpr int tile_codes = dim / group_size * header_bytes * 8;  // where those of a tile begin

  // The bytes of a row from `first` on.
  template <class Bytes>
  struct GroupBytes {
    Bytes bytes;
    int first;
    KVT_HD KVT_INLINE auto& operator[](int j) const { return bytes[first + j]; }
  };
  struct Header {
    float scale, least = 0;

    template <class Bytes>
    KVT_HD KVT_INLINE explicit Header(const Bytes& group) : scale(number(group, 0)) {
      if constexpr (!symmetric) least = number(group, 2);
    }
    template <class Bytes>
    KVT_HD KVT_INLINE static float number(const Bytes& group, int at) {
      return to_float(Half{static_cast<std::uint16_t>(group[at] | group[at + 1] << 8)});
    }
    // The product is exact, so it does not matter whether it is fused with the sum.
    KVT_HD KVT_INLINE float value(int code) const {
      if constexpr (!symmetric) {
        return static_cast<float>(code) * scale + least;
      } else if constexpr (bits == 8) {
        return static_cast<float>((code ^ half) - half) * scale;
      } else {
        return static_cast<float>(code - half) * scale;
      }
    }
  };
  template <int n>
  KVT_HD KVT_INLINE static void load_group(const unsigned char* group, float* x) {
    int code[n];
    Codes<n>::unpack(group + header_bytes, code);
    const Header header(group);
    for (int i = 0; i < n; ++i) x[i] = header.value(code[i]);
  }

  template <int n, class Lanes, class Bytes>
  KVT_HD static void encode_group(const Lanes& lanes, const float* x, const GroupBytes<Bytes>& to, float* scratch) {
    const auto store = [&](float scale, float least) {
      lanes.once([&] {
        const std::uint16_t stored[2] = {from_float<Half>(scale).bits, from_float<Half>(least).bits};
        for (int j = 0; j < header_bytes; ++j) to[j] = static_cast<unsigned char>(stored[j / 2] >> (j % 2 * 8));
      });
    };
    const auto each_element = [&](auto code) {
      lanes.each([&](int lane) {
        for (int d = lane; d < n; d += Lanes::size) scratch[d] = static_cast<float>(code(x[d]));
      });
    };
    if constexpr (!symmetric) {
      const float least = first_largest<n>(lanes, x, [](float v) { return -v; });
      const auto levels = Levels::between(least, first_largest<n>(lanes, x, [](float v) { return v; }));
      store(levels.scale, least);
      each_element([&](float v) { return levels.nearest(v); });
    } else {
      const float extreme = first_largest<n>(lanes, x, [](float v) { return std::fabs(v); });
      if constexpr (bits == 8) {
        const float scale = std::fabs(extreme) / 127, inverse = detail::inverse_or_zero(scale);
        store(scale, 0);
        each_element([&](float v) { return nearest_of_8_bits(detail::rounded_product(v, inverse)); });
      } else {
        // The scale of zeros is -0, whatever their sign.
        const float scale = (extreme != 0 ? extreme : 0.f) / -half, inverse = detail::inverse_or_zero(scale);
        store(scale, 0);
        each_element(
            [&](float v) { return detail::whole_part<Levels::most>(detail::rounded_product(v, inverse) + (half + 0.5f)); });
      }
    }
    Codes<n>::pack(lanes, scratch, GroupBytes<Bytes>{to.bytes, to.first + header_bytes});
  }
  // The first of those elements for which f is largest, which decides on the sign of a zero and on that of a scale.
  template <int n, class Lanes, class F>
  KVT_HD KVT_INLINE static float first_largest(const Lanes& lanes, const float* x, F f) {
    typename Lanes::template Reg<float> best, place;
    lanes.each([&](int lane) {
      best[lane] = f(x[lane < n ? lane : 0]);
      for (int d = lane + Lanes::size; d < n; d += Lanes::size) best[lane] = f(x[d]) > best[lane] ? f(x[d]) : best[lane];
    });
    const float largest = lanes.max(best);
    lanes.each([&](int lane) {
      int left = 0;
      for (int d = lane; d < n; d += Lanes::size) left = f(x[d]) == largest && left < n - d ? n - d : left;
      place[lane] = static_cast<float>(left);
    });
    return x[n - static_cast<int>(lanes.max(place))];
  }
  // Halves go away from zero.
  KVT_HD KVT_INLINE static int nearest_of_8_bits(float x) {
    if (!(x > -128 && x < 128)) return 0;
    const int whole = static_cast<int>(x);
    const float rest = x - static_cast<float>(whole);
    return whole + (rest >= 0.5f ? 1 : 0) - (rest <= -0.5f ? 1 : 0);
  }

 public:
#if defined(KVT_HOST_AVX2)
  using TileRows = typename GroupInt::Tiles;
  struct Integers : TileRows {
    static constexpr int size = dim, group = group_size, most = half, offset = half;
    static constexpr bool has_least = !symmetric;
    using TileRows::TileRows;

#if defined(KVT_HOST_AVX512)
    static constexpr bool strided = false;
    static constexpr int period = dim / group_size;
    template <int u, int plus, class Tile>
    KVT_INLINE static __m512i column(const Tile& tile, int w) {
      static_assert(plus == offset);
      return raised(Codes<group_size>::template column<u>(tile + tile_codes, w));
    }
#else
    template <int k, int plus>
    KVT_INLINE static __m256i column(detail::OneTile tile) {
      static_assert(plus == offset);
      return raised(Codes<group_size>::template column<k % 8>(tile + tile_codes, k / 8));
    }
#endif
    KVT_INLINE __m256 scales(int row, int g) const { return numbers(row, header_bytes / 2 * g); }
    // Of integers around zero: half a code less.
    KVT_INLINE __m256 leasts(int row, int g) const {
      const __m256 scale = numbers(row, header_bytes / 2 * g), least = numbers(row, header_bytes / 2 * g + 1);
      return _mm256_fmadd_ps(scale, _mm256_set1_ps(half), least);
    }

   private:
    template <class Reg>
    KVT_INLINE static Reg raised(Reg code) {
      return bits == 8 && symmetric ? code ^ detail::all_bytes<Reg>(half) : code;
    }
    KVT_INLINE __m256 numbers(int row, int which) const {
      return detail::load_eight(reinterpret_cast<const Half*>(this->tile(row)) + 8 * which);
    }
  };
#endif
};

template <int dim>
using Q4_0 = GroupInt<4, dim, IntRange::symmetric>;
template <int dim>
using Q4_1 = GroupInt<4, dim, IntRange::asymmetric>;
template <int dim>
using Q5_0 = GroupInt<5, dim, IntRange::symmetric>;
template <int dim>
using Q5_1 = GroupInt<5, dim, IntRange::asymmetric>;
template <int dim>
using Q8_0 = GroupInt<8, dim, IntRange::symmetric>;

static_assert(Q4_0<64>::row_bytes == 2 * 18 && Q4_1<64>::row_bytes == 2 * 20 && Q5_0<64>::row_bytes == 2 * 22 &&
              Q5_1<64>::row_bytes == 2 * 24 && Q8_0<64>::row_bytes == 2 * 34);
static_assert(RowWiseCodec<Q4_0<64>> && PlainCodec<Q8_0<40>>);

}  // namespace kvt::inline v0
