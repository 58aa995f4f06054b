// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// option_losses: what a head's attention loses if only its best rows stay, in the form that a codec gives them back. The
// options of a head that bytes are shared out over; see byte_budget.hpp.
//
// Loss:    the squared length of what the group's query heads then add to the hidden state less what they add with all rows as
//          they are, for each query. Rows that are kept take over the weight of those that are not, as they do in a cache.
//          Learned sink logits, which would take some, are not among the evidence.
// Cost:    O(queries * group * (rows * head_dim + options * group * head_dim^2)): the best k rows are summed up once for all k.
#pragma once

// Only the host multiplies here; marked for the device, Eigen makes nvcc warn.
#if defined(__CUDACC__) && !defined(EIGEN_NO_CUDA)
#define EIGEN_NO_CUDA
#endif
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <span>
#include <vector>

#include "kvtailor/core/evidence.hpp"

namespace kvt::inline v0 {

// The first rows of a head as a codec gives them back, [rows, head_dim].
struct CodedRows {
  std::span<const float> keys, values;
};

// losses [kept.size(), window queries].
// seen: keys, values, positions, window queries and the output projection. order: rows that may go, best first, each once; all
// other rows stay as they are. coded: has all rows of `order`. kept: how many of `order` stay, increasing, at most all.
// Errc::no_evidence without queries or a projection, bad_shape if rows are not there.
inline Status option_losses(const HeadEvidence& seen, std::span<const int> order, CodedRows coded, std::span<const int> kept,
                            std::vector<float>& losses) noexcept try {
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Rows = Eigen::Map<const Matrix, 0, Eigen::OuterStride<>>;
  const int dim = seen.head_dim, group = seen.group_size, rows = seen.num_rows();
  const auto queries = static_cast<int>(seen.window_positions.size()), free = static_cast<int>(order.size());
  if (queries == 0 || seen.window_queries == nullptr || seen.output.weights == nullptr)
    return error(Errc::no_evidence, "losses of options need queries, of which there are {}, and an output projection", queries);
  const auto coded_rows = static_cast<int>(std::min(coded.keys.size(), coded.values.size())) / dim;
  std::vector<int> place(static_cast<std::size_t>(rows), -1), others;
  for (int i = 0; i < free; ++i) {
    const int row = order[static_cast<std::size_t>(i)];
    if (row < 0 || row >= std::min(rows, coded_rows))
      return error(Errc::bad_shape, "row {} may go; there are {} coded ones", row, std::min(rows, coded_rows));
    if (place[static_cast<std::size_t>(row)] >= 0)
      return error(Errc::bad_shape, "row {} is twice among those that may go", row);
    place[static_cast<std::size_t>(row)] = i;
  }
  for (std::size_t k = 0; k < kept.size(); ++k) {
    if (kept[k] < (k == 0 ? 0 : kept[k - 1]) || kept[k] > free)
      return error(Errc::bad_shape, "{} rows stay of {}; numbers must increase up to all", kept[k], free);
  }
  for (int row = 0; row < rows; ++row) {
    if (place[static_cast<std::size_t>(row)] < 0) others.push_back(row);
  }
  const auto gather = [&](std::span<const float> from, std::span<const int> which) {
    Matrix to(static_cast<Eigen::Index>(which.size()), dim);
    for (std::size_t i = 0; i < which.size(); ++i)
      std::copy_n(from.data() + static_cast<std::ptrdiff_t>(which[i]) * dim, dim,
                  to.data() + static_cast<std::ptrdiff_t>(i) * dim);
    return to;
  };
  struct Part {
    Matrix keys, values;
    std::vector<int> positions;
  };
  const auto part = [&](std::span<const float> keys, std::span<const float> values, std::span<const int> which) {
    Part made{gather(keys, which), gather(values, which), {}};
    for (const int row : which) made.positions.push_back(seen.positions[static_cast<std::size_t>(row)]);
    return made;
  };
  const Part always = part(seen.keys, seen.values, others), plain = part(seen.keys, seen.values, order),
             stored = part(coded.keys, coded.values, order);
  // Squares of lengths in the hidden state, from what heads put out.
  Matrix gram(group * dim, group * dim);
  const auto projection = [&](int g) {
    return Rows(seen.output.weights + static_cast<std::ptrdiff_t>(g) * dim, seen.output.width, dim,
                Eigen::OuterStride<>(seen.output_stride));
  };
  for (int g = 0; g < group; ++g) {
    for (int h = 0; h < group; ++h)
      gram.block(g * dim, h * dim, dim, dim).noalias() = projection(g).transpose() * projection(h);
  }

  constexpr int tile = 64;  // queries at a time
  const float scale = seen.attend.scale != 0 ? seen.attend.scale : 1.f / std::sqrt(static_cast<float>(dim));
  std::vector<float> made(kept.size() * static_cast<std::size_t>(queries));
  std::vector<Matrix> apart(kept.size(), Matrix(tile, group * dim));
  for (int first = 0; first < queries; first += tile) {
    const int count = std::min(tile, queries - first);
    const auto logits_of = [&](const Matrix& query, const Part& of) {
      Matrix logits = query * of.keys.transpose();
      if (seen.attend.soft_cap > 0) logits = seen.attend.soft_cap * (logits.array() / seen.attend.soft_cap).tanh();
      for (int q = 0; q < count; ++q) {
        const int at = seen.window_positions[static_cast<std::size_t>(first + q)];
        for (std::size_t r = 0; r < of.positions.size(); ++r) {
          const bool visible = of.positions[r] <= at && (seen.attend.window == 0 || of.positions[r] > at - seen.attend.window);
          if (!visible) logits(q, static_cast<Eigen::Index>(r)) = -std::numeric_limits<float>::infinity();
        }
      }
      return logits;
    };
    for (int g = 0; g < group; ++g) {
      const Rows from(seen.window_queries + first * seen.window_stride + g * dim, count, dim,
                      Eigen::OuterStride<>(seen.window_stride));
      const Matrix query = from * scale;
      Matrix of_always = logits_of(query, always), of_plain = logits_of(query, plain), of_stored = logits_of(query, stored);
      Eigen::VectorXf top = Eigen::VectorXf::Constant(count, std::numeric_limits<float>::lowest());
      for (const Matrix* const logits : {&of_always, &of_plain, &of_stored}) {
        if (logits->cols() > 0) top = top.cwiseMax(logits->rowwise().maxCoeff());
      }
      for (Matrix* const logits : {&of_always, &of_plain, &of_stored}) *logits = (logits->colwise() - top).array().exp();
      Matrix sum = of_always * always.values;
      Eigen::VectorXf weight = of_always.rowwise().sum();
      const auto over = [](const Matrix& sums, const Eigen::VectorXf& weights) -> Matrix {
        return (weights.array() > 0).select(weights, 1.f).cwiseInverse().asDiagonal() * sums;
      };
      const Matrix whole = over(sum + of_plain * plain.values, weight + of_plain.rowwise().sum());
      int have = 0;
      for (std::size_t k = 0; k < kept.size(); ++k) {
        const int more = kept[k] - have;
        sum.noalias() += of_stored.middleCols(have, more) * stored.values.middleRows(have, more);
        weight += of_stored.middleCols(have, more).rowwise().sum();
        have = kept[k];
        apart[k].block(0, g * dim, count, dim) = over(sum, weight) - whole;
      }
    }
    for (std::size_t k = 0; k < kept.size(); ++k) {
      const auto error_of = apart[k].topRows(count);
      Eigen::Map<Eigen::VectorXf>(made.data() + static_cast<std::ptrdiff_t>(k) * queries + first, count) =
          (error_of * gram).cwiseProduct(error_of).rowwise().sum().cwiseMax(0.f);
    }
  }
  losses = std::move(made);
  return success();
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while options are weighed");
}

}  // namespace kvt::inline v0
