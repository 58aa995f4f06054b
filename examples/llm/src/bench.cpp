// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm bench: prefill and decode speed beside llama.cpp's own caches, taking turns.
#include <algorithm>
#include <cstdio>
#include <functional>
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
  int context = 1000, decode = 192, rounds = 5;
  std::vector<std::string> codecs = {"fp16", "turbo4", "turbo3/turbo2"}, peers = {"f16+no_flash", "f16"};
  double min_ratio = 0;
};

// One of those that take turns: a model and a cache that read tokens at positions first, first + 1, ...
struct Runner {
  std::string name;
  std::function<void(std::span<const int> tokens, int first)> eval;
  std::function<void()> encode;
  std::function<void(int position)> truncate;
  std::function<long long()> bytes;
  double prefill = 0;               // seconds
  std::vector<double> rounds = {};  // seconds a token, of each round
  std::vector<double> tokens = {};  // seconds of each token
};

double largest(const std::vector<double>& x) { return *std::max_element(x.begin(), x.end()); }

int bench(const Options& o) {
  const Tokenizer tokenizer(o.common.model_path());
  const auto text = tokens_of(tokenizer, o.text, 0, o.context + o.decode);
  const std::span<const int> tokens(text);
  const Model model(o.common.model_path());
  Engine engine(model, o.common.threads);
  std::vector<Runner> runners;
  for (const auto& peer : o.peers) {
    const auto reference =
        std::make_shared<Reference>(o.common.model_path(), o.context + o.decode + 8, o.common.threads, PeerCache::parse(peer));
    runners.push_back({.name = "llama.cpp " + peer,
                       .eval = [=](auto some, int first) { (void)reference->eval(some, first, false); },
                       .encode = [] {},
                       .truncate = [=](int position) { reference->truncate(position); },
                       .bytes = [=] { return reference->cache_bytes(); }});
  }
  for (const auto& codec : o.codecs) {
    const std::shared_ptr<kvt::AnyCache> cache =
        make_cache({"uniform", "sink_recent", codec}, model.parameters().layers, o.common.zones);
    runners.push_back(
        {.name = "kvtailor " + codec,
         .eval = [&, cache](auto some, int first) { (void)engine.eval(*cache, some, first, Engine::Logits::last); },
         .encode = [=] { check(cache->flush()); },
         .truncate = [=](int position) { check(cache->truncate(position)); },
         .bytes = [=] { return cache->memory().total(); }});
  }
  const auto timed = [&](const auto& f) {
    const double start = seconds();
    f();
    return seconds() - start;
  };
  const auto some = [&](int first, int n) {
    return tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
  };
  // They take turns chunk by chunk, and round by round, so that the machine's drift meets all alike.
  Progress progress("bench", static_cast<long long>(runners.size()) * (o.context + o.rounds * o.decode));
  in_chunks(o.context, o.common.chunk, 0, [&](int first, int n) {
    for (auto& r : runners) r.prefill += timed([&] { r.eval(some(first, n), first); });
    progress.advance(static_cast<long long>(runners.size()) * n);
  });
  for (auto& r : runners) r.prefill += timed(r.encode);
  // Every round decodes the same tokens from the same state.
  for (int round = 0; round < o.rounds; ++round) {
    for (auto& r : runners) {
      double total = 0;
      for (int i = 0; i < o.decode; ++i) {
        r.tokens.push_back(timed([&] { r.eval(some(o.context + i, 1), o.context + i); }));
        total += r.tokens.back();
      }
      r.rounds.push_back(total / o.decode);
      if (round + 1 < o.rounds) r.truncate(o.context);
      progress.advance(o.decode);
    }
  }
  // Ratios are to the peer that is fastest at each of the two.
  const auto peers = std::span(runners).first(o.peers.size());
  const auto& prefills = *std::min_element(peers.begin(), peers.end(), [](auto& a, auto& b) { return a.prefill < b.prefill; });
  const auto& decodes =
      *std::min_element(peers.begin(), peers.end(), [](auto& a, auto& b) { return median(a.rounds) < median(b.rounds); });
  json rows = json::array();
  std::fprintf(o.common.text(),
               "%d tokens in chunks of %d, then %d rounds of %d tokens; %d threads. Ratios are to the fastest of llama.cpp.\n"
               "%-30s %20s %36s %22s %8s\n",
               o.context, o.common.chunk, o.rounds, o.decode, o.common.threads, "", "prefill: s (ratio)",
               "decode: tokens/s (range), ratio", "ms: median, worst", "MiB");
  double first_ratio = 0;
  for (auto& r : runners) {
    std::vector<double> ratio;
    for (std::size_t i = 0; i < r.rounds.size(); ++i) ratio.push_back(decodes.rounds[i] / r.rounds[i]);
    const auto [low, high] = std::minmax_element(r.rounds.begin(), r.rounds.end());
    const double rate = 1 / median(r.rounds), middle = 1e3 * median(r.tokens), worst = 1e3 * largest(r.tokens);
    std::fprintf(o.common.text(), "%-30s %10.2f (%.3f) %12.1f (%.1f to %.1f), %.3f %14.2f, %.2f %10.2f\n", r.name.c_str(),
                 r.prefill, r.prefill / prefills.prefill, rate, 1 / *high, 1 / *low, median(ratio), middle, worst,
                 static_cast<double>(r.bytes()) / mebibyte);
    rows.push_back({{"name", r.name},
                    {"prefill_s", r.prefill},
                    {"prefill_ratio", r.prefill / prefills.prefill},
                    {"tokens_per_s", rate},
                    {"min", 1 / *high},
                    {"max", 1 / *low},
                    {"ratio", median(ratio)},
                    {"median_token_ms", middle},
                    {"worst_token_ms", worst},
                    {"bytes", r.bytes()}});
    if (&r == &runners[o.peers.size()]) first_ratio = median(ratio);
  }
  o.common.write({{"context", o.context},
                  {"chunk", o.common.chunk},
                  {"decode", o.decode},
                  {"rounds", o.rounds},
                  {"threads", o.common.threads},
                  {"results", rows}});
  if (!(first_ratio >= o.min_ratio)) throw std::runtime_error("the first codec's ratio is below the bound");
  return 0;
}

}  // namespace

void add_bench(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command = app.add_subcommand("bench", "prefill and decode speed beside llama.cpp's own caches, taking turns");
  o->common.add(*command, 512);
  command->add_option("--text", o->text, "text file")->required();
  command->add_option("--context", o->context, "tokens before decoding")->capture_default_str()->check(CLI::PositiveNumber);
  command
      ->add_option("--decode", o->decode, "tokens a round; a block and the recent rows, for the worst token to be among them")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--rounds", o->rounds, "rounds")->capture_default_str()->check(CLI::PositiveNumber);
  command->add_option("--codec", o->codecs, "codecs to compare")->capture_default_str();
  command->add_option("--peer", o->peers, "llama.cpp's caches: " + PeerCache::known())->capture_default_str();
  command->add_option("--min-ratio", o->min_ratio, "fail if the first codec decodes below this share of llama.cpp's speed")
      ->check(number_above(0));
  command->callback([o] { bench(*o); });
}

}  // namespace kvt_llm
