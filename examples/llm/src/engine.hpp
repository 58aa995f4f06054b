// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Engine: a model's forward pass over a kvtailor cache that holds its keys and values: a small one of our own for the Llama
// family, in which ggml multiplies the matrices, or llama.cpp's, for whatever it knows.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kvtailor/any_cache.hpp"
#include "model.hpp"

namespace kvt_llm {

class Engine {
 public:
  Engine(const Model& model, int num_threads);  // which of the two is the model's choice
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  enum class Logits { all, last };
  // Runs tokens at positions first, first + 1, ... over the cache, which gains them. Returns [n or 1, vocabulary], valid until
  // the next call. Throws std::runtime_error; the cache is then as it was.
  std::span<const float> eval(kvt::AnyCache& cache, std::span<const int> tokens, int first, Logits which);

  const Model& model() const { return model_; }

  // What eval() does with tokens that make sense; logits have room.
  struct Runner {
    virtual ~Runner() = default;
    virtual void run(kvt::AnyCache& cache, std::span<const int> tokens, int first, Logits which, std::span<float> logits) = 0;
  };

 private:
  const Model& model_;
  std::unique_ptr<Runner> runner_;
  std::vector<float> logits_;
};

std::unique_ptr<Engine::Runner> make_ggml_runner(const Model& model, int num_threads);
std::unique_ptr<Engine::Runner> make_llama_cpp_runner(const Model& model, int num_threads);

}  // namespace kvt_llm
