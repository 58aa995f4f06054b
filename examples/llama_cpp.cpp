// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// llama.cpp with a tailored cache: it reads a text, the cache is cut after each part of it, and it goes on with the text.
//
//   llama_cpp MODEL.gguf TEXT [SHARE]     share of the rows to keep, 0.25 unless told; 0 for llama.cpp's own cache
#include "kvtailor/engine/llama_cpp.hpp"

#include <llama.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvtailor/host/region_resource.hpp"
#include "kvtailor/kvtailor.hpp"

namespace {

using Model = std::unique_ptr<llama_model, void (*)(llama_model*)>;

constexpr int part = 512, answer = 24;  // tokens

void check(const kvt::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

// Memory of this process that is in use, in MiB, as Linux counts it; the model's file is not among it.
long resident() {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("RssAnon:")) return std::strtol(line.c_str() + 8, nullptr, 10) / 1024;
  }
  return 0;
}

// Calls after_part() when some of the text is in the cache.
template <class AfterPart>
void read_and_go_on(llama_model* model, const llama_context_params& params, std::vector<llama_token> text,
                    const AfterPart& after_part) {
  const long before = resident();
  const std::unique_ptr<llama_context, void (*)(llama_context*)> context(llama_init_from_model(model, params), llama_free);
  if (!context) throw std::runtime_error("no context of so many tokens");
  const auto decode = [&](llama_token* tokens, int n) {
    const int failed = llama_decode(context.get(), llama_batch_get_one(tokens, n));
    after_part(failed);
  };
  const int total = static_cast<int>(text.size());
  for (int at = 0; at < total; at += part) decode(text.data() + at, std::min(part, total - at));
  std::printf("%d tokens read, %ld MiB more in use\n", total, resident() - before);
  const llama_vocab* const vocab = llama_model_get_vocab(model);
  for (int i = 0; i < answer; ++i) {
    const float* const logits = llama_get_logits_ith(context.get(), -1);
    auto token = static_cast<llama_token>(std::max_element(logits, logits + llama_vocab_n_tokens(vocab)) - logits);
    char piece[64];
    const int n = llama_token_to_piece(vocab, token, piece, sizeof piece, 0, false);
    std::fwrite(piece, 1, static_cast<std::size_t>(std::max(n, 0)), stdout);
    decode(&token, 1);
  }
  std::printf("\n");
}

// 4-bit codes; rows by how unlike the others their keys are, more of them for heads where these are many. Whatever composition
// you like goes here.
template <int head_dim>
void with_cache(llama_model* model, llama_context_params params, const kvt::Geometry& geometry, std::vector<llama_token> text,
                double share) {
  kvt::RegionResource memory;  // gives back to the system what cuts give back
  kvt::KvCache<kvt::Adaptive, kvt::KeyDiff, kvt::KvCodec<kvt::TurboQuant<4, head_dim>>> cache;
  check(cache.init(geometry, {.memory = &memory}));
  kvt::LlamaCppAttention attention(cache);
  check(attention.attach(params));
  int seen = 0;
  const auto cut = [&](int failed) {
    check(attention.finish());
    if (failed != 0) throw std::runtime_error("llama.cpp cannot decode");
    // A share of all tokens so far, not of what is left of them.
    const int now = cache.end_position(0), most = static_cast<int>(share * now);
    if (now - seen > 1 && most > 64) check(cache.compress(kvt::Retain::rows(most)));
    seen = now;
  };
  read_and_go_on(model, params, std::move(text), cut);
  const kvt::Memory takes = cache.memory();
  std::printf("the cache has %.1f MiB instead of %.1f\n", static_cast<double>(takes.total()) / (1 << 20),
              static_cast<double>(takes.dense_fp16_bytes) / (1 << 20));
}

void run(const std::string& path, const std::string& text_path, double share) {
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  const Model model(llama_model_load_from_file(path.c_str(), llama_model_default_params()), llama_model_free);
  if (!model) throw std::runtime_error("cannot load " + path);
  std::ifstream file(text_path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  std::vector<llama_token> tokens(text.size() + 8);
  const int n = llama_tokenize(llama_model_get_vocab(model.get()), text.data(), static_cast<int>(text.size()), tokens.data(),
                               static_cast<int>(tokens.size()), true, false);
  if (n < 1) throw std::runtime_error("no text in " + text_path);
  tokens.resize(static_cast<std::size_t>(std::min(n, llama_model_n_ctx_train(model.get()) - answer)));

  auto params = llama_context_default_params();
  params.n_ctx = static_cast<unsigned>(tokens.size()) + answer;
  params.n_batch = params.n_ubatch = part;
  params.n_threads = params.n_threads_batch = 2;
  if (share == 0) {
    return read_and_go_on(model.get(), params, std::move(tokens), [](int failed) {
      if (failed != 0) throw std::runtime_error("llama.cpp cannot decode");
    });
  }
  kvt::Geometry geometry;
  check(kvt::llama_geometry(model.get(), geometry));
  const auto with = [&]<int head_dim>() { with_cache<head_dim>(model.get(), params, geometry, std::move(tokens), share); };
  if (geometry.head_dim == 64) return with.operator()<64>();
  if (geometry.head_dim == 128) return with.operator()<128>();
  if (geometry.head_dim == 256) return with.operator()<256>();
  throw std::runtime_error("this example has caches for heads of 64, 128 and 256, and not of " +
                           std::to_string(geometry.head_dim));
}

}  // namespace

int main(int argc, char** argv) try {
  const double share = argc == 4 ? std::atof(argv[3]) : 0.25;
  if (argc < 3 || argc > 4 || !(share >= 0 && share <= 1)) {
    std::fprintf(stderr, "usage: llama_cpp MODEL.gguf TEXT [SHARE]\n");
    return 1;
  }
  run(argv[1], argv[2], share);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
