// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Engine: a small Llama-family forward pass. ggml multiplies the matrices; a kvtailor cache holds keys and values.
#pragma once

#include <ggml-alloc.h>
#include <ggml-backend.h>

#include <span>
#include <vector>

#include "kvtailor/any_cache.hpp"
#include "kvtailor/engine/ggml.hpp"
#include "model.hpp"

namespace kvt_llm {

class Engine {
 public:
  Engine(const Model& model, int num_threads);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  enum class Logits { all, last };
  // Runs tokens at positions first, first + 1, ... over the cache, which gains them. Returns [n or 1, vocabulary], valid until
  // the next call. Throws std::runtime_error; the cache is then as it was.
  std::span<const float> eval(kvt::AnyCache& cache, std::span<const int> tokens, int first, Logits which);

  const Model& model() const { return model_; }

 private:
  const Model& model_;
  ggml_backend_t backend_;
  ggml_gallocr_t allocator_;
  std::vector<unsigned char> graph_memory_;
  std::vector<int> positions_;
  std::vector<float> logits_;
  kvt::GgmlAttention<kvt::AnyCache> attention_;
};

}  // namespace kvt_llm
