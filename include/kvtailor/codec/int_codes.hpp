// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What codecs of uniform integers share.
//   IntCodes   how n codes of 2, 3, 4, 5 or 8 bits lie in memory
//   IntLevels  2^bits equidistant levels from the least to the largest of some numbers, and the nearest of them
#pragma once

#include "kvtailor/codec/integer_rows.hpp"
#include "kvtailor/core/config.hpp"
#include "kvtailor/core/lanes.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0::detail {

// a * b, rounded before anything is added to it. Compilers fuse products with sums, and then ties round otherwise: codes would
// depend on how a program was compiled.
KVT_HD KVT_INLINE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  float x = a * b;
#if defined(__SSE__)
  asm("" : "+x"(x));
#elif defined(__GNUC__)
  asm("" : "+m"(x));
#endif
  return x;
#endif
}

// ggml's order. Of odd bits the highest ones come first, bit i of byte j that of element 8 j + i; the rest follows as a plane
// of `width` bits, in which byte j of S = n * width / 8 holds elements j, j + S, j + 2 S, ... from the low bits up.
template <int bits, int n>
struct IntCodes {
  static_assert((bits >= 2 && bits <= 5) || bits == 8, "codes have 2, 3, 4, 5 or 8 bits");
  static_assert(n % 8 == 0);
  static constexpr int width = bits == 8 ? 8 : bits >= 4 ? 4 : 2;
  static constexpr int mask = (1 << width) - 1;
  static constexpr int stride = n * width / 8;
  static constexpr int high_bytes = n * (bits - width) / 8;
  static constexpr int bytes = high_bytes + stride;

  // code [n] are whole numbers in memory that all lanes see; bits above the lowest ones are dropped.
  template <class Lanes, class Bytes>
  KVT_HD KVT_INLINE static void pack(const Lanes& lanes, const float* code, const Bytes& to) {
    lanes.each([&](int lane) {
      for (int j = lane; j < high_bytes; j += Lanes::size) {
        int byte = 0;
        for (int i = 0; i < 8; ++i) byte |= (static_cast<int>(code[8 * j + i]) >> width & 1) << i;
        to[j] = static_cast<unsigned char>(byte);
      }
      for (int j = lane; j < stride; j += Lanes::size) {
        int byte = 0;
        for (int s = 0; s < 8 / width; ++s) byte |= (static_cast<int>(code[s * stride + j]) & mask) << (s * width);
        to[high_bytes + j] = static_cast<unsigned char>(byte);
      }
    });
  }
  KVT_HD KVT_INLINE static void unpack(const unsigned char* from, int* code) {
    const unsigned char* const plane = from + high_bytes;
#if defined(KVT_HOST_AVX2)
    if constexpr (in_eights) {
      for (int i = 0; i < n; i += 8) _mm256_storeu_si256(reinterpret_cast<__m256i*>(code + i), eight_at(from, i));
      return;
    }
#endif
    for (int s = 0; s < 8 / width; ++s) {
      for (int j = 0; j < stride; ++j) code[s * stride + j] = plane[j] >> (s * width) & mask;
    }
    for (int j = 0; j < high_bytes; ++j) {
      for (int i = 0; i < 8; ++i) code[8 * j + i] |= (from[j] >> i & 1) << width;
    }
  }
#if defined(KVT_HOST_AVX2)
  static constexpr bool in_eights = stride % 8 == 0;
  KVT_INLINE static __m256i eight_at(const unsigned char* from, int i) requires(in_eights) {
    const __m256i low = eight_codes<width>(from + high_bytes + i % stride, i / stride * width);
    if constexpr (high_bytes == 0) {
      return low;
    } else {
      const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
      const __m256i unset = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(from[i / 8]), place), _mm256_setzero_si256());
      return _mm256_or_si256(low, _mm256_andnot_si256(unset, _mm256_set1_epi32(1 << width)));
    }
  }
  // Codes 4 k .. 4 k + 3 of each row, one a byte: of the group `group` of tiles of groups.
  template <int k, class Tile>
  KVT_INLINE static auto column(const Tile& tile, int group) requires(stride % 4 == 0 && high_bytes % 4 == 0) {
    const int first = group * bytes / 4;
    const auto low = plane_codes<width, stride, k>(tile, first + high_bytes / 4);
    if constexpr (high_bytes == 0) {
      return low;
    } else {
      return with_high_bits<k>(tile, first, low);
    }
  }

 private:
  // Byte k / 2 of a row has the bits of eight elements.
  static constexpr int high_place(int k) { return k % 2 == 0 ? 0x08040201 : static_cast<int>(0x80402010u); }
#if defined(KVT_HOST_AVX512)
  template <int k>
  KVT_INLINE static __m512i with_high_bits(const TilePair& tiles, int first, __m512i low) {
    const __m128i from =
        _mm_add_epi8(_mm_set1_epi32(0x01010101 * (k / 2 % 4)), _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    const __m512i bytes_of_rows = _mm512_shuffle_epi8(tile_words(tiles, first + k / 8), _mm512_broadcast_i32x4(from));
    return with(low, bytes_of_rows, _mm512_set1_epi32(high_place(k)));
  }
  // Turned, the bits of an element lie four times side by side.
  template <int k>
  KVT_INLINE static __m512i with_high_bits(const TurnedPair& tiles, int first, __m512i low) {
    const __m512i place = _mm512_broadcast_i32x4(turned_place(high_place(k)));
    const __m512i word = tile_words(tiles, first + k / 8);  // bytes 0 of four rows, bytes 1, ...
    return with(low, _mm512_shuffle_epi32(word, static_cast<_MM_PERM_ENUM>(0x55 * (k / 2 % 4))), place);
  }
  KVT_INLINE static __m128i turned_place(int place) {
    return _mm_setr_epi32(0x01010101 * (place & 255), 0x01010101 * (place >> 8 & 255), 0x01010101 * (place >> 16 & 255),
                          static_cast<int>(0x01010101u * (static_cast<unsigned>(place) >> 24)));
  }
  KVT_INLINE static __m512i with(__m512i low, __m512i high_bytes_of_rows, __m512i place) {
    return _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(high_bytes_of_rows, place), low, _mm512_set1_epi8(1 << width));
  }
#else
  template <int k>
  KVT_INLINE static __m256i with_high_bits(OneTile tile, int first, __m256i low) {
    const __m256i place = _mm256_set1_epi32(high_place(k));
    const __m256i from =
        _mm256_add_epi8(_mm256_set1_epi32(0x01010101 * (k / 2 % 4)),
                        _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    const __m256i bit = _mm256_and_si256(_mm256_shuffle_epi8(tile_words(tile, first + k / 8), from), place);
    return _mm256_or_si256(low, _mm256_and_si256(_mm256_cmpeq_epi8(bit, place), _mm256_set1_epi8(1 << width)));
  }
#endif

 public:
#endif
  template <class Bytes>
  KVT_HD KVT_INLINE static int at(const Bytes& from, int i) {
    int code = from[high_bytes + i % stride] >> (i / stride * width) & mask;
    if constexpr (high_bytes > 0) code |= (from[i / 8] >> i % 8 & 1) << width;
    return code;
  }
};

KVT_HD KVT_INLINE float inverse_or_zero(float x) { return x != 0 ? 1 / x : 0.f; }

// x >= 0 without its fraction, at most `most`. The inverse of the smallest scales is infinite, and the code of what was
// multiplied by it is 0.
template <int most>
KVT_HD KVT_INLINE int whole_part(float x) {
  if (!(x >= 0 && x < most + 2)) return 0;
  const int whole = static_cast<int>(x);
  return whole < most ? whole : most;
}

template <int bits>
struct IntLevels {
  static constexpr int most = (1 << bits) - 1;
  float zero, scale, inverse;

  KVT_HD KVT_INLINE static IntLevels between(float least, float largest) {
    const float scale = (largest - least) / most;
    return {least, scale, inverse_or_zero(scale)};
  }
  KVT_HD KVT_INLINE int nearest(float x) const { return whole_part<most>(rounded_product(x - zero, inverse) + 0.5f); }
};

}  // namespace kvt::inline v0::detail
