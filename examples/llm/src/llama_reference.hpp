// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// llama.cpp's own forward pass with its own cache (fp16 by default), to compare with.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine.hpp"
#include "llama-cpp.h"
#include "result.hpp"

namespace kvt::llm {

class LlamaReference {
 public:
  // `chunk` is the largest number of tokens one call of eval may be given.
  static Result<LlamaReference> load(const std::string& path, int context, int chunk, int threads);

  // As Engine::eval, over llama.cpp's own cache.
  Done eval(std::span<const int> tokens, int first_position, Logits which, std::vector<float>& logits);

 private:
  struct FreeBatch {
    void operator()(llama_batch* batch) const {
      llama_batch_free(*batch);
      delete batch;
    }
  };

  LlamaReference() = default;

  llama_model_ptr model_;
  llama_context_ptr context_;
  std::unique_ptr<llama_batch, FreeBatch> batch_;
  int chunk_ = 0;
};

}  // namespace kvt::llm
