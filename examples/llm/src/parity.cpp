// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm parity: the dense fp16 cache against llama.cpp's own logits.
#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "command.hpp"
#include "engine.hpp"
#include "reference.hpp"

namespace kvt_llm {

namespace {

struct Options {
  Common common;
  std::string text, weights = "f32";
  int tokens = 1024;
  long long offset = 0;
  double max_kl = 0, min_same_top = 0;
};

int parity(const Options& o) {
  const Tokenizer tokenizer(o.common.model_path());
  const auto tokens = tokens_of(tokenizer, o.text, o.offset, o.tokens);
  const std::string path = o.weights == "f32" ? dequantised(o.common.model_path()) : o.common.model_path();
  const Model model(path);
  Engine engine(model, o.common.threads);
  Reference reference(path, o.tokens + 8, o.common.threads);
  const auto width = static_cast<std::size_t>(model.parameters().vocabulary);
  const auto cache = make_cache({"uniform", "sink_recent", "fp16"}, model.parameters().layers, o.common.zones);
  Fidelity f;
  double largest = 0;
  Progress progress("parity with llama.cpp", o.tokens);
  in_chunks(o.tokens, o.common.chunk, 0, [&](int at, int n) {
    const auto part = std::span(tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n));
    const auto theirs = reference.eval(part, at, true);
    const auto ours = engine.eval(*cache, part, at, Engine::Logits::all);
    for (std::size_t i = 0; i < part.size(); ++i) {
      f.add(compare(theirs.subspan(i * width, width), ours.subspan(i * width, width)));
      for (std::size_t t = i * width; t < (i + 1) * width; ++t) {
        largest = std::max(largest, static_cast<double>(std::fabs(theirs[t] - ours[t])));
      }
    }
    progress.advance(n);
  });
  std::fprintf(o.common.text(),
               "dense fp16 cache against llama.cpp, %d tokens: mean KL %.2e, largest KL %.2e, largest logit difference %.2e, "
               "same top %.2f %%\n",
               o.tokens, f.mean_kl(), f.kl_quantile(1), largest, 100 * f.same_top_share());
  o.common.write({{"tokens", o.tokens},
                  {"mean_kl", f.mean_kl()},
                  {"max_kl", f.kl_quantile(1)},
                  {"max_difference", largest},
                  {"same_top", f.same_top_share()}});
  if (o.max_kl > 0 && !(f.mean_kl() <= o.max_kl)) throw std::runtime_error("the mean KL is above the bound");
  if (!(f.same_top_share() >= o.min_same_top)) throw std::runtime_error("the share of same top tokens is below the bound");
  return 0;
}

}  // namespace

void add_parity(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command = app.add_subcommand("parity", "dense fp16 cache against llama.cpp's own logits");
  o->common.add(*command, 128);
  command->add_option("--text", o->text, "text file")->required();
  command->add_option("--weights", o->weights, "f32 or file")->capture_default_str()->check(CLI::IsMember({"f32", "file"}));
  command->add_option("--tokens", o->tokens, "length of the text")->capture_default_str()->check(CLI::PositiveNumber);
  command->add_option("--offset", o->offset, "byte of the file to begin at")->capture_default_str();
  command->add_option("--max-kl", o->max_kl, "fail above this mean KL")->check(number_above(0));
  command->add_option("--min-same-top", o->min_same_top, "fail below this share of same top tokens")
      ->check(number_between(0, 1));
  command->callback([o] { parity(*o); });
}

}  // namespace kvt_llm
