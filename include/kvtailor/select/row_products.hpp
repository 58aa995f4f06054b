// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What selectors multiply rows by. Tiles of rows, so that products stay in the cache.
#pragma once

// Only the host multiplies here; marked for the device, Eigen makes nvcc warn.
#if defined(__CUDACC__) && !defined(EIGEN_NO_CUDA)
#define EIGEN_NO_CUDA
#endif
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <vector>

#include "kvtailor/core/evidence.hpp"
#include "kvtailor/core/row_tiles.hpp"
#include "kvtailor/select/device_products.hpp"

namespace kvt::inline v0 {

namespace detail {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using ConstRows = Eigen::Map<const Matrix, 0, Eigen::OuterStride<>>;

// f(first, tile) of rows [n, dim], a tile at a time.
template <class F>
void each_tile(std::span<const float> rows, int dim, F&& f) {
  constexpr int tile = 64;
  const int n = static_cast<int>(rows.size()) / dim;
  for (int first = 0; first < n; first += tile) {
    const int count = std::min(tile, n - first);
    f(first, ConstRows(rows.data() + static_cast<std::ptrdiff_t>(first) * dim, count, dim, Eigen::OuterStride<>(dim)));
  }
}

// Makes the largest element of each row 1 to 2: elements of 1e18 have products with each other that leave fp32. `sizes` are the
// powers of two that make rows what they were; they are rounded as if nothing were done.
inline void scale_rows(RowBlock& block, int dim, double* sizes) {
  float* x = block.own();
  for (int r = 0; r < block.count(); ++r, x += dim) {
    Eigen::Map<Eigen::ArrayXf> row(x, dim);
    const float largest = row.abs().maxCoeff();
    const int exponent = largest > 0 ? std::clamp(std::ilogb(largest), -100, 100) : 0;
    sizes[r] = std::ldexp(1.0, exponent);
    row *= std::ldexp(1.f, -exponent);
  }
}

// What becomes of the products of a block's rows is added up lane by lane.
struct LaneSums {
  template <int width>
  using Array = Eigen::Array<float, Eigen::Dynamic, width, Eigen::RowMajor>;
  static constexpr int lanes = PackedVectors::lanes;
  Array<RowBlock::vectors> product{RowBlock::most, int{RowBlock::vectors}};
  Array<lanes> sum{RowBlock::most, int{lanes}};

  auto products(int first, int count) const { return product.template middleCols<lanes>(first).topRows(count); }
};

}  // namespace detail

// forms[m, r] = row r . squares[m] . row r and products[m, r] = row r . vectors[m], of rows [n, dim], symmetric matrices
// [.., dim, dim] and vectors [.., dim].
inline void quadratic_forms(std::span<const float> rows, int dim, std::span<const float> squares,
                            std::span<const float> vectors, std::span<double> forms, std::span<double> products) {
  using detail::LaneSums, detail::PackedVectors;
  const auto wide = static_cast<std::size_t>(dim), n = rows.size() / wide;
  PackedVectors packed;
  packed.assign(static_cast<int>(vectors.size() / wide), dim,
                [&](int c, int k) { return vectors[static_cast<std::size_t>(c * dim + k)]; });
  // What lies below the diagonal is added to what lies above, and is left out then.
  std::vector<PackedVectors> matrices(squares.size() / (wide * wide));
  const float* from = squares.data();
  for (auto& matrix : matrices) {
    matrix.assign(dim, dim, [&](int c, int k) { return k > c ? 0.f : from[k * dim + c] * (k < c ? 2.f : 1.f); });
    from += dim * dim;
  }
  LaneSums sums;
  double sizes[detail::RowBlock::most];
  detail::each_block(rows, dim, [&](int first, detail::RowBlock& block) {
    const int count = block.count();
    detail::scale_rows(block, dim, sizes);
    const Eigen::Map<const Eigen::ArrayXd> size(sizes, count);
    for (std::size_t m = 0; m < matrices.size(); ++m) {
      sums.sum.setZero();
      for (int column = 0; column < dim;) {
        const int end = std::min(column + LaneSums::lanes, dim), more = std::min(end + LaneSums::lanes, dim) - end;
        const int done = block.multiply(matrices[m], column, end, more, sums.product.data(), detail::RowBlock::vectors);
        for (int c = 0; c < done; c += LaneSums::lanes, column += LaneSums::lanes) {
          // Products with what lies past the end of a row are zero.
          using Lanes = Eigen::Map<const LaneSums::Array<LaneSums::lanes>, 0, Eigen::OuterStride<>>;
          sums.sum.topRows(count) +=
              sums.products(c, count) * Lanes(block.row(0) + column, count, LaneSums::lanes, Eigen::OuterStride<>(dim));
        }
      }
      Eigen::Map<Eigen::ArrayXd>(forms.data() + m * n + first, count) =
          sums.sum.topRows(count).rowwise().sum().cast<double>() * size.square();
    }
    for (int m = 0; m < packed.count; ++m) {
      const int c = m % detail::RowBlock::vectors;
      if (c == 0) block.multiply(packed, m, dim, 0, sums.product.data(), detail::RowBlock::vectors);
      Eigen::Map<Eigen::ArrayXd>(products.data() + static_cast<std::size_t>(m) * n + first, count) =
          sums.product.col(c).head(count).cast<double>() * size;
    }
  });
}

// out[r] = |value r|.
inline void value_norms(const HeadEvidence& seen, std::span<float> out) {
  detail::each_tile(seen.values, seen.head_dim, [&](int first, const auto& tile) {
    Eigen::Map<Eigen::VectorXf>(out.data() + first, tile.rows()) = tile.rowwise().norm();
  });
}

// out[r] = mean over the group's query heads of the norm of value r through the output projection.
inline void projected_norms(const HeadEvidence& seen, Norm norm, std::span<float> out) {
  const int dim = seen.head_dim, group = seen.group_size;
  const auto average = 1.f / static_cast<float>(group);
  const auto weights = [&](int g) {
    return detail::ConstRows(seen.output.weights + static_cast<std::ptrdiff_t>(g) * dim, seen.output.width, dim,
                             Eigen::OuterStride<>(seen.output_stride));
  };
  std::fill(out.begin(), out.end(), 0.f);
  if (norm == Norm::root) {
    // Squares need the matrix only as what it makes of pairs of channels.
    detail::Matrix squares = detail::Matrix::Zero(group * dim, dim);
    for (int g = 0; g < group; ++g) {
      squares.middleRows(g * dim, dim).selfadjointView<Eigen::Upper>().rankUpdate(weights(g).transpose());
    }
    std::vector<double> forms(static_cast<std::size_t>(group) * out.size());
    quadratic_forms(seen.values, dim, {squares.data(), static_cast<std::size_t>(squares.size())}, {}, forms, {});
    for (std::size_t i = 0; i < forms.size(); ++i) {
      out[i % out.size()] += static_cast<float>(std::sqrt(std::max(forms[i], 0.0))) * average;
    }
    return;
  }
  detail::PackedVectors packed;
  detail::LaneSums sums;
  for (int g = 0; g < group; ++g) {
    const auto matrix = weights(g);
    packed.assign(seen.output.width, dim, [&](int c, int k) { return matrix(c, k); });
    detail::each_block(seen.values, dim, [&](int first, const detail::RowBlock& block) {
      const int count = block.count();
      sums.sum.setZero();
      for (int column = 0; column < packed.count;) {
        const int done = block.multiply(packed, column, dim, 0, sums.product.data(), detail::RowBlock::vectors);
        for (int c = 0; c < done; c += packed.lanes) sums.sum.topRows(count) += sums.products(c, count).abs();
        column += done;
      }
      Eigen::Map<Eigen::ArrayXf>(out.data() + first, count) += sums.sum.topRows(count).rowwise().sum() * average;
    });
  }
}

}  // namespace kvt::inline v0
