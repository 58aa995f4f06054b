// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See reference.hpp.
#include "reference.hpp"

#include <llama.h>

#include <stdexcept>

namespace kvt_llm {

Reference::Reference(const std::string& model_path, int context, int num_threads) {
  model_ = llama_model_load_from_file(model_path.c_str(), llama_model_default_params());
  if (model_ == nullptr) throw std::runtime_error("llama.cpp cannot load " + model_path);
  auto how = llama_context_default_params();
  how.n_ctx = static_cast<unsigned>(context);
  how.n_batch = how.n_ubatch = 512;
  how.n_threads = how.n_threads_batch = num_threads;
  context_ = llama_init_from_model(model_, how);
  if (context_ == nullptr)
    throw std::runtime_error("llama.cpp cannot make a context of " + std::to_string(context) + " tokens");
}

Reference::~Reference() {
  llama_free(context_);
  llama_model_free(model_);
}

std::span<const float> Reference::eval(std::span<const int> tokens, int first, bool all) {
  const int n = static_cast<int>(tokens.size());
  llama_batch batch = llama_batch_init(n, 0, 1);
  batch.n_tokens = n;
  for (int i = 0; i < n; ++i) {
    batch.token[i] = tokens[static_cast<std::size_t>(i)];
    batch.pos[i] = first + i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = all || i + 1 == n;
  }
  const int failed = llama_decode(context_, batch);
  llama_batch_free(batch);
  if (failed != 0) throw std::runtime_error("llama.cpp cannot decode " + std::to_string(n) + " tokens");
  const auto width = static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model_)));
  return {all ? llama_get_logits(context_) : llama_get_logits_ith(context_, -1), width * (all ? tokens.size() : 1)};
}

void Reference::truncate(int position) { llama_memory_seq_rm(llama_get_memory(context_), 0, position, -1); }

}  // namespace kvt_llm
