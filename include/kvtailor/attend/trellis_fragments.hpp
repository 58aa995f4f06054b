// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// TrellisFragments: slices of trellis codes, as the strings of code_strings.hpp. What follows a string comes from the next lane
// by a shuffle.
#pragma once

#include "kvtailor/attend/code_strings.hpp"

namespace kvt::inline v0 {

template <class Codec, bool is_key>
class TrellisFragments;

template <int bits, int size, int window, class RowScale, bool is_key>
class TrellisFragments<Trellis<bits, size, window, RowScale>, is_key>
    : public CodeStrings<Trellis<bits, size, window, RowScale>, is_key>, public SliceScales<RowScale, 3> {
  using Strings = CodeStrings<Trellis<bits, size, window, RowScale>, is_key>;
  using Strings::across, Strings::own, Strings::string_bits, Strings::reach;

 public:
  static constexpr int dim = size, tiles = dim / 8, element_bits = bits;
  static constexpr bool streamed = false, follows = true;  // words of other lanes
  // Of the scale, since weights are at most 8 where they meet it, and the largest is near that of fp16.
  static constexpr float unit = 8;  // 2^3

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
