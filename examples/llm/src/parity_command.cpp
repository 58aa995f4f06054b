// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "commands.hpp"
#include "dequantise.hpp"
#include "engine.hpp"
#include "fidelity.hpp"
#include "llama_reference.hpp"
#include "progress.hpp"
#include "tokenizer.hpp"

namespace kvt::llm {

Result<ParityResult> measure_parity(const ParityOptions& options) {
  if (options.tokens < 1) return failure("tokens is ", options.tokens, "; it must be at least 1");
  if (options.chunk < 1) return failure("chunk is ", options.chunk, "; it must be at least 1");
  auto text = read_text(options.text);
  if (!text) return text.error();
  auto path = dequantised(options.model, options.threads);
  if (!path) return path.error();
  auto model = Model::load(*path);
  if (!model) return model.error();
  auto tokenizer = Tokenizer::load(*path);
  if (!tokenizer) return tokenizer.error();
  std::vector<int> tokens = tokenizer->tokenize(*text);
  if (std::ssize(tokens) < options.tokens) {
    return failure("the text has ", tokens.size(), " tokens; ", options.tokens, " were asked for");
  }
  tokens.resize(static_cast<std::size_t>(options.tokens));

  auto cache = compose(Composition{}, model->geometry(), CacheShape{}, nullptr);
  if (!cache) return cache.error();
  auto engine = Engine::create(*model, options.threads);
  if (!engine) return engine.error();
  auto reference = LlamaReference::load(*path, options.tokens, options.chunk, options.threads);
  if (!reference) return reference.error();

  const auto vocabulary = static_cast<std::size_t>(model->hyper().vocabulary);
  std::vector<float> expected, logits;
  Fidelity fidelity;
  Progress progress("parity", options.tokens);
  for (std::size_t begin = 0; begin < tokens.size();) {
    const std::size_t n = std::min(static_cast<std::size_t>(options.chunk), tokens.size() - begin);
    const auto chunk = std::span<const int>(tokens).subspan(begin, n);
    const int position = static_cast<int>(begin);
    KVT_LLM_TRY(reference->eval(chunk, position, Logits::all, expected));
    KVT_LLM_TRY((*engine)->eval(**cache, chunk, position, Logits::all, logits));
    if (expected.size() != logits.size()) {
      return failure("llama.cpp gave ", expected.size(), " logits and the engine ", logits.size());
    }
    for (std::size_t i = 0; i < n; ++i) {
      fidelity.add(Expected(std::span<const float>(expected).subspan(i * vocabulary, vocabulary)),
                   std::span<const float>(logits).subspan(i * vocabulary, vocabulary), -1);
    }
    begin += n;
    progress.advance(static_cast<long long>(n));
  }
  return ParityResult{fidelity.positions(), fidelity.mean_kl(), fidelity.max_difference(), fidelity.same_top()};
}

Done parity(const ParityOptions& options) {
  auto result = measure_parity(options);
  if (!result) return result.error();
  std::printf("positions             %d\nmean KL               %.3g nats\nmax logit difference  %.3g\nsame top token        %.3f %%\n",
              result->positions, result->mean_kl, result->max_difference, 100 * result->same_top);
  if (options.max_kl >= 0 && !(result->mean_kl <= options.max_kl)) {
    return failure("the mean KL divergence is ", result->mean_kl, "; at most ", options.max_kl, " is accepted");
  }
  return done();
}

}  // namespace kvt::llm
