// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>

#include "budget.hpp"
#include "commands.hpp"
#include "counting_resource.hpp"
#include "engine.hpp"
#include "fidelity.hpp"
#include "model.hpp"
#include "progress.hpp"
#include "tokenizer.hpp"

namespace kvt::llm {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double rate(int tokens, double seconds) { return seconds > 0 ? tokens / seconds : 0; }

class Sampler {
 public:
  Sampler(double temperature, std::uint64_t seed) : temperature_(temperature), random_(seed) {}

  int operator()(std::span<const float> logits) {
    if (temperature_ <= 0) return top_token(logits);
    const double top = *std::max_element(logits.begin(), logits.end());
    weights_.resize(logits.size());
    double sum = 0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      sum += std::exp((logits[i] - top) / temperature_);
      weights_[i] = sum;
    }
    // The high 53 bits: the same draw with every standard library.
    const double draw = static_cast<double>(random_() >> 11) * 0x1p-53 * sum;
    const auto it = std::upper_bound(weights_.begin(), weights_.end(), draw);
    return static_cast<int>(std::min(it - weights_.begin(), std::ssize(weights_) - 1));
  }

 private:
  double temperature_;
  std::mt19937_64 random_;
  std::vector<double> weights_;
};

// A cache with a prompt in it, what the model says next, and what came of it.
struct Sequence {
  std::unique_ptr<AnyCache> cache;
  Budget budget;
  int protected_rows = 0;
  std::vector<float> logits;
  std::vector<int> answer;
  std::string text;
  int prefilled = 0;
  double prefill_seconds = 0;
  int decoded = 0;
  double decode_seconds = 0;
};

struct Figures {
  Memory memory;
  long long allocated = 0;
  long long peak = 0;  // while the prompt was read
  RowCounts rows;
  double bits = 0;
};

class Generation {
 public:
  Generation(const GenerateOptions& options, Engine& engine, const Tokenizer& tokenizer, Tokenizer::Prompt prompt)
      : options_(options), engine_(engine), tokenizer_(tokenizer), prompt_(std::move(prompt)) {}

  int prompt_tokens() const { return static_cast<int>(prompt_.document.size() + prompt_.question.size()); }

  Done prefill(Sequence& sequence, CompressWhen when, const char* title) {
    Progress progress(title, prompt_tokens());
    const auto start = Clock::now();
    KVT_LLM_TRY(read(sequence, prompt_.document, when, progress));
    if (when == CompressWhen::document) KVT_LLM_TRY(sequence.budget.enforce(*sequence.cache, 0));
    KVT_LLM_TRY(read(sequence, prompt_.question, when, progress));
    if (when != CompressWhen::document) KVT_LLM_TRY(sequence.budget.enforce(*sequence.cache, 0));
    sequence.prefill_seconds = seconds_since(start);
    return done();
  }

  // One more token; compresses again when it is time.
  Done decode(Sequence& sequence, int token) {
    const auto start = Clock::now();
    KVT_LLM_TRY(engine_.eval(*sequence.cache, {&token, 1}, sequence.cache->end_position(0), Logits::last,
                             sequence.logits));
    ++sequence.decoded;
    if (options_.decode_every > 0 && sequence.decoded % options_.decode_every == 0) {
      KVT_LLM_TRY(sequence.budget.enforce(*sequence.cache, 0));
    }
    sequence.decode_seconds += seconds_since(start);
    return done();
  }

  // `before` sees every distribution and the token drawn from it, before that token is decoded.
  using Before = std::function<Done(std::span<const float> logits, int token)>;
  Done answer(Sequence& sequence, bool stream, const Before& before) {
    Sampler sample(options_.temperature, options_.seed);
    while (std::ssize(sequence.answer) < options_.max_tokens) {
      const int token = sample(sequence.logits);
      if (before) KVT_LLM_TRY(before(sequence.logits, token));
      if (tokenizer_.ends_answer(token)) break;
      sequence.answer.push_back(token);
      const std::string piece = tokenizer_.piece(token);
      sequence.text += piece;
      if (stream) {
        std::fwrite(piece.data(), 1, piece.size(), stdout);
        std::fflush(stdout);
      }
      if (std::ssize(sequence.answer) < options_.max_tokens) KVT_LLM_TRY(decode(sequence, token));
    }
    if (stream) std::fputs("\n", stdout);
    return done();
  }

 private:
  Done read(Sequence& sequence, std::span<const int> tokens, CompressWhen when, Progress& progress) {
    while (!tokens.empty()) {
      const auto chunk = tokens.first(std::min(tokens.size(), static_cast<std::size_t>(options_.chunk)));
      tokens = tokens.subspan(chunk.size());
      const bool last = sequence.prefilled + std::ssize(chunk) == prompt_tokens();
      KVT_LLM_TRY(engine_.eval(*sequence.cache, chunk, sequence.prefilled, last ? Logits::last : Logits::none,
                               sequence.logits));
      sequence.prefilled += static_cast<int>(chunk.size());
      if (when == CompressWhen::chunk) {
        KVT_LLM_TRY(sequence.budget.enforce(*sequence.cache, sequence.protected_rows));
      }
      progress.advance(std::ssize(chunk));
    }
    return done();
  }

  const GenerateOptions& options_;
  Engine& engine_;
  const Tokenizer& tokenizer_;
  Tokenizer::Prompt prompt_;
};

// What the cache says it holds must be what was allocated for it; `others` were allocated from the same resource.
Result<Figures> measure(const AnyCache& cache, const CountingResource& counted, long long others,
                        long long peak) {
  Figures figures{cache.memory(), counted.bytes() - others, peak, count_rows(cache), cache.bits_per_element()};
  if (figures.memory.total() != figures.allocated) {
    return failure("the cache says that it holds ", figures.memory.total(), " bytes, but ", figures.allocated,
                   " are allocated");
  }
  return figures;
}

std::string format(const char* pattern, auto... values) {
  char text[160];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

double mebibytes(long long bytes) { return static_cast<double>(bytes) / (1 << 20); }

double share(const Figures& figures) {
  const auto dense = static_cast<double>(figures.memory.dense_fp16_bytes);
  return dense > 0 ? static_cast<double>(figures.allocated) / dense : 0;
}

struct Row {
  const char* name;
  std::string text;
};

std::vector<Row> describe(const Sequence& sequence, const Figures& figures) {
  return {
      {"memory", format("%.2f MiB (%.1f %% of fp16)", mebibytes(figures.allocated), 100 * share(figures))},
      {"peak in prefill", format("%.2f MiB", mebibytes(figures.peak))},
      {"rows per head", format("%.1f (%d to %d)", figures.rows.mean, figures.rows.min, figures.rows.max)},
      {"bits per element", format("%.2f", figures.bits)},
      {"prefill tokens/s", format("%.1f", rate(sequence.prefilled, sequence.prefill_seconds))},
      {"decode tokens/s", format("%.1f", rate(sequence.decoded, sequence.decode_seconds))},
  };
}

nlohmann::json to_json(const Sequence& sequence, const Figures& figures) {
  return {
      {"answer", sequence.text},
      {"answer_tokens", sequence.answer.size()},
      {"memory_bytes", figures.allocated},
      {"peak_memory_bytes", figures.peak},
      {"dense_fp16_bytes", figures.memory.dense_fp16_bytes},
      {"memory_share", share(figures)},
      {"rows", {{"mean", figures.rows.mean}, {"min", figures.rows.min}, {"max", figures.rows.max}}},
      {"bits_per_element", figures.bits},
      {"prefill_tokens_per_second", rate(sequence.prefilled, sequence.prefill_seconds)},
      {"decode_tokens_per_second", rate(sequence.decoded, sequence.decode_seconds)},
  };
}

// Words of `text` in lines of at most `width` bytes.
std::vector<std::string> wrap(const std::string& text, std::size_t width) {
  std::vector<std::string> lines(1);
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t end = std::min(text.find_first_of(" \n", at), text.size());
    const std::string word = text.substr(at, end - at);
    if (!lines.back().empty() && lines.back().size() + 1 + word.size() > width) lines.emplace_back();
    if (!lines.back().empty() && !word.empty()) lines.back() += ' ';
    lines.back() += word;
    if (end < text.size() && text[end] == '\n' && !lines.back().empty()) lines.emplace_back();
    at = end + 1;
  }
  if (lines.size() > 1 && lines.back().empty()) lines.pop_back();
  return lines;
}

void print_side_by_side(const Sequence& tailored, const std::vector<Row>& left, const Sequence& full,
                        const std::vector<Row>& right) {
  constexpr int name_width = 18, width = 40;
  const auto line = [](const char* name, const std::string& a, const std::string& b) {
    std::printf("%-*s  %-*s  %s\n", name_width, name, width, a.c_str(), b.c_str());
  };
  line("", "tailored", "full cache");
  const auto a = wrap(tailored.text, width), b = wrap(full.text, width);
  for (std::size_t i = 0; i < std::max(a.size(), b.size()); ++i) {
    line(i == 0 ? "answer" : "", i < a.size() ? a[i] : "", i < b.size() ? b[i] : "");
  }
  for (std::size_t i = 0; i < left.size(); ++i) line(left[i].name, left[i].text, right[i].text);
}

Done check(const GenerateOptions& options) {
  if (options.chunk < 1) return failure("chunk is ", options.chunk, "; it must be at least 1");
  if (options.max_tokens < 1) return failure("max-tokens is ", options.max_tokens, "; it must be at least 1");
  if (options.decode_every < 0) return failure("decode-every is ", options.decode_every, "; it must not be negative");
  if (!(options.temperature >= 0 && options.temperature <= 100)) {
    return failure("temperature is ", options.temperature, "; it must be between 0 and 100");
  }
  if (!(options.depth >= 0 && options.depth <= 1)) {
    return failure("depth is ", options.depth, "; it must be between 0 and 1");
  }
  if (options.retain) {
    const double amount = options.retain->amount;
    switch (options.retain->unit) {
      case Retain::Unit::ratio:
        if (!(amount > 0 && amount <= 1)) {
          return failure("the budget is ", amount, " of all rows; it must be above 0 and at most 1");
        }
        break;
      case Retain::Unit::rows:
        if (!(amount >= 1)) return failure("the budget is ", amount, " rows; it must be at least 1");
        break;
      case Retain::Unit::bytes:
        if (!(amount >= 1)) return failure("the budget is ", amount, " bytes; it must be at least 1");
        break;
    }
  }
  return done();
}

}  // namespace

std::string plant(const std::string& document, const std::string& sentence, double depth) {
  const auto wanted = static_cast<std::size_t>(depth * static_cast<double>(document.size()));
  const auto distance = [&](std::size_t at) { return at > wanted ? at - wanted : wanted - at; };
  // Both ends are borders.
  std::size_t best = distance(0) < distance(document.size()) ? 0 : document.size();
  const auto consider = [&](std::string_view border) {
    for (std::size_t at = document.find(border); at != document.npos; at = document.find(border, at + 1)) {
      if (distance(at + border.size()) < distance(best)) best = at + border.size();
    }
  };
  consider("\n\n");
  if (distance(best) > document.size() / 20) {
    for (const char* end : {". ", ".\n", "! ", "? "}) consider(end);
  }
  const bool paragraph = best == 0 || best == document.size() || document[best - 1] == '\n';
  const std::string_view before = best == document.size() ? "\n\n" : "";
  return document.substr(0, best).append(before) + sentence + (paragraph ? "\n\n" : " ") + document.substr(best);
}

Done generate(const GenerateOptions& options) {
  KVT_LLM_TRY(check(options));
  auto document = read_text(options.document);
  if (!document) return document.error();
  auto model = Model::load(options.model);
  if (!model) return model.error();
  auto tokenizer = Tokenizer::load(options.model);
  if (!tokenizer) return tokenizer.error();

  CountingResource tailored_memory, full_memory;
  Sequence tailored;
  tailored.budget.retain = options.retain;
  tailored.protected_rows = options.shape.protected_rows();
  auto cache = compose(options.composition, model->geometry(), options.shape, &tailored_memory);
  if (!cache) return cache.error();
  tailored.cache = std::move(*cache);

  auto prompt = tokenizer->prompt(options.plant.empty() ? *document : plant(*document, options.plant, options.depth),
                                  options.question);
  if (!prompt) return prompt.error();
  const auto needed = prompt->document.size() + prompt->question.size() + static_cast<std::size_t>(options.max_tokens);
  if (needed > static_cast<std::size_t>(model->hyper().context_length)) {
    return failure("document (", prompt->document.size(), " tokens), question (", prompt->question.size(),
                   ") and answer (", options.max_tokens, ") need ", needed, " tokens; the model's context is ",
                   model->hyper().context_length);
  }
  auto engine = Engine::create(*model, options.threads);
  if (!engine) return engine.error();
  Generation generation(options, **engine, *tokenizer, std::move(*prompt));

  KVT_LLM_TRY(generation.prefill(tailored, options.when, "prefill"));
  const long long peak = tailored_memory.peak();
  // The tailored cache as it is after the prompt, to be led along the full cache's answer.
  Sequence led;
  if (options.compare) {
    KVT_LLM_TRY(from(tailored.cache->fork(led.cache)));
    led.budget = tailored.budget;
    led.logits = tailored.logits;
  }
  KVT_LLM_TRY(generation.answer(tailored, !options.json, {}));
  auto figures = measure(*tailored.cache, tailored_memory, led.cache ? led.cache->memory().total() : 0, peak);
  if (!figures) return figures.error();
  nlohmann::json report = to_json(tailored, *figures);
  report["model"] = options.model;
  report["prompt_tokens"] = generation.prompt_tokens();
  report["allocator"] = options.composition.allocator;
  report["selector"] = options.composition.selector;
  report["codec"] = options.composition.codec;

  if (!options.compare) {
    if (options.json) {
      std::printf("%s\n", report.dump(2).c_str());
    } else {
      std::fputs("\n", stdout);
      for (const Row& row : describe(tailored, *figures)) std::printf("%-18s  %s\n", row.name, row.text.c_str());
    }
    return done();
  }

  Sequence full;
  auto full_cache = compose(Composition{}, model->geometry(), options.shape, &full_memory);
  if (!full_cache) return full_cache.error();
  full.cache = std::move(*full_cache);
  KVT_LLM_TRY(generation.prefill(full, CompressWhen::prompt, "prefill of the full cache"));
  const long long full_peak = full_memory.peak();
  Fidelity fidelity;
  KVT_LLM_TRY(generation.answer(full, false, [&](std::span<const float> logits, int token) -> Done {
    fidelity.add(Expected(logits), led.logits, token);
    const bool last = tokenizer->ends_answer(token) || std::ssize(full.answer) + 1 == options.max_tokens;
    return last ? done() : generation.decode(led, token);
  }));
  auto full_figures = measure(*full.cache, full_memory, 0, full_peak);
  if (!full_figures) return full_figures.error();

  if (options.json) {
    report["full"] = to_json(full, *full_figures);
    report["mean_kl"] = fidelity.mean_kl();
    report["same_top"] = fidelity.same_top();
    std::printf("%s\n", report.dump(2).c_str());
    return done();
  }
  std::fputs("\n", stdout);
  print_side_by_side(tailored, describe(tailored, *figures), full, describe(full, *full_figures));
  std::printf("\nAlong the full cache's answer (%d tokens): mean KL %.3g nats, same top token %.1f %%\n",
              fidelity.positions(), fidelity.mean_kl(), 100 * fidelity.same_top());
  return done();
}

}  // namespace kvt::llm
