// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm generate: answers a question about a document from a tailored cache, and from the full one beside it.
#include <algorithm>
#include <cstdio>
#include <random>
#include <stdexcept>

#include "command.hpp"
#include "engine.hpp"
#include "prefill.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

struct Options {
  Common common;
  std::string document, question, plant, when = "prompt";
  std::optional<std::string> allocator, selector;
  std::string codec = "fp16";
  std::optional<double> depth, ratio;
  std::optional<long long> rows, bytes;
  std::optional<unsigned> seed;
  double temperature = 0;
  Budget budget;
  int max_tokens = 64, decode_every = 0;
  bool compare = false;

  kvt::Composition names() const {
    kvt::Composition names;
    if (allocator) names.allocator = *allocator;
    if (selector) names.selector = *selector;
    names.codec = codec;
    return names;
  }
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

std::string planted(const std::string& text, const std::string& plant, double depth) {
  if (plant.empty()) return text;
  auto at = text.find(". ", static_cast<std::size_t>(depth * static_cast<double>(text.size())));
  if (at == std::string::npos) at = text.size();
  return text.substr(0, std::min(text.size(), at + 1)) + " " + plant + text.substr(std::min(text.size(), at + 1));
}

Run run_generate(const Options& o, Engine& engine, const Tokenizer& tokenizer, const kvt::Composition& names, bool tailored,
                 const std::vector<int>& document, const std::vector<int>& rest, CountingResource& memory, FILE* stream) {
  const auto cache = make_counted_cache(names, engine.model(), o.common.zones, memory);
  std::vector<int> prompt = document;
  prompt.insert(prompt.end(), rest.begin(), rest.end());
  Run run;
  const int total = static_cast<int>(prompt.size());
  if (tailored && o.when == "chunk" && wants_repetition(*cache)) {
    throw std::runtime_error(
        "the token selector lets the model repeat its context before the cut, which --compress chunk "
        "makes too early");
  }
  const auto cut = [&](int length) {
    const std::span<const int> context(prompt.data(), static_cast<std::size_t>(length));
    if (o.budget.limits() && wants_repetition(*cache)) repeat_context(engine, *cache, tokenizer, context, o.common.chunk);
    o.budget.apply(*cache);
  };
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
      at += n;
      if (tailored && o.when == "chunk") (void)o.budget.hold(*cache);
      if (tailored && o.when == "document" && at == static_cast<int>(document.size())) cut(at);
      progress.advance(n);
    }
  }
  if (tailored && o.when == "prompt") cut(total);
  run.prefill_rate = total / (seconds() - start);
  run.memory = cache->memory();
  run.measured_bytes = measured_bytes(*cache, memory);
  run.peak_bytes = memory.peak();
  run.bits = cache->bits_per_element();
  run.mean_rows = mean_rows(*cache);
  run.min_rows = total;
  for (int l = 0; l < cache->geometry().num_layers; ++l) {
    for (int h = 0; h < cache->layer_shape(l).num_kv_heads; ++h) {
      run.min_rows = std::min(run.min_rows, cache->num_rows(l, h));
      run.max_rows = std::max(run.max_rows, cache->num_rows(l, h));
    }
  }
  check(cache->fork(run.prefilled));

  std::mt19937 random(o.seed.value_or(1));
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
    if (tailored && o.decode_every > 0 && (i + 1) % o.decode_every == 0) (void)o.budget.hold(*cache);
  }
  run.decode_rate = static_cast<double>(run.tokens.size()) / std::max(1e-9, seconds() - decode_start);
  return run;
}

json report(FILE* out, const char* name, const Run& run) {
  const auto& m = run.memory;
  std::fprintf(out, "%s\n", name);
  const auto share = [&](long long bytes) {
    return 100.0 * static_cast<double>(bytes) / static_cast<double>(m.dense_fp16_bytes);
  };
  std::fprintf(out,
               "  memory    %.2f MiB allocated (%.1f %% of dense fp16): payload %.2f, index %.2f, queries %.2f, slack %.2f\n",
               static_cast<double>(run.measured_bytes) / mebibyte, share(run.measured_bytes),
               static_cast<double>(m.payload_bytes) / mebibyte, static_cast<double>(m.index_bytes) / mebibyte,
               static_cast<double>(m.evidence_bytes) / mebibyte, static_cast<double>(m.slack_bytes) / mebibyte);
  std::fprintf(out, "  peak      %.2f MiB while reading (%.1f %% of dense fp16)\n",
               static_cast<double>(run.peak_bytes) / mebibyte, share(run.peak_bytes));
  std::fprintf(out, "  rows      %.1f a KV head (%d to %d), %.2f bits an element\n", run.mean_rows, run.min_rows, run.max_rows,
               run.bits);
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

void check_options(Options& o) {
  if (o.ratio.has_value() + o.rows.has_value() + o.bytes.has_value() > 1) {
    throw std::runtime_error("give one of --retain, --rows and --bytes");
  }
  if (o.ratio) o.budget = Budget(kvt::Retain::ratio(*o.ratio));
  if (o.rows) o.budget = Budget(kvt::Retain::rows(*o.rows));
  if (o.bytes) o.budget = Budget(kvt::Retain::bytes(*o.bytes));
  if (!o.budget.limits()) {
    const char* idle = nullptr;
    if (o.allocator) idle = "--allocator";
    if (o.selector) idle = "--selector";
    if (o.when != "prompt") idle = "--compress";
    if (o.decode_every > 0) idle = "--decode-every";
    if (idle != nullptr) throw std::runtime_error(std::string(idle) + " needs --retain, --rows or --bytes");
  }
  if (o.seed && o.temperature == 0) throw std::runtime_error("--seed needs a --temperature above 0");
  if (o.depth && o.plant.empty()) throw std::runtime_error("--depth needs --plant");
  if (o.question.empty()) throw std::runtime_error("--question is empty");
}

int generate(const Options& o) {
  const std::string text = planted(read_file(o.document), o.plant, o.depth.value_or(0.5));
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
  const Model model(o.common.model_path(), o.common.engine);
  const auto length = static_cast<int>(document.size() + rest.size()) + o.max_tokens;
  if (length > model.parameters().context) {
    throw std::runtime_error("the prompt and the answer take " + std::to_string(length) + " tokens; the model's context is " +
                             std::to_string(model.parameters().context));
  }
  Engine engine(model, o.common.threads);
  FILE* const out = o.common.text();
  std::fprintf(out, "document %zu tokens, question %zu tokens\n", document.size(), rest.size());
  json result{{"document_tokens", document.size()}, {"question_tokens", rest.size()}};

  const kvt::Composition names = o.names();
  CountingResource full_memory, memory;
  Run full;
  if (o.compare) {
    std::fprintf(out, "\nanswer with the full cache: ");
    full = run_generate(o, engine, tokenizer, {"uniform", "sink_recent", "fp16"}, false, document, rest, full_memory, out);
    std::fprintf(out, "\n");
  }
  std::fprintf(out, "\nanswer with %s, %s, %s: ", names.allocator.c_str(), names.selector.c_str(), names.codec.c_str());
  Run run = run_generate(o, engine, tokenizer, names, true, document, rest, memory, out);
  std::fprintf(out, "\n\n");
  if (o.compare) result["full"] = report(out, "full cache", full);
  result["tailored"] = report(out, "tailored cache", run);
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

}  // namespace

void add_generate(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command = app.add_subcommand("generate", "answer a question about a document");
  o->common.add(*command, 256);
  o->common.add_engine(*command);
  command->add_option("--document", o->document, "text file")->required();
  command->add_option("--question", o->question, "what to ask")->required();
  command->add_option("--allocator", o->allocator, "budget allocator (default: uniform)");
  command->add_option("--selector", o->selector, "token selector (default: sink_recent)");
  command->add_option("--codec", o->codec, "storage codec, or keys/values")->capture_default_str();
  command->add_option("--retain", o->ratio, "share of all rows to keep, above 0 and at most 1")
      ->check(number_above(0))
      ->check(number_between(0, 1));
  command->add_option("--rows", o->rows, "rows a KV head to keep on average")->check(number_above(0));
  command->add_option("--bytes", o->bytes, "bytes the whole cache may take")->check(number_above(0));
  command->add_option("--compress", o->when, "when: after the prompt, each chunk, or the document (question unseen)")
      ->capture_default_str()
      ->check(CLI::IsMember({"prompt", "chunk", "document"}));
  command->add_option("--decode-every", o->decode_every, "compress again every N decoded tokens (0: never)")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--temperature", o->temperature, "0 takes the most likely token")
      ->capture_default_str()
      ->check(number_between(0, 100));
  command->add_option("--seed", o->seed, "seed of sampling (default: 1)");
  command->add_option("--max-tokens", o->max_tokens, "longest answer")->capture_default_str()->check(CLI::PositiveNumber);
  command->add_option("--plant", o->plant, "a sentence to hide in the document");
  command->add_option("--depth", o->depth, "where to hide it, 0 to 1 (default: 0.5)")->check(number_between(0, 1));
  command->add_flag("--compare", o->compare, "run the full fp16 cache too and show both");
  command->callback([o] {
    check_options(*o);
    generate(*o);
  });
}

}  // namespace kvt_llm
