// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "llama_reference.hpp"

#include "engine_log.hpp"

namespace kvt::llm {

Result<LlamaReference> LlamaReference::load(const std::string& path, int context, int chunk, int threads) {
  quiet_engine_log();
  LlamaReference self;
  self.model_.reset(llama_model_load_from_file(path.c_str(), llama_model_default_params()));
  if (!self.model_) return failure("llama.cpp cannot load \"", path, "\"", take_engine_errors());
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(context);
  params.n_batch = params.n_ubatch = static_cast<std::uint32_t>(chunk);
  params.n_threads = params.n_threads_batch = threads;
  self.context_.reset(llama_init_from_model(self.model_.get(), params));
  if (!self.context_) return failure("llama.cpp cannot make a context of ", context, take_engine_errors());
  self.batch_.reset(new llama_batch(llama_batch_init(chunk, 0, 1)));
  self.chunk_ = chunk;
  return self;
}

Done LlamaReference::eval(std::span<const int> tokens, int first_position, Logits which,
                          std::vector<float>& logits) {
  const int n = static_cast<int>(tokens.size());
  if (n < 1 || n > chunk_) return failure(n, " tokens were given; between 1 and ", chunk_, " are accepted");
  llama_batch& batch = *batch_;
  batch.n_tokens = n;
  for (int i = 0; i < n; ++i) {
    batch.token[i] = tokens[static_cast<std::size_t>(i)];
    batch.pos[i] = first_position + i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = which == Logits::all || (which == Logits::last && i + 1 == n) ? 1 : 0;
  }
  if (const int code = llama_decode(context_.get(), batch); code != 0) {
    return failure("llama.cpp could not evaluate ", n, " tokens, code ", code, take_engine_errors());
  }
  const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model_.get()));
  const std::size_t rows = which == Logits::all ? tokens.size() : which == Logits::last ? 1 : 0;
  logits.resize(rows * static_cast<std::size_t>(vocabulary));
  if (rows > 0) {
    const float* computed = llama_get_logits(context_.get());
    if (computed == nullptr) return failure("llama.cpp returned no logits", take_engine_errors());
    std::copy(computed, computed + logits.size(), logits.begin());
  }
  return done();
}

}  // namespace kvt::llm
