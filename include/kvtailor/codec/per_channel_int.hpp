// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// PerChannelInt: equidistant levels, their ends for each channel of 32 consecutive rows.
//
// Channels of keys differ much in size, and each keeps its size from row to row: an outlier widens the levels of its own
// channel alone.
//
// Block:   groups of at most 32 rows, one after another: uint16 rows; Half scale[head_dim]; Half least[head_dim]; the codes of
//          each row, see IntCodes, in tiles, see row_wise.hpp; a byte of 0 where their sum is odd. A group keeps scales and
//          codes until its last row goes.
// Value:   least[channel] + scale[channel] * code
// Error:   of an element, half a step, and what fp16 does to the levels: 2^-11 (|least| + largest - least) of its channel and
//          group, or 2^-25 of each fp16 number, times the code, where that is more.
// Host:    keys are multiplied as integers, which rounds queries, those of 2 bits with AVX2 alone as the field `precision`
// says:
//          see precision.hpp and integer_rows.hpp.
// Cost:    head_dim * bits / 8 bytes a row, and 4 * head_dim + 2 for each group, however few rows it has left.
// Source:  KIVI, arXiv 2402.02750. Differs from it: halves round up, not to even.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kvtailor/codec/int_codes.hpp"
#include "kvtailor/codec/row_wise.hpp"

namespace kvt::inline v0 {

namespace detail {

// The codes alone.
template <int bits, int dim>
struct ChannelCodes : RowCodec<ChannelCodes<bits, dim>, dim, 0, IntCodes<bits, dim>::bytes> {
  using Codes = IntCodes<bits, dim>;
  static constexpr int half = 1 << (bits - 1);
  static constexpr bool tiled = Codes::stride % 4 == 0 && Codes::high_bytes % 4 == 0;

  // code [dim] are whole numbers.
  template <class Lanes>
  KVT_HD void encode_row(const Lanes& lanes, const float* code, std::byte* block, int n, int row) const {
    Codes::pack(lanes, code, ChannelCodes::code_bytes_of(block, n, row));
  }
  template <int lanes>
  KVT_HD KVT_INLINE void load(const std::byte* block, int n, int row, int lane, LaneRow<dim, lanes>& to) const {
    if constexpr (lanes == 1) {
      int code[dim];
      Codes::unpack(typename ChannelCodes::OwnCodes(block, n, row).bytes, code);
      for (int d = 0; d < dim; ++d) to.x[d] = static_cast<float>(code[d]);
    } else {
      const auto from = ChannelCodes::code_bytes_of(block, n, row);
      for (int i = 0; i < LaneRow<dim, lanes>::length; ++i) {
        const int d = i * lanes + lane;
        to.x[i] = d < dim ? static_cast<float>(Codes::at(from, d)) : 0.f;
      }
    }
  }
  KVT_HD KVT_INLINE float row_scale(const std::byte*, int) const { return 1.f; }

#if defined(KVT_HOST_AVX2)
  // As keys.
  using TileRows = typename ChannelCodes::Tiles;
  struct Integers : TileRows {
    static constexpr int size = dim, group = dim, most = 2 * half - 1, offset = 0;
    static constexpr bool has_least = false;
    const std::int32_t* offsets;
    Integers(const std::byte* from, int rows, const std::int32_t* zero) : TileRows(from, rows), offsets(zero) {}

#if defined(KVT_HOST_AVX512)
    static constexpr bool strided = true;
    static constexpr int period = Codes::high_bytes == 0 ? Codes::stride / 4 : 1;
    template <int u, int plus, class Tile>
    KVT_INLINE static __m512i column(const Tile& tile, int w) {
      return Codes::template column<u * period>(tile + 32 * w, 0);
    }
#else
    template <int k, int plus>
    KVT_INLINE static __m256i column(detail::OneTile tile) {
      return Codes::template column<k>(tile, 0);
    }
#endif
    KVT_INLINE __m256 scales(int, int) const { return _mm256_set1_ps(1); }
  };
#endif
};

}  // namespace detail

template <int bits, int dim>
struct PerChannelInt : PlainBasis<dim>, detail::PrecisionField<bits == 2> {
  using Rows = detail::ChannelCodes<bits, dim>;
  static constexpr int max_block_rows = 512, group_rows = 32;

  // The least elements must fit in fp16; then the scales do.
  static constexpr double max_row_norm() { return static_cast<double>(Half::max); }

  // A block that has lost rows may have one left of each group.
  KVT_HD constexpr int max_block_bytes(int n) const {
    const int most = max_block_rows / group_rows, groups = n < most ? n : most;
    return groups * (header_bytes + row_bytes % 2) + n * row_bytes;
  }
  int encode(const float* rows, int n, std::byte* block) const {
    std::byte* to = block;
    for (int first = 0; first < n; first += group_rows) {
      const int group_n = std::min(group_rows, n - first);
      encode_group(rows + static_cast<std::ptrdiff_t>(first) * dim, group_n, to);
      to += group_bytes(group_n);
    }
    return static_cast<int>(to - block);
  }
  // The same by a block of threads; rows [n, head_dim] are memory that all see, and become codes.
  template <class Block>
  KVT_HD int encode(const Block& block, float* rows, int n, std::byte* to) const {
    using Lanes = typename Block::Lanes;
    const auto group = [=](int row) { return to + row / group_rows * group_bytes(group_rows); };
    const auto rows_of = [=](int first) { return n - first < group_rows ? n - first : group_rows; };
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        for (int i = warp * Lanes::size + lane; i < (n + group_rows - 1) / group_rows * dim; i += Block::warps * Lanes::size) {
          const int first = i / dim * group_rows;
          encode_channel(rows + first * dim, rows_of(first), i % dim, group(first));
        }
      });
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int row = warp; row < n; row += Block::warps) {
        const int first = row / group_rows * group_rows;
        Rows{}.encode_row(lanes, rows + row * dim, group(row) + header_bytes, rows_of(first), row - first);
        if (row == first) lanes.once([&] { finish_group(group(row), rows_of(first)); });
      }
    });
    return n / group_rows * group_bytes(group_rows) + (n % group_rows == 0 ? 0 : group_bytes(n % group_rows));
  }
  KVT_HD void decode(const std::byte* block, int n, int row, float* out) const noexcept {
    each_group(block, n, [&](const std::byte* group, int first, int rows) {
      if (row < first || row >= first + rows) return;
      LaneRow<dim, 1> x;
      load(Lines<1>(group, 0), group, rows, row - first, 0, x);
      for (int d = 0; d < dim; ++d) out[d] = x.x[d];
    });
  }
  int erase(const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    return erase(Serial{}, block, n, keep, to);
  }
  template <class Lanes>
  KVT_HD int erase(const Lanes& lanes, const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    std::byte* const begin = to;
    each_group(block, n, [&](const std::byte* group, int first, int rows) {
      const int kept = detail::count_marked(lanes, keep + first, rows);
      if (kept == 0) return;
      detail::copy_bytes(lanes, group, header_bytes, to);
      Rows{}.erase(lanes, group + header_bytes, rows, keep + first, to + header_bytes);
      lanes.once([&] { finish_group(to, kept); });
      to += group_bytes(kept);
    });
    return static_cast<int>(to - begin);
  }

  template <class Lanes>
  KVT_HD void row_of(const Lanes& lanes, const std::byte* block, int n, int row, float* out) const noexcept {
    each_group(block, n, [&](const std::byte* group, int first, int rows) {
      if (row < first || row >= first + rows) return;
      lanes.each([&](int lane) {
        LaneRow<dim, Lanes::size> x;
        load(Lines<Lanes::size>(group, lane), group, rows, row - first, lane, x);
        for (int d = lane; d < dim; d += Lanes::size) out[d] = x.x[d / Lanes::size];
      });
    });
  }

  template <class Lanes>
  KVT_HD void logits(const Lanes& lanes, const std::byte* block, int n, const float* prepared, int m, float* out,
                     int stride) const noexcept {
    each_group(block, n, [&](const std::byte* group, int first, int rows) {
      if constexpr (Lanes::size == 1) lanes.template reads_tile<group_bytes(group_rows)>(group);
#if defined(KVT_HOST_AVX2)
      if constexpr (Lanes::size == 1 && Rows::tiled) return group_logits(group, rows, prepared, m, out + first, stride);
#endif
      each_row(lanes, group, rows, [&](int row, auto& x) {
        for (int j = 0; j < m; ++j) {
          typename Lanes::template Reg<float> part;
          lanes.each([&](int lane) { part[lane] = lane_dot(x[lane], prepared + j * dim, lane); });
          const float logit = lanes.sum(part);
          lanes.once([&] { out[j * stride + first + row] = logit; });
        }
      });
    });
  }
  template <class Lanes>
  KVT_HD void accumulate(const Lanes& lanes, const std::byte* block, int n, const float* weights, int m, int stride,
                         float* acc) const noexcept {
    each_group(block, n, [&](const std::byte* group, int first, int rows) {
      if constexpr (Lanes::size == 1) lanes.template reads_tile<group_bytes(group_rows)>(group);
      each_row(lanes, group, rows, [&](int row, auto& x) {
        for (int j = 0; j < m; ++j) {
          const float weight = weights[j * stride + first + row];
          float* const to = acc + j * dim;
          lanes.each([&](int lane) {
            for (int i = 0; i < LaneRow<dim, Lanes::size>::length; ++i) {
              const int d = i * Lanes::size + lane;
              if (dim % Lanes::size == 0 || d < dim) to[d] += weight * x[lane].x[i];
            }
          });
        }
      });
    });
  }

 private:
  static constexpr int row_bytes = Rows::row_bytes;
  static constexpr int header_bytes = 2 + 4 * dim;

  // An even number: the next group's fp16 numbers are aligned.
  KVT_HD static constexpr int group_bytes(int rows) { return header_bytes + (rows * row_bytes + 1) / 2 * 2; }

  // f(group, its first row, number of its rows)
  template <class F>
  KVT_HD KVT_INLINE static void each_group(const std::byte* block, int n, F&& f) {
    for (int first = 0; first < n;) {
      const int rows = *reinterpret_cast<const std::uint16_t*>(block);
      f(block, first, rows);
      first += rows;
      block += group_bytes(rows);
    }
  }

  // What a lane holds of scales and least elements.
  template <int lanes>
  struct Lines {
    LaneRow<dim, lanes> scale, least;

    KVT_HD KVT_INLINE Lines(const std::byte* group, int lane) {
      const Half* const from = reinterpret_cast<const Half*>(group + 2);
      if constexpr (lanes == 1) {
        load_floats<dim>(from, scale.x);
        load_floats<dim>(from + dim, least.x);
      } else {
        for (int i = 0; i < LaneRow<dim, lanes>::length; ++i) {
          const int d = i * lanes + lane;
          scale.x[i] = d < dim ? to_float(from[d]) : 0.f;
          least.x[i] = d < dim ? to_float(from[dim + d]) : 0.f;
        }
      }
    }
    Lines() = default;
  };
  // The product is exact, so it does not matter whether it is fused with the sum.
  template <int lanes>
  KVT_HD KVT_INLINE static void load(const Lines<lanes>& lines, const std::byte* group, int n, int row, int lane,
                                     LaneRow<dim, lanes>& to) {
    Rows{}.template load<lanes>(group + header_bytes, n, row, lane, to);
    for (int i = 0; i < LaneRow<dim, lanes>::length; ++i) to.x[i] = to.x[i] * lines.scale.x[i] + lines.least.x[i];
  }
  // f(row, Reg<LaneRow>&)
  template <class Lanes, class F>
  KVT_HD KVT_INLINE static void each_row(const Lanes& lanes, const std::byte* group, int n, F&& f) {
    typename Lanes::template Reg<Lines<Lanes::size>> lines;
    lanes.each([&](int lane) { lines[lane] = Lines<Lanes::size>(group, lane); });
    for (int row = 0; row < n; ++row) {
      typename Lanes::template Reg<LaneRow<dim, Lanes::size>> x;
      lanes.each([&](int lane) { load(lines[lane], group, n, row, lane, x[lane]); });
      f(row, x);
    }
  }

#if defined(KVT_HOST_AVX2)
  // The scales meet the queries: q (zero + s c) = q zero + (q s) c, the second a product of integers. Codes count from the
  // level nearest to zero, where rows are that an outlier widened the levels of: they feel no rounding.
  void group_logits(const std::byte* group, int n, const float* queries, int m, float* out, int stride) const {
    constexpr int most_vectors = 8;
    const Lines<1> lines(group, 0);
    alignas(32) std::int32_t code[dim];
    float zero[dim];
    for (int d = 0; d < dim; d += 8) {
      const __m256 scale = _mm256_loadu_ps(lines.scale.x + d), least = _mm256_loadu_ps(lines.least.x + d);
      // No number where all rows are equal: any code will do.
      const __m256 steps = _mm256_sub_ps(_mm256_set1_ps(0.5f), _mm256_div_ps(least, scale));
      const __m256 near = _mm256_min_ps(_mm256_max_ps(steps, _mm256_setzero_ps()), _mm256_set1_ps((1 << bits) - 1));
      const __m256i eight = _mm256_cvttps_epi32(near);
      _mm256_store_si256(reinterpret_cast<__m256i*>(code + d), eight);
      _mm256_storeu_ps(zero + d, _mm256_fmadd_ps(_mm256_cvtepi32_ps(eight), scale, least));
    }
    const typename Rows::Integers rows(group + header_bytes, n, code);
    for (int first = 0; first < m; first += most_vectors) {
      const int count = std::min(most_vectors, m - first);
      alignas(32) float scaled[most_vectors * dim];
      for (int j = 0; j < count; ++j) {
        for (int d = 0; d < dim; ++d) scaled[j * dim + d] = queries[(first + j) * dim + d] * lines.scale.x[d];
      }
      float* const to = out + first * stride;
      detail::integer_logits(*this, Serial{}, rows, n, scaled, count, to, stride);
      for (int j = 0; j < count; ++j) {
        const float shift = dot<dim>(queries + (first + j) * dim, zero);
        for (int row = 0; row < n; ++row) to[j * stride + row] += shift;
      }
    }
  }
#endif

  KVT_HD static void finish_group(std::byte* group, int rows) {
    const auto stored = static_cast<std::uint16_t>(rows);
    std::memcpy(group, &stored, sizeof stored);
    if (rows * row_bytes % 2 != 0) group[header_bytes + rows * row_bytes] = std::byte{0};
  }
  using Levels = detail::IntLevels<bits>;
  // Of channel d, into the header of a group.
  KVT_HD static Levels store_levels(float least, float largest, int d, std::byte* group) {
    const Levels levels = Levels::between(least, largest);
    const Half scale = from_float<Half>(levels.scale), stored = from_float<Half>(least);
    std::memcpy(group + 2 + 2 * d, &scale, sizeof scale);
    std::memcpy(group + 2 + 2 * (dim + d), &stored, sizeof stored);
    return levels;
  }
  // Channel d of x [n, head_dim] becomes codes.
  KVT_HD static void encode_channel(float* x, int n, int d, std::byte* group) {
    float least = x[d], largest = x[d];
    for (int row = 1; row < n; ++row) {
      const float v = x[row * dim + d];
      least = v < least ? v : least;
      largest = v > largest ? v : largest;
    }
    const Levels levels = store_levels(least, largest, d, group);
    for (int row = 0; row < n; ++row) x[row * dim + d] = static_cast<float>(levels.nearest(x[row * dim + d]));
  }
  static void encode_group(const float* x, int n, std::byte* to) {
    float least[dim], largest[dim];
    std::copy_n(x, dim, least);
    std::copy_n(x, dim, largest);
    for (int row = 1; row < n; ++row) {
      for (int d = 0; d < dim; ++d) {
        const float v = x[row * dim + d];
        least[d] = v < least[d] ? v : least[d];
        largest[d] = v > largest[d] ? v : largest[d];
      }
    }
    Levels levels[dim];
    for (int d = 0; d < dim; ++d) levels[d] = store_levels(least[d], largest[d], d, to);
    for (int row = 0; row < n; ++row) {
      float code[dim];
      for (int d = 0; d < dim; ++d) code[d] = static_cast<float>(levels[d].nearest(x[row * dim + d]));
      Rows{}.encode_row(Serial{}, code, to + header_bytes, n, row);
    }
    finish_group(to, n);
  }
};

static_assert(PlainCodec<PerChannelInt<2, 64>> && !RowWiseCodec<PerChannelInt<2, 64>>);

}  // namespace kvt::inline v0
