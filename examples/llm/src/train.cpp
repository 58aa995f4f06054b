// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm train: scores of rows and shares of heads, learned by distilling the model with its full cache into itself with a
// part of it.
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <stdexcept>

#include "command.hpp"
#include "lessons.hpp"
#include "trainer.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

struct Options {
  Common common;
  LessonOptions lessons;
  TrainOptions train;
  int held_out = 6, every = 50, stop_after = 1 << 30;
  std::string out, resume;
};

volatile std::sig_atomic_t stop_asked = 0;

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const auto& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

class Training {
 public:
  explicit Training(Options& o) : o_(o) {}
  void run();

 private:
  json parameters() const;
  std::map<std::string, std::string> told() const;
  json look(Trainer& trainer);

  Options& o_;
  std::vector<Lesson> lessons_;
};

json Training::parameters() const {
  std::uint64_t hash = fingerprint(std::string());
  for (const Lesson& lesson : lessons_) {
    hash = fingerprint(lesson.tokens, hash);
    for (const Exercise& exercise : lesson.exercises) hash = fingerprint(exercise.tokens, hash);
  }
  const auto& t = o_.train;
  return {{"model", std::filesystem::path(o_.common.model_path()).filename().string()},
          {"lessons", std::to_string(hash)},
          {"held_out", o_.held_out},
          {"sink", o_.common.zones.sink_rows},
          {"recent", o_.common.zones.recent_rows},
          {"chunk", o_.common.chunk},
          {"steps", t.steps},
          {"batch", t.batch},
          {"hidden", t.hidden},
          {"width", t.width},
          {"shared", t.shared},
          {"score_rate", t.score_rate},
          {"share_rate", t.share_rate},
          {"warm", t.warm},
          {"cold", t.cold},
          {"least", t.least},
          {"most", t.most},
          {"keep_scores", t.keep_scores},
          {"keep_shares", t.keep_shares},
          {"seed", t.seed}};
}

std::map<std::string, std::string> Training::told() const {
  std::vector<std::string> names;
  for (const auto& path : o_.lessons.texts) names.push_back(std::filesystem::path(path).filename().string());
  return {{"model", std::filesystem::path(o_.common.model_path()).filename().string()},
          {"keys", "before RoPE"},
          {"data", joined(names)},
          {"part", name_of(o_.lessons.part)},
          {"lessons", std::to_string(lessons_.size() - static_cast<std::size_t>(o_.held_out)) + " of " +
                          std::to_string(o_.lessons.make.tokens) + " tokens: continuation, repetition; " +
                          joined(o_.lessons.tasks) + " in the wordings " + joined(o_.lessons.wordings)},
          {"parameters", parameters().dump()},
          {"source",
           "LKV, arXiv 2605.06676; what it leaves open is as in learn/token_scorer.hpp, learn/budget_head.hpp and "
           "learn/soft_top_k.hpp"}};
}

json Training::look(Trainer& trainer) {
  json found;
  std::fprintf(o_.common.text(), "  held out, step %4d:", trainer.steps_done());
  for (const double retention : {0.25, 0.15, 0.1}) {
    std::fprintf(o_.common.text(), "  %g:", retention);
    for (const auto& [kind, kl] : trainer.held_out(retention)) {
      std::fprintf(o_.common.text(), " %s %.4f", kind.c_str(), kl);
      found.push_back({{"step", trainer.steps_done()}, {"retention", retention}, {"kind", kind}, {"kl", kl}});
    }
  }
  std::fprintf(o_.common.text(), "\n");
  std::fflush(o_.common.text());
  return found;
}

void Training::run() {
  if (!(o_.train.least <= o_.train.most)) throw std::runtime_error("--least is above --most");
  // Whatever can be refused is refused before minutes are spent.
  for (const std::string& path : {o_.out, o_.resume}) {
    if (path.empty()) continue;
    const auto folder = std::filesystem::absolute(path).parent_path();
    if (!std::filesystem::is_directory(folder)) throw std::runtime_error("there is no folder " + folder.string());
  }
  const Tokenizer tokenizer(o_.common.model_path());
  const Model model(o_.common.model_path());
  for (const auto& wording : o_.lessons.wordings) {
    if (std::find(Tasks::wordings().begin(), Tasks::wordings().end(), wording) == Tasks::wordings().end())
      throw std::runtime_error("there is no wording \"" + wording + "\"; known: " + joined(Tasks::wordings()));
  }
  for (const auto& task : o_.lessons.tasks) Tasks::check_name(task, Tasks::wordings().front());
  o_.lessons.samples += o_.held_out;
  lessons_ = make_lessons(tokenizer, o_.lessons);
  const auto& p = model.parameters();
  for (const Lesson& lesson : lessons_) {
    std::size_t most = lesson.tokens.size() + 64;  // the request to repeat them all
    for (const Exercise& exercise : lesson.exercises) most = std::max(most, exercise.tokens.size());
    if (static_cast<int>(lesson.tokens.size() + most) > p.context) {
      throw std::runtime_error("a text of " + std::to_string(lesson.tokens.size()) + " tokens, which the model is to repeat, " +
                               "does not fit its context of " + std::to_string(p.context));
    }
    if (static_cast<int>(lesson.tokens.size()) <= o_.common.zones.sink_rows + o_.common.zones.recent_rows) {
      throw std::runtime_error("a text has " + std::to_string(lesson.tokens.size()) +
                               " tokens, all of which are sink or recent rows");
    }
  }
  const double start = seconds();
  {
    Engine engine(model, o_.common.threads);
    Progress progress("read", static_cast<long long>(lessons_.size()));
    for (Lesson& lesson : lessons_) {
      read_lesson(engine, tokenizer, o_.common, lesson);
      progress.advance(1);
    }
  }
  const Weights<float> weights = weights_of(model);
  Trainer trainer(weights, o_.common.zones, lessons_, lessons_.size() - static_cast<std::size_t>(o_.held_out), o_.train,
                  o_.common.threads);
  const std::string own = parameters().dump();
  json log = json::array();
  const auto note = [&](json found) { log.insert(log.end(), found.begin(), found.end()); };
  if (!o_.resume.empty() && std::filesystem::exists(o_.resume)) {
    trainer.read_state(o_.resume, own);
  } else {
    trainer.warm_start();
    note(look(trainer));
  }
  const auto save = [&] {
    if (!o_.resume.empty()) trainer.write_state(o_.resume, own);
    check(kvt::write_learned(o_.out, trainer.policy(), told()));
  };
  save();
  // A step is never left half done.
  std::signal(SIGINT, [](int) { stop_asked = 1; });
  std::signal(SIGTERM, [](int) { stop_asked = 1; });
  {
    Progress progress("train", o_.train.steps);
    progress.advance(trainer.steps_done());
    double sum = 0;
    const int last =
        o_.train.steps - trainer.steps_done() > o_.stop_after ? trainer.steps_done() + o_.stop_after : o_.train.steps;
    for (int since = 0; trainer.steps_done() < last && stop_asked == 0;) {
      sum += trainer.step();
      ++since;
      progress.advance(1);
      if (trainer.steps_done() % o_.every != 0 && trainer.steps_done() < last) continue;
      std::fprintf(o_.common.text(), "step %4d, %.0f s: KL %.4f\n", trainer.steps_done(), seconds() - start, sum / since);
      log.push_back({{"step", trainer.steps_done()}, {"seconds", seconds() - start}, {"kl", sum / since}});
      note(look(trainer));
      save();
      sum = 0;
      since = 0;
    }
  }
  save();
  json result = parameters();
  result["log"] = log;
  result["seconds"] = seconds() - start;
  o_.common.write(result);
  if (stop_asked != 0)
    throw std::runtime_error("stopped after step " + std::to_string(trainer.steps_done()) + "; " + o_.out +
                             " is as it was then");
}

}  // namespace

void add_train(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command =
      app.add_subcommand("train", "learn which rows matter and how many each head should keep, from the full cache");
  o->common.add(*command, 256);
  command->add_option("--text", o->lessons.texts, "text file; repeat for more")->required();
  command->add_option("--out", o->out, "policy file, safetensors, for the selector and the allocator \"learned\"")->required();
  command->add_option("--tokens", o->lessons.make.tokens, "length of a piece of text")
      ->capture_default_str()
      ->check(CLI::Range(50, 1 << 20));
  command->add_option("--continuation", o->lessons.continuation, "tokens behind a piece that the policy is trained on")
      ->capture_default_str()
      ->check(CLI::Range(8, 4096));
  add_part_option(*command, o->lessons.part);
  o->lessons.tasks = {"niah_single", "niah_multikey", "niah_multiquery"};
  command->add_option("--tasks", o->lessons.tasks, "questions that are a third of the lessons")
      ->delimiter(',')
      ->capture_default_str();
  o->lessons.wordings = {"magic"};
  command->add_option("--wordings", o->lessons.wordings, "of the questions, in turn")->delimiter(',')->capture_default_str();
  command->add_option("--samples", o->lessons.samples, "lessons")->capture_default_str()->check(CLI::Range(3, 100000));
  command->add_option("--held-out", o->held_out, "lessons more that are not trained on")
      ->capture_default_str()
      ->check(CLI::Range(0, 10000));
  command->add_option("--steps", o->train.steps, "0 for the warm start alone")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 20));
  command->add_option("--batch", o->train.batch, "lessons a step")->capture_default_str()->check(CLI::Range(1, 1024));
  command->add_option("--hidden", o->train.hidden, "hidden units of a head's scorer")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  command->add_option("--score-rate", o->train.score_rate, "of Adam")->capture_default_str()->check(number_between(0, 1));
  command->add_option("--share-rate", o->train.share_rate, "of Adam")->capture_default_str()->check(number_between(0, 1));
  command->add_option("--warm", o->train.warm, "temperature of the first step")->capture_default_str()->check(number_above(0));
  command->add_option("--cold", o->train.cold, "temperature of the last step")->capture_default_str()->check(number_above(0));
  command->add_option("--least", o->train.least, "smallest retention of a step")
      ->capture_default_str()
      ->check(number_between(0.02, 1));
  command->add_option("--most", o->train.most, "largest retention of a step")
      ->capture_default_str()
      ->check(number_between(0.02, 1));
  command->add_flag("--keep-scores", o->train.keep_scores, "scores stay as the warm start made them");
  command->add_flag("--keep-shares", o->train.keep_shares, "shares stay as the warm start made them");
  command->add_option("--seed", o->train.seed, "of lessons and networks")->capture_default_str();
  command->add_option("--every", o->every, "steps between two looks at held-out lessons")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--stop-after", o->stop_after, "steps of this run; another with --resume goes on")
      ->check(CLI::PositiveNumber);
  command->add_option("--resume", o->resume, "file that keeps the state of the training, and from which the next run goes on");
  command->callback([o] {
    o->lessons.make.seed = o->train.seed;
    Training(*o).run();
  });
}

}  // namespace kvt_llm
