// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Leverage: keys that others do not make up, whatever their place in the text.
//
// Score:   keys before RoPE, their mean taken away, times a Gaussian matrix [head_dim, sketch] of variance 1 / sketch: rows X;
//          x_j . (X'X + 0.01 I)^-1 x_j. A ridge that is too small for the Cholesky factorisation grows tenfold, up to five
//          times.
// Needs:   keys, positions, rope.  Cost: O(rows * sketch * (head_dim + sketch)).
// Source:  the leverage part of Compactor, Chari & Van Durme, arXiv 2507.08143; defaults of kvpress, whose scaling of scores
//          changes no order and is left out. Compactor's other part needs all queries of a prompt, and is not here.
#pragma once

#include "kvtailor/select/row_products.hpp"
//
#include <Eigen/Cholesky>
#include <new>
#include <vector>

#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/random.hpp"

namespace kvt::inline v0 {

struct Leverage {
  static constexpr EvidenceSet needs = Evidence::keys | Evidence::positions | Evidence::rope;
  int sketch = 48;  // 1 .. 256
  std::uint64_t seed = 0;

  Status check() const noexcept {
    if (sketch < 1 || sketch > 256) return error(Errc::bad_value, "sketch is {}; it must be between 1 and 256", sketch);
    return success();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    KVT_TRY(check());
    const int dim = seen.head_dim, n = seen.num_rows();
    detail::Matrix keys = detail::ConstRows(seen.keys.data(), n, dim, Eigen::OuterStride<>(dim));
    RopeInverse inverse(*seen.rope);
    for (int row = 0; row < n; ++row) {
      inverse.turn_back(keys.row(row).data(), 1, dim, seen.positions[static_cast<std::size_t>(row)]);
    }
    detail::Matrix matrix(dim, sketch);
    const double size = 1 / std::sqrt(static_cast<double>(sketch));
    for (int i = 0; i < dim * sketch; ++i) {
      matrix.data()[i] = static_cast<float>(size * normal_number(seed, static_cast<std::uint64_t>(i)));
    }
    Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(dim);
    for (int row = 0; row < n; ++row) sum += keys.row(row).cast<double>();
    keys.rowwise() -= Eigen::RowVectorXf((sum / n).cast<float>());
    const detail::Matrix rows = keys * matrix;
    const Eigen::MatrixXd squares = (rows.transpose() * rows).cast<double>();
    Eigen::LLT<Eigen::MatrixXd> factored;
    double ridge = 1e-2;
    for (int tries = 0; tries < 6; ++tries, ridge *= 10) {
      factored.compute(squares + ridge * Eigen::MatrixXd::Identity(sketch, sketch));
      if (factored.info() == Eigen::Success) break;
    }
    if (factored.info() != Eigen::Success || !squares.allFinite()) {
      return error(Errc::bad_value, "keys before RoPE are too large to be compared; the largest is {}",
                   static_cast<double>(keys.cwiseAbs().maxCoeff()));
    }
    const Eigen::MatrixXf lower = factored.matrixL().solve(Eigen::MatrixXd::Identity(sketch, sketch)).cast<float>();
    detail::Matrix solved;
    detail::each_tile({rows.data(), static_cast<std::size_t>(rows.size())}, sketch, [&](int first, const auto& tile) {
      solved.noalias() = tile * lower.transpose();
      Eigen::Map<Eigen::VectorXf>(score.data() + first, tile.rows()) = solved.rowwise().squaredNorm();
    });
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }
};

static_assert(TokenSelector<Leverage>);

}  // namespace kvt::inline v0
