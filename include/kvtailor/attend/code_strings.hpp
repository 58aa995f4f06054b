// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// CodeStrings: codes as the host stores them, for tensor cores: trellises, and codes of LloydMax of one plane.
//
// A lane holds neighbours of a row's codes, in the order of their bits: a quarter of a key, an eighth of a value, as one string
// of bits for each of its rows. So a state of a trellis is bits of the lane's own words, but for the last ones of a string,
// which end with the first bits of the next lane's part; the ring is closed, so the last part is followed by the first. Dims
// lie in that order, to which queries are put, and which sums are taken out of.
//
// A byte of a string, shifted so that a state begins there, is an index of a table of which every lane has a copy. Where two
// states are no more than a byte, an entry is both elements, else it is one, twice.
#pragma once

#include "kvtailor/attend/slices.hpp"
#include "kvtailor/codec/trellis.hpp"

namespace kvt::inline v0 {

namespace detail {

// Of codes that lie so: bits, window (of a state), and Values of states, to be multiplied by unit.
template <class Codec>
struct CodeRing;
template <int code_bits, int dim, int state_bits, class RowScale>
struct CodeRing<Trellis<code_bits, dim, state_bits, RowScale>> : Trellis<code_bits, dim, state_bits, RowScale> {
  using Scale = RowScale;
  static constexpr int bits = code_bits, window = state_bits;
  static constexpr float unit = 1;
};
// A plane is in the order of a ring.
template <int code_bits, int dim, NormCorrection correction, class RowScale>
requires(code_bits == 1 || code_bits == 2 || code_bits == 4)  //
    struct CodeRing<LloydMax<code_bits, dim, correction, RowScale>> {
  using Scale = RowScale;
  static constexpr int bits = code_bits, window = code_bits;
  static constexpr float unit = LloydMax<bits, dim>::unit;
  struct Values {
    float of[1 << bits] = {};
    constexpr Values() {
      for (int code = 0; code < 1 << bits; ++code) of[code] = static_cast<float>(LloydMax<bits, dim>::level(code));
    }
  };
  KVT_HD static constexpr int first_bit(int d) { return Trellis<bits, dim>::first_bit(d); }
  KVT_HD static constexpr int element_at(int bit) { return Trellis<bits, dim>::element_at(bit); }
};

}  // namespace detail

template <class Codec, bool is_key>
class CodeStrings {
  using Ring = detail::CodeRing<Codec>;
  static constexpr int bits = Ring::bits, window = Ring::window;
  static constexpr bool in_pairs = window + bits <= 8;

 public:
  using Scale = typename Ring::Scale;
  static constexpr float unit = Ring::unit;
  static constexpr int dim = Codec::head_dim, across = dim / 16, table_entries = 256;
  static constexpr int own = is_key ? dim / 4 : dim / 8;  // elements of a string
  static constexpr int strings = is_key ? 2 : 4;          // of a lane, of 16 rows
  static constexpr int string_bits = own * bits, reach = window - bits;
  static_assert(dim % 16 == 0 && string_bits >= reach, "a state ends in the next lane at most");

  // A lane's part of a ring, the lane that has the next one, and the row of its string r, of 16 rows or more.
  KVT_HD KVT_INLINE static constexpr int part_of(int lane) { return is_key ? lane % 4 : lane / 4; }
  KVT_HD KVT_INLINE static constexpr int next_lane(int lane) {
    return is_key ? lane / 4 * 4 + (lane + 1) % 4 : (lane + 4) % 32;
  }
  KVT_HD KVT_INLINE static constexpr int row_of(int lane, int r) {
    const int k = r % strings;
    return r / strings * 16 + (is_key ? lane / 4 + 8 * k : 2 * (lane % 4) + 8 * (k / 2) + k % 2);
  }
  // The string that a half of a register is of, and its place there.
  KVT_HD KVT_INLINE static constexpr int string_of(int tile, int i, int h) {
    return tile / across * strings + (is_key ? i % 2 : i / 2 * 2 + h);
  }
  KVT_HD KVT_INLINE static constexpr int place_of(int tile, int i, int h) {
    return is_key ? tile % across * 4 + i / 2 * 2 + h : tile % across * 2 + i % 2;
  }

  template <bool keys>
  KVT_HD KVT_INLINE static constexpr SlicePlace place(int lane, int tile, int i, int h) {
    static_assert(keys == is_key);
    return {row_of(lane, string_of(tile, i, h)), Ring::element_at(bits * (part_of(lane) * own + place_of(tile, i, h)))};
  }
  template <bool keys>
  KVT_HD KVT_INLINE static constexpr FragmentPlace find(int row, int d) {
    static_assert(keys == is_key);
    const int at = Ring::first_bit(d) / bits, part = at / own, e = at % own, tile = row / 16 * across;
    if (is_key) return {row % 8 * 4 + part, tile + e / 4, row % 16 / 8 + e % 4 / 2 * 2, e % 2};
    return {part * 4 + row % 8 / 2, tile + e / 2, e % 2 + row % 16 / 8 * 2, row % 2};
  }

  KVT_HD static std::uint32_t table_entry(int index) {
    static constexpr typename Ring::Values value;
    constexpr int mask = (1 << window) - 1;
    return pack_halves(value.of[index & mask], value.of[(in_pairs ? index >> bits : index) & mask]);
  }

  // Registers of a tile. string_word(r, m): 32 bits of string r, from bit 32 m on, and what follows it; table: begins at the
  // first copy of entry 0.
  template <class Lanes, class StringWord>
  KVT_HD KVT_INLINE static void unpack_strings(const Lanes& lanes, StringWord&& string_word, int tile, const std::byte* table,
                                               typename Lanes::template Reg<std::uint32_t> (&a)[4]) {
    const auto entry = [&](int i, int h) {
      return look_up(lanes, string_word, string_of(tile, i, h), bits * place_of(tile, i, h), table);
    };
    const auto join = [&]<bool high>(const auto& x, const auto& y) {
      return map(
          lanes, [](int, std::uint32_t p, std::uint32_t q) { return join_halves<high, high>(p, q); }, x, y);
    };
    KVT_UNROLL_ON_DEVICE
    for (int i = 0; i < 4; ++i) {
      if constexpr (is_key && in_pairs) {
        a[i] = entry(i, 0);
      } else if constexpr (in_pairs) {  // an entry is two dims, a register two rows
        if (i % 2 != 0) continue;
        const auto first = entry(i, 0), second = entry(i, 1);
        a[i] = join.template operator()<false>(first, second);
        a[i + 1] = join.template operator()<true>(first, second);
      } else {
        a[i] = join.template operator()<false>(entry(i, 0), entry(i, 1));
      }
    }
  }

 private:
  // The entry of the state, or the two, that begin at a bit of a string.
  template <class Lanes, class StringWord>
  KVT_HD KVT_INLINE static auto look_up(const Lanes& lanes, StringWord&& string_word, int r, int bit, const std::byte* table) {
    const int m = bit / 32, by = bit % 8, end = 32 * m + 24 + by;
    // States of the same word that begin at the same bit of a byte share one shift.
    const bool spread = by > 0 && end < string_bits && end % bits == 0;
    const auto low = string_word(r, m), high = spread ? string_word(r, m + 1) : low;
    return map(
        lanes,
        [table, by, bit](int lane, std::uint32_t x, std::uint32_t y) {
          const std::uint32_t states = by == 0 ? x : shift_right(x, y, by);
          return *reinterpret_cast<const std::uint32_t*>(
              table + byte_above(states, bit % 32 / 8, static_cast<std::uint32_t>(4 * lane)));
        },
        low, high);
  }
};

}  // namespace kvt::inline v0
