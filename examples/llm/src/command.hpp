// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What the commands of kvt-llm share: common options, budgets, texts, results.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "caches.hpp"
#include "measure.hpp"
#include "model.hpp"
#include "passages.hpp"
#include "tasks.hpp"
#include "tokenizer.hpp"

namespace kvt_llm {

inline constexpr double mebibyte = 1024.0 * 1024.0;

// Each adds a subcommand that runs while the command line is parsed. Failures are std::runtime_error with one sentence.
void add_generate(CLI::App& app);
void add_fidelity(CLI::App& app);
void add_parity(CLI::App& app);
void add_bench(CLI::App& app);
void add_sensitivity(CLI::App& app);
void add_retrieve(CLI::App& app);
void add_profile(CLI::App& app);
void add_train(CLI::App& app);
void add_report(CLI::App& app, int argc, char** argv);  // which the page repeats

struct Common {
  std::string model;
  EngineKind engine = EngineKind::ggml;
  int threads = 2, chunk = 256;
  kvt::CacheOptions zones;
  std::string json_path;

  void add(CLI::App& app, int default_chunk);
  void add_engine(CLI::App& app);  // --engine
  const std::string& model_path() const;
  void write(const nlohmann::json& facts) const;  // and which host kernels ran
  // Human text goes to standard error when JSON has standard output.
  FILE* text() const { return json_path == "-" ? stderr : stdout; }
};

// --tokens, --seed and --wording of questions about texts.
void add_question_options(CLI::App& app, Tasks::Options& options);

// --part, of the passages of texts.
void add_part_option(CLI::App& app, Part& part);

// What a cache may keep: everything, or a share of the rows, rows a KV head on average, or bytes.
class Budget {
 public:
  Budget() = default;
  explicit Budget(kvt::Retain retain) : retain_(retain) {}
  // "0.25", "200rows" or "3000000bytes".
  static Budget parse(const std::string& text);

  bool limits() const { return retain_.has_value(); }
  double bytes() const;  // throws unless it is one of bytes
  // Cuts the cache to the budget; without one, or if that is enough for it, everything is encoded.
  void apply(kvt::AnyCache& cache) const;
  // Cuts the cache if it is above the budget, a share being one of all tokens so far; false if it was not.
  bool hold(kvt::AnyCache& cache) const;
  // Throws unless so many rows of a text, once there, can be cut to it. Bytes are for the cache to judge.
  void check_room(int rows, const kvt::CacheOptions& zones) const;

 private:
  std::optional<kvt::Retain> retain_;
};

// The names in "ALLOCATOR,SELECTOR,CODEC" and the like. Parameters of a policy are joined by + there instead of a comma.
std::vector<std::string> split_names(const std::string& text);

// Makes a cache, told what its policies ask of the model, whose allocations `memory` counts.
std::unique_ptr<kvt::AnyCache> make_counted_cache(const kvt::Composition& names, const Model& model, kvt::CacheOptions options,
                                                  CountingResource& memory);
// What `memory` has given out and not got back, less the bytes of others; it must be what the cache says of itself.
long long measured_bytes(const kvt::AnyCache& cache, const CountingResource& memory, long long others = 0);

nlohmann::json to_json(const kvt::Memory& memory);
// Tells inputs apart: FNV-1a of characters or tokens, one after another.
template <class Items>
std::uint64_t fingerprint(const Items& items, std::uint64_t before = 0xcbf29ce484222325) {
  using Unsigned = std::make_unsigned_t<typename Items::value_type>;
  for (const auto item : items) before = (before ^ static_cast<Unsigned>(item)) * 0x100000001b3;
  return before;
}
std::string hex(std::uint64_t fingerprint);
// The whole file; an error if it is empty.
std::string read_file(const std::string& path);
// All tokens from the byte `offset` of a file, or of a part of it, on; an error if they are fewer than `least`.
std::vector<int> tokens_from(const Tokenizer& tokenizer, const std::string& path, long long offset, long long least,
                             Part part = Part::all);
// The first `count` of them.
std::vector<int> tokens_of(const Tokenizer& tokenizer, const std::string& path, long long offset, int count);

// Calls step(first, n) over a text; the first chunk is longer by `extra`.
template <class Step>
void in_chunks(int total, int chunk, int extra, const Step& step) {
  for (int at = 0; at < total;) {
    const int n = std::min(at == 0 ? chunk + extra : chunk, total - at);
    step(at, n);
    at += n;
  }
}

// Another size of chunks, for what rounding alone does.
inline int other_chunk(int chunk) { return chunk > 1 ? (chunk + 1) / 2 : 2; }

// CLI11's own checks let NaN pass, and name ranges of 300 digits.
CLI::Validator number_between(double low, double high);
CLI::Validator number_above(double low);

}  // namespace kvt_llm
