// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm report: which composition to use at which budget, with llama.cpp's own caches on the same axes. Runs a suite of
// compositions, budgets, texts and questions, and writes what was found as JSON and as a page. Compositions are chosen on
// passages for tuning and measured on those for evaluation, see passages.hpp.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>

#include "answers.hpp"
#include "command.hpp"
#include "engine.hpp"
#include "kvtailor/io/safetensors.hpp"
#include "passages.hpp"
#include "prefill.hpp"
#include "prompt.hpp"
#include "reference.hpp"
#include "report_page.hpp"
#include "results.hpp"
#include "shared_prefill.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

struct Options {
  Common common;
  std::vector<std::string> texts, policies, methods, peers, tasks = {"niah_single", "niah_multikey"};
  std::string out, resume, suite = "standard", weights = "f32";
  std::vector<double> budgets = {0.5, 0.25, 0.125, 0.0625};
  int tokens = 1024, continuation = 128, pieces = 6, tuning_pieces = 2, samples = 6, tuning_samples = 2;
  Tasks::Options make;
  std::string command;  // as it was given
};

enum class Kind { rows, bits, both };  // what a composition gives up: rows, bits of all rows, or both
constexpr const char* name_of(Kind kind) { return kind == Kind::rows ? "rows" : kind == Kind::bits ? "bits" : "both"; }

struct Method {
  std::string name;
  Kind kind;
  kvt::Composition composition;
  bool asked_for = false;  // by name, or of a suite
  std::string files = {};  // hashes of the policy files it names: another policy under an old name is another method

  // As it is written on a command line.
  std::string text() const {
    std::string out;
    for (std::string part : {composition.allocator, composition.selector, composition.codec}) {
      std::replace(part.begin(), part.end(), ',', '+');
      out += (out.empty() ? "" : ",") + part;
    }
    return out;
  }
};

// A row selection: a selector, and the allocator that goes with it.
struct Selection {
  std::string name, allocator, selector;
  bool asked_for = false, of_bytes = false;
};

struct Suite {
  std::vector<Selection> rows;         // tried with dense rows
  std::vector<std::string> bits;       // codecs of all rows
  std::vector<Selection> both;         // tried with
  std::vector<std::string> both_bits;  // these codecs
  std::vector<std::string> peers;      // llama.cpp's caches
};

const Selection second_pass = {"reconstruction", "global:safeguard=0", "reconstruction"};
const Selection unlike_keys = {"KeyDiff", "adaptive", "key_diff"};
const Selection attention_to_come = {"ExpectedAttention", "adaptive", "expected_attention:epsilon=0.02"};

const std::map<std::string, Suite>& suites() {
  static const std::map<std::string, Suite> all = {
      {"standard",
       {{{"sink and recent", "uniform", "sink_recent"}, {"SnapKV", "adaptive", "snap_kv"}, attention_to_come, second_pass},
        {"turbo6", "turbo5", "turbo4", "turbo3", "turbo2", "turbo2/turbo1", "low_rank_trellis2"},
        {second_pass},
        {"turbo5", "turbo4", "low_rank_trellis2"},
        {"f16", "q8_0", "q5_0", "q4_0"}}},
      {"quick",
       {{{"sink and recent", "uniform", "sink_recent"}, unlike_keys, attention_to_come},
        {"turbo4", "turbo2", "turbo2/turbo1"},
        {unlike_keys, attention_to_come},
        {"turbo4"},
        {"q8_0", "q4_0"}}},
  };
  return all;
}

// What a policy file is for: "curve:file=F" beside the selector it was made for, or "learned:file=F" for both.
Selection selection_of(const std::string& path) {
  kvt::TensorFile file;
  const kvt::Status status = kvt::read_safetensors(path, file);
  if (!status.ok()) throw std::runtime_error("the policy " + path + ": " + std::string(status.message()));
  const std::string name = std::filesystem::path(path).stem().string(), format = file.metadata["format"];
  if (format.starts_with("kvtailor learned")) return {name, "learned:file=" + path, "learned:file=" + path, true};
  if (format.starts_with("kvtailor bytes")) return {name, "uniform", file.metadata["selector"], true, true};
  if (format.starts_with("kvtailor curve")) return {name, "curve:file=" + path, file.metadata["selector"], true};
  throw std::runtime_error(path + " is neither a curve, nor a learned policy, nor a profile for bytes");
}

// What a cache is asked to go on with.
struct Item {
  std::string name;
  Part part;
  std::vector<int> context, continuation;  // with the token after it
  std::optional<Prompt> prompt;            // in place of a continuation
  std::string hash;                        // of all that
};

struct Peer {
  std::string name;
  PeerCache cache;
  std::unique_ptr<Reference> program;
};

class Report {
 public:
  explicit Report(const Options& o);
  void run();
  void write() const;

 private:
  using Use = std::function<void(std::size_t k, std::span<const float> logits)>;
  // What is measured: a composition at a budget, 0 being all rows.
  struct Cell {
    std::size_t method;
    double budget;
  };

  void choose_methods();
  void add_method(Kind kind, const Selection& rows, const std::string& codec);
  void check_methods();
  void make_peers(const std::string& weights, int context);
  void make_items();
  void make_cells();
  json parameters() const;
  std::size_t vocabulary() const { return static_cast<std::size_t>(model_->parameters().vocabulary); }
  double dense_bytes(const Item& item) const;
  Budget budget_of(const Item& item, double share) const;
  kvt::Composition composition_of(const Cell& cell, const Item& item) const;

  // By what is read, so that a run with more of them takes what it knows from one with fewer.
  json key(const Item& item, const std::string& what) const { return {item.name, name_of(item.part), item.hash, what}; }
  std::string name(const Cell& cell) const;
  void look(const Item& item);
  void read_reference(const Item& item);
  json read_on(const Reader& reader, const Item& item, int chunk, const Use& use) const;
  json compared(const Reader& reader, const Item& item, int chunk) const;
  json look_at_floor(const Item& item);
  void look_at_cells(const Item& item);
  void look_at_peers(const Item& item);
  void look_at_layers(const Item& item);
  json whole(const Item& item, const kvt::Composition& names, const std::vector<std::string>& codecs);

  std::vector<double> values(const std::string& what, Part part, bool questions, const char* field) const;
  json summary(const std::string& what) const;
  double tuned(const std::string& what) const;
  json chosen(double budget) const;

  const Options& o_;
  std::vector<Method> methods_;
  json left_out_ = json::array();
  std::vector<Cell> cells_;
  std::vector<std::vector<std::size_t>> groups_;  // of cells that are cut from one prefilled cache
  std::vector<Peer> peers_;
  std::optional<Plot> plot_;
  std::optional<Tokenizer> tokenizer_;
  std::optional<Model> model_;
  std::optional<Engine> engine_;
  std::vector<Item> items_;
  Results results_;
  std::optional<Progress> progress_;
  std::vector<float> reference_;  // logits of the full cache for an item
};

constexpr const char* layer_codec = "turbo2";
const std::string floor_name = "noise floor", full_name = "full cache";
std::string layer_name(int layer) { return "layer " + std::to_string(layer); }

// Whatever can be refused is refused before minutes are spent.
Report::Report(const Options& o) : o_(o) {
  for (const auto& task : o.tasks) Tasks::check_name(task, o.make.wording);
  if (o.pieces + o.samples < 1) throw std::runtime_error("give --pieces or --samples, or both");
  if (o.tuning_pieces + o.tuning_samples < 1)
    throw std::runtime_error("give --tuning-pieces or --tuning-samples, or both: compositions are chosen by them");
  if (o.continuation >= o.tokens)
    throw std::runtime_error("--continuation " + std::to_string(o.continuation) + " leaves no text before it, of " +
                             std::to_string(o.tokens) + " tokens");
  plot_.emplace(o.out + ".svg");
  choose_methods();
  tokenizer_.emplace(o.common.model_path());
  make_items();
  const std::string weights = o.weights == "f32" ? dequantised(o.common.model_path()) : o.common.model_path();
  model_.emplace(weights, o.common.engine);
  int most = 0;
  for (const Item& item : items_) {
    std::size_t behind = item.continuation.size();
    if (item.prompt) {
      for (const auto& reply : item.prompt->replies) behind = std::max(behind, item.prompt->asked.size() + reply.tokens.size());
    }
    most = std::max(most, static_cast<int>(item.context.size() + behind));
  }
  if (const int context = model_->parameters().context; most > context) {
    throw std::runtime_error("a text and what comes after it take " + std::to_string(most) +
                             " tokens; the model's context is " + std::to_string(context));
  }
  check_methods();
  make_cells();
  make_peers(weights, most);
  if (!o.resume.empty()) results_ = Results(o.resume, parameters());
  engine_.emplace(*model_, o.common.threads);
}

// What a model cannot have is left out of a suite, and said; what was asked for by name is refused.
void Report::check_methods() {
  std::erase_if(methods_, [&](const Method& m) {
    try {
      const auto names = for_budget(m.composition, 1e15, o_.tokens);
      make_cache(names, model_->parameters().layers, told_of(*model_, names, o_.common.zones));
      return false;
    } catch (const std::runtime_error& e) {
      if (m.asked_for) throw;
      left_out_.push_back({{"name", m.name}, {"why", e.what()}});
      return true;
    }
  });
}

void Report::make_peers(const std::string& weights, int context) {
  for (const auto& name : o_.peers.empty() ? suites().at(o_.suite).peers : o_.peers) {
    const PeerCache cache = PeerCache::parse(name);
    try {
      peers_.push_back({name, cache, std::make_unique<Reference>(weights, context, o_.common.threads, cache)});
    } catch (const std::runtime_error& e) {
      if (!o_.peers.empty()) throw;
      left_out_.push_back({{"name", "llama.cpp " + name}, {"why", e.what()}});
    }
  }
}

void Report::choose_methods() {
  Suite suite = suites().at(o_.suite);
  for (const auto& path : o_.policies) {
    const Selection selection = selection_of(path);
    if (selection.of_bytes) {
      add_method(Kind::both, selection, bytes_prefix + path);
      continue;
    }
    suite.rows.push_back(selection);
    suite.both.push_back(selection);
  }
  for (const auto& selection : suite.rows) add_method(Kind::rows, selection, "fp16");
  for (const auto& text : o_.methods) {  // as if the suite had it
    const auto part = split_names(text);
    if (part.size() != 3) throw std::runtime_error("--method " + text + " must be ALLOCATOR,SELECTOR,CODEC");
    const Selection selection = {part[0] + "," + part[1], part[0], part[1], true};
    if (part[2] == "fp16") {
      add_method(Kind::rows, selection, part[2]);
    } else {
      add_method(Kind::both, selection, part[2]);
      suite.bits.push_back(part[2]);
    }
  }
  for (const auto& codec : suite.bits) add_method(Kind::bits, {"", "uniform", "sink_recent"}, codec);
  for (const auto& selection : suite.both) {
    for (const auto& codec : suite.both_bits) add_method(Kind::both, selection, codec);
  }
  // Codes of all rows first: others need to know what they take.
  std::stable_sort(methods_.begin(), methods_.end(),
                   [](const Method& a, const Method& b) { return (a.kind == Kind::bits) > (b.kind == Kind::bits); });
}

void Report::add_method(Kind kind, const Selection& rows, const std::string& codec) {
  const std::string name = kind == Kind::rows || rows.of_bytes ? rows.name
                           : kind == Kind::bits                ? codec
                                                               : rows.name + " + " + codec;
  Method method{name, kind, {rows.allocator, rows.selector, codec}, rows.asked_for, {}};
  const std::string text = method.text();
  for (std::size_t at = 0; (at = text.find("file=", at)) != text.npos;) {
    at += 5;
    const std::string path = text.substr(at, text.find_first_of(",+)", at) - at);
    if (std::filesystem::is_regular_file(path)) method.files += " " + hex(fingerprint(read_file(path)));
  }
  if (rows.of_bytes) method.files += " " + hex(fingerprint(read_file(codec.substr(std::string(bytes_prefix).size()))));
  for (const Method& m : methods_) {
    if (m.kind == kind && m.text() == method.text()) return;
  }
  methods_.push_back(std::move(method));
}

void Report::make_items() {
  for (const Part part : {Part::tuning, Part::evaluation}) {
    const bool tuning = part == Part::tuning;
    std::string text;
    for (const auto& path : o_.texts) text += part_of(read_file(path), part);
    const auto refuse = [&](const std::string& what) {
      throw std::runtime_error("of the texts, " + std::to_string(text.size()) + " bytes are for " + name_of(part) + "; " +
                               what);
    };
    const auto count = static_cast<std::size_t>(tuning ? o_.tuning_pieces : o_.pieces);
    const auto length = static_cast<std::size_t>(o_.tokens);
    const auto all = tokenizer_->encode(text, false, false);
    if (all.size() < count * length + 1)
      refuse(std::to_string(count) + " pieces of " + std::to_string(length) + " tokens need more");
    for (std::size_t i = 0; i < count; ++i) {
      const auto first = all.begin() + static_cast<std::ptrdiff_t>(i * (all.size() - 1) / count);
      const auto cut = first + (o_.tokens - o_.continuation);
      items_.push_back({"text " + std::to_string(i), part, {first, cut}, {cut, first + o_.tokens + 1}, {}, {}});
    }
    if ((tuning ? o_.tuning_samples : o_.samples) == 0) continue;
    const Haystack haystack(*tokenizer_, text);
    const Tasks tasks(haystack, o_.make);
    for (const auto& task : o_.tasks) {
      const int samples = tasks.count(task, tuning ? o_.tuning_samples : o_.samples);
      for (int number = 0; number < samples; ++number) {
        Prompt prompt = make_prompt(*tokenizer_, tasks.make(task, number), false);
        items_.push_back({task + " " + std::to_string(number), part, prompt.context, {}, prompt, {}});
      }
    }
  }
  for (Item& item : items_) {
    std::uint64_t hash = fingerprint(item.continuation, fingerprint(item.context));
    if (item.prompt) {
      hash = fingerprint(item.prompt->asked, hash);
      for (const auto& reply : item.prompt->replies) hash = fingerprint(reply.tokens, hash);
    }
    item.hash = hex(hash);
  }
}

void Report::make_cells() {
  for (std::size_t m = 0; m < methods_.size(); ++m) {
    if (methods_[m].kind == Kind::bits) {
      cells_.push_back({m, 0});
    } else {
      for (const double budget : o_.budgets) cells_.push_back({m, budget});
    }
  }
  std::vector<std::size_t> all(cells_.size());
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
  groups_ = sharing_prefill(all, [&](std::size_t c) {
    return for_budget(methods_[cells_[c].method].composition, 1e6 * cells_[c].budget, 0);  // those of a profile by themselves
  });
}

json Report::parameters() const {
  const std::filesystem::path model = o_.common.model_path();
  return {{"format", "kvt-llm report 1"},
          {"model", model.filename().string()},
          {"model_bytes", std::filesystem::file_size(model)},
          {"engine", name_of(o_.common.engine)},
          {"weights", o_.weights},
          {"tokens", o_.tokens},
          {"continuation", o_.continuation},
          {"question_tokens", o_.make.tokens},
          {"wording", o_.make.wording},
          {"chunk", o_.common.chunk},
          {"sink", o_.common.zones.sink_rows},
          {"recent", o_.common.zones.recent_rows},
          {"block", o_.common.zones.block_rows}};
}

// Of the context, in fp16: what budgets are shares of.
double Report::dense_bytes(const Item& item) const {
  double elements = 0;
  for (const kvt::LayerShape& layer : model_->parameters().layers) elements += 2.0 * layer.num_kv_heads * layer.head_dim;
  return 2 * elements * static_cast<double>(item.context.size());
}

Budget Report::budget_of(const Item& item, double share) const {
  return share == 0 ? Budget() : Budget(kvt::Retain::bytes(static_cast<long long>(share * dense_bytes(item))));
}

kvt::Composition Report::composition_of(const Cell& cell, const Item& item) const {
  return for_budget(methods_[cell.method].composition, cell.budget * dense_bytes(item),
                    static_cast<double>(item.context.size()));
}

std::string Report::name(const Cell& cell) const {
  const Method& m = methods_[cell.method];
  std::ostringstream out;
  out << m.text() << m.files;
  if (cell.budget != 0) out << "," << cell.budget;
  return out.str();
}

// Reads what comes after the context. use(k, logits) is given what is predicted for the k-th token that counts.
json Report::read_on(const Reader& reader, const Item& item, int chunk, const Use& use) const {
  const int at = static_cast<int>(item.context.size());
  if (item.prompt) {
    const Score score = answer(reader, *item.prompt, vocabulary(), [&](std::size_t reply, std::span<const float> logits) {
      if (reply > 0) return;  // the same one over every cache
      std::size_t k = 0;
      for (const auto& target : item.prompt->replies[0].targets) {
        use(k++, logits.subspan((target.token - 1) * vocabulary(), vocabulary()));
      }
    });
    return {{"exact", score.exact}, {"log_prob", score.log_prob}};
  }
  in_chunks(o_.continuation, chunk, 0, [&](int first, int n) {
    const auto tokens = std::span(item.continuation).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
    const auto logits = reader.eval(tokens, at + first, Engine::Logits::all);
    for (int i = 0; i < n; ++i) {
      use(static_cast<std::size_t>(first + i), logits.subspan(static_cast<std::size_t>(i) * vocabulary(), vocabulary()));
    }
  });
  return json::object();
}

json Report::compared(const Reader& reader, const Item& item, int chunk) const {
  Fidelity fidelity;
  json found = read_on(reader, item, chunk, [&](std::size_t k, std::span<const float> logits) {
    const int next = item.prompt ? -1 : item.continuation[k + 1];
    fidelity.add(compare({reference_.data() + k * vocabulary(), vocabulary()}, logits, next));
  });
  found["kl"] = fidelity.mean_kl();
  found["same_top"] = fidelity.same_top_share();
  if (!item.prompt) found["nll_change"] = fidelity.mean_nll_change();
  return found;
}

const kvt::Composition full_cache = {"uniform", "sink_recent", "fp32"};

void Report::read_reference(const Item& item) {
  reference_.clear();
  const auto cache = make_cache(full_cache, model_->parameters().layers, o_.common.zones);
  prefill(*engine_, *cache, *tokenizer_, item.context, o_.common.chunk, o_.common.zones.sink_rows);
  json found = read_on(reader_of(*engine_, *cache), item, o_.common.chunk, [&](std::size_t, std::span<const float> logits) {
    reference_.insert(reference_.end(), logits.begin(), logits.end());
  });
  results_.add(key(item, full_name), found);
}

// The full cache again, in other chunks: what rounding alone does.
json Report::look_at_floor(const Item& item) {
  const int chunk = other_chunk(o_.common.chunk);
  const auto cache = make_cache(full_cache, model_->parameters().layers, o_.common.zones);
  prefill(*engine_, *cache, *tokenizer_, item.context, chunk);
  return compared(reader_of(*engine_, *cache), item, chunk);
}

void Report::look_at_cells(const Item& item) {
  const double dense = dense_bytes(item);
  for (const auto& group : groups_) {
    std::vector<kvt::Composition> served;
    for (const auto c : group) served.push_back(composition_of(cells_[c], item));
    SharedPrefill whole(*model_, o_.common.zones, served, [&](kvt::AnyCache& cache) {
      prefill(*engine_, cache, *tokenizer_, item.context, o_.common.chunk, o_.common.zones.sink_rows);
    });
    for (const auto c : group) {
      const Cell& cell = cells_[c];
      const Method& method = methods_[cell.method];
      const json place = key(item, name(cell));
      progress_->advance(1);
      if (results_.find(place) != nullptr) continue;
      if (method.kind == Kind::both && !method.composition.codec.starts_with(bytes_prefix)) {
        // Where all rows fit, none has to go.
        const Method coded{"", Kind::bits, {"uniform", "sink_recent", method.composition.codec}};
        const json& all = *results_.find(key(item, coded.text()));
        if (all.at("bytes_share").get<double>() <= cell.budget) {
          results_.add(place, all);
          continue;
        }
      }
      const auto cache = whole.cut(composition_of(cell, item), budget_of(item, cell.budget));
      const double bytes = static_cast<double>(whole.bytes_of(*cache)), rows = mean_rows(*cache),
                   bits = cache->bits_per_element();
      json found = compared(reader_of(*engine_, *cache), item, o_.common.chunk);
      found["bytes_share"] = bytes / dense;
      found["rows_share"] = rows / static_cast<double>(item.context.size());
      found["bits"] = bits;
      results_.add(place, found);
    }
  }
}

void Report::look_at_peers(const Item& item) {
  for (const Peer& peer : peers_) {
    const json place = key(item, "llama.cpp " + peer.name);
    progress_->advance(1);
    if (results_.find(place) != nullptr) continue;
    Reference& program = *peer.program;
    program.truncate(0);
    const Reader reader = {[&](std::span<const int> tokens, int first, Engine::Logits which) {
                             return program.eval(tokens, first, which == Engine::Logits::all);
                           },
                           [&](int position) { program.truncate(position); }};
    in_chunks(static_cast<int>(item.context.size()), o_.common.chunk, o_.common.zones.sink_rows, [&](int at, int n) {
      reader.eval(std::span(item.context).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at,
                  Engine::Logits::last);
    });
    json found = compared(reader, item, o_.common.chunk);
    found["bits"] = peer.cache.bits_per_element();
    found["bytes_share"] = peer.cache.bits_per_element() / 16;
    found["rows_share"] = 1;
    results_.add(place, found);
  }
}

// One layer's rows coded, all others dense.
void Report::look_at_layers(const Item& item) {
  const auto& layers = model_->parameters().layers;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const json place = key(item, layer_name(static_cast<int>(layer)));
    progress_->advance(1);
    if (results_.find(place) != nullptr) continue;
    std::vector<std::string> codecs;
    for (std::size_t l = 0; l < layers.size(); ++l)
      codecs.insert(codecs.end(), static_cast<std::size_t>(layers[l].num_kv_heads), l == layer ? layer_codec : "fp16");
    const auto cache = make_cache({"uniform", "sink_recent", "fp16"}, layers, o_.common.zones, codecs);
    prefill(*engine_, *cache, *tokenizer_, item.context, o_.common.chunk, o_.common.zones.sink_rows);
    check(cache->flush());
    results_.add(place, compared(reader_of(*engine_, *cache), item, o_.common.chunk));
  }
}

void Report::look(const Item& item) {
  // The reference is read only if something is missing that is compared with it.
  const bool layers = item.part == Part::tuning && item.name == "text 0";
  std::vector<std::string> wanted = {full_name, floor_name};
  for (const Cell& cell : cells_) wanted.push_back(name(cell));
  for (const Peer& peer : peers_) wanted.push_back("llama.cpp " + peer.name);
  for (int l = 0; layers && l < model_->parameters().num_layers; ++l) wanted.push_back(layer_name(l));
  const bool complete = std::all_of(wanted.begin(), wanted.end(),
                                    [&](const std::string& what) { return results_.find(key(item, what)) != nullptr; });
  if (complete) {
    progress_->advance(static_cast<long long>(wanted.size()));
    return;
  }
  read_reference(item);
  if (results_.find(key(item, floor_name)) == nullptr) results_.add(key(item, floor_name), look_at_floor(item));
  progress_->advance(2);
  look_at_cells(item);
  look_at_peers(item);
  if (layers) look_at_layers(item);
}

void Report::run() {
  progress_.emplace("report", static_cast<long long>(items_.size() * (2 + cells_.size() + peers_.size())) +
                                  (o_.tuning_pieces > 0 ? model_->parameters().num_layers : 0));
  for (const Item& item : items_) look(item);
  progress_.reset();
}

std::vector<double> Report::values(const std::string& what, Part part, bool questions, const char* field) const {
  std::vector<double> out;
  for (const Item& item : items_) {
    if (item.part != part || item.prompt.has_value() != questions) continue;
    const json& found = *results_.find(key(item, what));
    if (found.contains(field)) out.push_back(found.at(field));
  }
  return out;
}

json to_json(const Interval& x) {
  const auto end = [](double v) { return std::isfinite(v) ? json(v) : json(); };
  return {x.value, end(x.low), end(x.high)};
}

json Report::summary(const std::string& what) const {
  json out;
  const auto of = [&](bool questions, const char* field) { return values(what, Part::evaluation, questions, field); };
  const auto mean = [&](const char* name, const std::vector<double>& x) {
    if (x.empty()) return;
    Interval around = Interval::of_mean(x);
    if (std::string(name).ends_with("kl")) around.low = std::max(around.low, 0.0);  // no distance is negative
    out[name] = to_json(around);
  };
  mean("kl", of(false, "kl"));
  mean("nll_change", of(false, "nll_change"));
  mean("answer_kl", of(true, "kl"));
  mean("answer_log_prob", of(true, "log_prob"));
  if (const auto exact = of(true, "exact"); !exact.empty()) out["exact"] = to_json(Interval::of_share(exact));
  for (const char* const field : {"bytes_share", "rows_share", "bits", "same_top"}) {
    auto all = of(false, field);
    if (field != std::string("same_top")) {
      const auto more = of(true, field);
      all.insert(all.end(), more.begin(), more.end());
    }
    if (!all.empty()) out[field] = Mean::of(all).value;
  }
  return out;
}

// What is chosen by: the distance of texts and of answers on what is for tuning, nats.
double Report::tuned(const std::string& what) const {
  double sum = 0;
  for (const bool questions : {false, true}) {
    if (const auto kl = values(what, Part::tuning, questions, "kl"); !kl.empty()) sum += Mean::of(kl).value;
  }
  return sum;
}

// Of each kind the best that fits, by what is for tuning; and the best of all beside them.
json Report::chosen(double budget) const {
  json out = {{"budget", budget}};
  std::map<Kind, std::size_t> best;
  for (std::size_t c = 0; c < cells_.size(); ++c) {
    const Kind kind = methods_[cells_[c].method].kind;
    if (kind == Kind::bits) {
      bool fits = true;
      for (const Item& item : items_) {
        fits = fits && results_.find(key(item, name(cells_[c])))->at("bytes_share").get<double>() <= budget;
      }
      if (!fits) continue;
    } else if (cells_[c].budget != budget) {
      continue;
    }
    const auto [place, first] = best.try_emplace(kind, c);
    if (!first && tuned(name(cells_[c])) < tuned(name(cells_[place->second]))) place->second = c;
  }
  for (const auto& [kind, c] : best) out[name_of(kind)] = c;
  if (best.empty()) return out;
  const auto winner = std::min_element(best.begin(), best.end(), [&](auto& a, auto& b) {
    return tuned(name(cells_[a.second])) < tuned(name(cells_[b.second]));
  });
  out["recommended"] = winner->second;
  // Of the others to it, each text and question by itself.
  const std::string own = name(cells_[winner->second]);
  for (const auto& [kind, c] : best) {
    if (c == winner->second) continue;
    json difference;
    for (const bool questions : {false, true}) {
      const auto a = values(name(cells_[c]), Part::evaluation, questions, "kl"),
                 b = values(own, Part::evaluation, questions, "kl");
      std::vector<double> by(a.size());
      for (std::size_t i = 0; i < a.size(); ++i) by[i] = a[i] - b[i];
      if (!by.empty()) difference[questions ? "answer_kl" : "kl"] = to_json(Interval::of_mean(by));
    }
    const auto a = values(name(cells_[c]), Part::evaluation, true, "exact"), b = values(own, Part::evaluation, true, "exact");
    if (!a.empty()) difference["exact"] = to_json(Interval::of_paired_shares(a, b));
    out["differences"][name_of(kind)] = difference;
  }
  return out;
}

void Report::write() const {
  json result = parameters();
  result["command"] = o_.command;
  result["suite"] = o_.suite;
  result["budgets"] = o_.budgets;
  result["left_out"] = left_out_;
  result["tasks"] = o_.tasks;
  result["seed"] = o_.make.seed;
  result["other_chunk"] = other_chunk(o_.common.chunk);
  for (const auto& path : o_.texts) {
    const std::string text = read_file(path);
    result["texts"].push_back({{"file", std::filesystem::path(path).filename().string()},
                               {"bytes", text.size()},
                               {"for_tuning", part_of(text, Part::tuning).size()},
                               {"hash", hex(fingerprint(text))}});
  }
  for (const Part part : {Part::tuning, Part::evaluation}) {
    int of_kind[2] = {};
    for (const Item& item : items_) of_kind[item.prompt.has_value()] += item.part == part;
    result["items_of"][name_of(part)] = {{"texts", of_kind[0]}, {"questions", of_kind[1]}};
  }
  result["full"] = summary(full_name);
  result["noise_floor"] = summary(floor_name);
  for (const Cell& cell : cells_) {
    const Method& m = methods_[cell.method];
    json row = summary(name(cell));
    row.update({{"name", m.name},
                {"kind", name_of(m.kind)},
                {"composition", m.text()},
                {"budget", cell.budget == 0 ? json() : json(cell.budget)},
                {"tuned", tuned(name(cell))}});
    result["results"].push_back(row);
  }
  for (const Peer& peer : peers_) {
    json row = summary("llama.cpp " + peer.name);
    row["name"] = peer.name;
    result["peers"].push_back(row);
  }
  for (const double budget : o_.budgets) result["chosen"].push_back(chosen(budget));
  for (const Item& item : items_) {
    if (item.part != Part::tuning || item.name != "text 0") continue;
    result["layers"] = {{"codec", layer_codec}, {"kl", json::array()}};
    for (int l = 0; l < model_->parameters().num_layers; ++l) {
      result["layers"]["kl"].push_back(results_.find(key(item, layer_name(l)))->at("kl"));
    }
  }
  result["cpu"] = kernels();
  const std::string page = report_page(result, *plot_, o_.out + ".svg");
  if (!(std::ofstream(o_.out, std::ios::binary) << page)) throw std::runtime_error("cannot write " + o_.out);
  o_.common.write(result);
  std::filesystem::remove(o_.out + ".svg");
  FILE* const out = o_.common.text();
  std::fprintf(out, "%s", report_text(result).c_str());
}

// As it can be typed again.
std::string typed(int argc, char** argv) {
  std::string out = "kvt-llm";
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool plain = !word.empty() && word.find_first_not_of(
                                            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                                            "-_./,:=+%@") == word.npos;
    out += " " + (plain ? word : "'" + word + "'");
  }
  return out;
}

}  // namespace

void add_report(CLI::App& app, int argc, char** argv) {
  const auto o = std::make_shared<Options>();
  o->common.zones.sink_rows = 4;
  o->common.zones.recent_rows = 8;
  o->command = typed(argc, argv);
  o->make.wording = "badge";
  auto* const command = app.add_subcommand("report", "a page that says which composition to use at which budget");
  o->common.add(*command, 256);
  o->common.add_engine(*command);
  std::vector<std::string> names;
  for (const auto& [name, suite] : suites()) names.push_back(name);
  command
      ->add_option("--text", o->texts,
                   "text file; repeat for more. A third of its passages, by their hashes, is for choosing, the rest for "
                   "measuring")
      ->required();
  command->add_option("--out", o->out, "the page, HTML")->required();
  command->add_option("--suite", o->suite, "what is tried")->capture_default_str()->check(CLI::IsMember(names));
  command->add_option("--policy", o->policies, "curve or learned policy to try too; repeat for more");
  command->add_option("--method", o->methods, "ALLOCATOR,SELECTOR,CODEC to try too; repeat for more");
  command->add_option("--peer", o->peers,
                      "llama.cpp's caches to be measured beside, instead of the suite's; known: " + PeerCache::known());
  command->add_option("--budgets", o->budgets, "bytes that a cache may take, as shares of dense fp16 rows")
      ->capture_default_str()
      ->delimiter(',')
      ->check(number_between(0.001, 1));
  command->add_option("--weights", o->weights, "f32 (dequantised once, cached) or file (as quantised)")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "file"}));
  command->add_option("--tokens", o->tokens, "length of a piece of text, the continuation with it")
      ->capture_default_str()
      ->check(CLI::Range(50, 1 << 20));
  command->add_option("--continuation", o->continuation, "last tokens of a piece, that are predicted over the cut cache")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--pieces", o->pieces, "pieces measured")->capture_default_str()->check(CLI::NonNegativeNumber);
  command->add_option("--tuning-pieces", o->tuning_pieces, "pieces chosen by")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--tasks", o->tasks, "questions asked")->capture_default_str()->delimiter(',');
  command->add_option("--samples", o->samples, "questions of each task measured")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--tuning-samples", o->tuning_samples, "questions of each task chosen by")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--question-tokens", o->make.tokens, "length of the document of a question")
      ->capture_default_str()
      ->check(CLI::Range(50, 1 << 20));
  command->add_option("--seed", o->make.seed, "of the questions")->capture_default_str();
  command->add_option("--wording", o->make.wording, "in which numbers of keys are hidden and asked for")
      ->capture_default_str()
      ->check(CLI::IsMember(Tasks::wordings()));
  command->add_option("--resume", o->resume, "file that keeps each result as it is made, and from which the next run goes on");
  command->callback([o] {
    Report report(*o);
    report.run();
    report.write();
  });
}

}  // namespace kvt_llm
