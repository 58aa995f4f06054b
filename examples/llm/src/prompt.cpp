// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See prompt.hpp.
#include "prompt.hpp"

#include <stdexcept>
#include <string>

namespace kvt_llm {

namespace {

Prompt::Reply make_reply(const Tokenizer& tokenizer, const Response& response) {
  Prompt::Reply reply{tokenizer.encode(response.text, false, false), {}, response.answers.size()};
  std::size_t length = 0;
  for (const int token : reply.tokens) length += tokenizer.decode(token).size();
  // Some vocabularies put a blank before a text.
  const std::size_t blank = length - response.text.size();
  if (blank > 1) throw std::runtime_error("the model's tokens do not give back the text they were made of: " + response.text);
  std::size_t end = 0;
  for (std::size_t t = 0; t < reply.tokens.size(); ++t) {
    const std::size_t begin = end;
    end += tokenizer.decode(reply.tokens[t]).size();
    for (std::size_t a = 0; a < reply.answers; ++a) {
      if (begin < response.answers[a].end + blank && end > response.answers[a].begin + blank) reply.targets.push_back({t, a});
    }
  }
  return reply;
}

}  // namespace

Prompt make_prompt(const Tokenizer& tokenizer, Question question, bool question_aware) {
  const std::string marker = "\x01";
  // As in generate, only the template's own text is read as special tokens.
  const std::string form = tokenizer.chat(marker);
  const auto cut = form.find(marker);
  if (cut == std::string::npos)
    throw std::runtime_error("the chat template changes the message; the document cannot be put into it");
  Prompt prompt;
  const auto append = [](std::vector<int>& to, const std::vector<int>& tokens) {
    to.insert(to.end(), tokens.begin(), tokens.end());
  };
  append(prompt.context, tokenizer.encode(form.substr(0, cut), true, true));
  append(prompt.context, tokenizer.encode(question.document, false, false));
  auto& asked = question_aware ? prompt.context : prompt.asked;
  append(asked, tokenizer.encode("\n\n" + question.question, false, false));
  append(asked, tokenizer.encode(form.substr(cut + marker.size()), false, true));
  for (const auto& response : question.responses) prompt.replies.push_back(make_reply(tokenizer, response));
  prompt.question = std::move(question);
  return prompt;
}

}  // namespace kvt_llm
