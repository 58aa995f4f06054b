// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Trellis: trellis-coded rows. Codes overlap: each element is read from its own bits and those of the elements after it, so
// that at the bits of a scalar code the values are denser, and the encoder searches for the best sequence of codes.
//
// Block:   n rows: Scale scale[n]; then per row head_dim * bits / 8 bytes, a ring of bits: bit k is bit k % 8 of byte k / 8,
//          and after the last comes the first. The code of element d begins at bit first_bit(d): codes of 1, 2 and 4 bits lie
//          in planes, elements j, j + bytes, j + 2 bytes, ... in byte j from the low bits up, those of 3 bits in a line.
//          Rows lie in tiles: row_wise.hpp.
// Value:   scale * value[state] of a table of 2^window values; the state is the `window` bits from first_bit(d) on, the first
//          the lowest. See trellis_tables.hpp.
// Error:   of a row whose elements are spread like those of a random one, relative to its squared norm, on average, for
//          head_dim 64: .279 / .072 / .0187 / .0050 at 1 .. 4 bits, window 8; .285 / .075 / .0205 at 1 .. 3 bits, window 6.
//          At head_dim 128 up to 4 % more. Of any other row up to 1: see Rotated.
// Host:    attention rounds queries and weights as the field `precision` says: outputs off by 1e-2 of their size (fast, the
//          default) or 1e-4 (accurate). See precision.hpp.
// Cost:    head_dim * bits / 8 + sizeof(Scale) bytes a row: a ring has no beginning to be stored. Encoding takes eight times
//          as long as that of LloydMax at window 8, four times at window 6; reading a third longer with AVX2. With AVX-512
//          encoding takes thirteen times as long, since LloydMax gains more.
// Source:  trellis-coded quantization: M. W. Marcellin and T. R. Fischer, IEEE Trans. Commun. 38, 1990; the bit-shift trellis,
//          closed to a ring: QTIP, arXiv 2406.11235. Differs from QTIP: sizes and signs are numbered by parities of a state's
//          bits, as by a convolutional code (G. Ungerboeck, IEEE Trans. Inf. Theory 28, 1982), trained with the encoder.
#pragma once

#include <algorithm>
#include <cmath>

#include "kvtailor/codec/log_scale.hpp"
#include "kvtailor/codec/row_wise.hpp"
#include "kvtailor/codec/trellis_search.hpp"
#include "kvtailor/codec/trellis_tables.hpp"

namespace kvt::inline v0 {

template <int bits, int dim, int window = 8, class Scale = LogScale>
struct Trellis : RowCodec<Trellis<bits, dim, window, Scale>, dim, static_cast<int>(sizeof(Scale)), dim * bits / 8>,
                 detail::PrecisionField<> {
  static_assert(bits >= 1 && bits <= 4 && window <= 8, "codes have 1 to 4 bits, and states at most 8");
  using Search = TrellisSearch<bits, window>;
  using Table = TrellisTable<bits, window>;
  static constexpr int num_states = 1 << window;

  // Where in a row's ring the code of an element begins.
  KVT_HD static constexpr int first_bit(int d) {
    return 8 % bits == 0 ? 8 * (d % Trellis::code_bytes) + bits * (d / Trellis::code_bytes) : bits * d;
  }

  KVT_HD static constexpr int element_at(int bit) {
    return 8 % bits == 0 ? bit % 8 / bits * Trellis::code_bytes + bit / 8 : bit / bits;
  }
  // The code of an element, from a row's ring and to one that has zeros there.
  KVT_HD static int code_at(const unsigned char* ring, int d) {
    const int at = first_bit(d), both = ring[at / 8] | (at % 8 + bits > 8 ? ring[at / 8 + 1] << 8 : 0);
    return both >> at % 8 & ((1 << bits) - 1);
  }
  static void add_code(unsigned char* ring, int d, int code) {
    const int at = first_bit(d), both = code << at % 8;
    ring[at / 8] = static_cast<unsigned char>(ring[at / 8] | both);
    if (at % 8 + bits > 8) ring[at / 8 + 1] = static_cast<unsigned char>(ring[at / 8 + 1] | both >> 8);
  }
  // The state of an element, from code(element).
  template <class Code>
  KVT_HD static int state_of(Code&& code, int d) {
    int state = 0;
    for (int bit = 0; bit < window; bit += bits) state |= code(element_at((first_bit(d) + bit) % (dim * bits))) << bit;
    return state & (num_states - 1);
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

  // What an encoder by lanes keeps, behind the row.
  struct LaneMemory {
    float x[dim];
    typename Search::template LaneMemory<dim> search;
    std::uint8_t state[2][dim];
  };
  static constexpr int scratch_floats = dim + static_cast<int>(sizeof(LaneMemory) / sizeof(float));

  // The same bytes on any lane group.
  template <class Lanes>
  KVT_HD void encode_row(const Lanes& lanes, const float* x, std::byte* block, int n, int row, float* scratch) const {
    if constexpr (Lanes::size == 1) {
      HostMemory memory;
      encode_in(lanes, memory, x, block, n, row);
    } else {
      encode_in(lanes, *reinterpret_cast<LaneMemory*>(scratch + dim), x, block, n, row);
    }
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
  static constexpr int code_words = Trellis::code_bytes / 4;
  using TileRows = typename Trellis::Tiles;
  struct Integers : TileRows {
    static constexpr int size = dim, group = dim, most = *std::max_element(Table::size, std::end(Table::size)), offset = most;
    static constexpr bool has_least = false;
    using TileRows::TileRows;

#if defined(KVT_HOST_AVX512)
    static constexpr bool strided = 8 % bits == 0;
    static constexpr int period = strided ? code_words : dim / 32;
    template <int u, int plus>
    KVT_INLINE static __m512i column(const detail::TilePair& tiles, int w) {
      return values_of<plus>(states_of<u>(tiles, w));
    }
    template <int u, int plus, class Turned>
    KVT_INLINE static __m512i column(const Turned& rows, int w) {
      return values_of<plus>(detail::turned(states_of<u>(rows.plain, w)));
    }
#else
    template <int k, int plus>
    KVT_INLINE static __m256i column(detail::OneTile tile) {
      const __m256i value = values_of(states_of<k>(tile));
      return plus == 0 ? value : _mm256_add_epi8(value, _mm256_set1_epi8(static_cast<char>(plus)));
    }
#endif
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

  struct HostMemory {
    float x[dim];
    Search search;
    std::uint8_t from[Search::memory(dim)];
    std::uint8_t state[2][dim];
  };
  KVT_HD static Scale nearest_scale(float x) {
    constexpr auto most = static_cast<float>(Scale::max);
    return from_float<Scale>(x > most ? most : x);
  }
  // The sum of f(0) .. f(dim - 1), in the order of a warp.
  template <class Lanes, class F>
  KVT_HD static double sum(const Lanes& lanes, F&& f) {
    if constexpr (Lanes::size == 1) {
      return sum(SimulatedWarp{}, f);
    } else {
      typename Lanes::template Reg<double> part;
      lanes.each([&](int lane) {
        part[lane] = 0;
        for (int d = lane; d < dim; d += Lanes::size) part[lane] += f(d);
      });
      return lanes.sum(part);
    }
  }
  static void find(const Serial&, HostMemory& memory, const float* value, std::uint8_t* state) {
    memory.search(memory.x, dim, value, memory.from, state);
  }
  template <class Lanes>
  KVT_HD static void find(const Lanes& lanes, LaneMemory& memory, const float* value, std::uint8_t* state) {
    Search::template find<dim>(lanes, memory.x, value, memory.search, state);
  }
  // For each size the best path, and for each path the best scale. Products are exact, so it does not matter whether they are
  // fused with sums.
  template <class Lanes, class Memory>
  KVT_HD static void encode_in(const Lanes& lanes, Memory& memory, const float* x, std::byte* block, int n, int row) {
    static constexpr Values value;
    const auto place = [](int d) { return first_bit(d) / bits; };  // in the ring
    const auto exact = [](float v) { return static_cast<double>(v); };
    // Squares of the smallest rows are lost; they are zero for any scale.
    const double energy = sum(lanes, [&](int d) { return exact(x[d]) * exact(x[d]); });
    const float size = std::sqrt(static_cast<float>(energy / dim));
    Scale scale{0};
    double least = 0;  // change of the squared error, from that of zeros
    int best = 0;
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) memory.state[0][d] = 0;
    });
    KVT_LOOP_ON_DEVICE
    for (int i = 0; i < Search::num_sizes; ++i) {
      const float guess = to_float(nearest_scale(size * Search::size(i)));
      if (guess == 0) continue;
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) memory.x[place(d)] = x[d] / guess;
      });
      std::uint8_t* const state = memory.state[1 - best];
      find(lanes, memory, value.of, state);
      const double cross = sum(lanes, [&](int d) { return exact(x[d]) * exact(value.of[state[place(d)]]); });
      const double square = sum(lanes, [&](int d) { return exact(value.of[state[d]]) * exact(value.of[state[d]]); });
      if (!(cross > 0)) continue;
      const Scale near = nearest_scale(static_cast<float>(cross / square));
      const double stored = exact(to_float(near));
      const double change = stored * (stored * square - 2 * cross);
      if (change < least) {
        least = change;
        scale = near;
        best = 1 - best;
      }
    }
    lanes.once([&] { std::memcpy(block + static_cast<int>(sizeof(Scale)) * row, &scale, sizeof scale); });
    const auto codes = Trellis::code_bytes_of(block, n, row);
    lanes.each([&](int lane) {
      for (int k = lane; k < dim / 8; k += Lanes::size) {
        std::uint32_t word = 0;
        for (int i = 0; i < 8; ++i) word |= (memory.state[best][8 * k + i] & ((1u << bits) - 1)) << (i * bits);
        for (int i = 0; i < bits; ++i) codes[k * bits + i] = static_cast<unsigned char>(word >> (8 * i));
      }
    });
  }
  // The state of element d, whose code begins in the first of two bytes.
  KVT_HD KVT_INLINE static int state_in(unsigned char first, unsigned char second, int d) {
    return (first | second << 8) >> first_bit(d) % 8 & (num_states - 1);
  }

#if defined(KVT_HOST_AVX512)
  // The table by bytes. The numbers that belong to the lower and to the upper four bits of a state, joined by exclusive or,
  // have the number of its size below, and its sign as bit 6. A permutation of bytes looks at six bits, so that what lies
  // beside the four is of no matter; the upper four are bits 2 to 5 of what is looked up.
  template <int plus>
  struct Bytes {
    alignas(64) std::int8_t low[64], high[64], above[64], below[64];
    constexpr Bytes() : low(), high(), above(), below() {
      for (int i = 0; i < 64; ++i) {
        low[i] = part(i & 15);
        high[i] = part(i >> 2 << 4);
        const int size = Table::size[i & ((1 << (bits + 2)) - 1)];
        above[i] = static_cast<std::int8_t>(plus + size);
        below[i] = static_cast<std::int8_t>(plus - size);
      }
    }
    static constexpr std::int8_t part(int state) {
      return static_cast<std::int8_t>(index_of(state) + (parity(state & Table::sign) ? 64 : 0));
    }
  };
  // Of column u of the w-th run of columns (see wide_rows.hpp), one a byte; more bits than those of a state may be left above
  // them.
  template <int u, class Tile>
  KVT_INLINE static __m512i states_of(const Tile& tiles, int w) {
    if constexpr (8 % bits == 0) {
      return bits_from<u * bits>(tiles, w);
    } else {
      // Three bits apart, in either half of eight bytes.
      const __m512i place = _mm512_set1_epi64(0x2926232009060300);
      return _mm512_maskz_multishift_epi64_epi8(~__mmask64{0}, place, bits_from<12 * u % 32>(tiles, 3 * w + 12 * u / 32));
    }
  }
  // Bits of each row's ring, from a bit of a word on.
  template <int bit, class Tile>
  KVT_INLINE static __m512i bits_from(const Tile& tiles, int word) {
    const __m512i now = detail::tile_words(tiles, word);
    if constexpr (bit == 0) {
      return now;
    } else {
      return _mm512_shrdi_epi32(now, detail::next_words(tiles, word, code_words, now), bit);
    }
  }
  template <int plus>
  KVT_INLINE static __m512i values_of(__m512i state) {
    static constexpr Bytes<plus> table;
    // What is left above a state is in no parity.
    const __m512i low = detail::look_up_bytes(table.low, state);
    const __m512i high = detail::look_up_bytes(table.high, detail::shift_right(state, 2));
    return _mm512_permutex2var_epi8(_mm512_load_si512(table.above), low ^ high, _mm512_load_si512(table.below));
  }
#elif defined(KVT_HOST_AVX2)
  static constexpr bool halves = bits == 3;
  // The table by bytes. The numbers that belong to the lower and to the upper four bits of a state, joined by exclusive or,
  // have the number of its size below, and its sign as bit 6. Bit 5, if that number leaves it free, is set. Of `halves`, bit 4
  // of that number is bit 7, where it makes a look-up give zero.
  struct Bytes {
    static constexpr int num_sizes = 1 << (bits + 2);
    alignas(16) std::int8_t low[16] = {}, high[16] = {};
    alignas(32) std::int8_t size[std::max(16, num_sizes)] = {};
    constexpr Bytes() {
      for (int b = 0; b < 16; ++b) {
        low[b] = part(b, bits < 4 ? 32 : 0);
        high[b] = part(b << 4, 0);
      }
      for (int k = 0; k < num_sizes; ++k) size[k] = Table::size[k];
    }
    static constexpr std::int8_t part(int state, int more) {
      const int index = index_of(state), place = halves ? index % 16 + index / 16 * 128 : index;
      return static_cast<std::int8_t>(place + more + (parity(state & Table::sign) ? 64 : 0));
    }
  };
  // Of elements 4 k .. 4 k + 3 of the rows of a tile, one a byte; more bits than those of a state may be left above them.
  template <int k>
  KVT_INLINE static __m256i states_of(const unsigned char* tile) {
    if constexpr (8 % bits == 0) {
      return bits_from<k % code_words, k / code_words * bits>(tile);
    } else {
      // Three bits apart: the upper words move up, then the upper bytes of all words.
      const __m256i first = bits_from<12 * k / 32, 12 * k % 32, 3 * bits + window>(tile);
      const __m256i two = _mm256_blend_epi16(first, _mm256_slli_epi32(first, 2 * (8 - bits)), 0xaa);
      return _mm256_blendv_epi8(two, _mm256_slli_epi16(two, 8 - bits), _mm256_set1_epi16(-256));
    }
  }
  // At least `count` bits of each row's ring, from a bit of a word on.
  template <int word, int bit, int count = 32>
  KVT_INLINE static __m256i bits_from(const unsigned char* tile) {
    const __m256i now = detail::tile_words(tile, word);
    if constexpr (bit == 0) return now;
    if constexpr (bit + count <= 32) return _mm256_srli_epi32(now, bit);
    const __m256i next = detail::tile_words(tile, (word + 1) % code_words);
    return _mm256_or_si256(_mm256_srli_epi32(now, bit), _mm256_slli_epi32(next, 32 - bit));
  }
  KVT_INLINE static __m256i values_of(__m256i state) {
    static constexpr Bytes table;
    // What is left above a state is in no parity.
    const __m256i four_bits = _mm256_set1_epi8(15);
    const __m256i low = detail::look_up_bytes<16>(table.low, _mm256_and_si256(state, four_bits));
    // By 4 bits. Multiplied, since what looks up is busy with other shifts.
    const __m256i shifted = _mm256_mulhi_epu16(state, _mm256_set1_epi16(1 << 12));
    const __m256i high = detail::look_up_bytes<16>(table.high, _mm256_and_si256(shifted, four_bits));
    const __m256i index = _mm256_xor_si256(low, high);
    __m256i sign = _mm256_add_epi8(index, index);
    if constexpr (bits == 4) sign = _mm256_or_si256(sign, _mm256_set1_epi8(1));  // that of zero is none
    if constexpr (halves) {
      const __m256i upper = _mm256_xor_si256(index, _mm256_set1_epi8(-128));
      return _mm256_sign_epi8(
          _mm256_or_si256(detail::look_up_bytes<16>(table.size, index), detail::look_up_bytes<16>(table.size + 16, upper)),
          sign);
    } else {
      return _mm256_sign_epi8(detail::look_up_bytes<sizeof table.size>(table.size, index), sign);
    }
  }
#endif
};

static_assert(RowWiseCodec<Trellis<3, 64>> && RowWiseCodec<Trellis<1, 40, 6>>);

}  // namespace kvt::inline v0
