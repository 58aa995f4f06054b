// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See student.hpp.
#include "student.hpp"

#include <algorithm>
#include <limits>

namespace kvt_llm {

namespace {

// In row-major order; empty where the file has none.
template <class M>
M numbers_of(const ggml_tensor* t) {
  M out;
  if (t == nullptr) return out;
  out.resize(t->ne[1], t->ne[0]);
  if (t->type == GGML_TYPE_F32) {
    std::copy_n(static_cast<const float*>(t->data), out.size(), out.data());
  } else {
    ggml_get_type_traits(t->type)->to_float(t->data, out.data(), out.size());
  }
  return out;
}

template <class T>
T silu_gate(T x) {
  return 1 / (1 + std::exp(-x));
}

}  // namespace

Weights<float> weights_of(const Model& model) {
  using Matrix = Weights<float>::Matrix;
  using Row = Weights<float>::Row;
  Weights<float> w;
  w.parameters = model.parameters();
  w.rope = model.ropes().front();
  w.embedding = numbers_of<Matrix>(model.tensor("token_embd.weight"));
  w.head = numbers_of<Matrix>(model.tensor("output.weight", true));
  w.output_norm = numbers_of<Row>(model.tensor("output_norm.weight"));
  for (int l = 0; l < w.parameters.num_layers; ++l) {
    const auto matrix = [&](const char* name) { return numbers_of<Matrix>(model.layer(l, name)); };
    const auto row = [&](const char* name, bool optional) { return numbers_of<Row>(model.layer(l, name, optional)); };
    w.layers.push_back({row("attn_norm.weight", false), row("ffn_norm.weight", false), row("attn_q.bias", true),
                        row("attn_k.bias", true), row("attn_v.bias", true), matrix("attn_q.weight"), matrix("attn_k.weight"),
                        matrix("attn_v.weight"), matrix("attn_output.weight"), matrix("ffn_gate.weight"),
                        matrix("ffn_up.weight"), matrix("ffn_down.weight")});
  }
  return w;
}

template <class T>
auto Student<T>::normed(const Matrix& x, const Row& weight) const -> Matrix {
  Matrix y(x.rows(), x.cols());
  const T epsilon = static_cast<T>(w_.parameters.norm_epsilon);
  for (Eigen::Index i = 0; i < x.rows(); ++i) {
    const T by = 1 / std::sqrt(x.row(i).squaredNorm() / static_cast<T>(x.cols()) + epsilon);
    y.row(i) = by * x.row(i).cwiseProduct(weight);
  }
  return y;
}

template <class T>
auto Student<T>::norm_gradient(const Matrix& x, const Row& weight, const Matrix& by) const -> Matrix {
  Matrix y(x.rows(), x.cols());
  const T epsilon = static_cast<T>(w_.parameters.norm_epsilon), n = static_cast<T>(x.cols());
  for (Eigen::Index i = 0; i < x.rows(); ++i) {
    const T inverse = 1 / std::sqrt(x.row(i).squaredNorm() / n + epsilon);
    const Row weighed = by.row(i).cwiseProduct(weight);
    y.row(i) = inverse * (weighed - x.row(i) * (inverse * inverse * x.row(i).dot(weighed) / n));
  }
  return y;
}

template <class T>
void Student<T>::turn(Matrix& rows, T direction) const {
  const int dim = w_.parameters.head_dim;
  for (Eigen::Index t = 0; t < rows.rows(); ++t) {
    for (Eigen::Index first = 0; first < rows.cols(); first += dim) {
      for (int i = 0; i < w_.rope.rotary_dim / 2; ++i) {
        T &x = rows(t, first + w_.rope.first(i)), &y = rows(t, first + w_.rope.second(i));
        const T c = cosine_(t, i), s = direction * sine_(t, i), turned = x * c - y * s;
        y = x * s + y * c;
        x = turned;
      }
    }
  }
}

// The context's, and those behind it.
template <class T>
auto Student<T>::rows_of(const std::vector<kvt::Half>& context, const Matrix& own, int layer, int head) const -> Matrix {
  const int dim = w_.parameters.head_dim, n = context_->rows;
  Matrix all(n + own.rows(), dim);
  const kvt::Half* from = context.data() + (static_cast<std::ptrdiff_t>(layer) * w_.parameters.num_kv_heads + head) * n * dim;
  T* const to = all.data();
  for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(n) * dim; ++i) to[i] = static_cast<T>(kvt::to_float(from[i]));
  all.bottomRows(own.rows()) = own.middleCols(static_cast<Eigen::Index>(head) * dim, dim);
  return all;
}

template <class T>
auto Student<T>::run(const Context& context, std::span<const int> tokens, std::span<const int> wanted, std::span<const T> mask)
    -> const Matrix& {
  const auto& p = w_.parameters;
  const auto n = static_cast<Eigen::Index>(tokens.size());
  const int rows = context.rows, dim = p.head_dim;
  context_ = &context;
  wanted_.assign(wanted.begin(), wanted.end());
  mask_.assign(mask.begin(), mask.end());
  const int pairs = w_.rope.rotary_dim / 2;
  cosine_.resize(n, pairs);
  sine_.resize(n, pairs);
  for (Eigen::Index t = 0; t < n; ++t) {
    for (int i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(rows + t) * w_.rope.step(i);
      cosine_(t, i) = static_cast<T>(std::cos(angle));
      sine_(t, i) = static_cast<T>(std::sin(angle));
    }
  }
  Matrix x(n, p.embedding);
  for (Eigen::Index t = 0; t < n; ++t) x.row(t) = w_.embedding.row(tokens[static_cast<std::size_t>(t)]);
  for (int l = 0; l < p.num_layers; ++l) {
    const auto& w = w_.layers[static_cast<std::size_t>(l)];
    Layer& own = layers_[static_cast<std::size_t>(l)];
    own.before = x;
    const Matrix a = normed(x, w.attention_norm);
    const auto project = [&](const Matrix& weight, const Row& bias) {
      Matrix y = a * weight.transpose();
      if (bias.size() > 0) y.rowwise() += bias;
      return y;
    };
    Matrix q = project(w.q, w.q_bias);
    own.keys = project(w.k, w.k_bias);
    own.values = project(w.v, w.v_bias);
    turn(q, 1);
    turn(own.keys, 1);
    Matrix attended(n, static_cast<Eigen::Index>(p.num_q_heads) * dim);
    own.heads.resize(static_cast<std::size_t>(p.num_kv_heads));
    for (int h = 0; h < p.num_kv_heads; ++h) {
      Head& head = own.heads[static_cast<std::size_t>(h)];
      head.queries.resize(group() * n, dim);
      for (int g = 0; g < group(); ++g) head.queries.middleRows(g * n, n) = q.middleCols((h * group() + g) * dim, dim);
      const Matrix keys = rows_of(context.keys, own.keys, l, h), values = rows_of(context.values, own.values, l, h);
      Matrix& e = head.shares;
      e.noalias() = scale() * head.queries * keys.transpose();
      const Eigen::Map<const Row> m(mask_.data() + (static_cast<std::ptrdiff_t>(l) * p.num_kv_heads + h) * rows, rows);
      Matrix met(e.rows(), e.cols());
      for (Eigen::Index r = 0; r < e.rows(); ++r) {
        const Eigen::Index seen = rows + r % n + 1;
        auto row = e.row(r).head(seen);
        row.array() = (row.array() - row.maxCoeff()).exp();
        e.row(r).tail(e.cols() - seen).setZero();
        met.row(r) = e.row(r);
        met.row(r).head(rows).array() *= m.array();
        // Never 0: the token's own row counts, though it may be far below those that do not.
        const T by = 1 / std::max(met.row(r).sum(), std::numeric_limits<T>::min());
        e.row(r) *= by;
        met.row(r) *= by;
      }
      const Matrix out = met * values;
      for (int g = 0; g < group(); ++g) attended.middleCols((h * group() + g) * dim, dim) = out.middleRows(g * n, n);
    }
    x.noalias() += attended * w.output.transpose();
    own.middle = x;
    const Matrix f = normed(x, w.feed_norm);
    own.gate.noalias() = f * w.gate.transpose();
    own.up.noalias() = f * w.up.transpose();
    const Matrix inner = (own.gate.array() / (1 + (-own.gate.array()).exp()) * own.up.array()).matrix();
    x.noalias() += inner * w.down.transpose();
  }
  last_.resize(static_cast<Eigen::Index>(wanted_.size()), p.embedding);
  for (std::size_t i = 0; i < wanted_.size(); ++i) last_.row(static_cast<Eigen::Index>(i)) = x.row(wanted_[i]);
  out_ = normed(last_, w_.output_norm);
  return out_;
}

template <class T>
double Student<T>::distance(const Matrix& teacher) {
  const auto& head = w_.vocabulary();
  by_logits_.noalias() = out_ * head.transpose();
  const Matrix wanted = teacher * head.transpose();
  double sum = 0;
  for (Eigen::Index r = 0; r < out_.rows(); ++r) {
    auto own = by_logits_.row(r).array();
    const Eigen::Array<T, 1, Eigen::Dynamic> to = wanted.row(r).array() - wanted.row(r).maxCoeff();
    own -= own.maxCoeff();
    const T to_sum = to.exp().sum(), own_sum = own.exp().sum();
    const Eigen::Array<T, 1, Eigen::Dynamic> p = to.exp() / to_sum;
    sum += static_cast<double>((p * (to - own)).sum()) + std::log(static_cast<double>(own_sum)) -
           std::log(static_cast<double>(to_sum));
    own = (own.exp() / own_sum - p) / static_cast<T>(out_.rows());
  }
  return sum / static_cast<double>(out_.rows());
}

template <class T>
void Student<T>::gradient(std::span<T> by_mask) {
  const auto& p = w_.parameters;
  const int rows = context_->rows, dim = p.head_dim;
  const Eigen::Index n = layers_[0].before.rows();
  Matrix by = Matrix::Zero(n, p.embedding);
  const Matrix by_last = norm_gradient(last_, w_.output_norm, by_logits_ * w_.vocabulary());
  for (std::size_t i = 0; i < wanted_.size(); ++i) by.row(wanted_[i]) += by_last.row(static_cast<Eigen::Index>(i));
  for (int l = p.num_layers; l-- > 0;) {
    const auto& w = w_.layers[static_cast<std::size_t>(l)];
    const Layer& own = layers_[static_cast<std::size_t>(l)];
    const Matrix by_inner = by * w.down;
    const Matrix gate = own.gate.unaryExpr([](T x) { return silu_gate(x); });
    const Matrix by_gate =
        (by_inner.array() * own.up.array() * gate.array() * (1 + own.gate.array() * (1 - gate.array()))).matrix();
    const Matrix by_up = (by_inner.array() * own.gate.array() * gate.array()).matrix();
    by += norm_gradient(own.middle, w.feed_norm, by_gate * w.gate + by_up * w.up);

    const Matrix by_attended = by * w.output;
    Matrix by_q(n, static_cast<Eigen::Index>(p.num_q_heads) * dim), by_k(n, static_cast<Eigen::Index>(p.num_kv_heads) * dim);
    Matrix by_v(by_k.rows(), by_k.cols());
    for (int h = 0; h < p.num_kv_heads; ++h) {
      const Head& head = own.heads[static_cast<std::size_t>(h)];
      const Matrix keys = rows_of(context_->keys, own.keys, l, h), values = rows_of(context_->values, own.values, l, h);
      Matrix by_out(group() * n, dim);
      for (int g = 0; g < group(); ++g) by_out.middleRows(g * n, n) = by_attended.middleCols((h * group() + g) * dim, dim);
      const std::ptrdiff_t at = (static_cast<std::ptrdiff_t>(l) * p.num_kv_heads + h) * rows;
      const Eigen::Map<const Row> m(mask_.data() + at, rows);
      Matrix met = head.shares;
      met.leftCols(rows).array().rowwise() *= m.array();
      Matrix by_share = by_out * values.transpose();
      const Eigen::Matrix<T, Eigen::Dynamic, 1> mean = by_share.cwiseProduct(met).rowwise().sum();
      by_share.colwise() -= mean;
      // Into memory of Eigen's own first: the order in which it adds up depends on how the place is aligned.
      const Row by_rows = head.shares.leftCols(rows).cwiseProduct(by_share.leftCols(rows)).colwise().sum();
      Eigen::Map<Row>(by_mask.data() + at, rows) = by_rows;
      by_v.middleCols(h * dim, dim).noalias() = met.rightCols(n).transpose() * by_out;
      const Matrix by_logit = scale() * met.cwiseProduct(by_share);
      const Matrix by_query = by_logit * keys;
      for (int g = 0; g < group(); ++g) by_q.middleCols((h * group() + g) * dim, dim) = by_query.middleRows(g * n, n);
      by_k.middleCols(h * dim, dim).noalias() = by_logit.rightCols(n).transpose() * head.queries;
    }
    turn(by_q, -1);
    turn(by_k, -1);
    by += norm_gradient(own.before, w.attention_norm, by_q * w.q + by_k * w.k + by_v * w.v);
  }
}

template class Student<float>;
template class Student<double>;

}  // namespace kvt_llm
