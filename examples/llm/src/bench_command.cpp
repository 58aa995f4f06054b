// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>

#include "commands.hpp"
#include "engine.hpp"
#include "llama_reference.hpp"
#include "model.hpp"
#include "progress.hpp"

namespace kvt::llm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int chunk = 256;
constexpr int rounds = 8;  // decoding changes hands so often, so that a noisy moment hits all alike

struct Runner {
  std::string name;
  std::function<Done(std::span<const int> tokens, int position, Logits which)> eval;
  std::vector<double> rates;  // tokens/s, one a round

  double median() const {
    std::vector<double> sorted = rates;
    std::sort(sorted.begin(), sorted.end());
    const std::size_t half = sorted.size() / 2;
    return sorted.size() % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  }
};

}  // namespace

Done bench(const BenchOptions& options) {
  if (options.context < 1) return failure("context is ", options.context, "; it must be at least 1");
  if (options.decode < rounds) return failure("decode is ", options.decode, "; it must be at least ", rounds);
  auto model = Model::load(options.model);
  if (!model) return model.error();
  const int total = options.context + options.decode;
  if (total > model->hyper().context_length) {
    return failure("context and decoded tokens are ", total, " together; the model's context is ",
                   model->hyper().context_length);
  }
  auto engine = Engine::create(*model, options.threads);
  if (!engine) return engine.error();
  auto reference = LlamaReference::load(options.model, total, chunk, options.threads);
  if (!reference) return reference.error();

  std::vector<float> logits;
  std::vector<std::unique_ptr<AnyCache>> caches;
  std::vector<Runner> runners;
  runners.push_back({"llama.cpp", [&](std::span<const int> tokens, int position, Logits which) {
                       return reference->eval(tokens, position, which, logits);
                     }, {}});
  for (const std::string& codec : options.codecs) {
    Composition composition;
    composition.codec = codec;
    auto cache = compose(composition, model->geometry(), CacheShape{}, nullptr);
    if (!cache) return cache.error();
    AnyCache* raw = cache->get();
    caches.push_back(std::move(*cache));
    runners.push_back({"kvtailor " + codec, [&, raw](std::span<const int> tokens, int position, Logits which) {
                         return (*engine)->eval(*raw, tokens, position, which, logits);
                       }, {}});
  }

  // What the tokens are does not change how long they take.
  std::vector<int> tokens(static_cast<std::size_t>(total));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<int>((i * 7919 + 101) % static_cast<std::size_t>(model->hyper().vocabulary));
  }
  const std::span<const int> all(tokens);
  Progress progress("bench", static_cast<long long>(total) * std::ssize(runners));
  for (const Runner& runner : runners) {
    for (int at = 0; at < options.context;) {
      const int n = std::min(chunk, options.context - at);
      KVT_LLM_TRY(runner.eval(all.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at, Logits::none));
      at += n;
      progress.advance(n);
    }
  }
  for (int round = 0; round < rounds; ++round) {
    const int begin = options.context + options.decode * round / rounds;
    const int end = options.context + options.decode * (round + 1) / rounds;
    for (Runner& runner : runners) {
      const auto start = Clock::now();
      for (int at = begin; at < end; ++at) {
        KVT_LLM_TRY(runner.eval(all.subspan(static_cast<std::size_t>(at), 1), at, Logits::last));
      }
      runner.rates.push_back((end - begin) / std::chrono::duration<double>(Clock::now() - start).count());
      progress.advance(end - begin);
    }
  }

  const double own = runners.front().median();
  if (options.json) {
    nlohmann::json report = {{"model", options.model}, {"context", options.context}, {"decode", options.decode},
                             {"threads", options.threads}, {"caches", nlohmann::json::array()}};
    for (const Runner& runner : runners) {
      report["caches"].push_back({{"name", runner.name}, {"decode_tokens_per_second", runner.median()},
                                  {"rounds", runner.rates}, {"ratio_to_llama_cpp", runner.median() / own}});
    }
    std::printf("%s\n", report.dump(2).c_str());
    return done();
  }
  std::printf("%-24s  %9s  %9s  %9s  %9s\n", "decode tokens/s", "median", "min", "max", "ratio");
  for (const Runner& runner : runners) {
    const auto [low, high] = std::minmax_element(runner.rates.begin(), runner.rates.end());
    std::printf("%-24s  %9.1f  %9.1f  %9.1f  %9.3f\n", runner.name.c_str(), runner.median(), *low, *high,
                runner.median() / own);
  }
  return done();
}

}  // namespace kvt::llm
