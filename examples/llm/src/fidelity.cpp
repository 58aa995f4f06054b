// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm fidelity: how far the model's predictions over a text are from those of the full cache, for several compositions
// and for llama.cpp with its own caches.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "command.hpp"
#include "engine.hpp"
#include "hindsight.hpp"
#include "plot.hpp"
#include "prefill.hpp"
#include "reference.hpp"
#include "shared_prefill.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

struct Options {
  Common common;
  std::string text, weights = "f32", plot;
  int pieces = 1, tokens = 1024, skip = 128, continuation = 0;
  long long offset = 0;
  Part part = Part::all;
  bool flush = false;
  std::vector<std::string> caches, peers;
};

struct Candidate {
  std::string text;
  kvt::Composition names;
  Budget budget;
  bool oracle = false;
};

Candidate parse_candidate(const std::string& text, int rows) {
  const auto part = split_names(text);
  if (part.size() == 2 && part[0].starts_with(bytes_prefix)) {
    const Budget budget = Budget::parse(part[1]);
    return {text, for_budget(bytes_composition(part[0]), budget.bytes(), rows), budget};
  }
  if (part.size() == 1) return {text, {"uniform", "sink_recent", part[0]}, {}};
  if (part.size() == 4) {
    Candidate candidate{text, {part[0], part[1], part[2]}, Budget::parse(part[3])};
    candidate.oracle = take_oracle(candidate.names);
    return candidate;
  }
  throw std::runtime_error("--cache " + text + " must be CODEC, ALLOCATOR,SELECTOR,CODEC,RETAIN or bytes:FILE,BYTES");
}

struct Peer {
  std::string name;
  PeerCache cache;
  std::unique_ptr<Reference> program;
};

// What a cache gave over a piece of the text.
struct Outcome {
  Fidelity fidelity;
  double bits, rows_share;
  long long bytes;
  double seconds;
  json more;
};

// A cache of ours or of llama.cpp, and what it gave over each piece so far.
class Row {
 public:
  Row(std::string name, bool peer) : name_(std::move(name)), peer_(peer) {}

  void add(Outcome outcome) { of_piece_.push_back(std::move(outcome)); }
  std::size_t pieces() const { return of_piece_.size(); }
  void print(FILE* out) const;
  json to_json() const;
  Plot::Point point() const;

 private:
  Fidelity fidelity() const;  // of all tokens
  std::vector<double> kl() const;
  double mean(double Outcome::*field) const;
  double seconds() const;
  const Outcome& largest() const;

  std::string name_;
  bool peer_;
  std::vector<Outcome> of_piece_;
};

Fidelity Row::fidelity() const {
  Fidelity all;
  for (const auto& piece : of_piece_) all.add(piece.fidelity);
  return all;
}

std::vector<double> Row::kl() const {
  std::vector<double> means;
  for (const auto& piece : of_piece_) means.push_back(piece.fidelity.mean_kl());
  return means;
}

double Row::mean(double Outcome::*field) const {
  std::vector<double> values;
  for (const auto& piece : of_piece_) values.push_back(piece.*field);
  return Mean::of(values).value;
}

double Row::seconds() const { return mean(&Outcome::seconds) * static_cast<double>(pieces()); }

// Memory is told of the piece that took the most.
const Outcome& Row::largest() const {
  return *std::max_element(of_piece_.begin(), of_piece_.end(),
                           [](const Outcome& a, const Outcome& b) { return a.bytes < b.bytes; });
}

// The spread of the pieces has a column if there are several.
void print_header(FILE* out, bool spread) {
  std::fprintf(out, "%-44s %7s %6s %9s", "cache", "bits", "rows", "KL");
  if (spread) std::fprintf(out, " %8s", "+-");
  std::fprintf(out, " %9s %8s %9s %9s %7s\n", "KL 99 %", "same top", "NLL +", "MiB", "s");
}

void Row::print(FILE* out) const {
  const auto f = fidelity();
  std::fprintf(out, "%-44s %7.3f %5.1f%% %9.2e", ((peer_ ? "llama.cpp " : "") + name_).c_str(), mean(&Outcome::bits),
               100 * mean(&Outcome::rows_share), f.mean_kl());
  if (pieces() > 1) std::fprintf(out, " %8.1e", Mean::of(kl()).error);
  std::fprintf(out, " %9.2e %7.2f%% %+9.4f %9.3f %7.1f\n", f.kl_quantile(0.99), 100 * f.same_top_share(), f.mean_nll_change(),
               static_cast<double>(largest().bytes) / mebibyte, seconds());
  std::fflush(out);
}

json Row::to_json() const {
  const auto f = fidelity();
  json row = {{"cache", name_},
              {"peer", peer_},
              {"bits_per_element", mean(&Outcome::bits)},
              {"rows_share", mean(&Outcome::rows_share)},
              {"mean_kl", f.mean_kl()},
              {"pieces", kl()},
              {"kl_99", f.kl_quantile(0.99)},
              {"same_top", f.same_top_share()},
              {"nll_change", f.mean_nll_change()},
              {"measured_bytes", largest().bytes},
              {"seconds", seconds()}};
  row.update(largest().more);
  return row;
}

Plot::Point Row::point() const {
  return {name_, mean(&Outcome::bits) * mean(&Outcome::rows_share), fidelity().mean_kl(), peer_};
}

// Pieces of a text, each with the token after it: one begins at the offset, the others at equal distances behind it.
std::vector<std::vector<int>> pieces_of(const Options& o, const Tokenizer& tokenizer) {
  const auto count = static_cast<std::size_t>(o.pieces), length = static_cast<std::size_t>(o.tokens);
  const auto all = tokens_from(tokenizer, o.text, o.offset, static_cast<long long>(count * length + 1), o.part);
  std::vector<std::vector<int>> pieces;
  for (std::size_t i = 0; i < count; ++i) {
    const auto first = all.begin() + static_cast<std::ptrdiff_t>(i * (all.size() - 1) / count);
    pieces.emplace_back(first, first + o.tokens + 1);
  }
  return pieces;
}

class Benchmark {
 public:
  explicit Benchmark(const Options& o);
  void run();
  void report() const;

 private:
  // The logits that tokens at positions first, first + 1, ... give, of all of them or of the last.
  using Eval = std::function<std::span<const float>(std::span<const int> tokens, int first, Engine::Logits which)>;
  // Takes the logits of the scored positions, numbered from 0.
  using Use = std::function<void(std::size_t k, std::span<const float> logits)>;

  void read_options();
  void check_lengths() const;
  void check_candidates() const;
  void make_peers();

  std::size_t width() const { return static_cast<std::size_t>(model_->parameters().vocabulary); }
  std::span<const int> piece(int first, int n) const;
  long long steps() const;  // tokens that are evaluated for a piece, but for repetitions
  void eval_chunk(int at, int n, const Eval& eval, const Use& use);
  void eval_context(const Eval& eval, const Use& use, int chunk);
  void eval_continuation(const Eval& eval, const Use& use, int chunk);
  Eval eval_with(kvt::AnyCache& cache);

  void read_full(int chunk, const Use& use);
  void read_reference();
  Use compare_into(Fidelity& fidelity) const;
  void run_candidates();
  void run_group(const std::vector<std::size_t>& group);
  Outcome run_alone(const Candidate& candidate);
  Outcome run_peer(Peer& peer);
  Outcome outcome(Fidelity fidelity, const kvt::AnyCache& cache, long long bytes, double start) const;
  void add(std::size_t row, Outcome outcome);

  const Options& o_;
  int before_, skip_;  // tokens that are read before a cache is cut for good, and those not scored
  std::vector<Candidate> candidates_;
  std::vector<Peer> peers_;
  std::optional<Plot> plot_;
  std::optional<Tokenizer> tokenizer_;
  std::vector<std::vector<int>> pieces_;
  std::string model_path_;
  std::optional<Model> model_;
  std::optional<Engine> engine_;
  std::vector<std::vector<std::size_t>> groups_;  // of candidates that are cut from one prefilled cache
  std::optional<Progress> progress_;
  const std::vector<int>* piece_ = nullptr;  // that is run over
  std::vector<float> reference_;             // its logits at the scored positions
  Fidelity floor_;                           // the full cache in other chunks: what rounding alone does
  std::vector<Row> rows_;                    // of the candidates, then of the peers
  std::size_t printed_ = 0;
};

// Whatever can be refused is refused before minutes are spent: names, files, caches.
Benchmark::Benchmark(const Options& o)
    : o_(o), before_(o.tokens - o.continuation), skip_(o.continuation > 0 ? before_ : o.skip) {
  read_options();
  tokenizer_.emplace(o.common.model_path());
  pieces_ = pieces_of(o, *tokenizer_);
  model_path_ = o.weights == "f32" ? dequantised(o.common.model_path()) : o.common.model_path();
  model_.emplace(model_path_, o.common.engine);
  check_lengths();
  check_candidates();
  make_peers();
  engine_.emplace(*model_, o.common.threads);
}

void Benchmark::read_options() {
  if (o_.caches.empty() && o_.peers.empty()) throw std::runtime_error("fidelity needs a --cache or a --peer");
  for (const auto& text : o_.caches) {
    candidates_.push_back(parse_candidate(text, before_));
    rows_.emplace_back(text, false);
  }
  for (const auto& name : o_.peers) {
    peers_.push_back({name, PeerCache::parse(name), nullptr});
    rows_.emplace_back(name, true);
  }
  if (!o_.plot.empty()) plot_.emplace(o_.plot);
}

void Benchmark::check_lengths() const {
  const auto refuse = [&](const char* option, int value, const std::string& why) {
    throw std::runtime_error(std::string(option) + " " + std::to_string(value) + " " + why);
  };
  const int context = model_->parameters().context;
  if (o_.tokens > context) refuse("--tokens", o_.tokens, "is above the model's context of " + std::to_string(context));
  const std::string of_all = "of " + std::to_string(o_.tokens);
  if (before_ <= 0) refuse("--continuation", o_.continuation, "leaves no text before it, " + of_all + " tokens");
  if (skip_ >= o_.tokens) refuse("--skip", skip_, "leaves no token " + of_all);
}

void Benchmark::check_candidates() const {
  for (const auto& c : candidates_) {
    const auto cache = make_cache(c.names, model_->parameters().layers, told_of(*model_, c.names, o_.common.zones));
    if (o_.continuation > 0) {
      c.budget.check_room(before_, o_.common.zones);
    } else if (c.oracle) {
      throw std::runtime_error("the oracle knows what comes after the cut: give --continuation");
    } else if (wants_repetition(*cache)) {
      throw std::runtime_error("a token selector lets the model repeat its context before the cut: give --continuation");
    }
  }
}

void Benchmark::make_peers() {
  for (auto& peer : peers_) {
    peer.program = std::make_unique<Reference>(model_path_, o_.tokens, o_.common.threads, peer.cache);
  }
}

std::span<const int> Benchmark::piece(int first, int n) const {
  return std::span(*piece_).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
}

// All runs take the same chunks.
void Benchmark::eval_chunk(int at, int n, const Eval& eval, const Use& use) {
  const auto logits = eval(piece(at, n), at, at + n > skip_ ? Engine::Logits::all : Engine::Logits::last);
  for (int i = std::max(0, skip_ - at); i < n; ++i) {
    use(static_cast<std::size_t>(at + i - skip_), logits.subspan(static_cast<std::size_t>(i) * width(), width()));
  }
  progress_->advance(n);
}

void Benchmark::eval_context(const Eval& eval, const Use& use, int chunk) {
  in_chunks(before_, chunk, o_.common.zones.sink_rows, [&](int at, int n) { eval_chunk(at, n, eval, use); });
}

void Benchmark::eval_continuation(const Eval& eval, const Use& use, int chunk) {
  in_chunks(o_.continuation, chunk, 0, [&](int at, int n) { eval_chunk(before_ + at, n, eval, use); });
}

Benchmark::Eval Benchmark::eval_with(kvt::AnyCache& cache) {
  return
      [&](std::span<const int> tokens, int first, Engine::Logits which) { return engine_->eval(cache, tokens, first, which); };
}

void Benchmark::read_full(int chunk, const Use& use) {
  const auto full = make_cache({"uniform", "sink_recent", "fp32"}, model_->parameters().layers, o_.common.zones);
  eval_context(eval_with(*full), use, chunk);
  eval_continuation(eval_with(*full), use, chunk);
}

void Benchmark::read_reference() {
  reference_.resize(static_cast<std::size_t>(o_.tokens - skip_) * width());
  read_full(o_.common.chunk, [&](std::size_t k, std::span<const float> logits) {
    std::copy(logits.begin(), logits.end(), reference_.data() + k * width());
  });
  Fidelity again;
  read_full(other_chunk(o_.common.chunk), compare_into(again));
  floor_.add(again);
}

Benchmark::Use Benchmark::compare_into(Fidelity& fidelity) const {
  return [&](std::size_t k, std::span<const float> logits) {
    const int next = (*piece_)[k + static_cast<std::size_t>(skip_) + 1];
    fidelity.add(compare({reference_.data() + k * width(), width()}, logits, next));
  };
}

Outcome Benchmark::outcome(Fidelity fidelity, const kvt::AnyCache& cache, long long bytes, double start) const {
  return {std::move(fidelity),
          cache.bits_per_element(),
          (mean_rows(cache) - o_.continuation) / before_,
          bytes,
          seconds() - start,
          {{"memory", to_json(cache.memory())}}};
}

// Lines are printed in the order of the command line, each as soon as it can be.
void Benchmark::add(std::size_t row, Outcome outcome) {
  rows_[row].add(std::move(outcome));
  while (printed_ < rows_.size() && rows_[printed_].pieces() == pieces_.size()) rows_[printed_++].print(o_.common.text());
}

void Benchmark::run_group(const std::vector<std::size_t>& group) {
  std::vector<kvt::Composition> served;
  for (const auto k : group) served.push_back(candidates_[k].names);
  // As a question of one token and its answer: each token of the continuation, the first too, makes the next one.
  const auto look_ahead = [&](kvt::AnyCache& cache) {
    return see_importance(cache, o_.common.chunk, kvt::OverQueries::largest, [&](const Look& look) {
      read_answer(*engine_, cache, piece(before_, 1), piece(before_ + 1, o_.continuation), o_.common.chunk, look);
    });
  };
  SharedPrefill whole(
      *model_, o_.common.zones, served,
      [&](kvt::AnyCache& cache) {
        prefill(*engine_, cache, *tokenizer_, piece(0, before_), o_.common.chunk, o_.common.zones.sink_rows,
                [&](int n) { progress_->advance(n); });
      },
      look_ahead);
  for (const auto k : group) {
    const double start = seconds() - whole.seconds();  // as if the text had been read for this one alone
    const auto cache = whole.cut(candidates_[k].names, candidates_[k].budget, candidates_[k].oracle);
    Fidelity fidelity;
    eval_continuation(eval_with(*cache), compare_into(fidelity), o_.common.chunk);
    add(k, outcome(std::move(fidelity), *cache, whole.bytes_of(*cache), start));
  }
}

// Cut after each chunk.
Outcome Benchmark::run_alone(const Candidate& candidate) {
  const double start = seconds();
  CountingResource memory;
  const auto cache = make_counted_cache(candidate.names, *model_, o_.common.zones, memory);
  Fidelity fidelity;
  eval_context(
      [&](std::span<const int> tokens, int first, Engine::Logits which) {
        const auto logits = engine_->eval(*cache, tokens, first, which);
        if (!candidate.budget.hold(*cache) && o_.flush) check(cache->flush());
        return logits;
      },
      compare_into(fidelity), o_.common.chunk);
  return outcome(std::move(fidelity), *cache, measured_bytes(*cache, memory), start);
}

Outcome Benchmark::run_peer(Peer& peer) {
  const double start = seconds();
  Reference& program = *peer.program;
  program.truncate(0);
  const Eval eval = [&](std::span<const int> tokens, int first, Engine::Logits which) {
    return program.eval(tokens, first, which == Engine::Logits::all);
  };
  Fidelity fidelity;
  eval_context(eval, compare_into(fidelity), o_.common.chunk);
  eval_continuation(eval, compare_into(fidelity), o_.common.chunk);
  if (!peer.cache.rotate && (program.rotates_keys() || program.rotates_values()))
    throw std::runtime_error("this version of llama.cpp does not let its rotation be switched off");
  return {std::move(fidelity),
          peer.cache.bits_per_element(),
          1,
          program.cache_bytes(),
          seconds() - start,
          {{"rotated_keys", program.rotates_keys()}, {"rotated_values", program.rotates_values()}}};
}

void Benchmark::run_candidates() {
  for (const auto& group : groups_) run_group(group);
  if (o_.continuation > 0) return;
  for (std::size_t k = 0; k < candidates_.size(); ++k) add(k, run_alone(candidates_[k]));
}

long long Benchmark::steps() const {
  const auto groups = static_cast<long long>(groups_.size()), all = static_cast<long long>(candidates_.size());
  const long long ours = o_.continuation > 0 ? groups * before_ + all * o_.continuation : all * o_.tokens;
  return ours + o_.tokens * static_cast<long long>(2 + peers_.size());
}

void Benchmark::run() {
  if (o_.continuation > 0) {
    std::vector<std::size_t> all(candidates_.size());
    std::iota(all.begin(), all.end(), std::size_t{0});
    groups_ = sharing_prefill(all, [&](std::size_t k) { return candidates_[k].names; });
  }
  progress_.emplace("fidelity", o_.pieces * steps());
  print_header(o_.common.text(), o_.pieces > 1);
  for (const auto& piece : pieces_) {
    piece_ = &piece;
    read_reference();
    run_candidates();
    for (std::size_t k = 0; k < peers_.size(); ++k) add(candidates_.size() + k, run_peer(peers_[k]));
  }
  progress_.reset();
  std::fprintf(o_.common.text(), "%-44s %22.2e  (the full cache in chunks of %d: what rounding alone does)\n", "noise floor",
               floor_.mean_kl(), other_chunk(o_.common.chunk));
}

void Benchmark::report() const {
  json results = json::array();
  std::vector<Plot::Point> points;
  for (const auto& row : rows_) {
    results.push_back(row.to_json());
    points.push_back(row.point());
  }
  o_.common.write({{"text", o_.text},
                   {"pieces", o_.pieces},
                   {"tokens", o_.tokens},
                   {"skip", skip_},
                   {"continuation", o_.continuation},
                   {"chunk", o_.common.chunk},
                   {"weights", o_.weights},
                   {"engine", name_of(o_.common.engine)},
                   {"noise_floor", floor_.mean_kl()},
                   {"part", name_of(o_.part)},
                   {"results", results}});
  if (!plot_) return;
  plot_->draw(std::filesystem::path(o_.text).filename().string() + ", " + std::to_string(o_.pieces * (o_.tokens - skip_)) +
                  " scored tokens, chunks of " + std::to_string(o_.common.chunk),
              points);
}

}  // namespace

void add_fidelity(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command = app.add_subcommand("fidelity", "distance of compositions from the full cache over a text");
  o->common.add(*command, 128);
  o->common.add_engine(*command);
  command->add_option("--text", o->text, "text file")->required();
  command->add_option(
      "--cache", o->caches,
      "CODEC, or ALLOCATOR,SELECTOR,CODEC,RETAIN; repeat for more. RETAIN is what may be kept, held after each "
      "chunk: 0.25 of all rows so far, 200rows a KV head, or 3000000bytes. Join a policy's parameters by +: "
      "snap_kv:window=32+kernel=7. The selector oracle has read the continuation before the cut: what is left to "
      "others, and nothing that can be run");
  command->add_option(
      "--peer", o->peers,
      "llama.cpp with a cache of its own, measured in the same way; repeat for more. It reads the rows of a chunk back as "
      "stored, where ours are dense until the chunk ends: both are on equal terms with --chunk 1 --sink 0 --recent 0 "
      "--flush. Known: " +
          PeerCache::known());
  command->add_option("--weights", o->weights, "f32 (dequantised once, cached) or file (as quantised)")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "file"}));
  command->add_option("--pieces", o->pieces, "how many pieces of the text, spread evenly over what follows the offset")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--tokens", o->tokens, "length of a piece")->capture_default_str()->check(CLI::PositiveNumber);
  command->add_option("--skip", o->skip, "first tokens of a piece not scored")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command
      ->add_option(
          "--continuation", o->continuation,
          "last tokens of a piece that alone are scored: caches are cut once, before them, instead of after each chunk")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--offset", o->offset, "byte of the file to begin at")->capture_default_str();
  add_part_option(*command, o->part);
  command->add_flag("--flush", o->flush, "encode after every chunk instead of when a block is full");
  command->add_option("--plot", o->plot, "also draw KL against bits into this file, .svg or .png, with gnuplot");
  command->callback([o] {
    Benchmark benchmark(*o);
    benchmark.run();
    benchmark.report();
  });
}

}  // namespace kvt_llm
