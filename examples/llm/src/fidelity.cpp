// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm fidelity: how far the model's predictions over a text are from those of the full cache, for several compositions
// and for llama.cpp with its own caches.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <sstream>
#include <stdexcept>

#include "command.hpp"
#include "engine.hpp"
#include "plot.hpp"
#include "prefill.hpp"
#include "reference.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

struct Options {
  Common common;
  std::string text, weights = "f32", plot;
  int tokens = 1024, skip = 128, continuation = 0;
  long long offset = 0;
  bool flush = false;
  std::vector<std::string> caches, peers;
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

struct Peer {
  std::string name;
  PeerCache cache;
};

// What one run over the text gave.
struct Result {
  std::string name;
  bool peer;
  Fidelity fidelity;
  double bits, rows_share;
  long long bytes;
  double seconds;
};

void print(FILE* out, const Result& r) {
  const auto& f = r.fidelity;
  std::fprintf(out, "%-44s %7.3f %5.1f%% %9.2e %9.2e %7.2f%% %+9.4f %9.3f %7.1f\n",
               ((r.peer ? "llama.cpp " : "") + r.name).c_str(), r.bits, 100 * r.rows_share, f.mean_kl(), f.kl_quantile(0.99),
               100 * f.same_top_share(), f.mean_nll_change(), static_cast<double>(r.bytes) / mebibyte, r.seconds);
  std::fflush(out);
}

json row(const Result& r) {
  const auto& f = r.fidelity;
  return {{"cache", r.name},
          {"peer", r.peer},
          {"bits_per_element", r.bits},
          {"rows_share", r.rows_share},
          {"mean_kl", f.mean_kl()},
          {"kl_99", f.kl_quantile(0.99)},
          {"same_top", f.same_top_share()},
          {"nll_change", f.mean_nll_change()},
          {"measured_bytes", r.bytes},
          {"seconds", r.seconds}};
}

int fidelity(const Options& o) {
  // Whatever can be refused is refused before minutes are spent: names, files, caches.
  if (o.caches.empty() && o.peers.empty()) throw std::runtime_error("fidelity needs a --cache or a --peer");
  std::vector<Candidate> candidates;
  for (const auto& text : o.caches) candidates.push_back(parse_candidate(text));
  std::vector<Peer> peers;
  for (const auto& name : o.peers) peers.push_back({name, PeerCache::parse(name)});
  std::optional<Plot> plot;
  if (!o.plot.empty()) plot.emplace(o.plot);
  const Tokenizer tokenizer(o.common.model_path());
  const auto tokens = tokens_of(tokenizer, o.text, o.offset, o.tokens + 1);
  const std::string path = o.weights == "f32" ? dequantised(o.common.model_path()) : o.common.model_path();
  const Model model(path);
  if (o.tokens > model.parameters().context) {
    throw std::runtime_error("--tokens " + std::to_string(o.tokens) + " is above the model's context of " +
                             std::to_string(model.parameters().context));
  }
  if (o.continuation >= o.tokens) {
    throw std::runtime_error("--continuation " + std::to_string(o.continuation) + " leaves no text before it, of " +
                             std::to_string(o.tokens) + " tokens");
  }
  const int before = o.tokens - o.continuation;  // tokens that are read before a cache is cut for good
  const int skip = o.continuation > 0 ? before : o.skip;
  if (skip >= o.tokens)
    throw std::runtime_error("--skip " + std::to_string(skip) + " leaves no token of " + std::to_string(o.tokens));
  Engine engine(model, o.common.threads);
  const auto geometry = model.parameters().geometry();
  const auto width = static_cast<std::size_t>(model.parameters().vocabulary);
  std::deque<CountingResource> memories;
  std::vector<std::unique_ptr<kvt::AnyCache>> caches;
  for (const auto& c : candidates) {
    caches.push_back(make_counted_cache(c.names, model, o.common.zones, memories.emplace_back()));
  }
  for (const auto& cache : caches) {
    if (wants_repetition(*cache) && o.continuation == 0) {
      throw std::runtime_error("a token selector lets the model repeat its context before the cut: give --continuation");
    }
  }
  std::vector<std::unique_ptr<Reference>> references;
  for (const auto& p : peers) references.push_back(std::make_unique<Reference>(path, o.tokens, o.common.threads, p.cache));

  const auto runs = static_cast<long long>(1 + candidates.size() + peers.size());
  Progress progress("fidelity", o.tokens * runs);
  // All runs take the same chunks; `use` gets the logits of the scored positions, numbered from 0.
  const auto over_text = [&](const auto& eval, const auto& use) {
    const auto step = [&](int at, int n) {
      const std::span<const float> logits =
          eval(std::span(tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at);
      for (int i = std::max(0, skip - at); i < n; ++i) {
        use(static_cast<std::size_t>(at + i - skip), logits.subspan(static_cast<std::size_t>(i) * width, width));
      }
      progress.advance(n);
    };
    in_chunks(before, o.common.chunk, o.common.zones.sink_rows, step);
    in_chunks(o.continuation, o.common.chunk, 0, [&](int at, int n) { step(before + at, n); });
  };
  std::vector<float> reference(static_cast<std::size_t>(o.tokens - skip) * width);
  {
    const auto full = make_cache({"uniform", "sink_recent", "fp32"}, geometry, o.common.zones);
    over_text([&](std::span<const int> part, int at) { return engine.eval(*full, part, at, Engine::Logits::all); },
              [&](std::size_t k, std::span<const float> logits) {
                std::copy(logits.begin(), logits.end(), reference.data() + k * width);
              });
  }
  const auto distance = [&](const auto& eval) {
    Fidelity f;
    over_text(eval, [&](std::size_t k, std::span<const float> logits) {
      const int next = tokens[k + static_cast<std::size_t>(skip) + 1];
      f.add(compare({reference.data() + k * width, width}, logits, next));
    });
    return f;
  };

  const auto cut = [&](kvt::AnyCache& cache, const Budget& budget) {
    const std::span<const int> context(tokens.data(), static_cast<std::size_t>(before));
    if (wants_repetition(cache)) repeat_context(engine, cache, tokenizer, context, o.common.chunk);
    budget.apply(cache);
  };
  FILE* const out = o.common.text();
  std::fprintf(out, "%-44s %7s %6s %9s %9s %8s %9s %9s %7s\n", "cache", "bits", "rows", "KL", "KL 99 %", "same top", "NLL +",
               "MiB", "s");
  json rows = json::array();
  std::vector<Plot::Point> points;
  const auto report = [&](const Result& r, const json& more) {
    print(out, r);
    rows.push_back(row(r));
    rows.back().update(more);
    points.push_back({r.name, r.bits * r.rows_share, r.fidelity.mean_kl(), r.peer});
  };
  for (std::size_t k = 0; k < candidates.size(); ++k) {
    auto& cache = *caches[k];
    const double start = seconds();
    auto f = distance([&](std::span<const int> part, int at) {
      const auto logits = engine.eval(cache, part, at, Engine::Logits::all);
      const int end = at + static_cast<int>(part.size());
      if (o.continuation > 0) {
        if (end == before) cut(cache, candidates[k].budget);
      } else if (!candidates[k].budget.hold(cache) && o.flush) {
        check(cache.flush());
      }
      return logits;
    });
    report({candidates[k].text, false, std::move(f), cache.bits_per_element(), (mean_rows(cache) - o.continuation) / before,
            measured_bytes(cache, memories[k]), seconds() - start},
           {{"memory", to_json(cache.memory())}});
  }
  for (std::size_t k = 0; k < peers.size(); ++k) {
    auto& theirs = *references[k];
    const double start = seconds();
    auto f = distance([&](std::span<const int> part, int at) { return theirs.eval(part, at, true); });
    if (!peers[k].cache.rotate && (theirs.rotates_keys() || theirs.rotates_values()))
      throw std::runtime_error("this version of llama.cpp does not let its rotation be switched off");
    report({peers[k].name, true, std::move(f), peers[k].cache.bits_per_element(), 1, theirs.cache_bytes(), seconds() - start},
           {{"rotated_keys", theirs.rotates_keys()}, {"rotated_values", theirs.rotates_values()}});
    references[k].reset();
  }
  o.common.write({{"text", o.text},
                  {"tokens", o.tokens},
                  {"skip", skip},
                  {"continuation", o.continuation},
                  {"chunk", o.common.chunk},
                  {"weights", o.weights},
                  {"results", rows}});
  if (plot) {
    plot->draw(std::filesystem::path(o.text).filename().string() + ", " + std::to_string(o.tokens - skip) +
                   " scored tokens, chunks of " + std::to_string(o.common.chunk),
               points);
  }
  return 0;
}

}  // namespace

void add_fidelity(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command = app.add_subcommand("fidelity", "distance of compositions from the full cache over a text");
  o->common.add(*command, 128);
  command->add_option("--text", o->text, "text file")->required();
  command->add_option("--cache", o->caches,
                      "CODEC, or ALLOCATOR,SELECTOR,CODEC,RETAIN; repeat for more. RETAIN is what may be kept, held after each "
                      "chunk: 0.25 of all rows so far, 200rows a KV head, or 3000000bytes. Join a policy's parameters by +: "
                      "snap_kv:window=32+kernel=7");
  command->add_option(
      "--peer", o->peers,
      "llama.cpp with a cache of its own, measured in the same way; repeat for more. It reads the rows of a chunk back as "
      "stored, where ours are dense until the chunk ends: both are on equal terms with --chunk 1 --sink 0 --recent 0 "
      "--flush. Known: " +
          PeerCache::known());
  command->add_option("--weights", o->weights, "f32 (dequantised once, cached) or file (as quantised)")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "file"}));
  command->add_option("--tokens", o->tokens, "length of the text")->capture_default_str()->check(CLI::PositiveNumber);
  command->add_option("--skip", o->skip, "first tokens not scored")->capture_default_str()->check(CLI::NonNegativeNumber);
  command
      ->add_option("--continuation", o->continuation,
                   "last tokens that alone are scored: caches are cut once, before them, instead of after each chunk")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--offset", o->offset, "byte of the file to begin at")->capture_default_str();
  command->add_flag("--flush", o->flush, "encode after every chunk instead of when a block is full");
  command->add_option("--plot", o->plot, "also draw KL against bits into this file, .svg or .png, with gnuplot");
  command->callback([o] { fidelity(*o); });
}

}  // namespace kvt_llm
