// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See samples.hpp.
#include "samples.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>

#include "prompt.hpp"

namespace kvt_llm {

using nlohmann::json;

namespace {

Sample answered(const Tokenizer& tokenizer, Question question) {
  std::string task = question.task;
  Prompt prompt = make_prompt(tokenizer, std::move(question), false);
  return {std::move(task), std::move(prompt.context), std::move(prompt.asked), std::move(prompt.replies.front().tokens)};
}

// Lines of JSON: {"context": "..", "question": "..", "answer": ".."}.
std::vector<Sample> from_questions(const Tokenizer& tokenizer, const SampleOptions& o) {
  std::vector<Sample> samples;
  std::ifstream stream(o.questions);
  if (!stream) throw std::runtime_error("cannot read the questions " + o.questions);
  int number = 0;
  for (std::string line; std::getline(stream, line) && static_cast<int>(samples.size()) < o.samples;) {
    ++number;
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    const json one = json::parse(line, nullptr, false);
    const auto text = [&](const char* name) {
      if (one.is_object() && one.contains(name) && one[name].is_string() && one[name] != "")
        return one[name].get<std::string>();
      throw std::runtime_error(o.questions + ", line " + std::to_string(number) +
                               ": an object with the texts context, question and answer is wanted, and " + name +
                               " is missing or empty");
    };
    Question question;
    question.task = "question";
    question.document = text("context");
    question.question = text("question");
    Response& response = question.responses.emplace_back();
    response.text = text("answer");
    response.answers.push_back({0, response.text.size()});
    samples.push_back(answered(tokenizer, std::move(question)));
  }
  if (samples.empty()) throw std::runtime_error("there is no question in " + o.questions);
  return samples;
}

// Of each task in turn: questions made of the texts, or pieces of one text after another, from anywhere in it.
std::vector<Sample> from_texts(const Tokenizer& tokenizer, const SampleOptions& o) {
  const auto has = [&](const std::string& task) { return std::find(o.tasks.begin(), o.tasks.end(), task) != o.tasks.end(); };
  const int least = !has(continuation) ? has(repetition) ? o.make.tokens : 0 : o.make.tokens + o.continued;
  std::string all;
  std::vector<std::vector<int>> texts;
  for (const auto& path : o.texts) {
    const std::string text = read_part(path, o.part);
    all += text + "\n";
    texts.push_back(tokenizer.encode(text, false, false));
    if (static_cast<int>(texts.back().size()) < least) {
      throw std::runtime_error(path + " has " + std::to_string(texts.back().size()) + " tokens; --tokens " +
                               std::to_string(o.make.tokens) + (has(continuation) ? " and what follows are" : " are") +
                               " wanted of it");
    }
  }
  const Haystack haystack(tokenizer, all);
  const Tasks tasks(haystack, o.make);
  // As a document begins in a prompt.
  const std::string form = tokenizer.chat("\x01");
  const auto opening = tokenizer.encode(form.substr(0, form.find('\x01')), true, true);
  std::mt19937_64 random(o.make.seed);
  const auto piece = [&](const std::string& task, int number) {
    const auto& text = texts[static_cast<std::size_t>(number) % texts.size()];
    const bool goes_on = task == continuation;
    const int length = o.make.tokens + (goes_on ? o.continued : 0);
    const auto first =
        text.begin() + static_cast<std::ptrdiff_t>(random() % (text.size() - static_cast<std::size_t>(length) + 1));
    const auto end = first + o.make.tokens;
    Sample sample{task, opening, {}, {}};
    sample.context.insert(sample.context.end(), first, end);
    if (goes_on) {
      sample.asked = {*end};
      sample.reply.assign(end + 1, end + o.continued);
    }
    return sample;
  };
  std::vector<Sample> samples;
  const auto kinds = static_cast<int>(o.tasks.size());
  for (int i = 0; i < o.samples; ++i) {
    const auto& task = o.tasks[static_cast<std::size_t>(i % kinds)];
    const bool of_text = task == repetition || task == continuation;
    samples.push_back(of_text ? piece(task, i / kinds) : answered(tokenizer, tasks.make(task, i / kinds)));
  }
  return samples;
}

}  // namespace

void SampleOptions::add(CLI::App& app) {
  app.add_option("--text", texts, "text file; repeat for more");
  app.add_option(
      "--questions", questions,
      "lines of JSON with the texts context, question and answer, in place of --text: rows matter that answers look at");
  std::string known;
  for (const auto& name : Tasks::names()) known += ", " + name;
  app.add_option("--tasks", tasks,
                 "what is done with the texts, in turn; rows matter that the model looks at. Repetition of a piece and its "
                 "continuation need no task; the others are questions made of it: " +
                     repetition + ", " + continuation + known)
      ->delimiter(',');
  add_question_options(app, make);
  add_part_option(app, part);
  app.add_option("--samples", samples, "pieces of the texts, or questions")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--continuation", continued, "tokens of a continuation")->capture_default_str()->check(CLI::Range(2, 1 << 20));
}

void SampleOptions::complete(const std::vector<std::string>& otherwise) {
  if (!questions.empty() && (!tasks.empty() || !texts.empty()))
    throw std::runtime_error("--questions has texts of its own: give neither --text nor --tasks beside it");
  if (questions.empty() && texts.empty()) throw std::runtime_error("give --text or --questions to learn from");
  if (questions.empty() && tasks.empty()) tasks = otherwise;
  for (const auto& task : tasks) {
    if (task != repetition && task != continuation) Tasks::check_name(task, make.wording);
  }
}

std::string SampleOptions::data() const {
  std::string names;
  for (const auto& path : questions.empty() ? texts : std::vector<std::string>{questions})
    names += (names.empty() ? "" : ", ") + std::filesystem::path(path).filename().string();
  return names;
}

std::string SampleOptions::done() const {
  std::string all = tasks.empty() ? "answers to questions" : "";
  for (const auto& task : tasks) all += (all.empty() ? "" : ", ") + task;
  return all;
}

std::vector<Sample> make_samples(const Tokenizer& tokenizer, const SampleOptions& options) {
  return options.questions.empty() ? from_texts(tokenizer, options) : from_questions(tokenizer, options);
}

}  // namespace kvt_llm
