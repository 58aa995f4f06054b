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

// Rows whose largest element is 1 to 2, and the powers of two that make them what they were: elements of 1e18 have products
// with each other that leave fp32. Others are rounded as if nothing were done.
struct ScaledRows {
  Matrix rows;
  Eigen::VectorXf sizes;

  template <class Tile>
  void assign(const Tile& tile) {
    rows = tile;
    sizes.resize(tile.rows());
    for (Eigen::Index r = 0; r < tile.rows(); ++r) {
      const float largest = rows.row(r).cwiseAbs().maxCoeff();
      const int exponent = largest > 0 ? std::clamp(std::ilogb(largest), -100, 100) : 0;
      sizes[r] = std::ldexp(1.f, exponent);
      rows.row(r) *= std::ldexp(1.f, -exponent);
    }
  }
};

}  // namespace detail

// out[r] = row r . by . row r, of rows [n, dim] and a symmetric matrix [dim, dim].
inline void quadratic_forms(std::span<const float> rows, int dim, const float* by, std::span<double> out) {
  // What lies below the diagonal is added to what lies above, a block at a time, and is left out then.
  constexpr int width = 32;
  detail::Matrix matrix = detail::ConstRows(by, dim, dim, Eigen::OuterStride<>(dim)), product;
  for (int column = width; column < dim; column += width) {
    matrix.block(0, column, column, std::min(width, dim - column)) *= 2;
  }
  detail::ScaledRows scaled;
  detail::each_tile(rows, dim, [&](int first, const auto& tile) {
    scaled.assign(tile);
    product.resize(tile.rows(), dim);
    for (int column = 0; column < dim; column += width) {
      const int count = std::min(width, dim - column), before = column + count;
      product.middleCols(column, count).noalias() = scaled.rows.leftCols(before) * matrix.block(0, column, before, count);
    }
    const Eigen::VectorXf form = product.cwiseProduct(scaled.rows).rowwise().sum();
    Eigen::Map<Eigen::VectorXd>(out.data() + first, tile.rows()) =
        form.cast<double>().cwiseProduct(scaled.sizes.cast<double>().cwiseAbs2());
  });
}

// out[r] = row r . by, of rows [n, dim] and by [dim].
inline void inner_products(std::span<const float> rows, int dim, const float* by, std::span<float> out) {
  detail::each_tile(rows, dim, [&](int first, const auto& tile) {
    Eigen::Map<Eigen::VectorXf>(out.data() + first, tile.rows()).noalias() = tile * Eigen::Map<const Eigen::VectorXf>(by, dim);
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
  const int dim = seen.head_dim;
  const float average = 1.f / static_cast<float>(seen.group_size);
  std::fill(out.begin(), out.end(), 0.f);
  detail::Matrix product, squares;
  std::vector<double> of_head(norm == Norm::root ? out.size() : 0);
  for (int g = 0; g < seen.group_size; ++g) {
    const detail::ConstRows weights(seen.output.weights + static_cast<std::ptrdiff_t>(g) * dim, seen.output.width, dim,
                                    Eigen::OuterStride<>(seen.output_stride));
    if (norm == Norm::root) {
      // Squares need the matrix only as what it makes of pairs of channels.
      squares.noalias() = weights.transpose() * weights;
      quadratic_forms(seen.values, dim, squares.data(), of_head);
      for (std::size_t r = 0; r < out.size(); ++r) {
        out[r] += static_cast<float>(std::sqrt(std::max(of_head[r], 0.0))) * average;
      }
    } else {
      detail::each_tile(seen.values, dim, [&](int first, const auto& tile) {
        product.noalias() = tile * weights.transpose();
        Eigen::Map<Eigen::VectorXf>(out.data() + first, tile.rows()) += product.rowwise().template lpNorm<1>() * average;
      });
    }
  }
}

}  // namespace kvt::inline v0
