// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See engine.hpp.
#include "engine.hpp"

#include <stdexcept>

namespace kvt_llm {

Engine::Engine(const Model& model, int num_threads)
    : model_(model),
      runner_(model.engine() == EngineKind::ggml ? make_ggml_runner(model, num_threads)
                                                 : make_llama_cpp_runner(model, num_threads)) {}

Engine::~Engine() = default;

std::span<const float> Engine::eval(kvt::AnyCache& cache, std::span<const int> tokens, int first, Logits which) {
  const HyperParameters& p = model_.parameters();
  const int n = static_cast<int>(tokens.size());
  if (n == 0 || first < 0 || first + n > p.context) {
    throw std::runtime_error("position " + std::to_string(first + n) + " is outside the model's context of " +
                             std::to_string(p.context) + " tokens");
  }
  for (const int token : tokens) {
    if (token < 0 || token >= p.vocabulary) {
      throw std::runtime_error("the token " + std::to_string(token) + " is not among the model's " +
                               std::to_string(p.vocabulary));
    }
  }
  // A graph that fails is undone by dropping the rows from `first` on: they must all be its own.
  if (first < cache.end_position(0)) {
    throw std::runtime_error("position " + std::to_string(first) + " was computed before; the cache accepts " +
                             std::to_string(cache.end_position(0)) + " or later");
  }
  const auto rows = static_cast<std::size_t>(which == Logits::all ? n : 1);
  logits_.resize(rows * static_cast<std::size_t>(p.vocabulary));
  runner_->run(cache, tokens, first, which, logits_);
  return logits_;
}

}  // namespace kvt_llm
