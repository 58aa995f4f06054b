// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// TokenScorer: how much a row will matter, told from its key and value alone, by a small network for each KV head.
//
//   x = [k, v, log |k|, log |v|], k before RoPE: nothing of it depends on the place in the text; log |0| counts as log 1e-12
//   z = (x - mean) * scale, each element held to +-1000
//   score = linear . z + bias + outer . max(0, inner z + inner_bias)
//
// Made to give the logarithm of a row's importance (see learn/importance.hpp), up to what is the same for all rows and heads.
//
// Source:  LKV, arXiv 2605.06676: scores from keys and values, without attention. Its features and layers were not published:
//          these are ours.
#pragma once

#if defined(__CUDACC__) && !defined(EIGEN_NO_CUDA)
#define EIGEN_NO_CUDA
#endif
#include <Eigen/Core>
#include <cmath>
#include <span>
#include <vector>

#include "kvtailor/core/config.hpp"
#include "kvtailor/core/geometry.hpp"
#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

// Where the numbers of one head are, in floats from its first.
struct TokenScorerLayout {
  int head_dim = 0, hidden = 0;

  KVT_HD int features() const { return 2 * head_dim + 2; }
  KVT_HD int mean() const { return 0; }                          // [features]
  KVT_HD int scale() const { return features(); }                // [features]
  KVT_HD int matrix() const { return 2 * features(); }           // [hidden + 1, features]: inner, then linear
  KVT_HD int bias() const { return (hidden + 3) * features(); }  // [hidden + 1]: inner_bias, then bias
  KVT_HD int outer() const { return bias() + hidden + 1; }       // [hidden]
  KVT_HD int size() const { return outer() + hidden; }
  KVT_HD int learned() const { return size() - matrix(); }  // numbers from matrix() on, which have gradients
};

template <class T>
class TokenScorer {
 public:
  using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Rows = Eigen::Map<const Matrix>;
  static constexpr T most = 1000, no_length = T(1e-12);

  TokenScorer() = default;
  TokenScorer(int num_heads, int head_dim, int hidden)
      : layout_{head_dim, hidden},
        heads_(num_heads),
        numbers_(static_cast<std::size_t>(num_heads) * static_cast<std::size_t>(layout_.size()), T(0)) {}

  const TokenScorerLayout& layout() const { return layout_; }
  int num_heads() const { return heads_; }
  // [num_heads, layout().size()]
  std::vector<T>& numbers() { return numbers_; }
  const std::vector<T>& numbers() const { return numbers_; }
  std::span<T> of(int head) { return std::span(numbers_).subspan(place(head), static_cast<std::size_t>(layout_.size())); }
  std::span<const T> of(int head) const {
    return std::span(numbers_).subspan(place(head), static_cast<std::size_t>(layout_.size()));
  }
  // What has a gradient; mean and scale have none.
  std::span<T> learned(int head) { return of(head).subspan(static_cast<std::size_t>(layout_.matrix())); }

  // z [n, features] of rows [n, head_dim], keys before RoPE.
  void features(int head, const T* keys, const T* values, int n, Matrix& z) const {
    const int dim = layout_.head_dim;
    z.resize(n, layout_.features());
    z.leftCols(dim) = Rows(keys, n, dim);
    z.middleCols(dim, dim) = Rows(values, n, dim);
    z.col(2 * dim) = z.leftCols(dim).rowwise().norm().array().max(no_length).log().matrix();
    z.col(2 * dim + 1) = z.middleCols(dim, dim).rowwise().norm().array().max(no_length).log().matrix();
    z.rowwise() -= row(head, layout_.mean(), layout_.features());
    z.array().rowwise() *= row(head, layout_.scale(), layout_.features()).array();
    z = z.cwiseMax(-most).cwiseMin(most);
  }
  // scores [n] of what features() gave; hidden [n, hidden] is what add_gradient() wants.
  void score(int head, const Matrix& z, std::span<T> scores, Matrix& hidden) const {
    const int many = layout_.hidden;
    Eigen::Map<Eigen::Matrix<T, Eigen::Dynamic, 1>> out(scores.data(), z.rows());
    const Rows matrix(numbers_.data() + place(head) + layout_.matrix(), many + 1, layout_.features());
    hidden.noalias() = z * matrix.transpose();
    hidden.rowwise() += row(head, layout_.bias(), many + 1);
    out = hidden.col(many);
    hidden.conservativeResize(Eigen::NoChange, many);
    hidden = hidden.cwiseMax(T(0));
    out.noalias() += hidden * row(head, layout_.outer(), many).transpose();
  }
  // by_scores [n] is the gradient of a loss by the scores; that by the learned numbers of the head is added to `to`
  // [layout().learned()], which begins at layout().matrix().
  void add_gradient(int head, const Matrix& z, const Matrix& hidden, std::span<const T> by_scores, std::span<T> to) const {
    const int many = layout_.hidden;
    const Eigen::Map<const Eigen::Matrix<T, Eigen::Dynamic, 1>> by(by_scores.data(), z.rows());
    Matrix by_sums(z.rows(), many + 1);
    by_sums.leftCols(many) = (hidden.array() > T(0)).select(by * row(head, layout_.outer(), many), T(0));
    by_sums.col(many) = by;
    const int first = layout_.matrix();
    Eigen::Map<Matrix>(to.data(), many + 1, layout_.features()).noalias() += by_sums.transpose() * z;
    // Into memory of Eigen's own first: the order in which it adds up depends on how the place is aligned.
    const Eigen::Matrix<T, 1, Eigen::Dynamic> sums = by_sums.colwise().sum();
    Eigen::Map<Eigen::Matrix<T, 1, Eigen::Dynamic>>(to.data() + layout_.bias() - first, many + 1) += sums;
    Eigen::Map<Eigen::Matrix<T, Eigen::Dynamic, 1>>(to.data() + layout_.outer() - first, many).noalias() +=
        hidden.transpose() * by;
  }

 private:
  std::size_t place(int head) const { return static_cast<std::size_t>(head) * static_cast<std::size_t>(layout_.size()); }
  Eigen::Map<const Eigen::Matrix<T, 1, Eigen::Dynamic>> row(int head, int first, int n) const {
    return {numbers_.data() + place(head) + first, n};
  }

  TokenScorerLayout layout_;
  int heads_ = 0;
  std::vector<T> numbers_;
};

}  // namespace kvt::inline v0
