// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm profile: finds out on texts how many rows each head should keep, for every budget, and writes a curve that the budget
// allocator "curve" reads. What rows matter is seen while the model repeats a text, or answers questions about it. With --bytes
// it finds out how many in which form; see byte_profile.hpp.
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <numeric>
#include <stdexcept>

#include "byte_profile.hpp"
#include "command.hpp"
#include "engine.hpp"
#include "hindsight.hpp"
#include "kvtailor/io/policy_file.hpp"
#include "kvtailor/learn/marginal_utility.hpp"
#include "kvtailor/select/any_selector.hpp"
#include "plot.hpp"
#include "prefill.hpp"
#include "samples.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

struct Options {
  Common common;
  SampleOptions samples;
  std::vector<std::string> selectors, outs, plots;
  std::string resume;
  bool mean = false, average = false, per_layer = false, bytes = false;
  ByteProfileOptions byte_options;
};

class Profile {
 public:
  explicit Profile(const Options& o);
  void run();
  void report() const;

 private:
  // What was found out for one selector: losses of heads, and the tables of single texts.
  struct Found {
    kvt::LossPool pool;
    std::vector<float> tables;
  };

  void check_sample(const Sample& sample) const;
  json parameters() const;
  void load();
  void save(int done) const;
  std::vector<float> see_importance(kvt::AnyCache& cache, const Sample& sample) const;
  void learn(const Sample& sample);
  kvt::Table table_of(std::size_t selector) const;
  double predicted_loss(std::size_t selector, const std::vector<float>& dropped) const;

  // Rows of a text that a cut may drop, from the first on.
  int first_free() const { return o_.common.zones.sink_rows; }
  int free_rows(std::size_t rows) const {
    return static_cast<int>(rows) - o_.common.zones.sink_rows - o_.common.zones.recent_rows;
  }

  Options o_;
  std::optional<Tokenizer> tokenizer_;
  std::optional<Model> model_;
  mutable std::optional<Engine> engine_;
  kvt::Geometry shape_;
  std::vector<Plot> plots_;
  std::vector<Sample> samples_;
  std::vector<Found> found_;
  int done_ = 0;
};

constexpr int steps = 99;

// Whatever can be refused is refused before minutes are spent.
Profile::Profile(const Options& o) : o_(o) {
  if (o.selectors.size() != o.outs.size())
    throw std::runtime_error("each --selector needs its own --out, and the other way round");
  if (!o.plots.empty() && o.plots.size() != o.outs.size())
    throw std::runtime_error("there is one --plot for each --out, or none");
  o_.samples.complete({repetition});
  for (const auto& path : o.plots) plots_.emplace_back(path);
  const std::string& path = o.common.model_path();
  tokenizer_.emplace(path);
  model_.emplace(path, o_.common.engine);
  shape_ = model_->parameters().geometry();
  for (const auto& selector : o.selectors) {
    const kvt::Composition names{"uniform", selector, "fp16"};
    make_cache(names, shape_, told_of(*model_, names, o.common.zones));
  }
  samples_ = make_samples(*tokenizer_, o_.samples);
  for (const Sample& sample : samples_) check_sample(sample);
  const auto heads = static_cast<std::size_t>(shape_.num_heads());
  for (std::size_t s = 0; s < o.selectors.size(); ++s) {
    found_.push_back({kvt::LossPool(shape_.num_heads()), std::vector<float>(steps * heads)});
  }
  if (!o.resume.empty()) load();
  engine_.emplace(*model_, o.common.threads);
}

void Profile::check_sample(const Sample& sample) const {
  const auto rows = sample.context.size(), all = rows + sample.asked.size() + sample.reply.size();
  const int context = model_->parameters().context;
  if (free_rows(rows) < 1) {
    throw std::runtime_error("a text has " + std::to_string(rows) + " tokens, all of which are sink or recent rows");
  }
  if (static_cast<int>(all) >= context) {
    throw std::runtime_error("a text and what comes after it take " + std::to_string(all) + " tokens; the model's context is " +
                             std::to_string(context));
  }
}

json Profile::parameters() const {
  std::uint64_t hash = fingerprint(std::string());
  for (const Sample& sample : samples_) {
    for (const auto* part : {&sample.context, &sample.asked, &sample.reply}) hash = fingerprint(*part, hash);
  }
  json selectors;
  for (const auto& name : o_.selectors) selectors.push_back(kvt::full_name(name));
  const std::filesystem::path model = o_.common.model_path();
  return {{"model", model.filename().string()},
          {"engine", name_of(o_.common.engine)},
          {"samples", std::to_string(hash)},
          {"selectors", selectors},
          {"chunk", o_.common.chunk},
          {"sink", o_.common.zones.sink_rows},
          {"mean", o_.mean},
          {"block", o_.common.zones.block_rows},
          {"recent", o_.common.zones.recent_rows},
          {"per_layer", o_.per_layer}};
}

void Profile::load() {
  if (!std::filesystem::exists(o_.resume)) return;
  kvt::TensorFile file;
  check(kvt::read_safetensors(o_.resume, file));
  if (file.metadata["format"] != "kvt-llm profile 2" || file.metadata["parameters"] != parameters().dump()) {
    throw std::runtime_error("the file " + o_.resume + " is of another profile: other samples, selectors or options");
  }
  for (std::size_t s = 0; s < found_.size(); ++s) {
    auto& losses = file.tensors["losses." + std::to_string(s)].numbers;
    auto& tables = file.tensors["tables." + std::to_string(s)].numbers;
    if (losses.size() != found_[s].pool.losses().size() || tables.size() != found_[s].tables.size()) {
      throw std::runtime_error("the file " + o_.resume + " does not hold what its header says");
    }
    found_[s].pool.losses() = std::move(losses);
    found_[s].tables = std::move(tables);
  }
  done_ = std::clamp(std::atoi(file.metadata["done"].c_str()), 0, static_cast<int>(samples_.size()));
}

void Profile::save(int done) const {
  if (o_.resume.empty()) return;
  kvt::TensorFile file;
  file.metadata = {{"format", "kvt-llm profile 2"}, {"parameters", parameters().dump()}, {"done", std::to_string(done)}};
  for (std::size_t s = 0; s < found_.size(); ++s) {
    const auto& losses = found_[s].pool.losses();
    const auto& tables = found_[s].tables;
    file.tensors["losses." + std::to_string(s)] = {{losses.size()}, losses};
    file.tensors["tables." + std::to_string(s)] = {{tables.size()}, tables};
  }
  check(kvt::write_safetensors(o_.resume, file, kvt::FloatType::fp32));
}

std::vector<float> Profile::see_importance(kvt::AnyCache& cache, const Sample& sample) const {
  const int chunk = o_.common.chunk;
  return kvt_llm::see_importance(cache, chunk, o_.mean ? kvt::OverQueries::sum : kvt::OverQueries::largest,
                                 [&](const Look& look) {
                                   if (sample.reply.empty()) {
                                     repeat_context(*engine_, cache, *tokenizer_, sample.context, chunk, look);
                                   } else {
                                     read_answer(*engine_, cache, sample.asked, sample.reply, chunk, look);
                                   }
                                 });
}

void Profile::learn(const Sample& sample) {
  const std::size_t rows = sample.context.size(), heads = static_cast<std::size_t>(shape_.num_heads());
  std::vector<std::vector<float>> scores(o_.selectors.size());
  std::map<std::pair<std::uint32_t, int>, std::vector<std::size_t>> groups;
  for (std::size_t s = 0; s < o_.selectors.size(); ++s) {
    groups[observed_by({"uniform", o_.selectors[s], "fp16"})].push_back(s);
  }
  std::unique_ptr<kvt::AnyCache> cache;
  for (const auto& [observed, group] : groups) {
    kvt::CacheOptions told = told_of(*model_, {"uniform", "sink_recent", "fp16"}, o_.common.zones);
    told.output_projections = model_->output_projections();
    cache = make_cache({"uniform", o_.selectors[group.front()], "fp16"}, shape_, told);
    prefill(*engine_, *cache, *tokenizer_, sample.context, o_.common.chunk);
    for (const std::size_t s : group) {
      set_policies(*cache, {"uniform", o_.selectors[s], "fp16"});
      check(cache->scores(0.2, scores[s]));  // the share matters to selectors that choose in stages; the paper's own
    }
  }
  std::vector<float> importance = see_importance(*cache, sample);
  const auto first = static_cast<std::size_t>(first_free()), n = static_cast<std::size_t>(free_rows(rows));
  // The largest of many queries is more than that of few: a text counts as much as any other, repeated or asked about.
  double all = 0;
  for (std::size_t h = 0; h < heads; ++h) {
    const auto free = std::span(importance).subspan(h * rows + first, n);
    all = std::accumulate(free.begin(), free.end(), all);
  }
  for (float& x : importance) x = all > 0 ? static_cast<float>(static_cast<double>(x) / all) : 0.f;
  for (std::size_t s = 0; s < found_.size(); ++s) {
    kvt::LossPool own(shape_.num_heads());
    std::vector<kvt::Option> losses;
    for (std::size_t h = 0; h < heads; ++h) {
      const auto part = [&](const std::vector<float>& of_heads) { return std::span(of_heads).subspan(h * rows + first, n); };
      check(kvt::retention_losses(part(scores[s]), part(importance), losses));
      own.add(static_cast<int>(h), losses);
    }
    kvt::Table table;
    check(kvt::utility_table(own.curves(), shape_.num_layers, {steps, o_.per_layer}, table));
    for (std::size_t i = 0; i < table.numbers.size(); ++i) found_[s].tables[i] += table.numbers[i];
    for (std::size_t i = 0; i < own.losses().size(); ++i) found_[s].pool.losses()[i] += own.losses()[i];
  }
}

void Profile::run() {
  Progress progress("profile", static_cast<long long>(samples_.size()));
  progress.advance(done_);
  for (; done_ < static_cast<int>(samples_.size()); progress.advance(1)) {
    learn(samples_[static_cast<std::size_t>(done_)]);
    save(++done_);
  }
}

kvt::Table Profile::table_of(std::size_t s) const {
  kvt::Table table;
  check(kvt::utility_table(found_[s].pool.curves(), shape_.num_layers, {steps, o_.per_layer}, table));
  if (o_.average) {
    for (std::size_t i = 0; i < table.numbers.size(); ++i) {
      table.numbers[i] = std::clamp(found_[s].tables[i] / static_cast<float>(samples_.size()), 0.f, 1.f);
    }
  }
  return table;
}

// Of the importance of all rows, what is lost where heads drop such shares [heads].
double Profile::predicted_loss(std::size_t s, const std::vector<float>& dropped) const {
  double lost = 0, all = 0;
  const auto curves = found_[s].pool.curves();
  for (std::size_t h = 0; h < curves.size(); ++h) {
    const double kept = (1 - static_cast<double>(dropped[h])) * kvt::LossPool::points;
    const auto below = static_cast<std::size_t>(kept), above = std::min(below + 1, curves[h].size() - 1);
    lost += std::lerp(curves[h][below].loss, curves[h][above].loss, kept - static_cast<double>(below));
    all += curves[h].front().loss;
  }
  return all > 0 ? lost / all : 0;
}

void Profile::report() const {
  FILE* const out = o_.common.text();
  const auto heads = static_cast<std::size_t>(shape_.num_heads());
  json results = json::array();
  std::size_t tokens = 0;
  for (const Sample& sample : samples_) tokens += sample.context.size();
  const std::string data = o_.samples.data(), importance = o_.samples.done();
  std::fprintf(out, "%zu texts, %zu tokens on average; %s\n", samples_.size(), tokens / samples_.size(), importance.c_str());
  std::fprintf(out, "lost of all importance, as these texts would have it, where heads keep equal shares and by the curve:\n");
  std::fprintf(out, "%-28s", "selector");
  for (const int kept : {50, 25, 15, 10}) std::fprintf(out, "  %9d %% kept", kept);
  std::fprintf(out, "\n");
  for (std::size_t s = 0; s < found_.size(); ++s) {
    const kvt::Table table = table_of(s);
    kvt::Curve curve{table.numbers, shape_.num_layers, shape_.num_kv_heads, kvt::full_name(o_.selectors[s])};
    check(curve.check(shape_));
    check(kvt::write_curve(
        o_.outs[s], curve,
        {{"model", std::filesystem::path(o_.common.model_path()).filename().string()},
         {"head_dim", std::to_string(shape_.head_dim)},
         {"num_q_heads", std::to_string(shape_.num_q_heads)},
         {"data", data},
         {"part", name_of(o_.samples.part)},
         {"importance", importance + (o_.mean ? ", mean over queries" : ", largest over queries")},
         {"samples", std::to_string(samples_.size()) + " of " + std::to_string(tokens / samples_.size()) + " tokens"},
         {"seed", std::to_string(o_.samples.make.seed)},
         {"sink_rows", std::to_string(o_.common.zones.sink_rows)},
         {"recent_rows", std::to_string(o_.common.zones.recent_rows)},
         {"shared", std::string(o_.per_layer ? "within each layer" : "over all layers") +
                        (o_.average ? ", tables of texts averaged" : ", losses of texts added")},
         {"source", "LU-KV, arXiv 2602.08585"}}));
    std::fprintf(out, "%-28s", o_.selectors[s].c_str());
    json result = {{"selector", curve.selector}, {"file", o_.outs[s]}};
    for (const int kept : {50, 25, 15, 10}) {
      const float* const row = table.numbers.data() + (steps - static_cast<std::size_t>(kept)) * heads;
      const double even = predicted_loss(s, std::vector<float>(heads, 1 - static_cast<float>(kept) / 100)),
                   own = predicted_loss(s, std::vector<float>(row, row + heads));
      std::fprintf(out, "  %6.2f %6.2f", 100 * even, 100 * own);
      result["lost"].push_back({{"kept", kept}, {"equal_shares", even}, {"curve", own}});
    }
    std::fprintf(out, "\n");
    results.push_back(result);
    if (!plots_.empty()) {
      plots_[s].draw(o_.selectors[s] + ", " + data + ": " + importance, table, found_[s].pool.curves());
    }
  }
  json result = parameters();
  result["importance"] = importance;
  result["results"] = results;
  o_.common.write(result);
}

}  // namespace

void add_profile(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command = app.add_subcommand("profile", "find out how many rows each head should keep, for the allocator curve");
  o->common.add(*command, 256);
  o->common.add_engine(*command);
  command->add_option("--selector", o->selectors, "token selector by whose scores rows will be kept; repeat for more")
      ->required();
  command->add_option("--out", o->outs, "curve file, safetensors, for the --selector in the same place")->required();
  o->samples.add(*command);
  command->add_flag("--mean", o->mean, "what rows give to queries is added instead of the largest taken");
  command->add_flag("--average", o->average,
                    "average the tables of single texts, as published, instead of adding their losses");
  command->add_flag("--per-layer", o->per_layer, "every layer keeps as much as any other");
  command->add_option("--resume", o->resume, "file that keeps what each text showed, and from which the next run goes on");
  command->add_option("--plot", o->plots,
                      "also draw what heads keep and lose into this file, .svg or .png, one for each --out");
  command->add_flag("--bytes", o->bytes,
                    "find out in which form rows are kept too, for budgets in bytes: one --selector and one --out, read by the "
                    "name bytes:FILE");
  command->add_option("--codec", o->byte_options.codecs, "with --bytes: forms that rows may have. Join parameters by +")
      ->capture_default_str();
  command->add_option("--weights", o->byte_options.weights, "with --bytes: f32 (dequantised, made once) or file (as they are)")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "file"}));
  command->add_option("--weighed", o->byte_options.weighed, "with --bytes: samples by which layers are weighed")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command
      ->add_option("--check", o->byte_options.checked,
                   "with --bytes: single options whose prediction is compared with their KL")
      ->check(CLI::NonNegativeNumber);
  command->callback([o] {
    if (o->bytes) {
      if (o->selectors.size() != 1 || o->outs.size() != 1)
        throw std::runtime_error("with --bytes there is one --selector and one --out");
      if (!o->plots.empty() || !o->resume.empty() || o->mean || o->average || o->per_layer)
        throw std::runtime_error("--plot, --resume, --mean, --average and --per-layer are not for --bytes");
      return profile_bytes(o->common, o->samples, o->byte_options, o->selectors.front(), o->outs.front());
    }
    Profile profile(*o);
    profile.run();
    profile.report();
  });
}

}  // namespace kvt_llm
