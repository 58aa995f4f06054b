// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// TurboQuant: rotated rows at 1 to 6 bits an element and one fp16 scale a row.
//
// Block:   n rows: Half scale[n]; then per row head_dim * bits / 8 bytes of codes, as planes of 4, 2 and 1 bits (3 = 2 + 1,
//          5 = 4 + 1, 6 = 4 + 2, high bits first). In a plane of width w, byte j of S = head_dim * w / 8 holds elements j,
//          j + S, j + 2S, ... from the low bits up, so that unpacking needs no shuffle.
// Value:   rotation^-1 (scale * level[code]); see rotation.hpp and codebooks.hpp.
// Error:   of a row, relative to its squared norm, on average .36 / .116 / .034 / .0093 / .0025 / .0007 at 1 .. 6 bits.
// Cost:    head_dim * bits / 8 + 2 bytes a row. Keys and values are never rotated back: the query is rotated once, the
//          output once.
// Source:  TurboQuant, arXiv 2504.19874, algorithm 1 (mean squared error). Differs from it: the rotation is a Hadamard matrix
//          with random signs, and the scale is the least-squares one, not the norm (NormCorrection::none is as published).
#pragma once

#include <bit>
#include <cmath>

#include "kvtailor/codec/codebooks.hpp"
#include "kvtailor/codec/rotation.hpp"
#include "kvtailor/codec/row_wise.hpp"
#include "kvtailor/core/concepts.hpp"

namespace kvt::inline v0 {

enum class NormCorrection {
  none,           // scale = |x| / sqrt(d): as published; rows come back a little short
  least_squares,  // scale = <x, x'> / <x', x'>: the smallest error
  length,         // scale = |x| / |x'|: rows keep their norm
};

template <int bits, int dim, NormCorrection correction = NormCorrection::least_squares>
struct TurboQuant {
  static_assert(bits >= 1 && bits <= 6, "TurboQuant codes have 1 to 6 bits");
  static_assert(is_supported_head_dim(dim), "head_dim must be 40, 64, 80, 96, 112, 128, 192 or 256");
  static constexpr int head_dim = dim;
  static constexpr int max_block_rows = 1 << 16;
  static constexpr int code_bytes = dim * bits / 8;
  static constexpr int num_levels = 1 << bits;
  using Rotate = Rotation<dim>;

  KVT_HD constexpr int max_block_bytes(int n) const { return n * (code_bytes + 2); }
  // A corrected scale is at most |x| / |levels of its codes|, largest for a row along one rotated axis, and must fit fp16.
  static double max_row_norm() { return 8000.0 * std::sqrt(static_cast<double>(dim)); }

  struct Levels {
    float value[num_levels] = {};
    constexpr Levels() {
      for (int i = 0; i < num_levels / 2; ++i) {
        value[num_levels / 2 + i] = HalfLevels<dim, bits>::level[i];
        value[num_levels / 2 - 1 - i] = -HalfLevels<dim, bits>::level[i];
      }
    }
  };

  int encode(const float* rows, int n, std::byte* block) const noexcept {
    for (int row = 0; row < n; ++row) {
      float scratch[dim];
      encode_row(Serial{}, rows + static_cast<long long>(row) * dim, block, n, row, scratch);
    }
    return n * (code_bytes + 2);
  }

  // One row x [dim] by all lanes; scratch [dim] is memory all lanes see.
  template <class Lanes>
  KVT_HD void encode_row(const Lanes& lanes, const float* x, std::byte* block, int n, int row, float* scratch) const {
    typename Lanes::template Reg<float> part;
    // Scaled by the largest element first: squares of huge or tiny rows leave the range of fp32.
    lanes.each([&](int lane) {
      part[lane] = 0;
      for (int d = lane; d < dim; d += Lanes::size) {
        const float size = x[d] < 0 ? -x[d] : x[d];
        if (size > part[lane]) part[lane] = size;
      }
    });
    const float largest = lanes.max(part);
    const float shrink = largest > 0 ? 1.f / largest : 0.f;
    const bool safe = largest > 1e-30f;  // rows below are zero for fp16 anyway
    lanes.each([&](int lane) {
      part[lane] = 0;
      for (int d = lane; d < dim; d += Lanes::size) {
        const float y = safe ? x[d] * shrink : 0.f;
        scratch[d] = y;
        part[lane] += y * y;
      }
    });
    const float norm = std::sqrt(lanes.sum(part));
    Rotate::forward(lanes, scratch);
    constexpr float root = static_cast<float>(1.0 / inverse_root());
    const float unit = norm > 0 ? root / norm : 0.f;
    typename Lanes::template Reg<float> cross, square;
    lanes.each([&](int lane) {
      static constexpr Levels levels;
      cross[lane] = 0;
      square[lane] = 0;
      for (int d = lane; d < dim; d += Lanes::size) {
        const float u = scratch[d] * unit;
        const int code = nearest(u);
        const float q = levels.value[code];
        cross[lane] += u * q;
        square[lane] += q * q;
        scratch[d] = static_cast<float>(code);
      }
    });
    const float uq = lanes.sum(cross);
    const float qq = lanes.sum(square);
    const float factor = correction == NormCorrection::none            ? 1.f
                         : correction == NormCorrection::least_squares ? uq / qq
                                                                       : root / std::sqrt(qq);
    const Half scale = from_float<Half>(norm / root * largest * factor);
    lanes.once([&] { std::memcpy(block + 2 * row, &scale, 2); });
    unsigned char* codes = reinterpret_cast<unsigned char*>(block) + 2 * n + static_cast<long long>(row) * code_bytes;
    int left = bits;
    for (int width = 4; width > 0; width /= 2) {
      if (left < width) continue;
      left -= width;
      const int stride = dim * width / 8;
      lanes.each([&](int lane) {
        for (int j = lane; j < stride; j += Lanes::size) {
          int byte = 0;
          for (int s = 0; s < 8 / width; ++s) {
            byte |= (static_cast<int>(scratch[s * stride + j]) >> left & ((1 << width) - 1)) << (s * width);
          }
          codes[j] = static_cast<unsigned char>(byte);
        }
      });
      codes += stride;
    }
  }

  KVT_HD void decode(const std::byte* block, int n, int row, float* out) const noexcept {
    LaneRow<dim, 1> x;
    load<1>(block, n, row, 0, x);
    const float scale = row_scale(block, row);
    for (int d = 0; d < dim; ++d) out[d] = x.x[d] * scale;
    Rotate::inverse(Serial{}, out);
  }
  int erase(const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    return erase_by_row(*this, block, n, keep, to) * (code_bytes + 2);
  }
  KVT_HD void copy_row(const std::byte* from, int n, int row, std::byte* to, int to_n, int to_row) const noexcept {
    std::memcpy(to + 2 * to_row, from + 2 * row, 2);
    std::memcpy(to + 2 * to_n + static_cast<long long>(to_row) * code_bytes,
                from + 2 * n + static_cast<long long>(row) * code_bytes, code_bytes);
  }

  template <class Lanes>
  KVT_HD void prepare(const Lanes& lanes, const float* q, float scale, float* prepared) const noexcept {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) prepared[d] = q[d] * scale;
    });
    Rotate::forward(lanes, prepared);
  }
  template <class Lanes>
  KVT_HD void logits(const Lanes& lanes, const std::byte* block, int n, const float* prepared, int m, float* out,
                     int stride) const noexcept {
    logits_by_row(*this, lanes, block, n, prepared, m, out, stride);
  }
  template <class Lanes>
  KVT_HD void accumulate(const Lanes& lanes, const std::byte* block, int n, const float* weights, int m, int stride,
                         float* acc) const noexcept {
    accumulate_by_row(*this, lanes, block, n, weights, m, stride, acc);
  }
  template <class Lanes>
  KVT_HD void finish(const Lanes& lanes, float* acc, float* out) const noexcept {
    Rotate::inverse(lanes, acc);
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) out[d] += acc[d];
    });
  }

  template <int lanes>
  KVT_HD KVT_INLINE void load(const std::byte* block, int n, int row, int lane, LaneRow<dim, lanes>& to) const {
    static constexpr Levels levels;
    const unsigned char* codes =
        reinterpret_cast<const unsigned char*>(block) + 2 * n + static_cast<long long>(row) * code_bytes;
    if constexpr (lanes == 1) {
      int code[dim] = {};
      unpack<4>(codes, code);
      unpack<2>(codes, code);
      unpack<1>(codes, code);
      for (int d = 0; d < dim; ++d) to.x[d] = levels.value[code[d]];
    } else {
      for (int i = 0; i < LaneRow<dim, lanes>::length; ++i) {
        const int d = i * lanes + lane;
        to.x[i] = d < dim ? levels.value[code_at(codes, d)] : 0.f;
      }
    }
  }
  KVT_HD KVT_INLINE float row_scale(const std::byte* block, int row) const {
    Half scale;
    std::memcpy(&scale, block + 2 * row, 2);
    return to_float(scale);
  }

 private:
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

  template <int width>
  KVT_HD KVT_INLINE static void unpack(const unsigned char* codes, int* code) {
    if constexpr ((bits & width) != 0) {
      constexpr int stride = dim * width / 8;
      constexpr int mask = (1 << width) - 1;
      const unsigned char* const plane = codes + dim * bits_above(width) / 8;
      for (int s = 0; s < 8 / width; ++s) {
        for (int j = 0; j < stride; ++j) {
          code[s * stride + j] = code[s * stride + j] << width | (plane[j] >> (s * width) & mask);
        }
      }
    }
  }
  KVT_HD KVT_INLINE static int code_at(const unsigned char* codes, int d) {
    int code = 0;
    for (int width = 4; width > 0; width /= 2) {
      if ((bits & width) == 0) continue;
      const int stride = dim * width / 8;
      const unsigned char* const plane = codes + dim * bits_above(width) / 8;
      code = code << width | (plane[d % stride] >> (d / stride * width) & ((1 << width) - 1));
    }
    return code;
  }
  // The level nearest to u; a tie goes to the lower one.
  KVT_HD KVT_INLINE static int nearest(float u) {
    static constexpr Levels levels;
    int code = 0;
    for (int step = num_levels / 2; step > 0; step /= 2) {
      const int next = code + step;
      if (u > 0.5f * (levels.value[next - 1] + levels.value[next])) code = next;
    }
    return code;
  }
};

static_assert(RowWiseCodec<TurboQuant<3, 64>> && RowWiseCodec<TurboQuant<6, 40>>);

}  // namespace kvt::inline v0
