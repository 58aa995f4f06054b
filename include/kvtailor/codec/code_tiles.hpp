// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Tiles of eight rows of codes (see row_wise.hpp) in registers of a host with AVX2, or two of them in those of one with
// AVX-512; and what kernels on integers share: see integer_rows.hpp and wide_rows.hpp.
#pragma once

#include "kvtailor/core/half.hpp"
#include "kvtailor/core/lanes.hpp"
#include "kvtailor/core/simd.hpp"
#if defined(KVT_HOST_AVX2)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>

namespace kvt::inline v0::detail {

KVT_INLINE __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
// Bytes of an aligned table of `size` bytes, 16 to 64. Bits above an index do not matter, but the highest must not be set.
template <int size>
KVT_INLINE __m256i look_up_bytes(const std::int8_t* table, __m256i index) {
  if constexpr (size == 16) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
  } else {
#if defined(KVT_HOST_AVX512)
    // The masked form: gcc 12 warns of an uninitialised value inside the plain one.
    if constexpr (size == 32) return _mm256_maskz_permutexvar_epi8(0xffffffff, index, load_bytes(table));
    if constexpr (size == 64) return _mm256_permutex2var_epi8(load_bytes(table), index, load_bytes(table + 32));
#endif
    constexpr int top = size == 32 ? 4 : 5;  // the highest bit of an index
    __m256i upper = index;
    for (int bit = top; bit < 7; ++bit) upper = _mm256_add_epi8(upper, upper);  // no shift: these are needed elsewhere
    return _mm256_blendv_epi8(look_up_bytes<size / 2>(table, index), look_up_bytes<size / 2>(table + size / 2, index), upper);
  }
}
// f<0>(), f<1>(), ... Compilers keep arrays in registers only if their indices are constants from the start.
template <int count, class F>
KVT_INLINE void each(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>) KVT_INLINE_LAMBDA { (f.template operator()<i>(), ...); }
  (std::make_integer_sequence<int, count>{});
}
// f<many>(j) for vectors j .. j + many - 1: `most` at a time, and once for those that are left.
template <int most, class F>
KVT_INLINE void each_batch(int m, F f, int j = 0) {
  for (; j + most <= m; j += most) f.template operator()<most>(j);
  if constexpr (most > 1) {
    if (j < m) each_batch<most - 1>(m, f, j);
  }
}

inline constexpr int most_integer_vectors = 8, most_integer_rows = 128;  // at once

// Four words of four bytes turned round, in either half: bytes 0 of all words, then bytes 1, ...
KVT_INLINE __m256i turned(__m256i x) {
  const __m128i from = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(from));
}
#if defined(KVT_HOST_AVX512)
KVT_INLINE __m512i turned(__m512i x) {
  const __m128i from = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(from));
}
#endif

// A tile of eight rows in registers of 256 bits.
using OneTile = const unsigned char*;
#if defined(KVT_HOST_AVX512)
// Two tiles in registers of 512, as they are or with every four words of four bytes turned round.
struct TilePair {
  const unsigned char *first, *second;
  TilePair operator+(int bytes) const { return {first + bytes, second + bytes}; }
};
struct TurnedPair {
  TilePair plain;
  TurnedPair operator+(int bytes) const { return {plain + bytes}; }
};
// Four rows of a tile, the lower or the upper ones: what is read is four words, one in each lane, as they are or turned round.
template <int half>
struct HalfTile {
  const unsigned char* tile;
  HalfTile operator+(int bytes) const { return {tile + bytes}; }
};
template <int half>
struct TurnedHalf {
  HalfTile<half> plain;
  TurnedHalf operator+(int bytes) const { return {plain + bytes}; }
};
#endif

// Words of four bytes, one of each row.
KVT_INLINE __m256i tile_words(OneTile tile, int word) { return load_bytes(tile + 32 * word); }
KVT_INLINE __m256i shift_right(__m256i x, int bits) { return _mm256_srli_epi16(x, bits); }
#if defined(KVT_HOST_AVX512)
KVT_INLINE __m512i tile_words(const TilePair& tiles, int word) {
  const __m512i first = _mm512_castsi256_si512(tile_words(tiles.first, word));
  return _mm512_inserti64x4(first, tile_words(tiles.second, word), 1);
}
KVT_INLINE __m512i tile_words(const TurnedPair& tiles, int word) { return turned(tile_words(tiles.plain, word)); }
template <int half>
KVT_INLINE __m512i tile_words(const HalfTile<half>& rows, int word) {
  const unsigned char* const from = rows.tile + 32 * word;
  return _mm512_shuffle_i64x2(_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64), half == 0 ? 0x88 : 0xdd);
}
template <int half>
KVT_INLINE __m512i tile_words(const TurnedHalf<half>& rows, int word) {
  return turned(tile_words(rows.plain, word));
}
// The words that follow `now`, words `word` and, if they are several, after it; after the last of `count` comes the first.
KVT_INLINE __m512i next_words(const TilePair& tiles, int word, int count, __m512i) {
  return tile_words(tiles, word + 1 < count ? word + 1 : 0);
}
template <int half>
KVT_INLINE __m512i next_words(const HalfTile<half>& rows, int word, int count, __m512i now) {
  return _mm512_maskz_alignr_epi64(0xff, tile_words(rows, word + 4 < count ? word + 4 : 0), now, 2);
}
KVT_INLINE __m512i shift_right(__m512i x, int bits) { return _mm512_srli_epi16(x, static_cast<unsigned>(bits)); }
#endif
template <class Reg>
KVT_INLINE Reg all_bytes(int x) {
#if defined(KVT_HOST_AVX512)
  if constexpr (sizeof(Reg) == 64) return _mm512_set1_epi8(static_cast<char>(x));
#endif
  if constexpr (sizeof(Reg) == 32) return _mm256_set1_epi8(static_cast<char>(x));
}

// Codes of `width` bits of elements 4 k .. 4 k + 3, one a byte, from a plane in which byte j of `stride` holds elements j,
// j + stride, j + 2 stride, ... from the low bits up. It begins at a word of the tile.
template <int width, int stride, int k, class Tile>
KVT_INLINE auto plane_codes(const Tile& tile, int first_word) {
  static_assert(stride % 4 == 0);
  const auto words = tile_words(tile, first_word + k % (stride / 4));
  if constexpr (width == 8) {
    return words;
  } else {
    return shift_right(words, k / (stride / 4) * width) & all_bytes<std::remove_cv_t<decltype(words)>>((1 << width) - 1);
  }
}
// Codes of 1 or 2 bits wherever they are in the lower or upper half of their byte, which spares a shift.
template <int width, int stride, int k>
KVT_INLINE __m256i placed_codes(OneTile tile, int first_word) {
  constexpr int shift = k / (stride / 4) * width;
  const __m256i words = tile_words(tile, first_word + k % (stride / 4));
  return _mm256_and_si256(shift < 4 ? words : _mm256_srli_epi16(words, 4), _mm256_set1_epi8(((1 << width) - 1) << shift % 4));
}
// Bytes to look up for those: number i of `all` for code i, in each place.
template <int width>
struct PlacedBytes {
  alignas(16) std::int8_t byte[16] = {};
  constexpr explicit PlacedBytes(const std::int8_t* all) {
    for (int i = 0; i < 1 << width; ++i) {
      for (int shift = 0; shift < 4; shift += width) byte[i << shift] = all[i];
    }
  }
};
// One bit of a plane's codes as the highest bit of each byte, above what is no part of it.
template <int width, int stride, int k, int bit>
KVT_INLINE __m256i plane_bit(OneTile tile, int first_word) {
  return _mm256_slli_epi16(tile_words(tile, first_word + k % (stride / 4)), 7 - k / (stride / 4) * width - bit);
}
#if defined(KVT_HOST_AVX512)
// A permutation of bytes takes six bits of an index. Where the `width` bits of a plane's code number k are among them once
// words are shifted to the right (or, below zero, to the left), which those in the lower six bits need not be.
struct CodePlace {
  int shift, bit;
  static constexpr CodePlace of(int width, int stride, int k) {
    const int bit = k / (stride / 4) * width, shift = bit + width <= 6 ? 0 : 2;
    return {shift, bit - shift};
  }
};
template <int shift>
KVT_INLINE __m512i moved(__m512i words) {
  if constexpr (shift > 0) return shift_right(words, shift);
  if constexpr (shift < 0) return _mm512_slli_epi16(words, -shift);
  return words;
}
KVT_INLINE __m512i look_up_bytes(const std::int8_t* table, __m512i index) {
  // The masked form: gcc 12 warns of an uninitialised value inside the plain one.
  return _mm512_maskz_permutexvar_epi8(~__mmask64{0}, index, _mm512_load_si512(table));
}
// Values::byte[c] of codes c of 1, 2 or 4 bits.
template <class Values, int width, int stride, int k, class Tile>
KVT_INLINE __m512i plane_values(const Tile& tile, int first_word) {
  static constexpr CodePlace place = CodePlace::of(width, stride, k);
  struct Table {
    alignas(64) std::int8_t byte[64];
    constexpr Table() : byte() {
      for (int i = 0; i < 64; ++i) byte[i] = Values{}.byte[i >> place.bit & ((1 << width) - 1)];
    }
  };
  static constexpr Table table;
  const __m512i words = tile_words(tile, first_word + k % (stride / 4));
  return look_up_bytes(table.byte, moved<place.shift>(words));
}
// Of codes whose upper bits are in one plane and lower bits in another, six at most.
template <class Values, int upper, int lower, int upper_stride, int lower_stride, int k, class Tile>
KVT_INLINE __m512i joined_values(const Tile& tile, int upper_word, int lower_word) {
  static_assert(upper + lower <= 6);
  // The place that needs the fewest shifts.
  struct Places {
    CodePlace up{}, low{};
    constexpr Places() {
      const int up_bit = k / (upper_stride / 4) * upper, low_bit = k / (lower_stride / 4) * lower;
      int least = 3;
      for (int u = 0; u + upper <= 6; ++u) {
        for (int l = 0; l + lower <= 6; ++l) {
          const int shifts = (u != up_bit ? 1 : 0) + (l != low_bit ? 1 : 0);
          if ((u < l + lower && l < u + upper) || shifts >= least) continue;
          least = shifts;
          up = {up_bit - u, u};
          low = {low_bit - l, l};
        }
      }
    }
  };
  static constexpr Places places;
  struct Table {
    alignas(64) std::int8_t byte[64];
    constexpr Table() : byte() {
      for (int i = 0; i < 64; ++i) {
        byte[i] =
            Values{}.byte[(i >> places.up.bit & ((1 << upper) - 1)) << lower | (i >> places.low.bit & ((1 << lower) - 1))];
      }
    }
  };
  static constexpr Table table;
  const __m512i up = moved<places.up.shift>(tile_words(tile, upper_word + k % (upper_stride / 4)));
  const __m512i low = moved<places.low.shift>(tile_words(tile, lower_word + k % (lower_stride / 4)));
  const __m512i mask = all_bytes<__m512i>(((1 << upper) - 1) << places.up.bit);
  return look_up_bytes(table.byte, _mm512_ternarylogic_epi32(mask, up, low, 0xca));  // mask ? up : low
}
#endif
KVT_INLINE __m256 to_floats(__m128i halves) {
#if defined(__F16C__)
  return _mm256_cvtph_ps(halves);
#else
  alignas(16) Half from[8];
  alignas(32) float x[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(from), halves);
  load_floats<8>(from, x);
  return _mm256_load_ps(x);
#endif
}
// fp16 numbers 0 .. 7; zeros from `count` on, which are not read.
KVT_INLINE __m256 load_eight(const Half* from, int count = 8) {
  if (count >= 8) return to_floats(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  alignas(32) float x[8] = {};
  for (int i = 0; i < count; ++i) x[i] = to_float(from[i]);
  return _mm256_load_ps(x);
}

KVT_INLINE __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }
KVT_INLINE float largest_of(__m256 x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// The largest magnitude in x [dim], and its norm or, where squares do not fit, a little more.
template <int dim>
struct VectorSize {
  float largest, norm;

  explicit VectorSize(const float* x) {
    __m256 square = _mm256_setzero_ps(), most = square;
    for (int d = 0; d < dim; d += 8) {
      const __m256 v = _mm256_loadu_ps(x + d);
      square = _mm256_fmadd_ps(v, v, square);
      most = _mm256_max_ps(most, magnitude(v));
    }
    const float total = sum(square);
    largest = largest_of(most);
    norm = std::isinf(total) ? largest * root() : std::sqrt(total);
  }
  static constexpr float root() {  // of dim, or a little more
    int r = 1;
    while (r * r < dim) ++r;
    return static_cast<float>(r);
  }
};

// Unsigned, since what is no number becomes the lowest one.
inline std::uint32_t sum_of_words(__m256i x) {
  alignas(32) std::uint32_t eight[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(eight), x);
  return std::accumulate(eight, eight + 8, std::uint32_t{0});
}

// A place between 0 and 1 for each row, such that any that follow one another are spread evenly.
template <int rows>
struct GoldenSteps {
  alignas(64) float of[rows] = {};
  constexpr GoldenSteps() {
    double x = 0.5;
    for (float& t : of) {
      t = static_cast<float>(x) * 0.999f;
      x += 0.6180339887498949;
      x -= x >= 1 ? 1 : 0;
    }
  }
};

// Numbers times this are at most `to`, and their total at most `most`. Zero if they are as good as zero, or no numbers.
KVT_INLINE float integer_factor(float to, float largest, float total, float most) {
  return largest > 1e-30f && total < 3e38f ? std::min(to / largest, most / total) : 0.f;
}
// What the integers are multiplied by: not a number if any of them was none.
KVT_INLINE float integer_unit(float factor, float total) {
  return factor != 0 ? 1 / factor : total < 3e38f ? 0.f : std::nanf("");
}

}  // namespace kvt::inline v0::detail

#endif
