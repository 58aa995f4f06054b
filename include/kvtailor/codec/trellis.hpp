// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Trellis: trellis-coded rows. Codes overlap: each element is read from its own bits and those of the elements after it, so
// that at the bits of a scalar code the values are denser, and the encoder searches for the best sequence of codes.
//
// Block:   n rows: Scale scale[n]; then per row head_dim * bits / 8 bytes, a ring of bits: bit k is bit k % 8 of byte k / 8,
//          and after the last comes the first. The code of element d begins at bit first_bit(d): codes of 1, 2 and 4 bits lie
//          in planes, elements j, j + bytes, j + 2 bytes, ... in byte j from the low bits up, those of 3 bits in a line.
// Value:   scale * value[state] of a table of 2^window values; the state is the `window` bits from first_bit(d) on, the first
//          the lowest. See trellis_tables.hpp.
// Error:   of a row whose elements are spread like those of a random one, relative to its squared norm, on average, for
//          head_dim 64: .279 / .072 / .0187 / .0050 at 1 .. 4 bits, window 8; .285 / .075 / .0205 at 1 .. 3 bits, window 6.
//          At head_dim 128 up to 4 % more. Of any other row up to 1: see Rotated.
// Cost:    head_dim * bits / 8 + sizeof(Scale) bytes a row: a ring has no beginning to be stored. Encoding takes eight times
//          as long as that of LloydMax at window 8, four times at window 6; reading a third longer with AVX2.
// Source:  trellis-coded quantization: M. W. Marcellin and T. R. Fischer, IEEE Trans. Commun. 38, 1990; the bit-shift trellis,
//          closed to a ring: QTIP, arXiv 2406.11235. Differs from QTIP: sizes and signs are numbered by parities of a state's
//          bits, as by a convolutional code (G. Ungerboeck, IEEE Trans. Inf. Theory 28, 1982), trained with the encoder.
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
  static_assert(bits >= 1 && bits <= 4 && window <= 8, "codes have 1 to 4 bits, and states at most 8");
  using Search = TrellisSearch<bits, window>;
  using Table = TrellisTable<bits, window>;
  static constexpr int num_states = 1 << window;

  // Where in a row's ring the code of an element begins.
  KVT_HD static constexpr int first_bit(int d) {
    return 8 % bits == 0 ? 8 * (d % Trellis::code_bytes) + bits * (d / Trellis::code_bytes) : bits * d;
  }

  static constexpr double max_row_norm() { return static_cast<double>(Scale::max); }

  struct Values {
    float of[num_states] = {};
    constexpr Values() {
      for (int s = 0; s < num_states; ++s) {
        of[s] = static_cast<float>(Table::size[index_of(s)]) / Search::table_grid;
        if (parity(s & Table::sign)) of[s] = -of[s];
      }
    }
  };

  int encode(const float* rows, int n, std::byte* block) const {
    std::vector<std::uint8_t> memory(Search::memory(dim));
    Search search;
    for (int row = 0; row < n; ++row) {
      float x[dim];  // in the order of the ring
      for (int d = 0; d < dim; ++d) x[first_bit(d) / bits] = rows[static_cast<long long>(row) * dim + d];
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
    const auto codes = Trellis::code_bytes_of(block, n, row);
    static constexpr Values value;
    if constexpr (lanes == 1) {
      unsigned char ring[Trellis::code_bytes + 1];
      for (int j = 0; j <= Trellis::code_bytes; ++j) ring[j] = codes[j % Trellis::code_bytes];
#if defined(KVT_HOST_AVX2)
      if constexpr (8 % bits == 0 && Trellis::code_bytes % 4 == 0) {
        for (int d = 0; d < dim; d += 8) {
          // Four and four: a plane may end between them.
          const auto four = [&](int element) {
            int now, next;
            std::memcpy(&now, ring + element % Trellis::code_bytes, 4);
            std::memcpy(&next, ring + element % Trellis::code_bytes + 1, 4);
            const __m128i near = _mm_unpacklo_epi8(_mm_cvtsi32_si128(now), _mm_cvtsi32_si128(next));
            return _mm_srl_epi32(_mm_cvtepu16_epi32(near), _mm_cvtsi32_si128(element / Trellis::code_bytes * bits));
          };
          const __m256i near = _mm256_inserti128_si256(_mm256_castsi128_si256(four(d)), four(d + 4), 1);
          const __m256i state = _mm256_and_si256(near, _mm256_set1_epi32(num_states - 1));
          _mm256_storeu_ps(to.x + d, _mm256_i32gather_ps(value.of, state, 4));
        }
        return;
      }
#endif
      for (int d = 0; d < dim; ++d) to.x[d] = value.of[state_in(ring[first_bit(d) / 8], ring[first_bit(d) / 8 + 1], d)];
    } else {
      for (int i = 0; i < LaneRow<dim, lanes>::length; ++i) {
        const int d = i * lanes + lane;
        if (d < dim) {
          const int at = first_bit(d) / 8, next = at + 1 < Trellis::code_bytes ? at + 1 : 0;
          to.x[i] = value.of[state_in(codes[at], codes[next], d)];
        } else {
          to.x[i] = 0;
        }
      }
    }
  }
  KVT_HD KVT_INLINE float row_scale(const std::byte* block, int row) const {
    Scale scale;
    std::memcpy(&scale, block + static_cast<int>(sizeof(Scale)) * row, sizeof scale);
    return to_float(scale);
  }

#if defined(KVT_HOST_AVX2)
  using TileRows = typename Trellis::Tiles;
  struct Integers : TileRows {
    static constexpr int size = dim, group = dim, most = *std::max_element(Table::size, std::end(Table::size)), offset = most;
    static constexpr bool has_least = false, coarse = true;
    using TileRows::TileRows;

    template <int k>
    KVT_INLINE static __m256i column(const unsigned char* tile) {
      return _mm256_add_epi8(values_of(states_of<k>(tile)), _mm256_set1_epi8(static_cast<char>(offset)));
    }
    KVT_INLINE __m256 scales(int row, int) const {
      const auto* const from = reinterpret_cast<const Scale*>(this->block) + row;
      return _mm256_mul_ps(detail::load_eight(from, this->n - row), _mm256_set1_ps(1.f / Search::table_grid));
    }
  };
#endif

 private:
  static constexpr bool parity(int x) {
    bool odd = false;
    for (; x != 0; x &= x - 1) odd = !odd;
    return odd;
  }
  static constexpr int index_of(int state) {
    int k = 0;
    for (int i = 0; i < bits + 2; ++i) k |= parity(state & Table::index[i]) << i;
    return k;
  }

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
  template <class Codes>
  static void pack(const std::uint16_t* state, const Codes& codes) {
    for (int d = 0; d < dim; d += 8) {
      std::uint32_t word = 0;
      for (int k = 0; k < 8; ++k) word |= (state[d + k] & ((1u << bits) - 1)) << (k * bits);
      for (int i = 0; i < bits; ++i) codes[d / 8 * bits + i] = static_cast<unsigned char>(word >> (8 * i));
    }
  }
  // The state of element d, whose code begins in the first of two bytes.
  KVT_HD KVT_INLINE static int state_in(unsigned char first, unsigned char second, int d) {
    return (first | second << 8) >> first_bit(d) % 8 & (num_states - 1);
  }

#if defined(KVT_HOST_AVX2)
  // The table by bytes. The numbers that belong to the lower and to the upper four bits of a state, joined by exclusive or,
  // have the number of its size below and its sign as their highest bit; the next is always set, so that none is zero.
  struct Bytes {
    static constexpr int num_sizes = 1 << (bits + 2);
    alignas(16) std::int8_t low[16] = {}, high[16] = {};
    alignas(32) std::int8_t size[std::max(16, num_sizes)] = {};
    constexpr Bytes() {
      for (int b = 0; b < 16; ++b) {
        low[b] = part(b, 64);
        high[b] = part(b << 4, 0);
      }
      for (int k = 0; k < num_sizes; ++k) size[k] = Table::size[k];
    }
    static constexpr std::int8_t part(int state, int more) {
      return static_cast<std::int8_t>(index_of(state) + more - (parity(state & Table::sign) ? 128 : 0));
    }
  };
  // Of elements 4 k .. 4 k + 3 of the rows of a tile, one a byte; more bits than those of a state may be left above them.
  template <int k>
  KVT_INLINE static __m256i states_of(const unsigned char* tile) {
    constexpr int words = Trellis::code_bytes / 4;
    if constexpr (8 % bits == 0) {
      return bits_from<k % words, k / words * bits>(tile);
    } else {
      // Three bits apart: each byte from a shift of its own.
      const __m256i first = bits_from<12 * k / 32, 12 * k % 32>(tile);
      const auto moved = [&](int by) { return _mm256_slli_epi32(first, by * (8 - bits)); };
      const __m256i odd = _mm256_set1_epi16(-256);
      return _mm256_blend_epi16(_mm256_blendv_epi8(first, moved(1), odd), _mm256_blendv_epi8(moved(2), moved(3), odd), 0xaa);
    }
  }
  // 32 bits of each row's ring, from a bit of a word on.
  template <int word, int bit>
  KVT_INLINE static __m256i bits_from(const unsigned char* tile) {
    const __m256i now = detail::tile_words(tile, word);
    if constexpr (bit == 0) return now;
    const __m256i next = detail::tile_words(tile, (word + 1) % (Trellis::code_bytes / 4));
    return _mm256_or_si256(_mm256_srli_epi32(now, bit), _mm256_slli_epi32(next, 32 - bit));
  }
  KVT_INLINE static __m256i values_of(__m256i state) {
    static constexpr Bytes table;
    // What is left above a state is in no parity.
    const __m256i four_bits = _mm256_set1_epi8(15);
    const __m256i low = detail::look_up_bytes<16>(table.low, _mm256_and_si256(state, four_bits));
    const __m256i high = detail::look_up_bytes<16>(table.high, _mm256_and_si256(_mm256_srli_epi16(state, 4), four_bits));
    const __m256i both = _mm256_xor_si256(low, high);
    const __m256i index = _mm256_and_si256(both, _mm256_set1_epi8(static_cast<char>(Bytes::num_sizes - 1)));
    return _mm256_sign_epi8(detail::look_up_bytes<sizeof table.size>(table.size, index), both);
  }
#endif
};

static_assert(RowWiseCodec<Trellis<3, 64>> && RowWiseCodec<Trellis<1, 40, 6>>);

}  // namespace kvt::inline v0
