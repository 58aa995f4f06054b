// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What kvt-llm can do. Each command prints its results to stdout and its progress to stderr.
#pragma once

#include <cstdint>
#include <memory>
#include <memory_resource>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvtailor/any_cache.hpp"
#include "result.hpp"

namespace kvt::llm {

// The dense zones and blocks of a cache.
struct CacheShape {
  int sink = 4;
  int recent = 32;
  int block = 128;

  int protected_rows() const { return sink + recent; }
};

Result<std::unique_ptr<AnyCache>> compose(const Composition& composition, const Geometry& geometry,
                                          const CacheShape& shape, std::pmr::memory_resource* memory);

Result<std::string> read_text(const std::string& path);

// When a prompt is compressed.
enum class CompressWhen {
  prompt,    // once, after document and question
  chunk,     // after every prefill chunk
  document,  // once, before the question is seen
};

struct GenerateOptions {
  std::string model;
  std::string document;
  std::string question;
  Composition composition;
  std::optional<Retain> retain;
  CacheShape shape;
  int chunk = 256;
  CompressWhen when = CompressWhen::prompt;
  int decode_every = 0;  // compress again after so many decoded tokens; 0: never
  int threads = 1;
  std::uint64_t seed = 0;
  double temperature = 0;  // 0: greedy
  int max_tokens = 64;
  std::string plant;  // a sentence to insert into the document
  double depth = 0.5;
  bool compare = false;
  bool json = false;
};
Done generate(const GenerateOptions& options);

// "ALLOCATOR,SELECTOR,CODEC[,RETAIN[,option=value...]]"
struct FidelityCase {
  std::string name;
  Composition composition;
  double retain = 1;
  CacheShape shape;
  bool flush = false;
};
Result<FidelityCase> parse_case(const std::string& text, const CacheShape& shape, bool flush);

struct FidelityOptions {
  std::string model;
  std::string text;
  int tokens = 1024;
  int skip = 128;   // first tokens, not scored
  int offset = 0;   // tokens of the text to leave out
  int chunk = 128;  // the first one is `first_extra` tokens longer
  int first_extra = 4;
  bool f32_weights = true;
  std::vector<FidelityCase> cases;
  int threads = 1;
  std::string json;  // a file, "-" for stdout, or empty
};
Done measure_fidelity(const FidelityOptions& options);

struct BenchOptions {
  std::string model;
  int context = 1000;
  int decode = 64;
  int threads = 2;
  std::vector<std::string> codecs = {"fp16", "turbo4", "turbo3/turbo2"};
  bool json = false;
};
Done bench(const BenchOptions& options);

struct ParityOptions {
  std::string model;
  std::string text;
  int tokens = 1024;
  int chunk = 128;
  int threads = 1;
  double max_kl = -1;  // negative: no limit
};
struct ParityResult {
  int positions = 0;
  double mean_kl = 0;
  double max_difference = 0;
  double same_top = 0;
};
// The dense fp16 cache against llama.cpp's own, on F32 weights.
Result<ParityResult> measure_parity(const ParityOptions& options);
Done parity(const ParityOptions& options);

// The document with `sentence` put in at the paragraph border, or else the sentence border, nearest to `depth`.
std::string plant(const std::string& document, const std::string& sentence, double depth);

}  // namespace kvt::llm
