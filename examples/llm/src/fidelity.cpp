// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm fidelity: how far the model's predictions over a text are from those of the full cache, for several compositions.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <sstream>
#include <stdexcept>

#include "command.hpp"
#include "engine.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

struct Options {
  Common common;
  std::string text, weights = "f32";
  int tokens = 1024, skip = 128;
  long long offset = 0;
  bool flush = false;
  std::vector<std::string> caches;
};

struct Candidate {
  std::string text;
  kvt::Composition names;
  Budget budget;
};

// Parameters of a policy are joined by + instead of a comma here.
Candidate parse_candidate(const std::string& text) {
  std::vector<std::string> part;
  std::stringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) {
    std::replace(item.begin(), item.end(), '+', ',');
    part.push_back(item);
  }
  if (part.size() == 1) return {text, {"uniform", "sink_recent", part[0]}, {}};
  if (part.size() == 4) return {text, {part[0], part[1], part[2]}, Budget::parse(part[3])};
  throw std::runtime_error("--cache " + text + " must be CODEC or ALLOCATOR,SELECTOR,CODEC,RETAIN");
}

int fidelity(const Options& o) {
  std::vector<Candidate> candidates;
  for (const auto& text : o.caches) candidates.push_back(parse_candidate(text));
  const Tokenizer tokenizer(o.common.model_path());
  const auto tokens = tokens_of(tokenizer, o.text, o.offset, o.tokens + 1);
  const Model model(o.weights == "f32" ? dequantised(o.common.model_path()) : o.common.model_path());
  if (o.tokens > model.parameters().context) {
    throw std::runtime_error("--tokens " + std::to_string(o.tokens) + " is above the model's context of " +
                             std::to_string(model.parameters().context));
  }
  if (o.skip >= o.tokens)
    throw std::runtime_error("--skip " + std::to_string(o.skip) + " leaves no token of " + std::to_string(o.tokens));
  Engine engine(model, o.common.threads);
  const auto geometry = model.parameters().geometry();
  const auto width = static_cast<std::size_t>(model.parameters().vocabulary);
  const auto scored = static_cast<std::size_t>(o.tokens - o.skip);
  std::deque<CountingResource> memories;
  std::vector<std::unique_ptr<kvt::AnyCache>> caches;  // all made first: a wrong name costs no minutes
  for (const auto& c : candidates) {
    caches.push_back(make_counted_cache(c.names, geometry, o.common.zones, memories.emplace_back()));
  }
  std::vector<float> reference(scored * width);
  Progress progress("fidelity", static_cast<long long>(o.tokens) * (1 + static_cast<long long>(candidates.size())));
  {
    const auto full = make_cache({"uniform", "sink_recent", "fp32"}, geometry, o.common.zones);
    in_chunks(o.tokens, o.common.chunk, o.common.zones.sink_rows, [&](int at, int n) {
      const auto logits = engine.eval(
          *full, std::span(tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at, Engine::Logits::all);
      for (int i = std::max(0, o.skip - at); i < n; ++i) {
        std::copy_n(logits.data() + static_cast<std::size_t>(i) * width, width,
                    reference.data() + static_cast<std::size_t>(at + i - o.skip) * width);
      }
      progress.advance(n);
    });
  }
  FILE* const out = o.common.text();
  std::fprintf(out, "%-44s %7s %6s %9s %9s %8s %9s %9s %7s\n", "cache", "bits", "rows", "KL", "KL 99 %", "same top", "NLL +",
               "MiB", "s");
  json rows = json::array();
  for (std::size_t k = 0; k < candidates.size(); ++k) {
    auto& cache = *caches[k];
    const auto& candidate = candidates[k];
    Fidelity f;
    const double start = seconds();
    in_chunks(o.tokens, o.common.chunk, o.common.zones.sink_rows, [&](int at, int n) {
      const auto logits = engine.eval(
          cache, std::span(tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at, Engine::Logits::all);
      for (int i = std::max(0, o.skip - at); i < n; ++i) {
        f.add(compare({reference.data() + static_cast<std::size_t>(at + i - o.skip) * width, width},
                      logits.subspan(static_cast<std::size_t>(i) * width, width),
                      tokens[static_cast<std::size_t>(at + i + 1)]));
      }
      if (!candidate.budget.hold(cache) && o.flush) check(cache.flush());
      progress.advance(n);
    });
    const double time = seconds() - start;
    const auto bytes = measured_bytes(cache, memories[k]);
    const double share = mean_rows(cache) / o.tokens;
    std::fprintf(out, "%-44s %7.3f %5.1f%% %9.2e %9.2e %7.2f%% %+9.4f %9.3f %7.1f\n", candidate.text.c_str(),
                 cache.bits_per_element(), 100 * share, f.mean_kl(), f.kl_quantile(0.99), 100 * f.same_top_share(),
                 f.mean_nll_change(), static_cast<double>(bytes) / mebibyte, time);
    std::fflush(out);
    rows.push_back({{"cache", candidate.text},
                    {"bits_per_element", cache.bits_per_element()},
                    {"rows_share", share},
                    {"mean_kl", f.mean_kl()},
                    {"kl_99", f.kl_quantile(0.99)},
                    {"same_top", f.same_top_share()},
                    {"nll_change", f.mean_nll_change()},
                    {"measured_bytes", bytes},
                    {"memory", to_json(cache.memory())},
                    {"seconds", time}});
  }
  o.common.write({{"text", o.text},
                  {"tokens", o.tokens},
                  {"skip", o.skip},
                  {"chunk", o.common.chunk},
                  {"weights", o.weights},
                  {"results", rows}});
  return 0;
}

}  // namespace

void add_fidelity(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command = app.add_subcommand("fidelity", "distance of compositions from the full cache over a text");
  o->common.add(*command, 128);
  command->add_option("--text", o->text, "text file")->required();
  command
      ->add_option("--cache", o->caches,
                   "CODEC, or ALLOCATOR,SELECTOR,CODEC,RETAIN; repeat for more. RETAIN is what may be kept, held after each "
                   "chunk: 0.25 of all rows so far, 200rows a KV head, or 3000000bytes. Join a policy's parameters by +: "
                   "snap_kv:window=32+kernel=7")
      ->required();
  command->add_option("--weights", o->weights, "f32 (dequantised once, cached) or file (as quantised)")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "file"}));
  command->add_option("--tokens", o->tokens, "length of the text")->capture_default_str()->check(CLI::PositiveNumber);
  command->add_option("--skip", o->skip, "first tokens not scored")->capture_default_str()->check(CLI::NonNegativeNumber);
  command->add_option("--offset", o->offset, "byte of the file to begin at")->capture_default_str();
  command->add_flag("--flush", o->flush, "encode after every chunk instead of when a block is full");
  command->callback([o] { fidelity(*o); });
}

}  // namespace kvt_llm
