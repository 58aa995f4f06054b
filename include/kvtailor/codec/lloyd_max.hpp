// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// LloydMax: the code of the nearest level for each element, and one scale a row.
//
// Block:   n rows: Scale scale[n]; then per row head_dim * bits / 8 bytes of codes, as planes of 4, 2 and 1 bits (3 = 2 + 1,
//          5 = 4 + 1, 6 = 4 + 2, high bits first). In a plane of width w, byte j of S = head_dim * w / 8 holds elements j,
//          j + S, j + 2S, ... from the low bits up, so that unpacking needs no shuffle. Rows lie in tiles: row_wise.hpp.
// Value:   scale * unit * whole[code], the levels of codebooks.hpp.
// Error:   of a row whose elements are spread like those of a random one, relative to its squared norm, on average .36 / .116 /
//          .034 / .0093 / .0025 / .0007 at 1 .. 6 bits; of any other row up to 1: see Rotated.
// Host:    attention rounds queries and weights; up to 4 bits a field says to what: outputs off by 1e-2 of their size (fast,
// the
//          default) or 1e-4 (accurate, and above 4 bits). See precision.hpp.
// Cost:    head_dim * bits / 8 + sizeof(Scale) bytes a row.
// Source:  S. P. Lloyd, IEEE Trans. Inf. Theory 28, 1982; J. Max, IRE Trans. Inf. Theory 6, 1960.
#pragma once

#include <bit>
#include <cmath>
#include <type_traits>

#include "kvtailor/codec/codebooks.hpp"
#include "kvtailor/codec/log_scale.hpp"
#include "kvtailor/codec/row_wise.hpp"

namespace kvt::inline v0 {

enum class NormCorrection {
  none,           // scale = |x| / sqrt(d): as TurboQuant's authors; rows come back a little short
  least_squares,  // scale = <x, x'> / <x', x'>: the smallest error
  length,         // scale = |x| / |x'|: rows keep their norm
};

template <int bits, int dim, NormCorrection correction = NormCorrection::least_squares, class Scale = Half>
struct LloydMax : RowCodec<LloydMax<bits, dim, correction, Scale>, dim, static_cast<int>(sizeof(Scale)), dim * bits / 8>,
                  detail::PrecisionField<bits <= 4> {
  static_assert(bits >= 1 && bits <= 6, "codes have 1 to 6 bits");
  static constexpr int num_levels = 1 << bits;

  // A corrected scale is at most |x| / |levels of its codes|, largest for a row along one axis, and must fit.
  KVT_HD static double max_row_norm() { return static_cast<double>(Scale::max) / 8.188 * std::sqrt(static_cast<double>(dim)); }

  static constexpr float unit = HalfLevels<dim, bits>::unit;
  // What a code stands for, in units.
  static constexpr int level(int code) {
    const int i = code - num_levels / 2;
    return i < 0 ? -HalfLevels<dim, bits>::whole[-1 - i] : HalfLevels<dim, bits>::whole[i];
  }
  struct Levels {
    float value[num_levels < 4 ? 4 : num_levels] = {};
    constexpr Levels() {
      for (int i = 0; i < num_levels; ++i) value[i] = static_cast<float>(level(i));
    }
  };

  template <class Lanes>
  KVT_HD void encode_row(const Lanes& lanes, const float* x, std::byte* block, int n, int row, float* scratch) const {
    const Scale stored = encode_codes(lanes, x, LloydMax::code_bytes_of(block, n, row), scratch);
    lanes.once([&] { std::memcpy(block + static_cast<int>(sizeof(Scale)) * row, &stored, sizeof stored); });
  }
  // A row's codes; returns its scale. scratch as in encode_row().
  template <class Lanes, class Codes>
  KVT_HD static Scale encode_codes(const Lanes& lanes, const float* x, const Codes& codes, float* scratch) {
    typename Lanes::template Reg<float> part;
    lanes.each([&](int lane) {
      part[lane] = 0;
      for (int d = lane; d < dim; d += Lanes::size) part[lane] += x[d] * x[d];
    });
    // Squares of the smallest rows are lost; they are zero for any scale. So is what no cache lets in: NaN and infinity.
    const float square = lanes.sum(part);
    const float norm = square <= 3e38f ? std::sqrt(square) : 0.f;
    constexpr float root = static_cast<float>(1.0 / inverse_root());
    const float factor = norm > 0 ? root / norm : 0.f;
    Scale stored;
    if constexpr (std::is_same_v<Scale, LogScale>) {
      // The steps are wide, so the codes are chosen for the stored scale, and the best of three neighbours is taken.
      const Sums first = nearest_codes(lanes, x, factor);
      const LogScale guess = from_float<LogScale>(corrected(norm / root, first));
      float least = 0;
      stored = {0};
      for (int step = -1; step <= 1; ++step) {
        const LogScale near = guess.next(step);
        const float value = to_float(near);
        if (value == 0) continue;
        const Sums sums = nearest_codes(lanes, x, 1 / value);
        const float change = value * value * (sums.square - 2 * sums.cross);  // of the squared error, from that of zeros
        if (change < least) {
          least = change;
          stored = near;
        }
      }
      nearest_codes(lanes, x, stored.bits != 0 ? 1 / to_float(stored) : 0.f, scratch);
    } else {
      const Sums sums = nearest_codes(lanes, x, factor, scratch);
      stored = from_float<Scale>(norm > 0 ? corrected(norm / root, sums) : 0.f);
    }
    pack(lanes, scratch, codes);
    return stored;
  }

  template <int lanes>
  KVT_HD KVT_INLINE void load(const std::byte* block, int n, int row, int lane, LaneRow<dim, lanes>& to) const {
    if constexpr (lanes == 1 && LloydMax::tiled) {
      const typename LloydMax::OwnCodes own(block, n, row);
      load_codes<lanes>(own.bytes, lane, to.x);
    } else {
      load_codes<lanes>(LloydMax::code_bytes_of(block, n, row), lane, to.x);
    }
  }
  // Of element d, in the codes of a row.
  template <class Codes>
  KVT_HD KVT_INLINE static int code_at(const Codes& codes, int d) {
    int code = 0;
    for (int width = 4; width > 0; width /= 2) {
      if ((bits & width) == 0) continue;
      const int stride = dim * width / 8, plane = dim * bits_above(width) / 8;
      code = code << width | (codes[plane + d % stride] >> (d / stride * width) & ((1 << width) - 1));
    }
    return code;
  }
  // All of a row: code [dim].
  template <class Codes>
  KVT_HD KVT_INLINE static void unpack(const Codes& codes, int* code) {
    for (int d = 0; d < dim; ++d) code[d] = 0;
    unpack_plane<4>(codes, code);
    unpack_plane<2>(codes, code);
    unpack_plane<1>(codes, code);
  }
  template <class Lanes, class Code, class Codes>
  KVT_HD static void pack(const Lanes& lanes, const Code* code, const Codes& codes) {
    int left = bits, plane = 0;
    for (int width = 4; width > 0; width /= 2) {
      if (left < width) continue;
      left -= width;
      const int stride = dim * width / 8;
      lanes.each([&](int lane) {
        for (int j = lane; j < stride; j += Lanes::size) {
          int byte = 0;
          for (int s = 0; s < 8 / width; ++s) {
            byte |= (static_cast<int>(code[s * stride + j]) >> left & ((1 << width) - 1)) << (s * width);
          }
          codes[plane + j] = static_cast<unsigned char>(byte);
        }
      });
      plane += stride;
    }
  }
  // The levels of the codes of one row, as a LaneRow has them.
  template <int lanes, class Codes>
  KVT_HD KVT_INLINE static void load_codes(const Codes& codes, int lane, float* to) {
    static constexpr Levels levels;
#if defined(KVT_HOST_AVX2)
    if constexpr (lanes == 1 && whole_eights() && std::is_convertible_v<const Codes&, const unsigned char*>) {
      alignas(16) static constexpr Levels aligned;  // at least four
      for (int i = 0; i < dim; i += 8) {
        __m256i code = _mm256_setzero_si256();
        append_codes<4>(codes, i, code);
        append_codes<2>(codes, i, code);
        append_codes<1>(codes, i, code);
        _mm256_storeu_ps(to + i, detail::look_up<num_levels>(aligned.value, code));
      }
      return;
    }
#endif
    if constexpr (lanes == 1) {
      int code[dim];
      unpack(codes, code);
      for (int d = 0; d < dim; ++d) to[d] = levels.value[code[d]];
    } else {
      for (int i = 0; i < LaneRow<dim, lanes>::length; ++i) {
        const int d = i * lanes + lane;
        to[i] = d < dim ? levels.value[code_at(codes, d)] : 0.f;
      }
    }
  }
  KVT_HD KVT_INLINE float row_scale(const std::byte* block, int row) const {
    Scale scale;
    std::memcpy(&scale, block + static_cast<int>(sizeof(Scale)) * row, sizeof scale);
    return to_float(scale) * unit;
  }

#if defined(KVT_HOST_AVX2)
  // Bits of planes; there are one or two.
  static constexpr int widest = bits >= 4   ? 4
                                : bits >= 2 ? 2
                                            : 1,
                       narrower = bits - widest, narrowest = narrower > 0 ? narrower : widest;
  using TileRows = typename LloydMax::Tiles;
  struct Integers : TileRows {
    static constexpr int size = dim, group = dim, most = level(num_levels - 1), offset = most;
    static constexpr bool has_least = false;
    using TileRows::TileRows;

#if defined(KVT_HOST_AVX512)
    static constexpr bool strided = true;
    static constexpr int period = dim * narrowest / 32;
    template <int u, int plus, class Tile>
    KVT_INLINE static __m512i column(const Tile& tile, int w) {
      return levels_of<u * period, plus>(tile, w);
    }
#else
    template <int k, int plus>
    KVT_INLINE static __m256i column(detail::OneTile tile) {
      return levels_of<k, plus>(tile);
    }
#endif
    KVT_INLINE __m256 scales(int row, int) const {
      const auto* const from = reinterpret_cast<const Scale*>(this->block) + row;
      return _mm256_mul_ps(detail::load_eight(from, this->n - row), _mm256_set1_ps(unit));
    }
  };
  // Of elements 4 k .. 4 k + 3 of the rows of a tile, plus `plus`.
#if defined(KVT_HOST_AVX512)
  // Of column k + w, where the narrowest plane has no end between the two.
  template <int k, int plus, class Tile>
  KVT_INLINE static __m512i levels_of(const Tile& tile, int w) {
    if constexpr (narrower == 0) {
      return detail::plane_values<LevelBytes<plus>, widest, dim * widest / 8, k>(tile, w);
    } else {
      return detail::joined_values<LevelBytes<plus>, widest, narrower, dim * widest / 8, dim * narrower / 8, k>(
          tile, w, dim * widest / 32 + w);
    }
  }
#else
  template <int k, int plus>
  KVT_INLINE static __m256i levels_of(detail::OneTile tile) {
    if constexpr (bits > 4) return level_by_bits<k, plus, bits - 4>(tile);
    static constexpr LevelBytes<plus> levels;
    if constexpr (bits <= 2) {
      static constexpr detail::PlacedBytes<bits> placed(levels.byte);
      return detail::look_up_bytes<16>(placed.byte, detail::placed_codes<bits, dim * bits / 8, k>(tile, 0));
    }
    __m256i code = _mm256_setzero_si256();
    append_plane<4, k>(tile, code);
    append_plane<2, k>(tile, code);
    append_plane<1, k>(tile, code);
    return detail::look_up_bytes<sizeof levels.byte>(levels.byte, code);
  }
#endif
#endif

 private:
  struct Sums {
    float cross, square;  // of a row times `factor` with its levels, and of the levels
  };
  // Scale of a row of this size an element.
  KVT_HD static float corrected(float size, const Sums& sums) {
    constexpr float root = static_cast<float>(1.0 / inverse_root());
    return correction == NormCorrection::none            ? size
           : correction == NormCorrection::least_squares ? size * (sums.cross / sums.square)
                                                         : size * (root / std::sqrt(sums.square));
  }
  // The codes go to `codes` [dim], which may be x, if it is given.
  template <class Lanes>
  KVT_HD static Sums nearest_codes(const Lanes& lanes, const float* x, float factor, float* codes = nullptr) {
    typename Lanes::template Reg<float> cross, square;
    lanes.each([&](int lane) {
      static constexpr Levels levels;
      cross[lane] = 0;
      square[lane] = 0;
      for (int d = lane; d < dim; d += Lanes::size) {
        const float u = factor > 0 ? x[d] * factor : 0.f;
        const int code = nearest(u);
        const float level = levels.value[code] * unit;
        cross[lane] += u * level;
        square[lane] += level * level;
        if (codes != nullptr) codes[d] = static_cast<float>(code);
      }
    });
    const float uq = lanes.sum(cross);
    return {uq, lanes.sum(square)};
  }
  static constexpr double inverse_root() {
    double root = dim;
    for (int i = 0; i < 64; ++i) root = 0.5 * (root + dim / root);
    return 1.0 / root;
  }
  // Bits of a code that lie in planes wider than `width`.
  static constexpr int bits_above(int width) {
    int above = 0;
    for (int w = 4; w > width; w /= 2) {
      if ((bits & w) != 0) above += w;
    }
    return above;
  }

#if defined(KVT_HOST_AVX2)
  // Those whose lowest bits are `low`, every `step`th.
  template <int plus, int step = 1, int low = 0>
  struct LevelBytes {
    static constexpr int count = num_levels / step;
    alignas(16) std::int8_t byte[count < 16 ? 16 : count] = {};
    constexpr LevelBytes() {
      for (int i = 0; i < count; ++i) byte[i] = static_cast<std::int8_t>(level(i * step + low) + plus);
    }
  };
#if !defined(KVT_HOST_AVX512)
  // The highest four bits of a code are an index into tables of its lower ones, whose bits choose: the lowest `left` of them
  // are to be met, those above are `low`.
  template <int k, int plus, int left, int low = 0>
  KVT_INLINE static __m256i level_by_bits(const unsigned char* tile) {
    constexpr int width = bits - 4;
    if constexpr (left == 0) {
      static constexpr LevelBytes<plus, 1 << width, low> levels;
      return detail::look_up_bytes<16>(levels.byte, detail::plane_codes<4, dim / 2, k>(tile, 0));
    } else {
      return _mm256_blendv_epi8(level_by_bits<k, plus, left - 1, 2 * low>(tile),
                                level_by_bits<k, plus, left - 1, 2 * low + 1>(tile),
                                detail::plane_bit<width, dim * width / 8, k, left - 1>(tile, dim / 8));
    }
  }
  template <int width, int k>
  KVT_INLINE static void append_plane(const unsigned char* tile, __m256i& code) {
    if constexpr ((bits & width) != 0) {
      const __m256i low = detail::plane_codes<width, dim * width / 8, k>(tile, dim * bits_above(width) / 32);
      code = bits_above(width) == 0 ? low : _mm256_or_si256(_mm256_slli_epi16(code, width), low);
    }
  }
#endif
  // Eight elements in a row lie in eight bytes of every plane.
  static constexpr bool whole_eights() {
    for (int width = 4; width > 0; width /= 2) {
      if ((bits & width) != 0 && dim * width / 8 % 8 != 0) return false;
    }
    return true;
  }
  template <int width>
  KVT_INLINE static void append_codes(const unsigned char* codes, int i, __m256i& code) {
    if constexpr ((bits & width) != 0) {
      constexpr int stride = dim * width / 8;
      const unsigned char* const plane = codes + dim * bits_above(width) / 8;
      code =
          _mm256_or_si256(_mm256_slli_epi32(code, width), detail::eight_codes<width>(plane + i % stride, i / stride * width));
    }
  }
#endif
  template <int width, class Codes>
  KVT_HD KVT_INLINE static void unpack_plane(const Codes& codes, int* code) {
    if constexpr ((bits & width) != 0) {
      constexpr int stride = dim * width / 8;
      constexpr int mask = (1 << width) - 1;
      constexpr int plane = dim * bits_above(width) / 8;
      for (int s = 0; s < 8 / width; ++s) {
        for (int j = 0; j < stride; ++j) {
          code[s * stride + j] = code[s * stride + j] << width | (codes[plane + j] >> (s * width) & mask);
        }
      }
    }
  }
  // The level nearest to u; a tie goes to the lower one.
  KVT_HD KVT_INLINE static int nearest(float u) {
    static constexpr Levels levels;
    int code = 0;
    for (int step = num_levels / 2; step > 0; step /= 2) {
      const int next = code + step;
      if (u > 0.5f * unit * (levels.value[next - 1] + levels.value[next])) code = next;
    }
    return code;
  }
};

static_assert(RowWiseCodec<LloydMax<3, 64>> && RowWiseCodec<LloydMax<6, 40>>);

}  // namespace kvt::inline v0
