// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Rotated: a codec applied to rotated rows.
//
// A rotation spreads what is in a row evenly over its elements, so that few levels do for all of them. Rows are never rotated
// back to be read: the query is rotated once, the output once.
//
// Block:   that of the codec, of rows times the matrix in rotation.hpp.
// Error:   that of the codec, since a rotation keeps lengths.
#pragma once

#include <type_traits>
#include <vector>

#include "kvtailor/codec/rotation.hpp"
#include "kvtailor/codec/row_wise.hpp"

namespace kvt::inline v0 {

namespace detail {

// rows [n, head_dim] of a type that to_float() takes, to fp32 rows in the basis of a codec, by a block of threads; `to` may be
// where they are. Each warp has a row of `scratch`, memory that all its lanes see; warps beyond those do nothing.
template <class Codec, class Block, class T, int row_warps, int row_floats>
KVT_HD void load_rows(const Block& block, const T* rows, int n, float (&scratch)[row_warps][row_floats], float* to) {
  constexpr int dim = Codec::head_dim;
  static_assert(row_floats >= dim);
  using Lanes = typename Block::Lanes;
  constexpr int warps = row_warps < Block::warps ? row_warps : Block::warps;
  block.each_warp([&](const Lanes& lanes, int warp) {
    if (warp >= warps) return;
    float* const x = scratch[warp];
    for (int row = warp; row < n; row += warps) {
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) x[d] = to_float(rows[row * dim + d]);
      });
      if constexpr (!Codec::plain) Codec::Rotate::forward(lanes, x);
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) to[row * dim + d] = x[d];
      });
    }
  });
}

}  // namespace detail

template <PlainCodec Codec>
struct Rotated : Codec {
  static constexpr bool plain = false;
  static constexpr int dim = Codec::head_dim;
  using Rotate = Rotation<dim>;

  Rotated() = default;
  explicit Rotated(const Codec& codec) : Codec(codec) {}

  int encode(const float* rows, int n, std::byte* block) const {
    const auto size = static_cast<std::size_t>(n) * dim;
    std::vector<float> rotated(rows, rows + size);
    for (int row = 0; row < n; ++row) Rotate::forward(Serial{}, rotated.data() + static_cast<std::size_t>(row) * dim);
    return Codec::encode(rotated.data(), n, block);
  }
  // Of a codec whose rows decode one by one.
  template <class Lanes>
  KVT_HD void encode_row(const Lanes& lanes, const float* x, std::byte* block, int n, int row, float* scratch) const requires
      requires(const Codec& c) {
    c.encode_row(lanes, x, block, n, row, scratch);
  }
  {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) scratch[d] = x[d];
    });
    Rotate::forward(lanes, scratch);
    Codec::encode_row(lanes, scratch, block, n, row, scratch);
  }
  KVT_HD void decode(const std::byte* block, int n, int row, float* out) const noexcept {
    Codec::decode(block, n, row, out);
    Rotate::inverse(Serial{}, out);
  }

  template <class Lanes>
  KVT_HD void prepare(const Lanes& lanes, const float* q, float scale, float* prepared) const noexcept {
    Codec::prepare(lanes, q, scale, prepared);
    Rotate::forward(lanes, prepared);
  }
  template <class Lanes>
  KVT_HD void finish(const Lanes& lanes, float* acc, float* out) const noexcept {
    Rotate::inverse(lanes, acc);
    Codec::finish(lanes, acc, out);
  }
};

}  // namespace kvt::inline v0
