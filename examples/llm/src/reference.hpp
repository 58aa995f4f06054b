// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Reference: llama.cpp itself on the same file, with its default fp16 cache, to be compared with.
#pragma once

#include <span>
#include <string>
#include <vector>

struct llama_model;
struct llama_context;

namespace kvt_llm {

class Reference {
 public:
  Reference(const std::string& model_path, int context, int num_threads);
  ~Reference();
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;

  // Runs tokens at positions first, first + 1, ...; logits of all of them or of the last, valid until the next call.
  std::span<const float> eval(std::span<const int> tokens, int first, bool all);
  // Forgets positions from `position` on.
  void truncate(int position);

 private:
  llama_model* model_;
  llama_context* context_;
};

}  // namespace kvt_llm
