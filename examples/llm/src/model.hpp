// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Model: the weights and hyper-parameters of a model from a GGUF file. Weights stay quantised as they are. Those of the Llama
// family are for the small engine here; llama.cpp loads whatever it knows by itself. Failures are std::runtime_error with one
// sentence.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvtailor/core/geometry.hpp"

struct llama_model;
struct gguf_context;

namespace kvt_llm {

struct HyperParameters {
  int num_layers = 0, embedding = 0, num_q_heads = 0, num_kv_heads = 0, head_dim = 0, rotary_dim = 0, context = 0,
      vocabulary = 0;  // heads are those of the first layer
  float norm_epsilon = 0, rope_base = 10000;
  float rope_scale = 1;  // positions are multiplied by it
  int rope_type = 0;     // ggml's GGML_ROPE_TYPE_*

  bool alike() const;              // are the layers
  kvt::Geometry geometry() const;  // throws std::runtime_error if they are not
  // Of each layer that has keys of its own: num_layers.
  std::vector<kvt::LayerShape> layers = {};
};

enum class EngineKind { ggml, llama_cpp };
constexpr const char* name_of(EngineKind kind) { return kind == EngineKind::ggml ? "ggml" : "llama.cpp"; }

class Model {
 public:
  explicit Model(const std::string& path, EngineKind engine = EngineKind::ggml);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const HyperParameters& parameters() const { return parameters_; }
  EngineKind engine() const { return library_ ? EngineKind::llama_cpp : EngineKind::ggml; }
  llama_model* library() const { return library_.get(); }  // llama.cpp's, if that is the engine

  // A tensor by its GGUF name; null when `optional` and absent. Of llama.cpp's models it has no data.
  ggml_tensor* tensor(const std::string& name, bool optional = false) const;
  ggml_tensor* layer(int layer, const char* name, bool optional = false) const;

  // What policies may ask of a model; lives as long as it. No RoPE where it is not known, or layers differ.
  std::span<const kvt::Rope> ropes() const { return {&rope_, rope_known_ ? 1u : 0u}; }
  // In fp32: made at the first call where the file has another type.
  std::span<const kvt::OutputProjection> output_projections() const;

 private:
  // Vectors are fp32; matrices may be quantised.
  enum class Kind { vector, matrix };
  void expect(const std::string& name, Kind kind, std::initializer_list<std::int64_t> shape, bool optional = false) const;
  // Whatever a graph takes for granted, so that nothing fails in the middle of one.
  void check_tensors();
  void read_llama_family();
  void load_weights();
  void open_library();
  std::vector<char> read_tensor(const ggml_tensor* t) const;

  template <auto free>
  struct Free {
    template <class T>
    void operator()(T* p) const {
      free(p);
    }
  };
  std::string path_;
  HyperParameters parameters_;
  std::unique_ptr<gguf_context, void (*)(gguf_context*)> file_;
  std::unique_ptr<ggml_context, Free<ggml_free>> context_;
  std::unique_ptr<ggml_backend, Free<ggml_backend_free>> backend_;
  std::unique_ptr<ggml_backend_buffer, Free<ggml_backend_buffer_free>> buffer_;
  std::unique_ptr<llama_model, void (*)(llama_model*)> library_;
  kvt::Rope rope_;
  bool rope_known_ = true;
  std::vector<float> rope_factors_;
  std::vector<int> blocks_;  // of llama.cpp's model, that have keys of their own
  mutable std::vector<std::vector<float>> output_weights_;
  mutable std::vector<kvt::OutputProjection> output_projections_;
};

// Keeps ggml and llama.cpp quiet but for errors. Call once, first.
void init_engine();

// A file with every weight as F32, made once and cached beside the model (or in the user's cache folder).
std::string dequantised(const std::string& path);

}  // namespace kvt_llm
