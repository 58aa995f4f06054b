// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Lessons: texts and what may come after them, that policies are trained on.
#pragma once

#include <string>
#include <vector>

#include "command.hpp"
#include "engine.hpp"
#include "student.hpp"

namespace kvt_llm {

// Tokens behind a text.
struct Exercise {
  std::string kind;
  std::vector<int> tokens;
  std::vector<int> wanted;         // places in them after which the next token counts
  Weights<float>::Matrix teacher;  // what the full context gives, see Student::run()
};

struct Lesson {
  std::vector<int> tokens;
  std::vector<Exercise> exercises;
  std::vector<int> asked, reply;  // of a question
  Context context;
  // [heads, rows], see see_importance(): while the model repeats the text, and while it answers, if it is asked.
  std::vector<float> importance, answer_importance;
};

struct LessonOptions {
  std::vector<std::string> texts, wordings, tasks;
  int samples = 48, continuation = 128;
  Part part = Part::all;
  Tasks::Options make;
};

// Their tokens; in turn a piece of a text and a piece with something hidden in it, of the next task and wording. The first goes
// on as it does, about the second a question is answered, and parts of both are repeated. Throws std::runtime_error with one
// sentence if a text is too short.
std::vector<Lesson> make_lessons(const Tokenizer& tokenizer, const LessonOptions& options);

// Lets the model read a lesson's text: its keys and values, and the importance of rows.
void read_lesson(Engine& engine, const Tokenizer& tokenizer, const Common& common, Lesson& lesson);

}  // namespace kvt_llm
