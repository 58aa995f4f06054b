// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See reference.hpp.
#include "reference.hpp"

#include <ggml-backend.h>
#include <llama.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace kvt_llm {

namespace {

constexpr ggml_type cache_types[] = {GGML_TYPE_F16,  GGML_TYPE_Q8_0, GGML_TYPE_Q5_1,  GGML_TYPE_Q5_0,
                                     GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL};

ggml_type parse_type(const std::string& name, const std::string& whole) {
  for (const auto type : cache_types) {
    if (name == ggml_type_name(type)) return type;
  }
  throw std::runtime_error("llama.cpp has no cache \"" + whole + "\"; known: " + PeerCache::known());
}

double bits(ggml_type type) {
  return 8.0 * static_cast<double>(ggml_type_size(type)) / static_cast<double>(ggml_blck_size(type));
}

}  // namespace

PeerCache PeerCache::parse(const std::string& name) {
  PeerCache cache;
  std::string types = name;
  const auto ends_with = [&](const std::string& suffix) {
    if (!types.ends_with(suffix)) return false;
    types.resize(types.size() - suffix.size());
    return true;
  };
  cache.flash = !ends_with("+no_flash");
  cache.rotate = !ends_with("+unrotated");
  const auto slash = types.find('/');
  cache.key = parse_type(types.substr(0, slash), name);
  cache.value = slash == std::string::npos ? cache.key : parse_type(types.substr(slash + 1), name);
  if (!cache.rotate && !ggml_is_quantized(cache.key) && !ggml_is_quantized(cache.value)) {
    throw std::runtime_error("llama.cpp rotates nothing in \"" + types + "\", so there is no \"" + name + "\"");
  }
  if (!cache.flash && ggml_is_quantized(cache.value)) {
    throw std::runtime_error("llama.cpp reads quantised values with flash attention only, so there is no \"" + name + "\"");
  }
  return cache;
}

std::string PeerCache::known() {
  std::string names;
  for (const auto type : cache_types) names += (names.empty() ? "" : ", ") + std::string(ggml_type_name(type));
  return names +
         "; keys and values apart as q8_0/q4_0; without llama.cpp's rotation as q4_0+unrotated; f16 values without "
         "flash attention as q8_0/f16+no_flash";
}

double PeerCache::bits_per_element() const { return 0.5 * (bits(key) + bits(value)); }

Reference::Reference(const std::string& model_path, int context, int num_threads, const PeerCache& cache) {
  model_ = llama_model_load_from_file(model_path.c_str(), llama_model_default_params());
  if (model_ == nullptr) throw std::runtime_error("llama.cpp cannot load " + model_path);
  auto how = llama_context_default_params();
  how.n_ctx = how.n_batch = static_cast<unsigned>(context);
  how.n_ubatch = 512;
  how.n_threads = how.n_threads_batch = num_threads;
  how.flash_attn_type = cache.flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  how.type_k = cache.key;
  how.type_v = cache.value;
  how.cb_eval = look;
  how.cb_eval_user_data = &seen_;
  // The only switch there is; read while the context is made.
  if (cache.rotate) {
    unsetenv("LLAMA_ATTN_ROT_DISABLE");
  } else {
    setenv("LLAMA_ATTN_ROT_DISABLE", "1", 1);
  }
  context_ = llama_init_from_model(model_, how);
  if (context_ == nullptr) {
    llama_model_free(model_);
    throw std::runtime_error("llama.cpp cannot make a context of " + std::to_string(context) + " tokens with " +
                             ggml_type_name(cache.key) + " keys and " + ggml_type_name(cache.value) + " values");
  }
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
  seen_.complete = true;
  const auto width = static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model_)));
  return {all ? llama_get_logits(context_) : llama_get_logits_ith(context_, -1), width * (all ? tokens.size() : 1)};
}

void Reference::truncate(int position) { llama_memory_seq_rm(llama_get_memory(context_), 0, position, -1); }

long long Reference::cache_bytes() const {
  long long bytes = 0;
  for (auto* const buffer : seen_.buffers) bytes += static_cast<long long>(ggml_backend_buffer_get_size(buffer));
  return bytes;
}

// llama.cpp's interface tells neither of the two; its graph does. Every node is shown before it runs; false asks for no more.
bool Reference::look(ggml_tensor* node, bool, void* data) {
  auto& seen = *static_cast<Seen*>(data);
  if (seen.complete) return false;
  if (node->op == GGML_OP_SET_ROWS && node->view_src != nullptr) seen.buffers.insert(node->view_src->buffer);
  for (const ggml_tensor* const source : node->src) {
    if (source == nullptr) break;
    seen.rotates_keys |= std::strstr(source->name, "attn_inp_k_rot") != nullptr;
    seen.rotates_values |= std::strstr(source->name, "attn_inp_v_rot") != nullptr;
  }
  return false;
}

}  // namespace kvt_llm
