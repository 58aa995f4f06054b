// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// TurboQuantUnbiased: a code of bits - 1 bits, and the signs of a sketch of what it leaves, so that products with a query are
// right on average.
//
// For completeness: what it wins in bias it loses several times in variance, which the softmax of attention feels as error.
// See docs/decisions.md for what that costs.
//
// Block:   n rows: Half {norm / sqrt(head_dim), residual norm} [n]; then per row the codes of LloydMax, and head_dim signs,
//          a plane of one bit as theirs. Rows lie in tiles: row_wise.hpp.
// Value:   rotation^-1 (scale * level[code] + factor * residual norm * S^T sign), S the sketch; see Sketch.
// Error:   of a row, relative to its squared norm, on average D times that of the sketch, D the error of bits - 1 bits (1 at
//          0): .571 with an orthogonal sketch, 1.571 with a Gaussian one.
// Host:    attention rounds queries and weights, up to 5 bits as the field `precision` says: see precision.hpp.
// Cost:    head_dim * bits / 8 + 4 bytes a row; queries and sums are twice as long, so attention takes twice the time.
// Source:  TurboQuant, arXiv 2504.19874, algorithm 2, which has the Gaussian sketch. Of the orthogonal one: QJL, arXiv
//          2406.03482, section 4.
#pragma once

#include <cmath>
#include <cstdint>

#include "kvtailor/codec/int_codes.hpp"
#include "kvtailor/codec/lloyd_max.hpp"
#include "kvtailor/codec/rotation.hpp"
#include "kvtailor/codec/row_wise.hpp"

namespace kvt::inline v0 {

enum class Sketch {
  orthogonal,  // another rotation
  gaussian,    // independent normal numbers
};

namespace detail {

// forward: y = S x. transposed: x = S^T y / scale, so that S^T sign times `factor` estimates a vector of length 1 without bias.
template <Sketch kind, int dim>
struct SketchMatrix;

template <int dim>
struct SketchMatrix<Sketch::orthogonal, dim> {
  using Rotate = Rotation<dim, 0x736b65746368ull>;
  KVT_HD static float factor() { return 1.25331414f / std::sqrt(static_cast<float>(dim)); }  // sqrt(pi / 2 / dim)
  // Both take from [dim] and give to [dim], memory that all lanes see.
  template <class Lanes>
  KVT_HD static void forward(const Lanes& lanes, const float* from, float* to) {
    copy(lanes, from, to);
    Rotate::forward(lanes, to);
  }
  template <class Lanes>
  KVT_HD static void add_transposed(const Lanes& lanes, float* from, float* to) {
    Rotate::inverse(lanes, from);
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) to[d] += from[d];
    });
  }

 private:
  template <class Lanes>
  KVT_HD static void copy(const Lanes& lanes, const float* from, float* to) {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) to[d] = from[d];
    });
  }
};

template <int dim>
struct SketchMatrix<Sketch::gaussian, dim> {
  KVT_HD static float factor() { return 1.25331414f / static_cast<float>(dim); }
  // Row i, column j: a normal number by Box and Muller's transform of two splitmix64 numbers.
  KVT_HD static float entry(int i, int j) {
    const auto index = static_cast<std::uint64_t>(i * dim + j);
    const float a = unit(2 * index), b = unit(2 * index + 1);
    return std::sqrt(-2.f * std::log(a)) * std::cos(6.28318531f * b);
  }
  // The host remembers the matrix; a device makes an entry faster than it reads one. Sums go in the same order.
  template <class Lanes>
  KVT_HD static void forward(const Lanes& lanes, const float* from, float* to) {
    if constexpr (Lanes::size == 1) {
      for (int i = 0; i < dim; ++i) to[i] = 0;
      add_product(table().transposed, from, to);
    } else {
      lanes.each([&](int lane) {
        for (int i = lane; i < dim; i += Lanes::size) {
          float sum = 0;
          for (int j = 0; j < dim; ++j) sum += entry(i, j) * from[j];
          to[i] = sum;
        }
      });
    }
  }
  template <class Lanes>
  KVT_HD static void add_transposed(const Lanes& lanes, float* from, float* to) {
    if constexpr (Lanes::size == 1) {
      add_product(table().value, from, to);
    } else {
      lanes.each([&](int lane) {
        for (int j = lane; j < dim; j += Lanes::size) {
          float sum = 0;
          for (int i = 0; i < dim; ++i) sum += entry(i, j) * from[i];
          to[j] += sum;
        }
      });
    }
  }

 private:
  KVT_HD static float unit(std::uint64_t index) {  // above 0, at most 1
    std::uint64_t z = 0x716a6cull + 0x9e3779b97f4a7c15ull * (index + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (static_cast<float>((z ^ (z >> 31)) >> 40) + 1) * 5.96046448e-8f;
  }
  struct Table {
    float value[dim * dim], transposed[dim * dim];
    Table() {
      for (int i = 0; i < dim; ++i) {
        for (int j = 0; j < dim; ++j) value[i * dim + j] = transposed[j * dim + i] = entry(i, j);
      }
    }
  };
  static const Table& table() {
    static const Table all;
    return all;
  }
  // to[j] += the sum of rows[i][j] from[i], of four rows at once, so that sums are read and written less often
  static void add_product(const float* rows, const float* from, float* to) {
    static_assert(dim % 4 == 0);
    for (int i = 0; i < dim; i += 4) {
      const float* const r = rows + i * dim;
      for (int j = 0; j < dim; ++j) {
        float sum = to[j];
        for (int k = 0; k < 4; ++k) sum += r[k * dim + j] * from[i + k];
        to[j] = sum;
      }
    }
  }
};

}  // namespace detail

template <int bits, int dim, Sketch kind = Sketch::orthogonal>
struct TurboQuantUnbiased : RowCodec<TurboQuantUnbiased<bits, dim, kind>, dim, 4, dim * bits / 8, 2 * dim>,
                            detail::PrecisionField<bits <= 5> {
  static_assert(bits >= 1 && bits <= 6, "codes have 1 to 6 bits");
  static constexpr bool plain = false;
  static constexpr int max_basis_dim = 2 * dim, scratch_floats = 2 * dim;
  using Rotate = Rotation<dim>;
  using Matrix = detail::SketchMatrix<kind, dim>;
  using Codes = LloydMax<(bits > 1 ? bits - 1 : 1), dim, NormCorrection::none>;
  static constexpr int sign_offset = dim * (bits - 1) / 8, sign_bytes = dim / 8;
  static constexpr bool tiled = dim % 32 == 0;

  KVT_HD static constexpr int basis_dim() { return 2 * dim; }
  // Norms have to fit fp16.
  KVT_HD static double max_row_norm() { return static_cast<double>(Half::max); }

  template <class Lanes>
  KVT_HD void encode_row(const Lanes& lanes, const float* x, std::byte* block, int n, int row, float* scratch) const {
    float *const rest = scratch, *const sketch = scratch + dim;
    const auto codes = TurboQuantUnbiased::code_bytes_of(block, n, row);
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) rest[d] = x[d];
    });
    Rotate::forward(lanes, rest);
    Half scales[2] = {};
    if constexpr (bits > 1) scales[0] = Codes::encode_codes(lanes, rest, codes, sketch);
    typename Lanes::template Reg<float> part;
    lanes.each([&](int lane) {
      LaneRow<dim, Lanes::size> level = {};
      if constexpr (bits > 1) Codes::template load_codes<Lanes::size>(codes, lane, level.x);
      part[lane] = 0;
      for (int d = lane; d < dim; d += Lanes::size) {
        rest[d] -= detail::rounded_product(level.x[d / Lanes::size], to_float(scales[0]) * Codes::unit);
        part[lane] += rest[d] * rest[d];
      }
    });
    const float square = lanes.sum(part);
    const bool fits = square <= static_cast<float>(Half::max) * static_cast<float>(Half::max);
    scales[1] = from_float<Half>(fits ? std::sqrt(square) : 0.f);
    Matrix::forward(lanes, rest, sketch);
    lanes.once([&] { std::memcpy(block + 4 * row, scales, 4); });
    lanes.each([&](int lane) {
      for (int j = lane; j < sign_bytes; j += Lanes::size) {
        int byte = 0;
        for (int i = 0; i < 8; ++i) byte |= (sketch[i * sign_bytes + j] >= 0 ? 1 : 0) << i;
        codes[sign_offset + j] = static_cast<unsigned char>(byte);
      }
    });
  }
  void decode(const std::byte* block, int n, int row, float* out) const noexcept {
    LaneRow<2 * dim, 1> x;
    load<1>(block, n, row, 0, x);
    for (int d = 0; d < dim; ++d) out[d] = 0;
    finish(Serial{}, x.x, out);
  }

  template <class Lanes>
  KVT_HD void prepare(const Lanes& lanes, const float* q, float scale, float* prepared) const noexcept {
    PlainBasis<dim>::prepare(lanes, q, scale, prepared);
    Rotate::forward(lanes, prepared);
    Matrix::forward(lanes, prepared, prepared + dim);
    times_factor(lanes, prepared + dim);
  }
  template <class Lanes>
  KVT_HD void finish(const Lanes& lanes, float* acc, float* out) const noexcept {
    to_rotated(lanes, acc);
    Rotate::inverse(lanes, acc);
    PlainBasis<dim>::finish(lanes, acc, out);
  }

  // A sum of rows to its first half: the sum as rotated rows of head_dim elements.
  template <class Lanes>
  KVT_HD void to_rotated(const Lanes& lanes, float* acc) const noexcept {
    times_factor(lanes, acc + dim);
    Matrix::add_transposed(lanes, acc + dim, acc);
  }

  template <int lanes>
  KVT_HD KVT_INLINE void load(const std::byte* block, int n, int row, int lane, LaneRow<2 * dim, lanes>& to) const {
    if constexpr (lanes == 1) {
      const typename TurboQuantUnbiased::OwnCodes own(block, n, row);
      load_codes(own.bytes, block, row, lane, to);
    } else {
      load_codes(TurboQuantUnbiased::code_bytes_of(block, n, row), block, row, lane, to);
    }
  }
  KVT_HD KVT_INLINE float row_scale(const std::byte*, int) const { return 1.f; }

#if defined(KVT_HOST_AVX2)
  using TileRows = typename TurboQuantUnbiased::Tiles;
  struct Integers : TileRows {
    static constexpr int size = 2 * dim, group = dim, most = Codes::Integers::most, offset = most;
    static constexpr bool has_least = false;
    using TileRows::TileRows;

    template <int plus>
    struct Signs {
      std::int8_t byte[2] = {plus - 1, plus + 1};
    };
#if defined(KVT_HOST_AVX512)
    static constexpr bool strided = true;
    static constexpr int period = sign_bytes / 4;  // of planes of more bits whole multiples
    template <int u, int plus, class Tile>
    KVT_INLINE static __m512i column(const Tile& tile, int w) {
      constexpr int k = u * period;
      if constexpr (4 * k >= dim) {
        return detail::plane_values<Signs<plus>, 1, sign_bytes, k - dim / 4>(tile, sign_offset / 4 + w);
      } else if constexpr (bits > 1) {
        return Codes::template levels_of<k, plus>(tile, w);
      } else {
        return _mm512_set1_epi8(plus);
      }
    }
#else
    template <int k, int plus>
    KVT_INLINE static __m256i column(detail::OneTile tile) {
      if constexpr (4 * k >= dim) {
        static constexpr detail::PlacedBytes<1> placed(Signs<plus>{}.byte);
        return detail::look_up_bytes<16>(placed.byte, detail::placed_codes<1, sign_bytes, k - dim / 4>(tile, sign_offset / 4));
      } else if constexpr (bits > 1) {
        return Codes::template levels_of<k, plus>(tile);
      } else {
        return _mm256_set1_epi8(plus);
      }
    }
#endif
    KVT_INLINE __m256 scales(int row, int g) const {
      alignas(32) std::uint32_t some[8] = {};
      const std::byte* pairs = this->block + 4 * row;
      if (this->n - row < 8) {
        std::memcpy(some, pairs, static_cast<std::size_t>(4 * (this->n - row)));
        pairs = reinterpret_cast<const std::byte*>(some);
      }
      const __m256i words = _mm256_and_si256(_mm256_srli_epi32(detail::load_bytes(pairs), 16 * g), _mm256_set1_epi32(0xffff));
      const __m128i own = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      return _mm256_mul_ps(detail::to_floats(own), _mm256_set1_ps(g == 0 ? Codes::unit : 1 / root()));
    }
  };
#endif

 private:
  template <class Bytes, int lanes>
  KVT_HD KVT_INLINE static void load_codes(const Bytes& codes, const std::byte* block, int row, int lane,
                                           LaneRow<2 * dim, lanes>& to) {
    Half scales[2];
    std::memcpy(scales, block + 4 * row, 4);
    const float scale = to_float(scales[0]) * Codes::unit, size = to_float(scales[1]) / root();
    LaneRow<dim, lanes> level = {};
    if constexpr (bits > 1) Codes::template load_codes<lanes>(codes, lane, level.x);
    for (int i = 0; i < LaneRow<2 * dim, lanes>::length; ++i) {
      const int d = i * lanes + lane;
      to.x[i] = 0;
      // Where dim is no multiple of the lanes, the sketch begins in the middle of a step.
      if (d < dim) to.x[i] = scale * level.x[i];
      if (d >= dim && d < 2 * dim) {
        const int sign = d - dim;
        to.x[i] = (codes[sign_offset + sign % sign_bytes] >> sign / sign_bytes & 1) != 0 ? size : -size;
      }
    }
  }
  KVT_HD static float root() { return std::sqrt(static_cast<float>(dim)); }
  // Products with signs are estimates only after this, and elements as large as those of the row's other half.
  template <class Lanes>
  KVT_HD static void times_factor(const Lanes& lanes, float* x) {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) x[d] *= Matrix::factor() * root();
    });
  }
};

static_assert(RowWiseCodec<TurboQuantUnbiased<3, 64>> && !PlainCodec<TurboQuantUnbiased<3, 64>>);

}  // namespace kvt::inline v0
