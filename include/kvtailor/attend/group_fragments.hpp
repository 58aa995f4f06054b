// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// GroupFragments: slices of uniform groups for tensor cores.
//
// Codes become whole numbers of fp16 by arithmetic: below the exponent of 1024 a code is the lowest bits of a number, and one
// fused operation makes of it half the code, less half of what it counts from. Times the scale (and with half the least
// element) of its group, which another such operation does two elements at a time, it is half the element: 65504 is no limit
// then, and `unit` makes it whole.
//
// A lane's scales are of its own rows: of keys g and g + 8, in one word, of values 2 t and 2 t + 1 in one and 2 t + 8 and
// 2 t + 9 in another. Lanes that need the same ones read the same words.
#pragma once

#include "kvtailor/attend/slices.hpp"
#include "kvtailor/codec/group_int.hpp"

namespace kvt::inline v0 {

template <class Codec, bool is_key>
class GroupFragments;

template <int bits, int size, IntRange range, bool is_key>
class GroupFragments<GroupInt<bits, size, range>, is_key> : public InOrder<size>, public NoScales {
  using Codec = GroupInt<bits, size, range>;
  // Fields of `plane` bits are half of a word's lower half, and the others of its upper half; odd bits have a plane of one bit.
  static constexpr int plane = bits == 8 ? 8 : bits >= 4 ? 4 : 2, top = bits - plane;
  static_assert(top <= 1);
  static constexpr int fields = 16 / plane, four_words = plane + top;  // of a word; of four tiles

 public:
  static constexpr int dim = size, tiles = dim / 8, table_entries = 0, element_bits = bits;
  static constexpr bool streamed = false, grouped = true;
  static constexpr float unit = 2;
  static constexpr int words = tiles / 4 * four_words + (tiles % 4 * plane + 3) / 4 + (tiles % 4 > 0 ? top : 0);

 private:
  static constexpr int across = dim / 16, halves = read_by_halves<dim> ? 2 : 1;
  static constexpr int numbers = Codec::scale_numbers;  // fp16, of a row

 public:
  static constexpr int scale_bytes = 2 * numbers, extra = (is_key ? 2 : 4) * numbers;

  // Lanes that read the same scales, and the byte among them of byte k of those of a row.
  KVT_HD KVT_INLINE static constexpr int part_of(int lane) { return is_key ? lane / 4 : lane % 4; }
  KVT_HD KVT_INLINE static constexpr int scale_place(int row, int k) {
    const int part = is_key ? row % 8 : row % 8 / 2, first = (part * 2 + row / 16) * numbers + k / 2, second = row % 16 / 8;
    return is_key ? 4 * first + 2 * second + k % 2 : 4 * (2 * first + second) + row % 2 * 2 + k % 2;
  }

  template <class Lanes>
  KVT_HD KVT_INLINE static void unpack(const Lanes& lanes, const typename Lanes::template Reg<std::uint32_t>* word, int tile,
                                       const std::byte*, typename Lanes::template Reg<std::uint32_t> (&a)[4]) {
    constexpr int each = numbers / Codec::num_groups;
    const int first = tile / across * numbers + tile % across * 16 / Codec::group_size * each;
    const auto* const scales = word + words / halves;
    // Of the rows that a register has: both the same of keys, two of values.
    const auto number = [&](int i, int which) {
      if constexpr (!is_key) return scales[2 * (first + which) + i / 2];
      return map(
          lanes,
          [i](int, std::uint32_t both) {
            return i % 2 == 0 ? join_halves<false, false>(both, both) : join_halves<true, true>(both, both);
          },
          scales[first + which]);
    };
    KVT_UNROLL_ON_DEVICE
    for (int i = 0; i < 4; ++i) {
      const int four = tile / 4, q = tile % 4 * 4 + i;
      const auto& from = word[four * four_words + q / fields];
      const auto& tops = word[top == 0 ? 0 : four * four_words + plane_words(four)];
      const auto half_code = map(
          lanes, [q](int, std::uint32_t w, std::uint32_t t) { return half_of(w, t, q); }, from, tops);
      if constexpr (Codec::symmetric) {
        a[i] = map(
            lanes, [](int, std::uint32_t x, std::uint32_t scale) { return multiply_halves(x, scale); }, half_code,
            number(i, 0));
      } else {
        a[i] = map(
            lanes,
            [](int, std::uint32_t x, std::uint32_t scale, std::uint32_t least) {
              return fma_halves(x, scale, multiply_halves(least, both_halves(1, -1)));
            },
            half_code, number(i, 0), number(i, 1));
      }
    }
  }

  // A lane's word from code(tile, i, h), and a code from word(index). Codes below zero are of rows that do not exist.
  template <class Code>
  KVT_HD KVT_INLINE static std::uint32_t make_word(int w, Code&& code) {
    const int four = w / four_words, own = w % four_words;
    const bool of_tops = own == plane_words(four);
    const int count = of_tops ? 16 : fields, first = of_tops ? 0 : own * fields;
    std::uint32_t word = 0;
    for (int k = 0; k < 2 * count; ++k) {
      const int q = first + k / 2, tile = 4 * four + q / 4, h = k % 2, x = tile < tiles ? code(tile, q % 4, h) : -1;
      if (x < 0) continue;
      const auto own_bits = static_cast<std::uint32_t>(of_tops ? x >> plane : stored(x) & mask);
      word |= own_bits << ((of_tops ? q : k / 2 * plane) + 16 * h);
    }
    return word;
  }
  template <class Word>
  KVT_HD KVT_INLINE static int code(Word&& word, int tile, int i, int h) {
    const int four = tile / 4, q = tile % 4 * 4 + i;
    int x = static_cast<int>(word(four * four_words + q / fields) >> (q % fields * plane + 16 * h)) & mask;
    if constexpr (top > 0) {
      x |= static_cast<int>(word(four * four_words + plane_words(four)) >> (q + 16 * h) & 1u) << plane;
    }
    return stored(x);
  }
  // Those of all lanes on the host, from word [words][32] and, where it has zeros, to it.
  static void codes(const std::uint32_t (*word)[32], int tile, int i, int h, int* to) {
    for (int lane = 0; lane < 32; ++lane) to[lane] = code([&](int w) { return word[w][lane]; }, tile, i, h);
  }
  static void set_codes(const int* from, int tile, int i, int h, std::uint32_t (*word)[32]) {
    const int four = tile / 4, q = tile % 4 * 4 + i;
    for (int lane = 0; lane < 32; ++lane) {
      const auto x = static_cast<std::uint32_t>(stored(from[lane]));
      word[four * four_words + q / fields][lane] |= (x & mask) << (q % fields * plane + 16 * h);
      if constexpr (top > 0) word[four * four_words + plane_words(four)][lane] |= x >> plane << (q + 16 * h);
    }
  }

 private:
  static constexpr int mask = (1 << plane) - 1;
  static constexpr int offset = Codec::symmetric ? 1 << (bits - 1) : 0;

  // Codes of 8 bits count from 128, as those of fewer bits from half their range. And back.
  KVT_HD KVT_INLINE static constexpr int stored(int code) { return bits == 8 && Codec::symmetric ? code ^ 128 : code; }
  // Of four tiles, or of those that are left.
  KVT_HD KVT_INLINE static constexpr int plane_words(int four) {
    return 4 * four + 4 <= tiles ? plane : (tiles % 4 * plane + 3) / 4;
  }
  // Half of field q of four tiles, less half the offset, as two numbers of fp16.
  KVT_HD KVT_INLINE static std::uint32_t half_of(std::uint32_t word, std::uint32_t tops, int q) {
    constexpr std::uint32_t both = 0x10001u, of_1024 = 0x6400u * both;
    const int at = q % fields * plane, low = plane == 8 ? 0 : at % 8;
    std::uint32_t x;
    if constexpr (plane == 8) {
      x = bytes_below(word, at / 8, of_1024);
    } else {
      x = and_or(word >> (at - low), (mask << low) * both, of_1024);
    }
    if constexpr (top > 0) {
      const int to = low + plane;
      x = and_or(q >= to ? tops >> (q - to) : tops << (to - q), (1u << to) * both, x);
    }
    static constexpr Constants of;
    return fma_halves(x, of.factor[low], of.less[low]);
  }
  // For a field that begins at bit `low` of what is below the exponent of 1024.
  struct Constants {
    std::uint32_t factor[8] = {}, less[8] = {};
    constexpr Constants() {
      for (int low = 0; low < 8; low += plane) {
        factor[low] = both_halves(1, -1 - low);
        less[low] = both_halves(-(1024 >> low) - offset, -1);
      }
    }
  };
};

}  // namespace kvt::inline v0
