// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See command.hpp.
#include "command.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace kvt_llm {

using nlohmann::json;

void Common::add(CLI::App& app, int default_chunk) {
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

void Common::add_engine(CLI::App& app) {
  std::map<std::string, EngineKind> kinds;
  for (const auto kind : {EngineKind::ggml, EngineKind::llama_cpp}) kinds[name_of(kind)] = kind;
  app.add_option("--engine", engine, "ggml (our own, for the Llama family) or llama.cpp (default: ggml)")
      ->transform(CLI::CheckedTransformer(kinds).description(""));
}

void add_question_options(CLI::App& app, Tasks::Options& options) {
  app.add_option("--tokens", options.tokens, "length of a piece of text")
      ->capture_default_str()
      ->check(CLI::Range(50, 1 << 20));
  app.add_option("--seed", options.seed, "where pieces are, and what is hidden in them")->capture_default_str();
  app.add_option("--wording", options.wording, "in which numbers of keys are hidden and asked for")
      ->capture_default_str()
      ->check(CLI::IsMember(Tasks::wordings()));
}

void add_part_option(CLI::App& app, Part& part) {
  std::map<std::string, Part> parts;
  for (const auto each : {Part::all, Part::tuning, Part::evaluation}) parts[name_of(each)] = each;
  app.add_option("--part", part,
                 "all of a text, or the third of its passages for tuning, or the rest, for evaluation, as report has them "
                 "(default: all)")
      ->transform(CLI::CheckedTransformer(parts).description(""));
}

const std::string& Common::model_path() const {
  if (model.empty()) {
    throw std::runtime_error("no model is given: use --model FILE.gguf or set KVT_MODEL (tools/bootstrap installs one)");
  }
  if (!std::filesystem::is_regular_file(model)) {
    throw std::runtime_error("there is no file " + model + "; --model and KVT_MODEL take a GGUF file");
  }
  return model;
}

void Common::write(const json& facts) const {
  if (json_path.empty()) return;
  json result = facts;
  result["cpu"] = kernels();
  if (json_path == "-") {
    std::printf("%s\n", result.dump(2, ' ', false, json::error_handler_t::replace).c_str());
  } else if (!(std::ofstream(json_path) << result.dump(2, ' ', false, json::error_handler_t::replace) << '\n')) {
    throw std::runtime_error("cannot write " + json_path);
  }
}

Budget Budget::parse(const std::string& text) {
  char* end = nullptr;
  const double amount = std::strtod(text.c_str(), &end);
  const std::string unit = end;
  const bool number = end != text.c_str();
  if (number && unit.empty() && amount > 0 && amount <= 1) return Budget(kvt::Retain::ratio(amount));
  const bool whole = number && amount >= 1 && amount < 1e15 && amount == std::floor(amount);
  if (whole && unit == "rows") return Budget(kvt::Retain::rows(static_cast<long long>(amount)));
  if (whole && unit == "bytes") return Budget(kvt::Retain::bytes(static_cast<long long>(amount)));
  throw std::runtime_error("the retention \"" + text +
                           "\" must be a share above 0 and at most 1, or a whole number of rows or bytes: 0.25, 200rows, "
                           "3000000bytes");
}

double Budget::bytes() const {
  if (!limits() || retain_->unit != kvt::Retain::Unit::bytes)
    throw std::runtime_error("a budget in bytes is wanted, such as 3000000bytes");
  return retain_->amount;
}

void Budget::apply(kvt::AnyCache& cache) const {
  const bool enough =
      limits() && retain_->unit == kvt::Retain::Unit::bytes && static_cast<double>(cache.memory().total()) <= retain_->amount;
  check(limits() && !enough ? cache.compress(*retain_) : cache.flush());
}

bool Budget::hold(kvt::AnyCache& cache) const {
  if (!limits()) return false;
  if (retain_->unit == kvt::Retain::Unit::bytes) {
    if (static_cast<double>(cache.memory().total()) <= retain_->amount) return false;
    check(cache.compress(*retain_));
    return true;
  }
  const bool ratio = retain_->unit == kvt::Retain::Unit::ratio;
  const double target = std::floor(ratio ? retain_->amount * cache.end_position(0) : retain_->amount);
  if (mean_rows(cache) <= target) return false;
  // A share of a text that has only begun can be less than what is protected.
  const auto& zones = cache.options();
  if (ratio && target < zones.sink_rows + zones.recent_rows) return false;
  check(cache.compress(kvt::Retain::rows(static_cast<long long>(target))));
  return true;
}

void Budget::check_room(int rows, const kvt::CacheOptions& zones) const {
  if (!limits() || retain_->unit == kvt::Retain::Unit::bytes) return;
  const bool ratio = retain_->unit == kvt::Retain::Unit::ratio;
  const double target = std::floor(ratio ? retain_->amount * rows : retain_->amount);
  const int least = std::min(rows, zones.sink_rows + zones.recent_rows);
  if (target >= std::max(1, least) && target <= rows) return;
  std::ostringstream sentence;
  sentence << "the retention leaves " << target << " rows of " << rows << "; it must be between " << least
           << ", which --sink and --recent keep, and all";
  throw std::runtime_error(sentence.str());
}

std::vector<std::string> split_names(const std::string& text) {
  std::vector<std::string> names;
  std::stringstream stream(text);
  for (std::string name; std::getline(stream, name, ',');) {
    std::replace(name.begin(), name.end(), '+', ',');
    names.push_back(name);
  }
  return names;
}

std::unique_ptr<kvt::AnyCache> make_counted_cache(const kvt::Composition& names, const Model& model, kvt::CacheOptions options,
                                                  CountingResource& memory) {
  options.memory = &memory;
  return make_cache(names, model.parameters().layers, told_of(model, names, options));
}

long long measured_bytes(const kvt::AnyCache& cache, const CountingResource& memory, long long others) {
  const long long given = memory.outstanding() - others;
  if (given != cache.memory().total()) {
    throw std::runtime_error("the cache accounts for " + std::to_string(cache.memory().total()) +
                             " bytes; its memory resource gave " + std::to_string(given));
  }
  return given;
}

json to_json(const kvt::Memory& m) {
  return {{"payload", m.payload_bytes}, {"index", m.index_bytes}, {"evidence", m.evidence_bytes},
          {"slack", m.slack_bytes},     {"total", m.total()},     {"dense_fp16", m.dense_fp16_bytes}};
}

std::string hex(std::uint64_t fingerprint) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(fingerprint));
  return digits;
}

std::string read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::stringstream text;
  if (!stream) throw std::runtime_error("cannot read the text file " + path);
  // Inserting nothing counts as a failure of its own.
  if (!(text << stream.rdbuf())) throw std::runtime_error("the text file " + path + " is empty or cannot be read");
  return text.str();
}

std::vector<int> tokens_from(const Tokenizer& tokenizer, const std::string& path, long long offset, long long least,
                             Part part) {
  const std::string text = read_part(path, part);
  if (offset < 0 || offset >= static_cast<long long>(text.size())) {
    throw std::runtime_error("--offset " + std::to_string(offset) + " is outside the text of " + std::to_string(text.size()) +
                             " bytes");
  }
  auto tokens = tokenizer.encode(text.substr(static_cast<std::size_t>(offset)), false, false);
  if (static_cast<long long>(tokens.size()) < least) {
    throw std::runtime_error(path + " has " + std::to_string(tokens.size()) + " tokens from there on; " +
                             std::to_string(least) + " are needed");
  }
  return tokens;
}

std::vector<int> tokens_of(const Tokenizer& tokenizer, const std::string& path, long long offset, int count) {
  auto tokens = tokens_from(tokenizer, path, offset, count);
  tokens.resize(static_cast<std::size_t>(count));
  return tokens;
}

CLI::Validator number_between(double low, double high) {
  return {[=](const std::string& text) {
            char* end = nullptr;
            const double x = std::strtod(text.c_str(), &end);
            if (end != text.c_str() && *end == '\0' && x >= low && x <= high) return std::string();
            std::ostringstream sentence;
            sentence << text << " was given; it must be between " << low << " and " << high;
            return sentence.str();
          },
          ""};
}

CLI::Validator number_above(double low) {
  return {[=](const std::string& text) {
            char* end = nullptr;
            const double x = std::strtod(text.c_str(), &end);
            if (end != text.c_str() && *end == '\0' && x > low) return std::string();
            std::ostringstream sentence;
            sentence << text << " was given; it must be above " << low;
            return sentence.str();
          },
          ""};
}

}  // namespace kvt_llm
