// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Model: the weights and hyper-parameters of a Llama-family model from a GGUF file. Weights stay quantised as they are.
// Failures are std::runtime_error with one sentence.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvtailor/core/geometry.hpp"

namespace kvt_llm {

struct HyperParameters {
  int num_layers = 0, embedding = 0, num_q_heads = 0, num_kv_heads = 0, head_dim = 0, rotary_dim = 0, context = 0,
      vocabulary = 0;
  float norm_epsilon = 0, rope_base = 10000;
  float rope_scale = 1;  // positions are multiplied by it
  int rope_type = 0;     // ggml's GGML_ROPE_TYPE_*

  kvt::Geometry geometry() const { return {num_layers, num_kv_heads, num_q_heads, head_dim}; }
};

class Model {
 public:
  explicit Model(const std::string& path);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const HyperParameters& parameters() const { return parameters_; }
  // A tensor by its GGUF name; null when `optional` and absent.
  ggml_tensor* tensor(const std::string& name, bool optional = false) const;
  ggml_tensor* layer(int layer, const char* name, bool optional = false) const;

  // What policies may ask of a model; lives as long as it.
  const kvt::Rope& rope() const { return rope_; }
  // In fp32: made at the first call where the file has another type.
  std::span<const kvt::OutputProjection> output_projections() const;

 private:
  // Vectors are fp32; matrices may be quantised.
  enum class Kind { vector, matrix };
  void expect(const std::string& name, Kind kind, std::initializer_list<std::int64_t> shape, bool optional = false) const;
  // Whatever a graph takes for granted, so that nothing fails in the middle of one.
  void check_tensors();

  template <auto free>
  struct Free {
    template <class T>
    void operator()(T* p) const {
      free(p);
    }
  };
  std::string path_;
  HyperParameters parameters_;
  std::unique_ptr<ggml_context, Free<ggml_free>> context_;
  std::unique_ptr<ggml_backend, Free<ggml_backend_free>> backend_;
  std::unique_ptr<ggml_backend_buffer, Free<ggml_backend_buffer_free>> buffer_;
  kvt::Rope rope_;
  std::vector<float> rope_factors_;
  mutable std::vector<std::vector<float>> output_weights_;
  mutable std::vector<kvt::OutputProjection> output_projections_;
};

// Keeps ggml and llama.cpp quiet but for errors. Call once, first.
void init_engine();

// A file with every weight as F32, made once and cached beside the model (or in the user's cache folder).
std::string dequantised(const std::string& path);

}  // namespace kvt_llm
