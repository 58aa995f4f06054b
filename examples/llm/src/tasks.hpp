// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Tasks: questions about a text whose answers are known, after RULER (arXiv 2404.06654), sized for small models.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer.hpp"

namespace kvt_llm {

// How the assistant's turn may begin. The answers are parts of it.
struct Response {
  struct Part {
    std::size_t begin, end;  // bytes of the text
  };
  std::string text;
  std::vector<Part> answers;
};

// A question about a document.
struct Question {
  std::string task;
  int number = 0;
  std::optional<double> depth;  // where the one needle is, if the task asks for that
  std::string document, question;
  std::vector<Response> responses;  // each is right: answers may come in any order
};

// A text cut into sentences.
class Haystack {
 public:
  Haystack(const Tokenizer& tokenizer, std::string text);
  Haystack(const Haystack&) = delete;
  Haystack& operator=(const Haystack&) = delete;

  // Sentences that follow one another and have nearly `tokens` tokens; `where`, 0 to 1, says where in the text.
  std::span<const std::string_view> piece(double where, int tokens) const;
  int count(const std::string& text) const { return static_cast<int>(tokenizer_.encode(text, false, false).size()); }

 private:
  const Tokenizer& tokenizer_;
  std::string text_;
  std::vector<std::string_view> sentences_;
  std::vector<int> before_;  // tokens before each sentence, and in all
};

class Tasks {
 public:
  struct Options {
    int tokens = 800;  // of a document
    unsigned seed = 1;
    std::string wording = "magic";                         // in which numbers are hidden and asked for
    std::vector<double> depths = {0, 0.25, 0.5, 0.75, 1};  // of the passkey
  };
  Tasks(const Haystack& haystack, Options options) : haystack_(haystack), options_(std::move(options)) {}

  // Of a wording: all have the first, those about numbers of keys each.
  static std::vector<std::string> names(const std::string& wording = wordings().front());
  static const std::vector<std::string>& wordings();
  // Throws std::runtime_error, with the names there are, if this is none, or no task of that wording.
  static void check_name(const std::string& task, const std::string& wording);
  // Whole rounds of the depths where a task has them.
  int count(const std::string& task, int samples) const;
  // Depends on nothing but the text, the options, the task and the number. Throws std::runtime_error with one sentence.
  Question make(const std::string& task, int number) const;

 private:
  const Haystack& haystack_;
  Options options_;
};

}  // namespace kvt_llm
