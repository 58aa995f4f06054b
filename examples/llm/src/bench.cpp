// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm bench: decode speed against llama.cpp's own cache, interleaved.
#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "command.hpp"
#include "engine.hpp"
#include "reference.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

struct Options {
  Common common;
  std::string text;
  int context = 1000, decode = 32, rounds = 5;
  std::vector<std::string> codecs = {"fp16", "turbo4", "turbo3/turbo2"};
  double min_ratio = 0;
};

int bench(const Options& o) {
  const Tokenizer tokenizer(o.common.model_path());
  const auto tokens = tokens_of(tokenizer, o.text, 0, o.context + o.decode);
  const Model model(o.common.model_path());
  Engine engine(model, o.common.threads);
  Reference reference(o.common.model_path(), o.context + o.decode + 8, o.common.threads);
  const auto prompt = std::span(tokens).first(static_cast<std::size_t>(o.context));
  in_chunks(o.context, o.common.chunk, 0, [&](int at, int n) {
    (void)reference.eval(prompt.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at, false);
  });
  std::vector<std::unique_ptr<kvt::AnyCache>> caches;
  for (const auto& codec : o.codecs) {
    caches.push_back(make_cache({"uniform", "sink_recent", codec}, model.parameters().geometry(), o.common.zones));
    in_chunks(o.context, o.common.chunk, 0, [&](int at, int n) {
      (void)engine.eval(*caches.back(), prompt.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at,
                        Engine::Logits::last);
    });
    check(caches.back()->flush());
  }
  // A, B, C, A, B, C, ...: the machine's drift meets all alike. Every run decodes the same tokens from the same state.
  std::vector<std::vector<double>> rates(caches.size() + 1);
  for (int round = 0; round < o.rounds; ++round) {
    for (std::size_t k = 0; k <= caches.size(); ++k) {
      const double start = seconds();
      for (int i = 0; i < o.decode; ++i) {
        const auto token = std::span(tokens).subspan(static_cast<std::size_t>(o.context + i), 1);
        if (k == 0) {
          (void)reference.eval(token, o.context + i, false);
        } else {
          (void)engine.eval(*caches[k - 1], token, o.context + i, Engine::Logits::last);
        }
      }
      rates[k].push_back(o.decode / (seconds() - start));
      if (k == 0) {
        reference.truncate(o.context);
      } else {
        check(caches[k - 1]->truncate(o.context));
      }
    }
  }
  json rows = json::array();
  std::fprintf(o.common.text(), "decode at %d tokens of context, %d threads, %d rounds of %d tokens\n", o.context,
               o.common.threads, o.rounds, o.decode);
  double dense_ratio = 0;
  for (std::size_t k = 0; k < rates.size(); ++k) {
    std::vector<double> ratio;
    for (std::size_t r = 0; r < rates[k].size(); ++r) ratio.push_back(rates[k][r] / rates[0][r]);
    const auto [low, high] = std::minmax_element(rates[k].begin(), rates[k].end());
    const std::string name = k == 0 ? "llama.cpp, its own cache" : "kvtailor " + o.codecs[k - 1];
    std::fprintf(o.common.text(), "  %-28s median %.1f tokens/s (%.1f to %.1f), %.3f of llama.cpp\n", name.c_str(),
                 median(rates[k]), *low, *high, median(ratio));
    rows.push_back(
        {{"name", name}, {"tokens_per_s", median(rates[k])}, {"min", *low}, {"max", *high}, {"ratio", median(ratio)}});
    if (k == 1) dense_ratio = median(ratio);
  }
  o.common.write({{"context", o.context}, {"threads", o.common.threads}, {"results", rows}});
  if (!(dense_ratio >= o.min_ratio)) throw std::runtime_error("the first codec's ratio is below the bound");
  return 0;
}

}  // namespace

void add_bench(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command = app.add_subcommand("bench", "decode speed against llama.cpp's own cache, interleaved");
  o->common.add(*command, 256);
  command->add_option("--text", o->text, "text file")->required();
  command->add_option("--context", o->context, "tokens before decoding")->capture_default_str()->check(CLI::PositiveNumber);
  command->add_option("--decode", o->decode, "tokens a round")->capture_default_str()->check(CLI::PositiveNumber);
  command->add_option("--rounds", o->rounds, "rounds")->capture_default_str()->check(CLI::PositiveNumber);
  command->add_option("--codec", o->codecs, "codecs to compare")->capture_default_str();
  command->add_option("--min-ratio", o->min_ratio, "fail if the first codec decodes below this share of llama.cpp's speed")
      ->check(number_above(0));
  command->callback([o] { bench(*o); });
}

}  // namespace kvt_llm
