// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Trellis codes for tensor cores.
//   TrellisStrings     which elements a lane holds, and registers of them
//   TrellisFragments   slices of them
//
// A lane holds neighbours of a row's ring: a quarter of it of keys, an eighth of values, as one string of bits for each of its
// rows. So a state is bits of the lane's own words, but for the last ones of a string, which end with the first bits of the
// next lane's: these come by a shuffle. Dims lie in the order of the ring, to which queries are put, and which sums are taken
// out of.
//
// A byte of a string, shifted so that a state begins there, is an index of a table of which every lane has a copy. Where two
// states are no more than a byte, an entry is both elements, else it is one, twice.
#pragma once

#include "kvtailor/attend/slices.hpp"
#include "kvtailor/codec/trellis.hpp"

namespace kvt::inline v0 {

template <class Codec, bool is_key>
class TrellisStrings;

template <int bits, int size, int window, class Scale, bool is_key>
class TrellisStrings<Trellis<bits, size, window, Scale>, is_key> {
  using Codec = Trellis<bits, size, window, Scale>;
  static constexpr bool in_pairs = window + bits <= 8;

 public:
  static constexpr int dim = size, across = dim / 16, table_entries = 256;
  static constexpr int own = is_key ? dim / 4 : dim / 8;  // elements of a string
  static constexpr int strings = is_key ? 2 : 4;          // of a lane, of 16 rows
  static constexpr int string_bits = own * bits, reach = window - bits;
  static_assert(dim % 16 == 0 && string_bits >= reach && reach > 0, "a state ends in the next lane at most");

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
    return {row_of(lane, string_of(tile, i, h)), Codec::element_at(bits * (part_of(lane) * own + place_of(tile, i, h)))};
  }
  template <bool keys>
  KVT_HD KVT_INLINE static constexpr FragmentPlace find(int row, int d) {
    static_assert(keys == is_key);
    const int at = Codec::first_bit(d) / bits, part = at / own, e = at % own, tile = row / 16 * across;
    if (is_key) return {row % 8 * 4 + part, tile + e / 4, row % 16 / 8 + e % 4 / 2 * 2, e % 2};
    return {part * 4 + row % 8 / 2, tile + e / 2, e % 2 + row % 16 / 8 * 2, row % 2};
  }

  KVT_HD static std::uint32_t table_entry(int index) {
    static constexpr typename Codec::Values value;
    constexpr int mask = Codec::num_states - 1;
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

template <class Codec, bool is_key>
class TrellisFragments;

template <int bits, int size, int window, class RowScale, bool is_key>
class TrellisFragments<Trellis<bits, size, window, RowScale>, is_key>
    : public TrellisStrings<Trellis<bits, size, window, RowScale>, is_key>, public SliceScales<RowScale, 8> {
  using Strings = TrellisStrings<Trellis<bits, size, window, RowScale>, is_key>;
  using Strings::across, Strings::own, Strings::string_bits, Strings::reach;

 public:
  static constexpr int dim = size, tiles = dim / 8, element_bits = bits;
  static constexpr bool streamed = false, follows = true;  // words of other lanes
  // Of the scale, since weights are at most 8 where they meet it, and the largest is near that of fp16.
  static constexpr float unit = 8;

 private:
  // Of what is in registers at a time, and of a slice.
  static constexpr int halves = read_by_halves<dim> ? 2 : 1, kept_strings = 2 * Strings::strings / halves;

 public:
  static constexpr int words = (dim * bits + 31) / 32, extra = 2 * Strings::strings;

  // The first bits of the next lane's strings, behind the words of a slice (or of 16 rows).
  template <class Lanes>
  KVT_HD KVT_INLINE static void follow(const Lanes& lanes, typename Lanes::template Reg<std::uint32_t>* word) {
    const auto next_lane = map(lanes, [](int lane) { return Strings::next_lane(lane); });
    int have = -1;  // known where loops are unrolled, as all that follows from a string's number
    auto there = map(lanes, [](int) { return 0u; });
    KVT_UNROLL_ON_DEVICE
    for (int r = 0; r < kept_strings; ++r) {
      const int at = r * string_bits, last = (at + reach - 1) / 32;
      if (have != at / 32) there = gather(lanes, word[at / 32], next_lane);
      have = last;
      auto after = there;
      if (last != at / 32) after = gather(lanes, word[last], next_lane);
      word[kept_words + r] = map(
          lanes, [at](int, std::uint32_t low, std::uint32_t high) { return shift_right(low, high, at % 32); }, there, after);
      there = after;
    }
  }
  template <class Lanes>
  KVT_HD KVT_INLINE static void unpack(const Lanes& lanes, const typename Lanes::template Reg<std::uint32_t>* word, int tile,
                                       const std::byte* table, typename Lanes::template Reg<std::uint32_t> (&a)[4]) {
    Strings::unpack_strings(
        lanes, [&](int r, int m) KVT_INLINE_LAMBDA { return string_word(lanes, word, r, m); }, tile, table, a);
  }

  // A lane's word from code(tile, i, h), and a code from word(index). Codes below zero are of rows that do not exist.
  template <class Code>
  KVT_HD KVT_INLINE static std::uint32_t make_word(int w, Code&& code) {
    std::uint32_t word = 0;
    for (int q = 32 * w / bits; q * bits < 32 * (w + 1) && q < extra * own; ++q) {
      const int r = q / own, e = q % own, row = r % Strings::strings, tile = r / Strings::strings * across;
      const int x = is_key ? code(tile + e / 4, row + e % 4 / 2 * 2, e % 2) : code(tile + e / 2, e % 2 + row / 2 * 2, row % 2);
      if (x < 0) continue;
      const int by = q * bits - 32 * w;
      word |= by >= 0 ? static_cast<std::uint32_t>(x) << by : static_cast<std::uint32_t>(x) >> -by;
    }
    return word;
  }
  template <class Word>
  KVT_HD KVT_INLINE static int code(Word&& word, int tile, int i, int h) {
    const int at = bit_of(tile, i, h);
    std::uint32_t x = word(at / 32) >> (at % 32);
    if (at % 32 + bits > 32) x |= word(at / 32 + 1) << (32 - at % 32);
    return static_cast<int>(x & ((1u << bits) - 1));
  }
  // Those of all lanes on the host, from word [words][32] and, where it has zeros, to it.
  static void codes(const std::uint32_t (*word)[32], int tile, int i, int h, int* to) {
    for (int lane = 0; lane < 32; ++lane) to[lane] = code([&](int w) { return word[w][lane]; }, tile, i, h);
  }
  static void set_codes(const int* from, int tile, int i, int h, std::uint32_t (*word)[32]) {
    const int at = bit_of(tile, i, h), w = at / 32, by = at % 32;
    for (int lane = 0; lane < 32; ++lane) {
      const auto x = static_cast<std::uint32_t>(from[lane]);
      word[w][lane] |= x << by;
      if (by + bits > 32) word[w + 1][lane] |= x >> (32 - by);
    }
  }

 private:
  static constexpr int kept_words = words / halves;

  KVT_HD KVT_INLINE static constexpr int bit_of(int tile, int i, int h) {
    return Strings::string_of(tile, i, h) * string_bits + Strings::place_of(tile, i, h) * bits;
  }
  // 32 bits of a string, from bit 32 m on, and what follows it.
  template <class Lanes>
  KVT_HD KVT_INLINE static auto string_word(const Lanes& lanes, const typename Lanes::template Reg<std::uint32_t>* word, int r,
                                            int m) {
    const int left = string_bits - 32 * m, at = r * string_bits + 32 * m, w = at / 32, by = at % 32;
    const auto& after = word[kept_words + r];
    if (left <= 0) {
      return map(
          lanes, [left](int, std::uint32_t x) { return x >> -left; }, after);
    }
    const bool spread = by + (left < 32 ? left : 32) > 32;
    const auto own_bits = map(
        lanes, [by](int, std::uint32_t low, std::uint32_t high) { return by == 0 ? low : shift_right(low, high, by); }, word[w],
        spread ? word[w + 1] : word[w]);
    if (left >= 32) return own_bits;
    return map(
        lanes, [left](int, std::uint32_t x, std::uint32_t then) { return and_or(x, (1u << left) - 1, then << left); }, own_bits,
        after);
  }
};

}  // namespace kvt::inline v0
