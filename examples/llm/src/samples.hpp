// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Samples: texts that a profile is made of, and what the model goes on with, whose queries show what it needs.
#pragma once

#include <string>
#include <vector>

#include "command.hpp"
#include "tasks.hpp"

namespace kvt_llm {

// The text itself is repeated if there is nothing to go on with.
struct Sample {
  std::string task;
  std::vector<int> context, asked, reply;
};

inline const std::string repetition = "repetition", continuation = "continuation";

struct SampleOptions {
  std::vector<std::string> texts, tasks;  // in turn: repetition, continuation, or questions made of the texts
  std::string questions;                  // a file of questions and answers, in place of texts and tasks
  int samples = 16, continued = 128;      // and tokens of a continuation
  Part part = Part::all;
  Tasks::Options make;

  void add(CLI::App& app);
  // What is done with the texts, `otherwise` unless it was said. Throws std::runtime_error where options do not go together.
  void complete(const std::vector<std::string>& otherwise);
  // For people: the names of texts, and what is done with them.
  std::string data() const, done() const;
};

// Throws std::runtime_error with one sentence.
std::vector<Sample> make_samples(const Tokenizer& tokenizer, const SampleOptions& options);

}  // namespace kvt_llm
