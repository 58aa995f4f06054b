// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm retrieve: what is still found in a document whose cache was cut, for several compositions and budgets. The cache is
// cut before the question is seen, unless --question-aware says otherwise.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <stdexcept>

#include "answers.hpp"
#include "command.hpp"
#include "engine.hpp"
#include "hindsight.hpp"
#include "plot.hpp"
#include "prefill.hpp"
#include "prompt.hpp"
#include "results.hpp"
#include "shared_prefill.hpp"
#include "tasks.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

struct Options {
  Common common;
  std::string text, plot, resume;
  std::vector<std::string> methods, retains, tasks;
  int samples = 8;
  Part part = Part::all;
  Tasks::Options make;
  bool question_aware = false;
};

struct Method {
  std::string text;
  kvt::Composition names;
  bool oracle = false;
};

struct Retention {
  std::string text;
  Budget budget;
};

const Method full_cache = {"full", {"uniform", "sink_recent", "fp16"}};
const Retention everything = {"", {}};

Method parse_method(const std::string& text) {
  const auto names = split_names(text);
  if (names.size() != 3) throw std::runtime_error("--method " + text + " must be ALLOCATOR,SELECTOR,CODEC");
  Method method{text, {names[0], names[1], names[2]}};
  method.oracle = take_oracle(method.names);
  return method;
}

// Of a question over what was cut.
struct Cell {
  Score score;
  double rows_share = 0, bytes = 0;

  json to_json() const { return {score.exact, score.partial, score.log_prob, rows_share, bytes}; }
  static Cell from(const json& j) { return {{j.at(0), j.at(1), j.at(2)}, j.at(3), j.at(4)}; }
};

struct Summary {
  Mean exact, partial, log_prob, rows_share, bytes;

  static constexpr std::pair<const char*, Mean Summary::*> fields[] = {{"exact_match", &Summary::exact},
                                                                       {"partial", &Summary::partial},
                                                                       {"log_prob", &Summary::log_prob},
                                                                       {"rows_share", &Summary::rows_share},
                                                                       {"measured_bytes", &Summary::bytes}};
  static Summary of(const std::vector<Cell>& cells) {
    std::vector<double> of_field[std::size(fields)];
    for (const Cell& c : cells) {
      const double parts[] = {c.score.exact, c.score.partial, c.score.log_prob, c.rows_share, c.bytes};
      for (std::size_t f = 0; f < std::size(fields); ++f) of_field[f].push_back(parts[f]);
    }
    Summary s;
    for (std::size_t f = 0; f < std::size(fields); ++f) s.*fields[f].second = Mean::of(of_field[f]);
    return s;
  }
  static Summary over(const std::vector<Summary>& summaries) {
    Summary s;
    for (const auto& [name, field] : fields) {
      std::vector<Mean> parts;
      for (const Summary& each : summaries) parts.push_back(each.*field);
      s.*field = Mean::over(parts);
    }
    return s;
  }
  json to_json() const {
    json out;
    for (const auto& [name, field] : fields) {
      out[name] = (this->*field).value;
      out[std::string(name) + "_error"] = (this->*field).error;
    }
    return out;
  }
};

class Benchmark {
 public:
  explicit Benchmark(const Options& o);
  void run();
  void report() const;

 private:
  // A method at a retention, with a summary for each task.
  struct Row {
    const Method& method;
    const Retention& retention;
    std::vector<Summary> of_task;
    Summary mean;  // of the tasks that are solved
  };

  // What one method cuts from a cache.
  struct Run {
    const Method& method;
    std::span<const Retention> retentions;
  };

  void read_options();
  std::vector<std::vector<Run>> groups() const;
  void check_context(int tokens) const;
  void make_prompts();
  json parameters() const;
  json key(const Prompt& prompt, const Method& method, const Retention& retention) const;
  void run_group(const Prompt& prompt, const std::vector<Run>& group, Progress& progress);
  std::vector<Cell> cells(const std::string& task, const Method& method, const Retention& retention,
                          std::optional<double> depth = {}) const;
  Row row(const Method& method, const Retention& retention) const;
  std::vector<Row> rows() const;
  void print_table(FILE* out, const std::vector<Row>& rows, bool of_solved) const;
  json to_json(const Row& row) const;

  const Options& o_;
  std::vector<std::string> tasks_;
  std::vector<Method> methods_;
  std::vector<Retention> retentions_;
  std::optional<Plot> plot_;
  std::string text_;
  std::optional<Tokenizer> tokenizer_;
  std::optional<Model> model_;
  std::optional<Engine> engine_;
  std::vector<Prompt> prompts_;
  std::vector<bool> solved_;  // of each task
  Results results_;
};

// Whatever can be refused is refused before minutes are spent.
Benchmark::Benchmark(const Options& o) : o_(o) {
  read_options();
  if (!o.plot.empty()) plot_.emplace(o.plot);
  const std::string& path = o.common.model_path();
  text_ = read_part(o.text, o.part);
  model_.emplace(path, o_.common.engine);
  for (const auto& method : methods_) {
    make_cache(method.names, model_->parameters().layers, told_of(*model_, method.names, o.common.zones));
  }
  make_prompts();
  if (!o.resume.empty()) results_ = Results(o.resume, parameters());
  engine_.emplace(*model_, o.common.threads);
}

void Benchmark::read_options() {
  tasks_ = o_.tasks.empty() ? Tasks::names(o_.make.wording) : o_.tasks;
  for (const auto& task : tasks_) Tasks::check_name(task, o_.make.wording);
  for (std::size_t i = 0; i < tasks_.size(); ++i) {
    if (std::find(tasks_.begin(), tasks_.begin() + static_cast<std::ptrdiff_t>(i), tasks_[i]) !=
        tasks_.begin() + static_cast<std::ptrdiff_t>(i))
      throw std::runtime_error("the task " + tasks_[i] + " is given twice");
  }
  if (o_.methods.empty() != o_.retains.empty()) throw std::runtime_error("--method and --retain need each other");
  for (const auto& text : o_.methods) methods_.push_back(parse_method(text));
  if (o_.question_aware && std::any_of(methods_.begin(), methods_.end(), [](const Method& m) { return m.oracle; }))
    throw std::runtime_error("the oracle has read the question anyway: give it no --question-aware");
  for (const auto& text : o_.retains) retentions_.push_back({text, Budget::parse(text)});
}

void Benchmark::check_context(int tokens) const {
  const int context = model_->parameters().context;
  if (tokens <= context) return;
  throw std::runtime_error("--tokens " + std::to_string(o_.make.tokens) + " and a question take " + std::to_string(tokens) +
                           " tokens or more; the model's context is " + std::to_string(context));
}

void Benchmark::make_prompts() {
  check_context(o_.make.tokens);
  const Tokenizer& tokenizer = tokenizer_.emplace(o_.common.model_path());
  const Haystack haystack(tokenizer, text_);
  const Tasks tasks(haystack, o_.make);
  int most = 0;
  for (int number = 0; number < tasks.count("passkey", o_.samples); ++number) {
    for (const auto& task : tasks_) {
      if (number >= tasks.count(task, o_.samples)) continue;
      prompts_.push_back(make_prompt(tokenizer, tasks.make(task, number), o_.question_aware));
      const auto& prompt = prompts_.back();
      for (const auto& reply : prompt.replies)
        most = std::max(most, static_cast<int>(prompt.context.size() + prompt.asked.size() + reply.tokens.size()));
      for (const auto& retention : retentions_)
        retention.budget.check_room(static_cast<int>(prompt.context.size()), o_.common.zones);
    }
  }
  check_context(most);
}

json Benchmark::parameters() const {
  const std::filesystem::path model = o_.common.model_path();
  return {{"format", "kvt-llm retrieve 1"},
          {"model", model.filename().string()},
          {"model_bytes", std::filesystem::file_size(model)},
          {"engine", name_of(o_.common.engine)},
          {"text_hash", hex(fingerprint(text_))},
          {"tokens", o_.make.tokens},
          {"seed", o_.make.seed},
          {"wording", o_.make.wording},
          {"depths", o_.make.depths},
          {"question_aware", o_.question_aware},
          {"chunk", o_.common.chunk},
          {"sink", o_.common.zones.sink_rows},
          {"recent", o_.common.zones.recent_rows},
          {"block", o_.common.zones.block_rows}};
}

json Benchmark::key(const Prompt& prompt, const Method& method, const Retention& retention) const {
  return {prompt.question.task, prompt.question.number, method.text, retention.text};
}

std::vector<std::vector<Benchmark::Run>> Benchmark::groups() const {
  std::vector<Run> runs = {{full_cache, std::span(&everything, 1)}};
  for (const auto& method : methods_) runs.push_back({method, retentions_});
  return sharing_prefill(runs, [](const Run& run) { return run.method.names; });
}

void Benchmark::run_group(const Prompt& prompt, const std::vector<Run>& group, Progress& progress) {
  std::vector<kvt::Composition> served;
  for (const auto& run : group) served.push_back(run.method.names);
  const auto look_ahead = [&](kvt::AnyCache& cache) {
    return see_importance(cache, o_.common.chunk, kvt::OverQueries::largest, [&](const Look& look) {
      read_answer(*engine_, cache, prompt.asked, prompt.replies.front().tokens, o_.common.chunk, look);
    });
  };
  SharedPrefill whole(
      *model_, o_.common.zones, served,
      [&](kvt::AnyCache& cache) { prefill(*engine_, cache, *tokenizer_, prompt.context, o_.common.chunk); }, look_ahead);
  for (const auto& [method, retentions] : group) {
    for (const auto& retention : retentions) {
      const json name = key(prompt, method, retention);
      if (results_.find(name) == nullptr) {
        const auto cache = whole.cut(method.names, retention.budget, method.oracle);
        Cell cell;
        cell.rows_share = mean_rows(*cache) / static_cast<double>(prompt.context.size());
        cell.bytes = static_cast<double>(whole.bytes_of(*cache));
        cell.score = answer(reader_of(*engine_, *cache), prompt, static_cast<std::size_t>(model_->parameters().vocabulary));
        results_.add(name, cell.to_json());
      }
      progress.advance(1);
    }
  }
}

void Benchmark::run() {
  const auto runs = prompts_.size() * (1 + methods_.size() * retentions_.size());
  Progress progress("retrieve", static_cast<long long>(runs));
  const auto all = groups();
  for (const auto& prompt : prompts_) {
    for (const auto& group : all) run_group(prompt, group, progress);
  }
  for (const auto& task : tasks_) solved_.push_back(Summary::of(cells(task, full_cache, everything)).exact.value >= 0.5);
}

std::vector<Cell> Benchmark::cells(const std::string& task, const Method& method, const Retention& retention,
                                   std::optional<double> depth) const {
  std::vector<Cell> out;
  for (const auto& prompt : prompts_) {
    if (prompt.question.task != task || (depth && prompt.question.depth != depth)) continue;
    out.push_back(Cell::from(*results_.find(key(prompt, method, retention))));
  }
  return out;
}

Benchmark::Row Benchmark::row(const Method& method, const Retention& retention) const {
  Row row{method, retention, {}, {}};
  std::vector<Summary> solved;
  for (std::size_t t = 0; t < tasks_.size(); ++t) {
    row.of_task.push_back(Summary::of(cells(tasks_[t], method, retention)));
    if (solved_[t]) solved.push_back(row.of_task.back());
  }
  if (!solved.empty()) row.mean = Summary::over(solved);
  return row;
}

std::vector<Benchmark::Row> Benchmark::rows() const {
  std::vector<Row> rows = {row(full_cache, everything)};
  for (const auto& method : methods_) {
    for (const auto& retention : retentions_) rows.push_back(row(method, retention));
  }
  return rows;
}

// The tasks that the full cache solves, with their means, or the others.
void Benchmark::print_table(FILE* out, const std::vector<Row>& rows, bool of_solved) const {
  std::vector<std::size_t> shown;
  for (std::size_t t = 0; t < tasks_.size(); ++t) {
    if (solved_[t] == of_solved) shown.push_back(t);
  }
  if (shown.empty()) return;
  const auto column = [&](std::size_t t) {
    return (tasks_[t].starts_with("niah_") ? tasks_[t].substr(5) : tasks_[t]) + (of_solved ? "" : "*");
  };
  std::size_t wide = 6;
  for (const auto& r : rows) wide = std::max(wide, r.method.text.size());
  std::fprintf(out, "\n");
  if (!of_solved) std::fprintf(out, "* not solved by the full cache (exact match below 50 %%), and not in the means:\n");
  std::fprintf(out, "%-*s %10s", static_cast<int>(wide), "method", "retain");
  if (of_solved) std::fprintf(out, " %6s %7s", "rows", "MiB");
  for (const auto t : shown) std::fprintf(out, " %*s", std::max(6, static_cast<int>(column(t).size())), column(t).c_str());
  std::fprintf(out, of_solved ? " | %6s %5s %7s %7s\n" : "\n", "mean", "+-", "partial", "log p");
  for (const auto& r : rows) {
    std::fprintf(out, "%-*s %10s", static_cast<int>(wide), r.method.text.c_str(), r.retention.text.c_str());
    if (of_solved) std::fprintf(out, " %5.1f%% %7.3f", 100 * r.mean.rows_share.value, r.mean.bytes.value / mebibyte);
    for (const auto t : shown) {
      std::fprintf(out, " %*.1f", std::max(6, static_cast<int>(column(t).size())), 100 * r.of_task[t].exact.value);
    }
    if (of_solved) {
      std::fprintf(out, " | %6.1f %5.1f %7.1f %7.3f", 100 * r.mean.exact.value, 100 * r.mean.exact.error,
                   100 * r.mean.partial.value, r.mean.log_prob.value);
    }
    std::fprintf(out, "\n");
  }
}

json Benchmark::to_json(const Row& row) const {
  json of_task = json::array();
  for (std::size_t t = 0; t < tasks_.size(); ++t) {
    json task = row.of_task[t].to_json();
    task["task"] = tasks_[t];
    task["samples"] = cells(tasks_[t], row.method, row.retention).size();
    task["solved"] = static_cast<bool>(solved_[t]);
    if (tasks_[t] == "passkey") {
      for (const double depth : o_.make.depths) {
        json at = Summary::of(cells(tasks_[t], row.method, row.retention, depth)).to_json();
        at["depth"] = depth;
        task["depths"].push_back(at);
      }
    }
    of_task.push_back(task);
  }
  const bool full = &row.method == &full_cache;
  const bool any = std::find(solved_.begin(), solved_.end(), true) != solved_.end();
  return {{"method", row.method.text},
          {"retain", full ? json() : json(row.retention.text)},
          {"mean", any ? row.mean.to_json() : json()},
          {"tasks", of_task}};
}

void Benchmark::report() const {
  const auto all = rows();
  FILE* const out = o_.common.text();
  std::size_t tokens = 0;
  for (const auto& prompt : prompts_) tokens += prompt.context.size();
  std::fprintf(out, "%zu questions, on average after %zu tokens; exact match, %%\n", prompts_.size(), tokens / prompts_.size());
  print_table(out, all, true);
  print_table(out, all, false);
  json result = parameters();
  result["text"] = o_.text;
  result["samples"] = o_.samples;
  result["tasks"] = tasks_;
  for (const auto& r : all) result["results"].push_back(to_json(r));
  o_.common.write(result);
  if (!plot_) return;
  std::vector<Plot::Line> lines;
  for (std::size_t m = 0; m < methods_.size(); ++m) {
    auto& line = lines.emplace_back(Plot::Line{methods_[m].text, {}});
    for (std::size_t r = 0; r < retentions_.size(); ++r) {
      const auto& mean = all[1 + m * retentions_.size() + r].mean;
      line.points.push_back({100 * mean.rows_share.value, 100 * mean.exact.value});
    }
  }
  plot_->draw(std::filesystem::path(o_.text).filename().string() + ", " + std::to_string(o_.make.tokens) + " tokens, " +
                  std::to_string(o_.samples) + " samples a task",
              lines, 100 * all[0].mean.exact.value);
}

}  // namespace

void add_retrieve(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command = app.add_subcommand("retrieve", "what is still found in a document whose cache was cut");
  o->common.add(*command, 256);
  o->common.add_engine(*command);
  std::string known;
  for (const auto& name : Tasks::names()) known += (known.empty() ? "" : ", ") + name;
  command->add_option("--text", o->text, "text file in which things are hidden")->required();
  command->add_option(
      "--method", o->methods,
      "ALLOCATOR,SELECTOR,CODEC; repeat for more; none: the full cache alone. Join a policy's parameters by +: "
      "snap_kv:window=32+kernel=7. The selector oracle has read the question and its answer before the cut: what "
      "is left to others, and nothing that can be run");
  command
      ->add_option("--retain", o->retains,
                   "what may be kept of the document: shares of its rows, rows a KV head, or bytes; 0.5,200rows")
      ->delimiter(',');
  command->add_option("--tasks", o->tasks, "of " + known + " (default: all that have the wording)")->delimiter(',');
  add_question_options(*command, o->make);
  add_part_option(*command, o->part);
  command->add_option("--samples", o->samples, "questions of each task; of passkey, in whole rounds of the depths")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--depths", o->make.depths, "where the passkeys are, 0 to 1")
      ->capture_default_str()
      ->delimiter(',')
      ->check(number_between(0, 1));
  command->add_flag("--question-aware", o->question_aware, "cut the cache after the question instead of before it");
  command->add_option("--resume", o->resume, "file that keeps each result as it is made, and from which the next run goes on");
  command->add_option("--plot", o->plot, "also draw exact match against rows into this file, .svg or .png, with gnuplot");
  command->callback([o] {
    Benchmark benchmark(*o);
    benchmark.run();
    benchmark.report();
  });
}

}  // namespace kvt_llm
