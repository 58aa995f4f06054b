// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See lessons.hpp.
#include "lessons.hpp"

#include <algorithm>
#include <random>
#include <stdexcept>

#include "hindsight.hpp"
#include "kvtailor/budget/any_allocator.hpp"
#include "kvtailor/select/any_selector.hpp"
#include "prefill.hpp"
#include "prompt.hpp"

namespace kvt_llm {

namespace {

// Copies what it is shown; all rows score the same.
struct Capture {
  static constexpr kvt::EvidenceSet needs = kvt::Evidence::keys | kvt::Evidence::values;
  Context* to = nullptr;
  int num_kv_heads = 0;

  kvt::Status score(const kvt::HeadEvidence& seen, std::span<float> score) const noexcept {
    std::fill(score.begin(), score.end(), 0.f);
    const auto at = static_cast<std::ptrdiff_t>(seen.layer * num_kv_heads + seen.kv_head) * seen.num_rows() * seen.head_dim;
    std::transform(seen.keys.begin(), seen.keys.end(), to->keys.begin() + at, kvt::from_float<kvt::Half>);
    std::transform(seen.values.begin(), seen.values.end(), to->values.begin() + at, kvt::from_float<kvt::Half>);
    return kvt::success();
  }
};

}  // namespace

std::vector<Lesson> make_lessons(const Tokenizer& tokenizer, const LessonOptions& o) {
  const int piece = o.make.tokens;
  std::string all;
  std::vector<std::vector<int>> texts;
  for (const auto& path : o.texts) {
    const std::string text = read_part(path, o.part);
    all += text + "\n";
    texts.push_back(tokenizer.encode(text, false, false));
    if (static_cast<int>(texts.back().size()) < piece + o.continuation) {
      throw std::runtime_error(path + " has " + std::to_string(texts.back().size()) + " tokens; --tokens " +
                               std::to_string(piece) + " and --continuation " + std::to_string(o.continuation) +
                               " are wanted of it");
    }
  }
  const Haystack haystack(tokenizer, all);
  std::vector<std::pair<std::string, Tasks>> questions;  // in turn
  for (const auto& wording : o.wordings) {
    Tasks::Options make = o.make;
    make.wording = wording;
    for (const auto& task : o.tasks) {
      const auto known = Tasks::names(wording);
      if (std::find(known.begin(), known.end(), task) != known.end()) questions.emplace_back(task, Tasks(haystack, make));
    }
  }
  std::mt19937_64 random(o.make.seed);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const auto counted_from = [](Exercise& exercise, std::size_t first) {
    for (std::size_t t = first; t < exercise.tokens.size(); ++t) exercise.wanted.push_back(static_cast<int>(t));
  };
  std::vector<Lesson> lessons;
  const int kinds = questions.empty() ? 1 : 2;
  for (int i = 0; i < o.samples; ++i) {
    Lesson& lesson = lessons.emplace_back();
    const int number = i / kinds;
    std::size_t opening = 0;  // tokens before the text
    if (i % kinds == 0) {
      const auto& text = texts[static_cast<std::size_t>(number) % texts.size()];
      const auto first =
          text.begin() + static_cast<std::ptrdiff_t>(below(text.size() - static_cast<std::size_t>(piece + o.continuation) + 1));
      lesson.tokens.assign(first, first + piece);
      Exercise& on =
          lesson.exercises.emplace_back(Exercise{"continuation", {first + piece, first + piece + o.continuation}, {}, {}});
      counted_from(on, 0);
    } else {
      const auto& [task, tasks] = questions[static_cast<std::size_t>(number) % questions.size()];
      Prompt prompt = make_prompt(tokenizer, tasks.make(task, number), false);
      lesson.tokens = std::move(prompt.context);
      lesson.asked = std::move(prompt.asked);
      lesson.reply = std::move(prompt.replies.front().tokens);
      Exercise& answer = lesson.exercises.emplace_back(Exercise{"question", lesson.asked, {}, {}});
      answer.tokens.insert(answer.tokens.end(), lesson.reply.begin(), lesson.reply.end() - 1);
      counted_from(answer, lesson.asked.size() - 1);
      const std::string form = tokenizer.chat("\x01");
      opening = tokenizer.encode(form.substr(0, form.find('\x01')), true, true).size();
    }
    constexpr std::size_t shown = 8;
    const std::size_t text_rows = lesson.tokens.size() - opening, all_rows = shown + static_cast<std::size_t>(o.continuation);
    const std::size_t from = opening + (text_rows > all_rows ? below(text_rows - all_rows) : 0);
    const auto shown_from = lesson.tokens.begin() + static_cast<std::ptrdiff_t>(from);
    const auto until = lesson.tokens.begin() + static_cast<std::ptrdiff_t>(std::min(lesson.tokens.size(), from + all_rows));
    Exercise& repeated = lesson.exercises.emplace_back(
        Exercise{"repetition",
                 tokenizer.encode("\n\nRepeat the part of the previous context exactly, starting with", false, false),
                 {},
                 {}});
    const std::size_t request = repeated.tokens.size() + shown;
    repeated.tokens.insert(repeated.tokens.end(), shown_from, until - 1);
    counted_from(repeated, request - 1);
  }
  return lessons;
}

void read_lesson(Engine& engine, const Tokenizer& tokenizer, const Common& common, Lesson& lesson) {
  const Model& model = engine.model();
  const kvt::Geometry shape = model.parameters().geometry();
  kvt::CacheOptions told = told_of(model, {"uniform", "sink_recent", "fp32"}, common.zones);
  told.output_projections = model.output_projections();
  const auto cache = make_cache({"uniform", "sink_recent", "fp32"}, shape, told);
  prefill(engine, *cache, tokenizer, lesson.tokens, common.chunk);
  lesson.context.rows = static_cast<int>(lesson.tokens.size());
  const auto numbers =
      static_cast<std::size_t>(shape.num_heads()) * lesson.tokens.size() * static_cast<std::size_t>(shape.head_dim);
  lesson.context.keys.resize(numbers);
  lesson.context.values.resize(numbers);
  std::vector<float> scores;
  check(cache->set_policies(kvt::AnyAllocator(kvt::Uniform{}), kvt::AnySelector(Capture{&lesson.context, shape.num_kv_heads})));
  check(cache->scores(1, scores));
  const auto largest = kvt::OverQueries::largest;
  lesson.importance = see_importance(*cache, common.chunk, largest, [&](const Look& look) {
    repeat_context(engine, *cache, tokenizer, lesson.tokens, common.chunk, look);
  });
  if (lesson.reply.empty()) return;
  lesson.answer_importance = see_importance(*cache, common.chunk, largest, [&](const Look& look) {
    read_answer(engine, *cache, lesson.asked, lesson.reply, common.chunk, look);
  });
}

}  // namespace kvt_llm
