// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm: a real model on a tailored KV cache. generate answers a question about a document; fidelity measures what a
// composition loses; parity and bench compare with llama.cpp itself.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <stdexcept>

#include "caches.hpp"
#include "engine.hpp"
#include "measure.hpp"
#include "reference.hpp"
#include "tokenizer.hpp"

namespace {

using namespace kvt_llm;
using nlohmann::json;

constexpr double mebibyte = 1024.0 * 1024.0;

std::string read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::stringstream text;
  if (!stream || !(text << stream.rdbuf())) throw std::runtime_error("cannot read the text file " + path);
  return text.str();
}

// What several commands share.
struct Common {
  std::string model;
  int threads = 2, chunk = 256;
  kvt::CacheOptions zones;
  std::string json_path;

  void add(CLI::App& app, int default_chunk) {
    chunk = default_chunk;
    if (const char* const path = std::getenv("KVT_MODEL")) model = path;
    app.add_option("--model", model, "GGUF file (default: the environment's KVT_MODEL)");
    app.add_option("--threads", threads, "threads")->capture_default_str()->check(CLI::Range(1, 256));
    app.add_option("--chunk", chunk, "tokens of a prefill step")->capture_default_str()->check(CLI::Range(1, 4096));
    app.add_option("--sink", zones.sink_rows, "first rows kept dense")->capture_default_str();
    app.add_option("--recent", zones.recent_rows, "newest rows kept dense")->capture_default_str();
    app.add_option("--block", zones.block_rows, "rows encoded together")->capture_default_str();
    app.add_option("--json", json_path, "also write the result as JSON to this file (- for standard output)");
  }
  const std::string& model_path() const {
    if (model.empty()) {
      throw std::runtime_error("no model is given: use --model FILE.gguf or set KVT_MODEL (tools/bootstrap installs one)");
    }
    return model;
  }
  void write(const json& result) const {
    if (json_path.empty()) return;
    if (json_path == "-") {
      std::printf("%s\n", result.dump(2).c_str());
    } else if (!(std::ofstream(json_path) << result.dump(2) << '\n')) {
      throw std::runtime_error("cannot write " + json_path);
    }
  }
  // Human text goes to standard error when JSON has standard output.
  FILE* text() const { return json_path == "-" ? stderr : stdout; }
};

json to_json(const kvt::Memory& m) {
  return {{"payload", m.payload_bytes}, {"index", m.index_bytes}, {"evidence", m.evidence_bytes},
          {"slack", m.slack_bytes},     {"total", m.total()},     {"dense_fp16", m.dense_fp16_bytes}};
}

// -- generate -------------------------------------------------------------------------------------------------------------

struct GenerateOptions {
  Common common;
  std::string document, question, plant, when = "prompt";
  kvt::Composition names;
  double depth = 0.5, ratio = 1, temperature = 0;
  long long rows = 0, bytes = 0;
  int max_tokens = 64, decode_every = 0;
  unsigned seed = 1;
  bool compare = false;
};

// The budget of a run and when it is above.
class Budget {
 public:
  explicit Budget(const GenerateOptions& o) : o_(o) {}
  bool limits() const { return o_.rows > 0 || o_.bytes > 0 || o_.ratio != 1; }
  // Brings the cache down to the budget if it is above it. Ratios are of all tokens so far.
  void apply(kvt::AnyCache& cache, bool must) const {
    if (!limits()) return check(cache.flush());
    if (o_.bytes > 0) {
      if (must || cache.memory().total() > o_.bytes) check(cache.compress(kvt::Retain::bytes(o_.bytes)));
    } else if (o_.rows > 0) {
      if (must || mean_rows(cache) > static_cast<double>(o_.rows)) check(cache.compress(kvt::Retain::rows(o_.rows)));
    } else if (must) {
      check(cache.compress(kvt::Retain::ratio(o_.ratio)));
    } else {
      const double target = o_.ratio * cache.end_position(0);
      const auto protected_rows = o_.common.zones.sink_rows + o_.common.zones.recent_rows;
      if (target > protected_rows && mean_rows(cache) > target)
        check(cache.compress(kvt::Retain::rows(static_cast<long long>(target))));
    }
  }

 private:
  const GenerateOptions& o_;
};

struct Run {
  std::string answer;
  std::vector<int> tokens;
  std::unique_ptr<kvt::AnyCache> prefilled;  // as the answer began
  std::vector<float> first_logits;
  kvt::Memory memory;
  long long measured_bytes = 0, peak_bytes = 0;
  double bits = 0, mean_rows = 0, prefill_rate = 0, decode_rate = 0;
  int min_rows = 0, max_rows = 0;
};

// Puts `plant` at the end of the sentence nearest to `depth` of the text.
std::string planted(const std::string& text, const std::string& plant, double depth) {
  if (plant.empty()) return text;
  auto at = text.find(". ", static_cast<std::size_t>(depth * static_cast<double>(text.size())));
  if (at == std::string::npos) at = text.size();
  return text.substr(0, std::min(text.size(), at + 1)) + " " + plant + text.substr(std::min(text.size(), at + 1));
}

Run run_generate(const GenerateOptions& o, Engine& engine, const Tokenizer& tokenizer, const kvt::Composition& names,
                 bool tailored, const std::vector<int>& document, const std::vector<int>& rest, CountingResource& memory,
                 FILE* stream) {
  auto zones = o.common.zones;
  zones.memory = &memory;
  auto cache = make_cache(names, engine.model().parameters().geometry(), zones);
  const Budget budget(o);
  std::vector<int> prompt = document;
  prompt.insert(prompt.end(), rest.begin(), rest.end());
  Run run;
  const int total = static_cast<int>(prompt.size());
  const double start = seconds();
  {
    Progress progress(tailored ? "prefill (tailored cache)" : "prefill (full cache)", total);
    for (int at = 0; at < total;) {
      const int border = at < static_cast<int>(document.size()) ? static_cast<int>(document.size()) : total;
      const int n = std::min(o.common.chunk, border - at);
      const auto logits =
          engine.eval(*cache, std::span(prompt).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at,
                      Engine::Logits::last);
      run.first_logits.assign(logits.begin(), logits.end());
      run.peak_bytes = std::max(run.peak_bytes, memory.outstanding());
      at += n;
      if (tailored && o.when == "chunk") budget.apply(*cache, false);
      if (tailored && o.when == "document" && at == static_cast<int>(document.size())) budget.apply(*cache, true);
      progress.advance(n);
    }
  }
  if (tailored && o.when == "prompt") budget.apply(*cache, true);
  run.prefill_rate = total / (seconds() - start);
  run.memory = cache->memory();
  run.measured_bytes = memory.outstanding();
  run.bits = cache->bits_per_element();
  run.mean_rows = mean_rows(*cache);
  const auto& shape = cache->geometry();
  run.min_rows = total;
  for (int l = 0; l < shape.num_layers; ++l) {
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      run.min_rows = std::min(run.min_rows, cache->num_rows(l, h));
      run.max_rows = std::max(run.max_rows, cache->num_rows(l, h));
    }
  }
  check(cache->fork(run.prefilled));

  std::mt19937 random(o.seed);
  std::vector<float> logits = run.first_logits;
  const double decode_start = seconds();
  for (int i = 0; i < o.max_tokens; ++i) {
    int token;
    if (o.temperature <= 0) {
      token = static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    } else {
      const float top = *std::max_element(logits.begin(), logits.end());
      std::vector<double> weight(logits.size());
      for (std::size_t t = 0; t < logits.size(); ++t)
        weight[t] = std::exp(static_cast<double>(logits[t] - top) / o.temperature);
      token = std::discrete_distribution<int>(weight.begin(), weight.end())(random);
    }
    if (tokenizer.ends_generation(token)) break;
    run.tokens.push_back(token);
    run.answer += tokenizer.decode(token);
    if (stream != nullptr) {
      std::fputs(tokenizer.decode(token).c_str(), stream);
      std::fflush(stream);
    }
    const auto next = engine.eval(*cache, std::span(&token, 1), total + i, Engine::Logits::last);
    logits.assign(next.begin(), next.end());
    if (tailored && o.decode_every > 0 && (i + 1) % o.decode_every == 0) budget.apply(*cache, false);
  }
  run.decode_rate = static_cast<double>(run.tokens.size()) / std::max(1e-9, seconds() - decode_start);
  return run;
}

json report(FILE* out, const char* name, const Run& run) {
  const auto& m = run.memory;
  std::fprintf(out, "%s\n", name);
  std::fprintf(out,
               "  memory    %.2f MiB allocated (%.1f %% of dense fp16): payload %.2f, index %.2f, queries %.2f, slack %.2f\n",
               static_cast<double>(run.measured_bytes) / mebibyte,
               100.0 * static_cast<double>(run.measured_bytes) / static_cast<double>(m.dense_fp16_bytes),
               static_cast<double>(m.payload_bytes) / mebibyte, static_cast<double>(m.index_bytes) / mebibyte,
               static_cast<double>(m.evidence_bytes) / mebibyte, static_cast<double>(m.slack_bytes) / mebibyte);
  std::fprintf(out, "  rows      %.1f a KV head (%d to %d), %.2f bits an element, peak %.2f MiB while reading\n", run.mean_rows,
               run.min_rows, run.max_rows, run.bits, static_cast<double>(run.peak_bytes) / mebibyte);
  std::fprintf(out, "  speed     prefill %.0f tokens/s, decode %.1f tokens/s\n", run.prefill_rate, run.decode_rate);
  return {{"answer", run.answer},
          {"measured_bytes", run.measured_bytes},
          {"peak_bytes", run.peak_bytes},
          {"memory", to_json(m)},
          {"mean_rows", run.mean_rows},
          {"min_rows", run.min_rows},
          {"max_rows", run.max_rows},
          {"bits_per_element", run.bits},
          {"prefill_tokens_per_s", run.prefill_rate},
          {"decode_tokens_per_s", run.decode_rate}};
}

int generate(const GenerateOptions& o) {
  if ((o.rows > 0) + (o.bytes > 0) + (o.ratio != 1) > 1) {
    throw std::runtime_error("give one of --retain, --rows and --bytes");
  }
  if (!(o.ratio > 0 && o.ratio <= 1)) {
    throw std::runtime_error("--retain " + std::to_string(o.ratio) + " must be above 0 and at most 1");
  }
  if (!Budget(o).limits() && o.when != "prompt")
    throw std::runtime_error("--compress " + o.when + " needs --retain, --rows or --bytes");
  if (!Budget(o).limits() && o.decode_every > 0) throw std::runtime_error("--decode-every needs --retain, --rows or --bytes");
  const std::string text = planted(read_file(o.document), o.plant, o.depth);
  const Tokenizer tokenizer(o.common.model_path());
  const std::string marker = "\x01";
  // The template is applied to a marker, so that only its own text is read as special tokens: a document that holds the
  // end of a turn stays a document.
  const std::string prompt = tokenizer.chat(marker);
  const auto cut = prompt.find(marker);
  if (cut == std::string::npos)
    throw std::runtime_error("the chat template changes the message; the document cannot be put into it");
  const auto join = [](std::vector<int> head, const std::vector<int>& tail) {
    head.insert(head.end(), tail.begin(), tail.end());
    return head;
  };
  const auto document = join(tokenizer.encode(prompt.substr(0, cut), true, true), tokenizer.encode(text, false, false));
  const auto rest = join(tokenizer.encode("\n\n" + o.question, false, false),
                         tokenizer.encode(prompt.substr(cut + marker.size()), false, true));
  const Model model(o.common.model_path());
  const auto length = static_cast<int>(document.size() + rest.size()) + o.max_tokens;
  if (length > model.parameters().context) {
    throw std::runtime_error("the prompt and the answer take " + std::to_string(length) + " tokens; the model's context is " +
                             std::to_string(model.parameters().context));
  }
  Engine engine(model, o.common.threads);
  FILE* const out = o.common.text();
  std::fprintf(out, "document %zu tokens, question %zu tokens\n", document.size(), rest.size());
  json result{{"document_tokens", document.size()}, {"question_tokens", rest.size()}};

  CountingResource full_memory, memory;
  Run full;
  if (o.compare) {
    std::fprintf(out, "\nanswer with the full cache: ");
    full = run_generate(o, engine, tokenizer, {"uniform", "sink_recent", "fp16"}, false, document, rest, full_memory, out);
    std::fprintf(out, "\n");
  }
  std::fprintf(out, "\nanswer with %s, %s, %s: ", o.names.allocator.c_str(), o.names.selector.c_str(), o.names.codec.c_str());
  Run run = run_generate(o, engine, tokenizer, o.names, true, document, rest, memory, out);
  std::fprintf(out, "\n\n");
  if (o.compare) result["full"] = report(out, "full cache", full);
  result["tailored"] = report(out, "tailored cache", run);
  if (run.measured_bytes != run.memory.total()) {
    throw std::runtime_error("the cache accounts for " + std::to_string(run.memory.total()) +
                             " bytes; its memory resource gave " + std::to_string(run.measured_bytes));
  }
  if (o.compare) {
    // Both caches read the full cache's answer; how far are the distributions apart at each of its tokens?
    Fidelity fidelity;
    std::vector<float> a = full.first_logits, b = run.first_logits;
    // The first token's logits were computed before the cut; the tailored cache is asked again from the last prompt token on.
    const int total = static_cast<int>(document.size() + rest.size());
    check(run.prefilled->truncate(total - 1));
    auto again = engine.eval(*run.prefilled, std::span(&rest.back(), 1), total - 1, Engine::Logits::last);
    b.assign(again.begin(), again.end());
    for (std::size_t i = 0; i < full.tokens.size(); ++i) {
      fidelity.add(compare(a, b, full.tokens[i]));
      const int position = total + static_cast<int>(i);
      auto next = engine.eval(*full.prefilled, std::span(&full.tokens[i], 1), position, Engine::Logits::last);
      a.assign(next.begin(), next.end());
      next = engine.eval(*run.prefilled, std::span(&full.tokens[i], 1), position, Engine::Logits::last);
      b.assign(next.begin(), next.end());
    }
    std::fprintf(
        out, "distance from the full cache over its answer (%zu tokens): mean KL %.4f, largest %.4f, same top token %.1f %%\n",
        full.tokens.size(), fidelity.mean_kl(), fidelity.kl_quantile(1), 100 * fidelity.same_top_share());
    result["mean_kl"] = fidelity.mean_kl();
    result["same_top"] = fidelity.same_top_share();
  }
  o.common.write(result);
  return 0;
}

// -- fidelity -------------------------------------------------------------------------------------------------------------

struct FidelityOptions {
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
  double retain = 1;
};

// "allocator,selector,codec[,retain]"; parameters of a policy are joined by + instead of a comma here.
Candidate parse_candidate(const std::string& text) {
  std::vector<std::string> part;
  std::stringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) {
    std::replace(item.begin(), item.end(), '+', ',');
    part.push_back(item);
  }
  if (part.size() < 3 || part.size() > 4) {
    throw std::runtime_error("--cache " + text + " must be ALLOCATOR,SELECTOR,CODEC or ALLOCATOR,SELECTOR,CODEC,RETAIN");
  }
  Candidate c{text, {part[0], part[1], part[2]}, 1};
  if (part.size() == 4) {
    char* end = nullptr;
    c.retain = std::strtod(part[3].c_str(), &end);
    if (*end != '\0' || !(c.retain > 0 && c.retain <= 1)) {
      throw std::runtime_error("the retention " + part[3] + " must be above 0 and at most 1");
    }
  }
  return c;
}

std::vector<int> tokens_of(const Tokenizer& tokenizer, const std::string& path, long long offset, int count) {
  const std::string text = read_file(path);
  if (offset < 0 || offset >= static_cast<long long>(text.size())) {
    throw std::runtime_error("--offset " + std::to_string(offset) + " is outside the text of " + std::to_string(text.size()) +
                             " bytes");
  }
  auto tokens = tokenizer.encode(text.substr(static_cast<std::size_t>(offset)), false, false);
  if (static_cast<int>(tokens.size()) < count) {
    throw std::runtime_error(path + " has " + std::to_string(tokens.size()) + " tokens from there on; " +
                             std::to_string(count) + " are needed");
  }
  tokens.resize(static_cast<std::size_t>(count));
  return tokens;
}

// Calls step(first, n) over a text; the first chunk is longer by `extra`.
template <class Step>
void in_chunks(int total, int chunk, int extra, const Step& step) {
  for (int at = 0; at < total;) {
    const int n = std::min(at == 0 ? chunk + extra : chunk, total - at);
    step(at, n);
    at += n;
  }
}

int fidelity(const FidelityOptions& o) {
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
  std::vector<std::unique_ptr<kvt::AnyCache>> caches;  // all made first: a wrong name costs no minutes
  for (const auto& c : candidates) caches.push_back(make_cache(c.names, geometry, o.common.zones));
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
      const double target = candidate.retain * (at + n);
      if (candidate.retain < 1 && target > o.common.zones.sink_rows + o.common.zones.recent_rows && mean_rows(cache) > target) {
        check(cache.compress(kvt::Retain::rows(static_cast<long long>(target))));
      } else if (o.flush) {
        check(cache.flush());
      }
      progress.advance(n);
    });
    const double time = seconds() - start;
    const auto memory = cache.memory();
    const double share = mean_rows(cache) / o.tokens;
    std::fprintf(out, "%-44s %7.3f %5.1f%% %9.2e %9.2e %7.2f%% %+9.4f %9.3f %7.1f\n", candidate.text.c_str(),
                 cache.bits_per_element(), 100 * share, f.mean_kl(), f.kl_quantile(0.99), 100 * f.same_top_share(),
                 f.mean_nll_change(), static_cast<double>(memory.total()) / mebibyte, time);
    std::fflush(out);
    rows.push_back({{"cache", candidate.text},
                    {"bits_per_element", cache.bits_per_element()},
                    {"rows_share", share},
                    {"mean_kl", f.mean_kl()},
                    {"kl_99", f.kl_quantile(0.99)},
                    {"same_top", f.same_top_share()},
                    {"nll_change", f.mean_nll_change()},
                    {"memory", to_json(memory)},
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

// -- parity ---------------------------------------------------------------------------------------------------------------

struct ParityOptions {
  Common common;
  std::string text, weights = "f32";
  int tokens = 1024;
  long long offset = 0;
  double max_kl = 0, min_same_top = 0;
};

int parity(const ParityOptions& o) {
  const Tokenizer tokenizer(o.common.model_path());
  const auto tokens = tokens_of(tokenizer, o.text, o.offset, o.tokens);
  const std::string path = o.weights == "f32" ? dequantised(o.common.model_path()) : o.common.model_path();
  const Model model(path);
  Engine engine(model, o.common.threads);
  Reference reference(path, o.tokens + 8, o.common.threads);
  const auto width = static_cast<std::size_t>(model.parameters().vocabulary);
  const auto cache = make_cache({"uniform", "sink_recent", "fp16"}, model.parameters().geometry(), o.common.zones);
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

// -- bench ----------------------------------------------------------------------------------------------------------------

struct BenchOptions {
  Common common;
  std::string text;
  int context = 1000, decode = 32, rounds = 5;
  std::vector<std::string> codecs = {"fp16", "turbo4", "turbo3/turbo2"};
  double min_ratio = 0;
};

int bench(const BenchOptions& o) {
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

// libgomp reads OMP_WAIT_POLICY before main, so the program starts anew with it. Threads that spin while they wait take the
// cores from whatever else a shared machine runs.
void wait_passively(char** arguments) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  setenv("OMP_WAIT_POLICY", "passive", 1);
  execv("/proc/self/exe", arguments);  // returns only if it fails; threads spin then
}

}  // namespace

int main(int argc, char** argv) try {
  wait_passively(argv);
  init_engine();
  CLI::App app("A real model on a tailored KV cache.\n\n" + known_policies());
  app.require_subcommand(1);

  // CLI11's own check names a range of 300 digits.
  const CLI::Validator positive(
      [](const std::string& value) {
        return std::atof(value.c_str()) > 0 ? std::string() : value + " was given; it must be above 0";
      },
      "POSITIVE");
  GenerateOptions g;
  auto* const generate_command = app.add_subcommand("generate", "answer a question about a document");
  g.common.add(*generate_command, 256);
  generate_command->add_option("--document", g.document, "text file")->required();
  generate_command->add_option("--question", g.question, "what to ask")->required();
  generate_command->add_option("--allocator", g.names.allocator, "budget allocator")->capture_default_str();
  generate_command->add_option("--selector", g.names.selector, "token selector")->capture_default_str();
  generate_command->add_option("--codec", g.names.codec, "storage codec, or keys/values")->capture_default_str();
  generate_command->add_option("--retain", g.ratio, "share of all rows to keep, above 0 and at most 1");
  generate_command->add_option("--rows", g.rows, "rows a KV head to keep on average")->check(positive);
  generate_command->add_option("--bytes", g.bytes, "bytes the whole cache may take")->check(positive);
  generate_command->add_option("--compress", g.when, "when: after the prompt, each chunk, or the document (question unseen)")
      ->capture_default_str()
      ->check(CLI::IsMember({"prompt", "chunk", "document"}));
  generate_command->add_option("--decode-every", g.decode_every, "compress again every N decoded tokens (0: never)")
      ->check(CLI::NonNegativeNumber);
  generate_command->add_option("--seed", g.seed, "seed of sampling")->capture_default_str();
  generate_command->add_option("--temperature", g.temperature, "0 takes the most likely token")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  generate_command->add_option("--max-tokens", g.max_tokens, "longest answer")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  generate_command->add_option("--plant", g.plant, "a sentence to hide in the document");
  generate_command->add_option("--depth", g.depth, "where to hide it, 0 to 1")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0));
  generate_command->add_flag("--compare", g.compare, "run the full fp16 cache too and show both");

  FidelityOptions f;
  auto* const fidelity_command = app.add_subcommand("fidelity", "distance of compositions from the full cache over a text");
  f.common.add(*fidelity_command, 128);
  fidelity_command->add_option("--text", f.text, "text file")->required();
  fidelity_command
      ->add_option("--cache", f.caches,
                   "ALLOCATOR,SELECTOR,CODEC[,RETAIN]; repeat for more. RETAIN: after each chunk at most this share of all "
                   "rows so far is kept. Join a policy's parameters by +: snap_kv:window=32+kernel=7")
      ->required();
  fidelity_command->add_option("--weights", f.weights, "f32 (dequantised once, cached) or file (as quantised)")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "file"}));
  fidelity_command->add_option("--tokens", f.tokens, "length of the text")->capture_default_str()->check(CLI::PositiveNumber);
  fidelity_command->add_option("--skip", f.skip, "first tokens not scored")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  fidelity_command->add_option("--offset", f.offset, "byte of the file to begin at")->capture_default_str();
  fidelity_command->add_flag("--flush", f.flush, "encode after every chunk instead of when a block is full");

  ParityOptions p;
  auto* const parity_command = app.add_subcommand("parity", "dense fp16 cache against llama.cpp's own logits");
  p.common.add(*parity_command, 128);
  parity_command->add_option("--text", p.text, "text file")->required();
  parity_command->add_option("--weights", p.weights, "f32 or file")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "file"}));
  parity_command->add_option("--tokens", p.tokens, "length of the text")->capture_default_str()->check(CLI::PositiveNumber);
  parity_command->add_option("--offset", p.offset, "byte of the file to begin at")->capture_default_str();
  parity_command->add_option("--max-kl", p.max_kl, "fail above this mean KL");
  parity_command->add_option("--min-same-top", p.min_same_top, "fail below this share of same top tokens");

  BenchOptions b;
  auto* const bench_command = app.add_subcommand("bench", "decode speed against llama.cpp's own cache, interleaved");
  b.common.add(*bench_command, 256);
  bench_command->add_option("--text", b.text, "text file")->required();
  bench_command->add_option("--context", b.context, "tokens before decoding")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  bench_command->add_option("--decode", b.decode, "tokens a round")->capture_default_str()->check(CLI::PositiveNumber);
  bench_command->add_option("--rounds", b.rounds, "rounds")->capture_default_str()->check(CLI::PositiveNumber);
  bench_command->add_option("--codec", b.codecs, "codecs to compare")->capture_default_str();
  bench_command->add_option("--min-ratio", b.min_ratio,
                            "fail if the first codec decodes below this share of llama.cpp's speed");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help
    throw std::runtime_error(e.what());
  }
  if (*generate_command) return generate(g);
  if (*fidelity_command) return fidelity(f);
  if (*parity_command) return parity(p);
  return bench(b);
} catch (const std::exception& e) {
  std::fprintf(stderr, "kvt-llm: error: %s\n", e.what());
  return 1;
}
