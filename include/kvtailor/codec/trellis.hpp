// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Trellis: trellis-coded rows. Codes overlap: each element is read from its own bits and those of the elements after it, so
// that at the bits of a scalar code the values are denser, and the encoder searches for the best sequence of codes.
//
// Block:   n rows: Scale scale[n]; then per row head_dim * bits / 8 bytes, a ring of bits: bit k is bit k % 8 of byte k / 8,
//          and after the last comes the first. Bits i * bits .. (i + 1) * bits - 1 are the code of element i.
// Value:   scale * value[state] of a table of 2^window values; the state is bits i * bits .. i * bits + window - 1 of the ring,
//          the first of them the lowest. See trellis_tables.hpp.
// Error:   of a row whose elements are spread like those of a random one, relative to its squared norm, on average, for
//          head_dim 64: .281 / .073 / .0194 / .0052 at 1 .. 4 bits, window 8; .285 / .078 / .0215 at 1 .. 3 bits, window 6.
//          At head_dim 128 up to 4 % more. Of any other row up to 1: see Rotated.
// Cost:    head_dim * bits / 8 + sizeof(Scale) bytes a row: a ring has no beginning to be stored. Encoding takes eight times
//          as long as that of LloydMax at window 8, four times at window 6; reading, twice as long with AVX2, and a third
//          longer with AVX-512 (VBMI).
// Source:  trellis-coded quantization: M. W. Marcellin and T. R. Fischer, IEEE Trans. Commun. 38, 1990; the bit-shift trellis,
//          closed to a ring: QTIP, arXiv 2406.11235. Differs from QTIP: one table over all states, trained with the encoder.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kvtailor/codec/log_scale.hpp"
#include "kvtailor/codec/row_wise.hpp"
#include "kvtailor/codec/trellis_search.hpp"
#include "kvtailor/codec/trellis_tables.hpp"

namespace kvt::inline v0 {

template <int bits, int dim, int window = 8, class Scale = LogScale>
struct Trellis : RowCodec<Trellis<bits, dim, window, Scale>, dim, static_cast<int>(sizeof(Scale)), dim * bits / 8> {
  static_assert(bits >= 1 && bits <= 4, "codes have 1 to 4 bits");
  using Search = TrellisSearch<bits, window>;
  static constexpr int num_states = 1 << window;

  static constexpr double max_row_norm() { return static_cast<double>(Scale::max); }

  struct Values {
    float of[num_states] = {};
    constexpr Values() {
      for (int s = 0; s < num_states / 2; ++s) {
        of[s] = static_cast<float>(TrellisTable<bits, window>::half[s]) / Search::table_grid;
        of[num_states - 1 - s] = -of[s];
      }
    }
  };

  int encode(const float* rows, int n, std::byte* block) const {
    std::vector<std::uint8_t> memory(Search::memory(dim));
    Search search;
    for (int row = 0; row < n; ++row) {
      const float* const x = rows + static_cast<long long>(row) * dim;
      // Squares of the smallest rows are lost; they are zero for any scale.
      const float size = std::sqrt(dot<dim>(x, x) / dim);
      Path best;
      for (const float factor : Search::sizes) {
        const Path path = path_for(search, memory.data(), x, nearest_scale(size * factor));
        if (path.change < best.change) best = path;
      }
      std::memcpy(block + static_cast<int>(sizeof(Scale)) * row, &best.scale, sizeof best.scale);
      pack(best.state, Trellis::code_bytes_of(block, n, row));
    }
    return n * Trellis::row_bytes;
  }

  template <int lanes>
  KVT_HD KVT_INLINE void load(const std::byte* block, int n, int row, int lane, LaneRow<dim, lanes>& to) const {
    const unsigned char* const codes = Trellis::code_bytes_of(block, n, row);
    if constexpr (lanes == 1) {
      // Eight elements at a time are read from eight bytes; those that would pass the end, from a copy with the row's first
      // bytes after it.
      constexpr int copied = std::min(8, Trellis::code_bytes), copied_from = Trellis::code_bytes - copied;
      unsigned char end[16] = {};
      std::memcpy(end, codes + copied_from, copied);
      std::memcpy(end + copied, codes, copied);
      for (int d = 0; d < dim; d += 8) {
        const int at = d / 8 * bits;
        std::uint64_t word;
        std::memcpy(&word, at + 8 <= Trellis::code_bytes ? codes + at : end + (at - copied_from), sizeof word);
        load_eight(word, to.x + d);
      }
    } else {
      static constexpr Values value;
      for (int i = 0; i < LaneRow<dim, lanes>::length; ++i) {
        const int d = i * lanes + lane;
        to.x[i] = d < dim ? value.of[state_at(codes, d)] : 0.f;
      }
    }
  }
  KVT_HD KVT_INLINE float row_scale(const std::byte* block, int row) const {
    Scale scale;
    std::memcpy(&scale, block + static_cast<int>(sizeof(Scale)) * row, sizeof scale);
    return to_float(scale);
  }

#if defined(KVT_HOST_AVX2)
  struct Integers {
    static constexpr int size = dim, group = dim, most = 127;
    static constexpr bool has_least = false;
    const std::byte* block;
    int n;

    template <int c>
    KVT_INLINE void load(int row, __m256i* to) const {
      load_integers<c>(Trellis::code_bytes_of(block, n, row), to);
    }
    KVT_INLINE float scale(int row, int) const { return Trellis{}.row_scale(block, row) / Search::table_grid; }
  };
#endif

 private:
  struct Path {
    Scale scale{0};
    double change = 0;  // of the squared error, from that of zeros
    std::uint16_t state[dim] = {};
  };
  static Scale nearest_scale(float x) { return from_float<Scale>(std::min(x, static_cast<float>(Scale::max))); }

  // The best path for a scale, and the best scale for that path.
  static Path path_for(Search& search, std::uint8_t* memory, const float* x, Scale scale) {
    static constexpr Values value;
    Path path;
    const float size = to_float(scale);
    if (size == 0) return path;
    float unit[dim];
    for (int d = 0; d < dim; ++d) unit[d] = x[d] / size;
    search(unit, dim, value.of, memory, path.state);
    double cross = 0, square = 0;
    for (int d = 0; d < dim; ++d) {
      const float v = value.of[path.state[d]];
      cross += static_cast<double>(x[d] * v);
      square += static_cast<double>(v * v);
    }
    if (cross <= 0) return path;
    path.scale = nearest_scale(static_cast<float>(cross / square));
    const double stored = static_cast<double>(to_float(path.scale));
    path.change = stored * (stored * square - 2 * cross);
    return path;
  }
  static void pack(const std::uint16_t* state, unsigned char* codes) {
    for (int d = 0; d < dim; d += 8) {
      std::uint32_t word = 0;
      for (int k = 0; k < 8; ++k) word |= (state[d + k] & ((1u << bits) - 1)) << (k * bits);
      std::memcpy(codes + d / 8 * bits, &word, bits);
    }
  }
  KVT_HD KVT_INLINE static int state_at(const unsigned char* codes, int d) {
    constexpr int last_bit = (bits % 2 == 1 ? 7 : 8 - bits) + window - 1;  // of a window that begins in byte 0
    const int first = d * bits / 8;
    int word = 0;
    for (int k = 0; k <= last_bit / 8; ++k) {
      const int at = first + k;
      word |= codes[at < Trellis::code_bytes ? at : at - Trellis::code_bytes] << (8 * k);
    }
    return word >> (d * bits % 8) & (num_states - 1);
  }

#if defined(KVT_HOST_AVX2)
  // The table by bytes: what stands for states below half of them.
  struct ValueBytes {
    alignas(16) std::int8_t half[num_states / 2] = {};
    constexpr ValueBytes() {
      for (int s = 0; s < num_states / 2; ++s) half[s] = TrellisTable<bits, window>::half[s];
    }
  };
  // Where elements 16 k .. 16 k + 15 lie in 16 bytes that hold their codes.
  struct Sources {
    static constexpr int loads = dim / 16, read = std::min(16, Trellis::code_bytes);
    int from[loads] = {};                                 // the first of these bytes
    bool wraps[loads] = {};                               // the row's first byte takes the place of that one
    alignas(32) std::int8_t byte[loads / 2][2][32] = {};  // of each 32 elements: 0 .. 7 and 16 .. 23, then the others
    alignas(32) std::int16_t factor[16] = {};             // moves a state to the top of its 16 bits
    alignas(32) std::int8_t eight[loads / 2][32] = {};    // the bytes that states 8 k .. 8 k + 7 come from, in eight bytes
    alignas(32) std::int8_t shift[32] = {};               // where they begin in these

    constexpr Sources() {
      for (int k = 0; k < loads; ++k) {
        const int first = 2 * bits * k;
        from[k] = std::min(first, Trellis::code_bytes - read);
        wraps[k] = k + 1 == loads && Trellis::code_bytes > 16;
        for (int i = 0; i < 16; ++i) {
          const int at = first + i * bits / 8;
          const auto place = [&](int b) {
            return static_cast<std::int8_t>(at + b < Trellis::code_bytes ? at + b - from[k] : at + b - Trellis::code_bytes);
          };
          for (int b = 0; b < 2; ++b) byte[k / 2][i / 8][16 * (k % 2) + 2 * (i % 8) + b] = place(b);
          if (i % 8 != 0) continue;
          for (int b = 0; 8 * b < 7 * bits + window; ++b) eight[k / 2][16 * (k % 2) + i + b] = place(b);
        }
      }
      for (int i = 0; i < 16; ++i) factor[i] = static_cast<std::int16_t>(1 << (16 - window - i * bits % 8));
      for (int i = 0; i < 32; ++i) shift[i] = static_cast<std::int8_t>(i % 8 * bits);
    }
  };
  KVT_INLINE static __m128i sixteen_bytes(const unsigned char* codes) {
    __m128i bytes = _mm_setzero_si128();
    std::memcpy(&bytes, codes, Sources::read);
    return bytes;
  }
  template <int c>
  KVT_INLINE static void load_integers(const unsigned char* codes, __m256i* to) {
    static constexpr Sources source;
    static constexpr ValueBytes values;
    const auto half_of = [&](int k) {
      const __m128i bytes = sixteen_bytes(codes + source.from[k]);
      return source.wraps[k] ? _mm_insert_epi8(bytes, codes[0], 0) : bytes;
    };
    const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(half_of(2 * c)), half_of(2 * c + 1), 1);
#if defined(KVT_HOST_AVX512)
    const __m256i eights = _mm256_shuffle_epi8(bytes, detail::load_bytes(source.eight[c]));
    // The masked form: gcc 12 warns of an uninitialised value inside the plain one.
    const __m256i near = _mm256_maskz_multishift_epi64_epi8(0xffffffff, detail::load_bytes(source.shift), eights);
    const __m256i state = _mm256_and_si256(near, _mm256_set1_epi8(static_cast<char>(num_states - 1)));
#else
    const auto sixteen_states = [&](int part) {
      const __m256i near = _mm256_shuffle_epi8(bytes, detail::load_bytes(source.byte[c][part]));
      return _mm256_srli_epi16(_mm256_mullo_epi16(near, detail::load_bytes(source.factor)), 16 - window);
    };
    const __m256i state = _mm256_packus_epi16(sixteen_states(0), sixteen_states(1));
#endif
    // The complement of a state above the middle stands for the opposite value.
    const __m256i above = window == 8 ? _mm256_cmpgt_epi8(_mm256_setzero_si256(), state)
                                      : _mm256_cmpgt_epi8(state, _mm256_set1_epi8(num_states / 2 - 1));
    const __m256i index = _mm256_xor_si256(state, _mm256_and_si256(above, _mm256_set1_epi8(static_cast<char>(num_states - 1))));
    const __m256i size = detail::look_up_bytes<num_states / 2>(values.half, index);
    detail::widen(_mm256_sub_epi8(_mm256_xor_si256(size, above), above), to);
  }
#endif
  // The values of the eight states that begin at bits 0, bits, 2 * bits, ... of a word.
  KVT_HD KVT_INLINE static void load_eight(std::uint64_t word, float* to) {
    static constexpr Values value;
#if defined(KVT_HOST_VECTORS) && defined(__AVX2__)
    // Byte k * bits / 8 of the word and the three after it, shifted, for state k.
    static constexpr Windows window_of;
    const __m256i from = _mm256_load_si256(reinterpret_cast<const __m256i*>(window_of.byte));
    const __m256i shift = _mm256_load_si256(reinterpret_cast<const __m256i*>(window_of.shift));
    const __m256i near = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<long long>(word)), from);
    const __m256i state = _mm256_and_si256(_mm256_srlv_epi32(near, shift), _mm256_set1_epi32(num_states - 1));
    _mm256_storeu_ps(to, _mm256_i32gather_ps(value.of, state, 4));
#else
    for (int k = 0; k < 8; ++k) to[k] = value.of[static_cast<unsigned>(word >> (k * bits)) & (num_states - 1)];
#endif
  }
  struct Windows {
    alignas(32) char byte[32] = {};
    alignas(32) std::int32_t shift[8] = {};
    constexpr Windows() {
      for (int k = 0; k < 8; ++k) {
        shift[k] = k * bits % 8;
        for (int b = 0; b < 4; ++b) byte[4 * k + b] = static_cast<char>(k * bits / 8 + b);
      }
    }
  };
};

static_assert(RowWiseCodec<Trellis<3, 64>> && RowWiseCodec<Trellis<1, 40, 6>>);

}  // namespace kvt::inline v0
