// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Slices: 32 rows of keys and values as tensor cores want them. Codes are stored in the order of the fragments, so that a word
// of a lane unpacks into the registers it multiplies, without shuffles and without a way through shared memory.
//
//   DenseFragments<dim>          fp16 elements
//   CodeFragments<bits, dim>     codes of LloydMax, 1 .. 6 bits
//   TrellisFragments, GroupFragments   see trellis_fragments.hpp and group_fragments.hpp
//   SliceLayout<Keys, Values>    key words, value words, scales of keys and values
//
// Tile s of a slice are rows 16 j .. 16 j + 15 and 16 dims, s = j dim / 16 + k: a fragment A of keys (rows by dims), and of
// transposed values (dims by rows). Which dims they are is the affair of the fragments: see InOrder. What a lane has of a slice
// is `words` 32-bit words, kept so that four (then two, then one) of them are one load of the warp. Codes are the host's codes:
// see pack() and code().
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvtailor/codec/lloyd_max.hpp"
#include "kvtailor/codec/log_scale.hpp"
#include "kvtailor/core/fragments.hpp"

namespace kvt::inline v0 {

inline constexpr int slice_rows = 32;
struct SlicePages;

// An element of a slice, and the half of a fragment's register that it is.
struct SlicePlace {
  int row, dim;
};
struct FragmentPlace {
  int lane, tile, i, h;
};

// Dims 16 k .. 16 k + 15 in their order.
template <int dim>
struct InOrder {
  template <bool keys>
  KVT_HD KVT_INLINE static constexpr SlicePlace place(int lane, int tile, int i, int h) {
    constexpr int across = dim / 16;
    const int left = lane / 4 + 8 * (i % 2), right = 2 * (lane % 4) + 8 * (i / 2) + h;  // of the fragment
    return {tile / across * 16 + (keys ? left : right), tile % across * 16 + (keys ? right : left)};
  }
  template <bool keys>
  KVT_HD KVT_INLINE static constexpr FragmentPlace find(int row, int d) {
    const int left = keys ? row : d, right = keys ? d : row;
    return {left % 8 * 4 + right % 8 / 2, row / 16 * (dim / 16) + d / 16, left % 16 / 8 + right % 16 / 8 * 2, right % 2};
  }
};

// A scale over 2^power, within 2^-22 of itself: all bits of it are for those who encode.
template <int power = 0, class Scale>
KVT_HD KVT_INLINE float near_float(Scale scale) {
  if constexpr (std::is_same_v<Scale, LogScale>) {
    return scale.bits == 0 ? 0.f : fast_exp2(static_cast<float>(scale.bits) * .125f - (16.f + power));
  } else {
    return to_float(scale) * (1.f / (1 << power));
  }
}

// Scales of rows g, g + 8, g + 16 and g + 24 in one word or two, as floats over 2^power.
template <class Scale, int power>
struct SliceScales {
  static constexpr int scale_bytes = static_cast<int>(sizeof(Scale)), scale_words = scale_bytes;
  static constexpr bool scaled = true, grouped = false, follows = false;

  KVT_HD KVT_INLINE static Float4 scales(std::uint32_t first, std::uint32_t second) {
    Float4 x;
    KVT_UNROLL_ON_DEVICE
    for (int i = 0; i < 4; ++i) {
      if constexpr (scale_bytes == 1) {
        x.x[i] = near_float<power>(Scale{static_cast<std::uint8_t>(first >> (8 * i))});
      } else {
        const std::uint32_t both = i < 2 ? first : second;
        x.x[i] = (i % 2 == 0 ? low_half(both) : high_half(both)) * (1.f / (1 << power));
      }
    }
    return x;
  }
};
struct NoScales {
  static constexpr int scale_bytes = 0, scale_words = 0;
  static constexpr bool scaled = false, grouped = false, follows = false;
  KVT_HD KVT_INLINE static Float4 scales(std::uint32_t, std::uint32_t) { return {{1, 1, 1, 1}}; }
};

// Of the largest heads, words of 16 rows are read at a time.
template <int dim>
inline constexpr bool read_by_halves = dim > 192;

template <int size>
struct DenseFragments : InOrder<size>, NoScales {
  static_assert(size % 16 == 0);
  static constexpr int dim = size, tiles = dim / 8, words = 4 * tiles, extra = 0, table_entries = 0, element_bits = 16;
  static constexpr bool streamed = true;  // too many words to hold those of the next slice
  static constexpr float unit = 1;        // what registers are multiplied by

  template <class Lanes>
  KVT_HD KVT_INLINE static void unpack(const Lanes&, const typename Lanes::template Reg<std::uint32_t>* word, int tile,
                                       const std::byte*, typename Lanes::template Reg<std::uint32_t> (&a)[4]) {
    KVT_UNROLL_ON_DEVICE
    for (int i = 0; i < 4; ++i) a[i] = word[4 * tile + i];
  }
  // A lane's word from code(tile, i, h), and a code from word(index): the bits of an element.
  template <class Code>
  KVT_HD KVT_INLINE static std::uint32_t make_word(int w, Code&& code) {
    const int low = code(w / 4, w % 4, 0), high = code(w / 4, w % 4, 1);
    return (low < 0 ? 0u : static_cast<std::uint32_t>(low)) | (high < 0 ? 0u : static_cast<std::uint32_t>(high)) << 16;
  }
  template <class Word>
  KVT_HD KVT_INLINE static int code(Word&& word, int tile, int i, int h) {
    return static_cast<int>(word(4 * tile + i) >> (16 * h) & 0xffffu);
  }
  // Those of all lanes on the host, from word [words][32] and, where it has zeros, to it.
  static void codes(const std::uint32_t (*word)[32], int tile, int i, int h, int* code) {
    for (int lane = 0; lane < 32; ++lane) code[lane] = static_cast<int>(word[4 * tile + i][lane] >> (16 * h) & 0xffffu);
  }
  static void set_codes(const int* code, int tile, int i, int h, std::uint32_t (*word)[32]) {
    for (int lane = 0; lane < 32; ++lane) word[4 * tile + i][lane] |= static_cast<std::uint32_t>(code[lane]) << (16 * h);
  }
};

// Of one or two bits, registers are made by arithmetic. Other codes are indices of a table that every lane has a copy of: pairs
// of 3 or 4 bits, one entry for both halves of a register, and single codes of 5 or 6. Such fields do not straddle words: as
// many as fit lie in a word from the low bits up, and two bits of each word that are left over make up the last fields of four
// tiles, so that nothing is wasted.
template <int bits, int size>
struct CodeFragments : InOrder<size>, SliceScales<Half, 0> {
  static_assert(bits >= 1 && bits <= 6 && size % 16 == 0);
  using Codes = LloydMax<bits, size>;
  static constexpr int dim = size, tiles = dim / 8, extra = 0, element_bits = bits;
  static constexpr bool streamed = false;
  static constexpr bool arithmetic = bits <= 2, in_pairs = bits == 3 || bits == 4;

 private:
  static constexpr int field_bits = in_pairs ? 2 * bits : bits, tile_fields = in_pairs ? 4 : 8;
  static constexpr int word_fields = 32 / field_bits, group_words = 4 * tile_fields * field_bits / 32;
  static constexpr int plain_fields = word_fields * group_words;  // of four tiles

 public:
  static constexpr int words =
      arithmetic ? (tiles * bits + 3) / 4 : tiles / 4 * group_words + (tiles % 4 * tile_fields + word_fields - 1) / word_fields;
  static constexpr int table_entries = arithmetic ? 0 : 1 << field_bits;

 private:
  // Of two bits, the magnitudes are the subnormal `small` and small + 2^10 units of fp16, chosen for the ratio of the levels.
  static constexpr int low_level = Codes::level((1 << bits) / 2), high_level = Codes::level((1 << bits) - 1);
  static constexpr int small =
      bits != 2 ? 0 : (1024 * low_level * 2 + (high_level - low_level)) / (2 * (high_level - low_level));
  static_assert(small < 1024);

 public:
  // The level that registers have as 1, or for two bits that makes both levels right to 5e-4 of themselves.
  static constexpr float unit = Codes::unit * (bits == 1   ? static_cast<float>(low_level)
                                               : bits == 2 ? static_cast<float>(high_level + low_level) * 16777216.f /
                                                                 static_cast<float>(2 * small + 1024)
                                                           : 1.f);

  // An entry of the table: two levels as fp16, or one twice.
  KVT_HD static std::uint32_t table_entry(int index) {
    static constexpr typename Codes::Levels levels;
    constexpr int mask = (1 << bits) - 1;
    return pack_halves(levels.value[index & mask], levels.value[in_pairs ? index >> bits : index & mask]);
  }

  // Registers of a tile; `table` begins at the first copy of entry 0.
  template <class Lanes>
  KVT_HD KVT_INLINE static void unpack(const Lanes& lanes, const typename Lanes::template Reg<std::uint32_t>* word, int tile,
                                       const std::byte* table, typename Lanes::template Reg<std::uint32_t> (&a)[4]) {
    KVT_UNROLL_ON_DEVICE
    for (int i = 0; i < 4; ++i) {
      if constexpr (arithmetic) {
        constexpr int per_word = 4 / bits;
        const int turn = bits * (tile % per_word * 4 + i);
        a[i] = map(
            lanes,
            [turn](int, std::uint32_t w) {
              const std::uint32_t x = turn == 0 ? w : rotate_left(w, turn);
              constexpr std::uint32_t both = 0x10001u;
              return bits == 1 ? and_or(x, 0x8000u * both, 0x3c00u * both) : and_or(x, 0x8400u * both, small * both);
            },
            word[tile / per_word]);
      } else if constexpr (in_pairs) {
        a[i] = look_up(lanes, word, tile, i, table);
      } else {
        a[i] = map(
            lanes, [](int, std::uint32_t low, std::uint32_t high) { return join_halves<false, true>(low, high); },
            look_up(lanes, word, tile, 2 * i, table), look_up(lanes, word, tile, 2 * i + 1, table));
      }
    }
  }

  // A lane's word from code(tile, i, h), and a code from word(index). Codes below zero are of rows that do not exist.
  template <class Code>
  KVT_HD KVT_INLINE static std::uint32_t make_word(int w, Code&& code) {
    std::uint32_t word = 0;
    if constexpr (arithmetic) {
      constexpr int per_word = 4 / bits;
      for (int k = 0; k < per_word * 8; ++k) {
        const int tile = per_word * w + k / 8, i = k / 2 % 4, h = k % 2, own = tile < tiles ? code(tile, i, h) : -1;
        for (int b = 0; b < bits && own >= 0; ++b) {
          word |= static_cast<std::uint32_t>(signs_first(own) >> b & 1) << bit_of(tile, i, h, b) % 32;
        }
      }
    } else {
      const int first = w / group_words * 4, own = w % group_words;  // tile; word of four tiles
      const auto field = [&](int k) {
        const int tile = first + k / tile_fields;
        if (tile >= tiles) return std::uint32_t{0};
        if constexpr (!in_pairs) return known(code(tile, k % tile_fields / 2, k % 2));
        return known(code(tile, k % tile_fields, 0)) | known(code(tile, k % tile_fields, 1)) << bits;
      };
      for (int f = 0; f < word_fields; ++f) word |= field(own * word_fields + f) << (f * field_bits);
      if (word_fields * field_bits < 32 && first + 4 <= tiles) {
        for (int r = 0; r < 2; ++r) {
          const int rest = 2 * own + r;
          word |= (field(plain_fields + rest / field_bits) >> rest % field_bits & 1u) << (30 + r);
        }
      }
    }
    return word;
  }
  template <class Word>
  KVT_HD KVT_INLINE static int code(Word&& word, int tile, int i, int h) {
    int code = 0;
    for (int b = 0; b < bits; ++b) {
      const int at = bit_of(tile, i, h, b);
      code |= static_cast<int>(word(at / 32) >> at % 32 & 1u) << b;
    }
    return arithmetic ? signs_last(code) : code;
  }
  static void codes(const std::uint32_t (*word)[32], int tile, int i, int h, int* code) {
    for (int lane = 0; lane < 32; ++lane) code[lane] = 0;
    for (int b = 0; b < bits; ++b) {
      const int at = bit_of(tile, i, h, b), turn = at % 32;
      for (int lane = 0; lane < 32; ++lane) code[lane] |= static_cast<int>(word[at / 32][lane] >> turn & 1u) << b;
    }
    for (int lane = 0; lane < 32 && arithmetic; ++lane) code[lane] = signs_last(code[lane]);
  }
  static void set_codes(const int* code, int tile, int i, int h, std::uint32_t (*word)[32]) {
    std::uint32_t stored[32];
    for (int lane = 0; lane < 32; ++lane) {
      stored[lane] = static_cast<std::uint32_t>(arithmetic ? signs_first(code[lane]) : code[lane]);
    }
    for (int b = 0; b < bits; ++b) {
      const int at = bit_of(tile, i, h, b), turn = at % 32;
      for (int lane = 0; lane < 32; ++lane) word[at / 32][lane] |= (stored[lane] >> b & 1u) << turn;
    }
  }

 private:
  // Codes, whose levels rise, as the sign of fp16 and whether the magnitude is the larger one: 0 1 2 3 are 3 2 0 1. And back.
  KVT_HD KVT_INLINE static int signs_first(int code) { return bits == 1 ? code ^ 1 : code >= 2 ? code - 2 : 3 - code; }
  KVT_HD KVT_INLINE static std::uint32_t known(int code) { return code < 0 ? 0u : static_cast<std::uint32_t>(code); }
  KVT_HD KVT_INLINE static int signs_last(int stored) { return bits == 1 ? stored ^ 1 : stored >= 2 ? 3 - stored : stored + 2; }

  // Bit b of a code, counted in a lane's words.
  KVT_HD KVT_INLINE static constexpr int bit_of(int tile, int i, int h, int b) {
    if constexpr (arithmetic) {
      // Rotated to the left by bits * slot, the sign is at 15 + 16 h and the magnitude, of two bits, at 10 + 16 h.
      constexpr int per_word = 4 / bits;
      const int slot = tile % per_word * 4 + i, at = 16 * h + (bits == 2 && b == 0 ? 10 : 15) - bits * slot;
      return 32 * (tile / per_word) + (at + 32) % 32;
    } else if constexpr (in_pairs) {
      return field_place(tile, i, bits * h + b);
    } else {
      return field_place(tile, 2 * i + h, b);
    }
  }
  // Bit b of a tile's field.
  KVT_HD KVT_INLINE static constexpr int field_place(int tile, int field, int b) {
    const int first = tile / 4 * group_words, k = tile % 4 * tile_fields + field;
    if (k < plain_fields) return 32 * (first + k / word_fields) + k % word_fields * field_bits + b;
    const int rest = (k - plain_fields) * field_bits + b;  // two of these in each word
    return 32 * (first + rest / 2) + 30 + rest % 2;
  }
  static constexpr std::uint32_t field_mask = ((1u << field_bits) - 1) << 8;  // of an offset in the table
  KVT_HD KVT_INLINE static std::uint32_t entry(const std::byte* at) { return *reinterpret_cast<const std::uint32_t*>(at); }
  // The entry that a field of a tile names.
  template <class Lanes>
  KVT_HD KVT_INLINE static auto look_up(const Lanes& lanes, const typename Lanes::template Reg<std::uint32_t>* word, int tile,
                                        int field, const std::byte* table) {
    const int first = tile / 4 * group_words, k = tile % 4 * tile_fields + field;
    if (k < plain_fields) {
      return map(
          lanes,
          [table, at = k % word_fields * field_bits](int lane, std::uint32_t w) {
            const auto copy = static_cast<std::uint32_t>(4 * lane);
            if constexpr (field_bits == 8) return entry(table + byte_above(w, at / 8, copy));
            return entry(table + and_or(at <= 8 ? w << (8 - at) : w >> (at - 8), field_mask, copy));
          },
          word[first + k / word_fields]);
    }
    auto shifted = map(lanes, [](int) { return 0u; });
    KVT_UNROLL_ON_DEVICE
    for (int w = 0; w < group_words; ++w) {
      shifted = map(
          lanes,
          [k, w](int, std::uint32_t bits_so_far, std::uint32_t from) {
            for (int bit = 30; bit < 32; ++bit) {
              const int b = 2 * w + bit - 30 - (k - plain_fields) * field_bits;  // of the field
              if (b < 0 || b >= field_bits) continue;
              bits_so_far = and_or(from >> (bit - 8 - b), 1u << (8 + b), bits_so_far);
            }
            return bits_so_far;
          },
          shifted, word[first + w]);
    }
    return map(
        lanes,
        [table](int lane, std::uint32_t at) {
          return entry(table + and_or(at, field_mask, static_cast<std::uint32_t>(4 * lane)));
        },
        shifted);
  }
};

// Entries for K and V lie side by side: 256 bytes hold 32 copies of each.
inline constexpr int table_stride = 256, value_table_offset = 128;
template <class Fragments>
KVT_HD void fill_table(std::byte* table, int thread, int threads) {
  if constexpr (Fragments::table_entries > 0) {
    for (int k = thread; k < Fragments::table_entries * 32; k += threads) {
      *reinterpret_cast<std::uint32_t*>(table + k / 32 * table_stride + k % 32 * 4) = Fragments::table_entry(k / 32);
    }
  }
}

template <class KeyFragments, class ValueFragments>
struct SliceLayout {
  static_assert(KeyFragments::dim == ValueFragments::dim);
  using Keys = KeyFragments;
  using Values = ValueFragments;
  using Pages = SlicePages;
  static constexpr bool fragments = true, grouped = Keys::grouped || Values::grouped;
  static constexpr int dim = Keys::dim;
  static constexpr int word_bytes = 4 * 32;
  static constexpr int values_at = Keys::words * word_bytes, scales_at = values_at + Values::words * word_bytes;
  // Scales of rows g, g + 8, g + 16 and g + 24, of keys then of values, lie together: one load.
  static constexpr int most_scale_words = Keys::scale_words > Values::scale_words ? Keys::scale_words : Values::scale_words;
  static constexpr int value_scale_word = Keys::scaled ? most_scale_words : 0;
  static constexpr int scale_words = value_scale_word + (Values::scaled ? most_scale_words : 0);
  // Scales of groups, of keys then of values, where the fragments want them.
  static constexpr int key_groups_at = scales_at + 32 * scale_words;
  static constexpr int value_groups_at = key_groups_at + (Keys::grouped ? slice_rows * Keys::scale_bytes : 0);
  static constexpr int groups_end = value_groups_at + (Values::grouped ? slice_rows * Values::scale_bytes : 0);
  static constexpr int bytes = (groups_end + 127) / 128 * 128;
  static constexpr int tables = (Keys::table_entries > Values::table_entries ? Keys::table_entries : Values::table_entries);
  static constexpr int tables_bytes = tables * table_stride, table_bytes = tables_bytes;  // of tables, and of all there
  static constexpr bool packs_queries = true;

  // Byte of a lane's word, from the first word of keys or of values.
  template <class Fragments>
  KVT_HD KVT_INLINE static constexpr int word_at(int lane, int word) {
    constexpr int fours = Fragments::words / 4 * 4, twos = fours + (Fragments::words - fours) / 2 * 2;
    if (word < fours) return word / 4 * 512 + lane * 16 + word % 4 * 4;
    if (word < twos) return fours * word_bytes + lane * 8 + (word - fours) * 4;
    return twos * word_bytes + lane * 4;
  }
  template <bool keys>
  using Part = std::conditional_t<keys, Keys, Values>;
  // Byte k of Part<keys>::scale_bytes, the scale of a row or the numbers of its groups.
  template <bool keys>
  KVT_HD KVT_INLINE static constexpr int scale_at(int row, int k) {
    if constexpr (Part<keys>::grouped) {
      return (keys ? key_groups_at : value_groups_at) + Part<keys>::scale_place(row, k);
    } else {
      return scales_at + 4 * (row % 8 * scale_words + (keys ? 0 : value_scale_word)) + row / 8 * Part<keys>::scale_bytes + k;
    }
  }

  // A row's, of bytes key(k) and value(k).
  template <class Key, class Value>
  KVT_HD static void write_scales(std::byte* slice, int row, Key&& key, Value&& value) {
    for (int k = 0; k < Keys::scale_bytes; ++k) slice[scale_at<true>(row, k)] = key(k);
    for (int k = 0; k < Values::scale_bytes; ++k) slice[scale_at<false>(row, k)] = value(k);
  }

  // All of a lane's words; from: 16 bytes a lane.
  template <class Fragments, class Lanes>
  KVT_HD KVT_INLINE static void load(const Lanes& lanes, const typename Lanes::template Reg<const std::byte*>& from,
                                     typename Lanes::template Reg<std::uint32_t>* to) {
    constexpr int fours = Fragments::words / 4 * 4, twos = fours + (Fragments::words - fours) / 2 * 2;
    const auto at = [&](int word, int lane_bytes) {
      return map(
          lanes, [=](int lane, const std::byte* p) { return p + (word * word_bytes + lane * (lane_bytes - 16)); }, from);
    };
    load_fours<fours>(lanes, from, to);
    if constexpr (twos > fours) load_words<2>(lanes, at(fours, 8), to + fours);
    if constexpr (Fragments::words > twos) load_words<1>(lanes, at(twos, 4), to + twos);
    if constexpr (Fragments::grouped) load_groups<Fragments::extra, Fragments>(lanes, from, 0, to + Fragments::words);
  }
  // Those of 16 rows, where they are a multiple of four.
  template <class Fragments, class Lanes>
  KVT_HD KVT_INLINE static void load_half(const Lanes& lanes, const typename Lanes::template Reg<const std::byte*>& from,
                                          int half, typename Lanes::template Reg<std::uint32_t>* to) {
    constexpr int count = Fragments::words / 2;
    static_assert(count % 4 == 0 && Fragments::tiles % 8 == 0);
    load_fours<count>(lanes, offset(lanes, from, half * count * word_bytes), to);
    if constexpr (Fragments::grouped) load_groups<Fragments::extra / 2, Fragments>(lanes, from, half, to + count);
  }
  // Writes the keys (or the values) of a slice from row `keep` on: element(row, dim) is a code, or the bits of a dense element,
  // and negative for rows that do not exist. Those become zeros, since weights of zero meet them.
  template <bool keys, class Lanes, class Element>
  KVT_HD static void pack(const Lanes& lanes, std::byte* slice, int keep, Element&& element) {
    using Fragments = Part<keys>;
    std::byte* const to = slice + (keys ? 0 : values_at);
    map(lanes, [&](int lane) {
      const auto old = [&](int w) { return word_of<Fragments>(to, lane, w); };
      KVT_LOOP_ON_DEVICE
      for (int w = 0; w < Fragments::words; ++w) {
        // Codes of rows that are kept may be spread over words; those that are written already still have them.
        const std::uint32_t word = Fragments::make_word(w, [&](int tile, int i, int h) {
          const SlicePlace at = Fragments::template place<keys>(lane, tile, i, h);
          return at.row < keep ? Fragments::code(old, tile, i, h) : element(at.row, at.dim);
        });
        std::memcpy(to + word_at<Fragments>(lane, w), &word, sizeof word);
      }
      return 0;
    });
  }
  // Byte of a dense element in a slice.
  template <bool keys>
  KVT_HD static constexpr int dense_at(int row, int d) {
    using Fragments = Part<keys>;
    const FragmentPlace at = Fragments::template find<keys>(row, d);
    return (keys ? 0 : values_at) + word_at<Fragments>(at.lane, 4 * at.tile + at.i) + 2 * at.h;
  }
  // What pack() was given for one element.
  template <bool keys>
  KVT_HD static int element(const std::byte* slice, int row, int d) {
    using Fragments = Part<keys>;
    const FragmentPlace at = Fragments::template find<keys>(row, d);
    const auto word = [&](int w) { return word_of<Fragments>(slice + (keys ? 0 : values_at), at.lane, w); };
    return Fragments::code(word, at.tile, at.i, at.h);
  }
  // What pack() was given for all, element [slice_rows][dim], and the same packed: on the host, a place of all lanes at a time.
  template <bool keys>
  static void read(const std::byte* slice, int (*element)[dim]) {
    using Fragments = Part<keys>;
    std::uint32_t word[Fragments::words][32];
    for (int w = 0; w < Fragments::words; ++w) {
      for (int lane = 0; lane < 32; ++lane) word[w][lane] = word_of<Fragments>(slice + (keys ? 0 : values_at), lane, w);
    }
    each_place([&](int tile, int i, int h) {
      int code[32];
      Fragments::codes(word, tile, i, h, code);
      for (int lane = 0; lane < 32; ++lane) {
        const SlicePlace at = Fragments::template place<keys>(lane, tile, i, h);
        element[at.row][at.dim] = code[lane];
      }
    });
  }
  template <bool keys>
  static void write(const int (*element)[dim], std::byte* slice) {
    using Fragments = Part<keys>;
    std::uint32_t word[Fragments::words][32] = {};
    each_place([&](int tile, int i, int h) {
      int code[32];
      for (int lane = 0; lane < 32; ++lane) {
        const SlicePlace at = Fragments::template place<keys>(lane, tile, i, h);
        code[lane] = element[at.row][at.dim];
      }
      Fragments::set_codes(code, tile, i, h, word);
    });
    for (int w = 0; w < Fragments::words; ++w) {
      for (int lane = 0; lane < 32; ++lane) {
        std::memcpy(slice + (keys ? 0 : values_at) + word_at<Fragments>(lane, w), &word[w][lane], sizeof(std::uint32_t));
      }
    }
  }
  // Copies of the tables for every lane: table_bytes, by `threads` threads.
  KVT_HD static void fill_tables(std::byte* table, int thread, int threads) {
    fill_table<Keys>(table, thread, threads);
    fill_table<Values>(table + value_table_offset, thread, threads);
  }

 private:
  template <class Visit>
  static void each_place(Visit&& visit) {
    for (int k = 0; k < dim; ++k) visit(k / 8, k / 2 % 4, k % 2);
  }
  template <class Fragments>
  KVT_HD KVT_INLINE static std::uint32_t word_of(const std::byte* part, int lane, int w) {
    std::uint32_t word;
    std::memcpy(&word, part + word_at<Fragments>(lane, w), sizeof word);
    return word;
  }
  template <int count, class Lanes>
  KVT_HD KVT_INLINE static void load_fours(const Lanes& lanes, const typename Lanes::template Reg<const std::byte*>& from,
                                           typename Lanes::template Reg<std::uint32_t>* to) {
    KVT_UNROLL_ON_DEVICE
    for (int w = 0; w < count; w += 4) load_words<4>(lanes, offset(lanes, from, w * word_bytes), to + w);
  }
  // Part number `part`, of `count` words, of a lane's scales of groups; from: as load().
  template <int count, class Fragments, class Lanes>
  KVT_HD KVT_INLINE static void load_groups(const Lanes& lanes, const typename Lanes::template Reg<const std::byte*>& from,
                                            int part, typename Lanes::template Reg<std::uint32_t>* to) {
    constexpr int begin = std::is_same_v<Fragments, Keys> ? key_groups_at : value_groups_at - values_at;
    constexpr int width = count % 4 == 0 ? 4 : count % 2 == 0 ? 2 : 1;
    const auto at = map(
        lanes,
        [part](int lane, const std::byte* p) {
          return p + (begin - 16 * lane + 4 * (Fragments::part_of(lane) * Fragments::extra + part * count));
        },
        from);
    KVT_UNROLL_ON_DEVICE
    for (int w = 0; w < count; w += width) load_words<width>(lanes, offset(lanes, at, 4 * w), to + w);
  }
};

}  // namespace kvt::inline v0
