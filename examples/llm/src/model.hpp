// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Model: the weights and hyper-parameters of a Llama-family model from a GGUF file. Weights stay quantised as they are.
// Failures are std::runtime_error with one sentence.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include <memory>
#include <string>

#include "kvtailor/core/geometry.hpp"

namespace kvt_llm {

struct HyperParameters {
  int num_layers = 0, embedding = 0, num_q_heads = 0, num_kv_heads = 0, head_dim = 0, rotary_dim = 0, context = 0,
      vocabulary = 0;
  float norm_epsilon = 0, rope_base = 10000;
  int rope_type = 0;  // ggml's GGML_ROPE_TYPE_*

  kvt::Geometry geometry() const { return {num_layers, num_kv_heads, num_q_heads, head_dim}; }
};

class Model {
 public:
  explicit Model(const std::string& path);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const HyperParameters& parameters() const { return parameters_; }
  // A tensor by its GGUF name; null when `optional` and absent.
  ggml_tensor* tensor(const std::string& name, bool optional = false) const;
  ggml_tensor* layer(int layer, const char* name, bool optional = false) const;

 private:
  std::string path_;
  HyperParameters parameters_;
  ggml_context* context_ = nullptr;
  ggml_backend_t backend_ = nullptr;
  ggml_backend_buffer_t buffer_ = nullptr;
};

// Keeps ggml and llama.cpp quiet but for errors. Call once, first.
void init_engine();

// A file with every weight as F32, made once and cached beside the model (or in the user's cache folder).
std::string dequantised(const std::string& path);

}  // namespace kvt_llm
