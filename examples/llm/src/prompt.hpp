// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Prompt: a question about a document in tokens, as the model's chat template has it.
#pragma once

#include <vector>

#include "tasks.hpp"
#include "tokenizer.hpp"

namespace kvt_llm {

// A question as the model reads it.
struct Prompt {
  struct Target {
    std::size_t token, answer;  // the token is (a part of) the answer
  };
  struct Reply {
    std::vector<int> tokens;
    std::vector<Target> targets;
    std::size_t answers;
  };
  Question question;
  std::vector<int> context, asked;  // what is in the cache when it is cut, and what comes before the reply
  std::vector<Reply> replies;
};
// With `question_aware` the question is part of the context. Throws std::runtime_error if the template or the model's tokens
// change the text.
Prompt make_prompt(const Tokenizer& tokenizer, Question question, bool question_aware);

}  // namespace kvt_llm
