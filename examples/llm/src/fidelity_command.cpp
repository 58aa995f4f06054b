// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "budget.hpp"
#include "commands.hpp"
#include "dequantise.hpp"
#include "engine.hpp"
#include "fidelity.hpp"
#include "model.hpp"
#include "progress.hpp"
#include "tokenizer.hpp"

namespace kvt::llm {
namespace {

using Clock = std::chrono::steady_clock;

std::vector<std::string> split(const std::string& text, char border) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == border) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

template <class T>
bool read_number(const std::string& text, T& out) {
  const char* end = text.data() + text.size();
  const auto [stop, code] = std::from_chars(text.data(), end, out);
  return code == std::errc() && stop == end;
}

// One cache on its way through the text.
struct Contender {
  const FidelityCase* wanted = nullptr;
  std::unique_ptr<AnyCache> cache;
  Budget budget;
  Fidelity fidelity;
  double seconds = 0;
};

Done step(Contender& it, Engine& engine, std::span<const int> chunk, int position, std::vector<float>& logits) {
  const auto start = Clock::now();
  KVT_LLM_TRY(engine.eval(*it.cache, chunk, position, Logits::all, logits));
  // Compressing first leaves less to encode.
  KVT_LLM_TRY(it.budget.enforce(*it.cache, it.wanted->shape.protected_rows()));
  if (it.wanted->flush) KVT_LLM_TRY(from(it.cache->flush()));
  it.seconds += std::chrono::duration<double>(Clock::now() - start).count();
  return done();
}

Done check(const FidelityOptions& options) {
  if (options.tokens < 2) return failure("tokens is ", options.tokens, "; it must be at least 2");
  if (options.skip < 0 || options.skip >= options.tokens) {
    return failure("skip is ", options.skip, "; it must be between 0 and ", options.tokens - 1);
  }
  if (options.offset < 0) return failure("offset is ", options.offset, "; it must not be negative");
  if (options.chunk < 1) return failure("chunk is ", options.chunk, "; it must be at least 1");
  return done();
}

Done write(const std::string& path, const nlohmann::json& report) {
  const std::string text = report.dump(2) + "\n";
  if (path == "-") {
    std::fputs(text.c_str(), stdout);
    return done();
  }
  std::ofstream file(path);
  if (!(file << text) || !file.flush()) return failure("results cannot be written to \"", path, "\"");
  return done();
}

nlohmann::json to_json(const Contender& it) {
  return {
      {"cache", it.wanted->name},
      {"bits_per_element", it.cache->bits_per_element()},
      {"rows_kept", count_rows(*it.cache).mean / it.cache->end_position(0)},
      {"mean_kl", it.fidelity.mean_kl()},
      {"p99_kl", it.fidelity.percentile_kl(0.99)},
      {"same_top", it.fidelity.same_top()},
      {"nll_change", it.fidelity.nll_change()},
      {"memory_bytes", it.cache->memory().total()},
      {"dense_fp16_bytes", it.cache->memory().dense_fp16_bytes},
      {"seconds", it.seconds},
  };
}

void print_table(const std::vector<Contender>& contenders) {
  int width = 5;
  for (const Contender& it : contenders) width = std::max(width, static_cast<int>(it.wanted->name.size()));
  std::printf("%-*s  %6s  %6s  %9s  %9s  %8s  %9s  %8s  %7s\n", width, "cache", "bits", "rows %", "mean KL", "p99 KL",
              "top %", "NLL", "MiB", "s");
  for (const Contender& it : contenders) {
    std::printf("%-*s  %6.2f  %6.1f  %9.3g  %9.3g  %8.2f  %+9.2g  %8.2f  %7.1f\n", width, it.wanted->name.c_str(),
                it.cache->bits_per_element(), 100 * count_rows(*it.cache).mean / it.cache->end_position(0),
                it.fidelity.mean_kl(), it.fidelity.percentile_kl(0.99), 100 * it.fidelity.same_top(),
                it.fidelity.nll_change(), static_cast<double>(it.cache->memory().total()) / (1 << 20), it.seconds);
  }
}

}  // namespace

Result<FidelityCase> parse_case(const std::string& text, const CacheShape& shape, bool flush) {
  const auto wrong = [&](const auto&... why) {
    return failure("cache \"", text, "\": ", why..., "; the form is ALLOCATOR,SELECTOR,CODEC[,RETAIN[,option=value...]]");
  };
  FidelityCase it{text, {}, 1, shape, flush};
  std::vector<std::string> fields;
  for (const std::string& part : split(text, ',')) {
    // Parameters of a policy are separated by commas too: snap_kv:window=32,kernel=7.
    const bool parameter = part.find('=') != part.npos && part.find(':') == part.npos;
    if (parameter && !fields.empty() && fields.size() <= 3 && fields.back().find(':') != std::string::npos) {
      fields.back() += "," + part;
    } else {
      fields.push_back(part);
    }
  }
  if (fields.size() < 3) return wrong("it has ", fields.size(), " fields");
  it.composition = {fields[0], fields[1], fields[2]};
  if (fields.size() > 3 && (!read_number(fields[3], it.retain) || !(it.retain > 0 && it.retain <= 1))) {
    return wrong("RETAIN is ", fields[3], ", it must be a number above 0 and at most 1");
  }
  for (std::size_t i = 4; i < fields.size(); ++i) {
    const auto parts = split(fields[i], '=');
    const std::string value = parts.size() == 2 ? parts[1] : "";
    const bool known = (parts[0] == "recent" && read_number(value, it.shape.recent)) ||
                       (parts[0] == "block" && read_number(value, it.shape.block)) ||
                       (parts[0] == "flush" && (value == "on" || value == "off"));
    if (!known) return wrong("unknown option ", fields[i], ", known are recent=N, block=N and flush=on|off");
    if (parts[0] == "flush") it.flush = value == "on";
  }
  return it;
}

Done measure_fidelity(const FidelityOptions& options) {
  KVT_LLM_TRY(check(options));
  auto text = read_text(options.text);
  if (!text) return text.error();
  std::string path = options.model;
  if (options.f32_weights) {
    auto twin = dequantised(path, options.threads);
    if (!twin) return twin.error();
    path = *twin;
  }
  auto model = Model::load(path);
  if (!model) return model.error();
  auto tokenizer = Tokenizer::load(path);
  if (!tokenizer) return tokenizer.error();

  std::vector<int> tokens = tokenizer->tokenize(*text);
  if (std::ssize(tokens) < options.offset + options.tokens) {
    return failure("the text has ", tokens.size(), " tokens; offset ", options.offset, " and ", options.tokens,
                   " tokens need ", options.offset + options.tokens);
  }
  tokens = {tokens.begin() + options.offset, tokens.begin() + options.offset + options.tokens};

  const FidelityCase everything{"reference", {"uniform", "sink_recent", "fp32"}, 1, {}, false};
  Contender reference{&everything, nullptr, {}, {}, 0};
  std::vector<Contender> contenders(options.cases.size());
  for (std::size_t i = 0; i < contenders.size(); ++i) {
    contenders[i].wanted = &options.cases[i];
    if (options.cases[i].retain < 1) contenders[i].budget.retain = Retain::ratio(options.cases[i].retain);
  }
  const auto compose_for = [&](Contender& it) -> Done {
    auto cache = compose(it.wanted->composition, model->geometry(), it.wanted->shape, nullptr);
    if (!cache) return cache.error();
    it.cache = std::move(*cache);
    return done();
  };
  KVT_LLM_TRY(compose_for(reference));
  for (Contender& it : contenders) KVT_LLM_TRY(compose_for(it));
  auto engine = Engine::create(*model, options.threads);
  if (!engine) return engine.error();

  // All caches go through the text side by side, so that no logits are kept for longer than a step.
  const auto vocabulary = static_cast<std::size_t>(model->hyper().vocabulary);
  std::vector<float> expected_logits;
  std::vector<std::vector<float>> logits(contenders.size());
  Progress progress("fidelity", options.tokens * static_cast<long long>(contenders.size() + 1));
  for (int begin = 0; begin < options.tokens;) {
    const int wanted = options.chunk + (begin == 0 ? options.first_extra : 0);
    const int n = std::min(wanted, options.tokens - begin);
    const auto chunk = std::span<const int>(tokens).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(n));
    KVT_LLM_TRY(step(reference, **engine, chunk, begin, expected_logits));
    progress.advance(n);
    for (std::size_t c = 0; c < contenders.size(); ++c) {
      KVT_LLM_TRY(step(contenders[c], **engine, chunk, begin, logits[c]));
      progress.advance(n);
    }
    for (int i = std::max(0, options.skip - begin); i < n; ++i) {
      const auto at = static_cast<std::size_t>(i) * vocabulary;
      const Expected expected(std::span<const float>(expected_logits).subspan(at, vocabulary));
      const int next = begin + i + 1 < options.tokens ? tokens[static_cast<std::size_t>(begin + i + 1)] : -1;
      for (std::size_t c = 0; c < contenders.size(); ++c) {
        contenders[c].fidelity.add(expected, std::span<const float>(logits[c]).subspan(at, vocabulary), next);
      }
    }
    begin += n;
  }

  if (options.json != "-") print_table(contenders);
  if (options.json.empty()) return done();
  nlohmann::json report = {{"model", path},           {"text", options.text},   {"tokens", options.tokens},
                           {"skip", options.skip},    {"offset", options.offset}, {"chunk", options.chunk},
                           {"weights", options.f32_weights ? "f32" : "file"}, {"caches", nlohmann::json::array()}};
  for (const Contender& it : contenders) report["caches"].push_back(to_json(it));
  return write(options.json, report);
}

}  // namespace kvt::llm
