// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Student: the model over a context whose rows count in part, forward and backward. What policies are trained by.
//
// A row of the context with the mask m, 0 to 1, has m times its softmax weight: 1 is a row that is kept, 0 one that is not
// there. Keys and values of the context are constants, so that only the layers of the tokens behind it are gone through.
// Row-major matrices as in the file, [out, in]; double is for tests.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <span>
#include <vector>

#include "kvtailor/core/half.hpp"
#include "kvtailor/core/rope.hpp"
#include "model.hpp"

namespace kvt_llm {

template <class T>
struct Weights {
  using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Row = Eigen::Matrix<T, 1, Eigen::Dynamic>;
  struct Layer {
    Row attention_norm, feed_norm, q_bias, k_bias, v_bias;  // biases may be empty
    Matrix q, k, v, output, gate, up, down;
  };
  HyperParameters parameters;
  kvt::Rope rope;
  Matrix embedding, head;  // head is empty where it is the embedding
  Row output_norm;
  std::vector<Layer> layers;

  const Matrix& vocabulary() const { return head.size() > 0 ? head : embedding; }
};
// In fp32, whatever the file has.
Weights<float> weights_of(const Model& model);

// Keys, after RoPE, and values of a text that the model has read, [num_layers, num_kv_heads, rows, head_dim].
struct Context {
  int rows = 0;
  std::vector<kvt::Half> keys, values;
};

template <class T>
class Student {
 public:
  using Matrix = typename Weights<T>::Matrix;
  using Row = typename Weights<T>::Row;

  explicit Student(const Weights<T>& weights) : w_(weights), layers_(weights.layers.size()) {}

  // Runs tokens at the positions behind the context; mask [num_layers, num_kv_heads, context.rows]. Returns what the vocabulary
  // is multiplied by, [wanted, embedding], for the tokens at the places `wanted`, valid until the next call.
  const Matrix& run(const Context& context, std::span<const int> tokens, std::span<const int> wanted, std::span<const T> mask);
  // The mean over the wanted tokens of the KL distance of what follows from what a teacher with such rows [wanted, embedding]
  // says follows.
  double distance(const Matrix& teacher);
  // The gradient of the last distance() by the mask.
  void gradient(std::span<T> by_mask);

 private:
  struct Head {
    Matrix queries;  // [group * tokens, head_dim]
    Matrix shares;   // [group * tokens, rows + tokens]: softmax weights, those of the context as if the mask were 1
  };
  struct Layer {
    Matrix before, middle, gate, up, keys, values;
    std::vector<Head> heads;
  };
  int group() const { return w_.parameters.num_q_heads / w_.parameters.num_kv_heads; }
  T scale() const { return 1 / std::sqrt(static_cast<T>(w_.parameters.head_dim)); }
  Matrix normed(const Matrix& x, const Row& weight) const;
  Matrix norm_gradient(const Matrix& x, const Row& weight, const Matrix& by) const;
  // Each head of each row to the position behind the context that it has, or back.
  void turn(Matrix& rows, T direction) const;
  Matrix rows_of(const std::vector<kvt::Half>& context, const Matrix& own, int layer, int head) const;

  const Weights<T>& w_;
  const Context* context_ = nullptr;
  std::vector<int> wanted_;
  std::vector<T> mask_;
  std::vector<Layer> layers_;
  Matrix last_, out_, by_logits_, cosine_, sine_;
};

}  // namespace kvt_llm
