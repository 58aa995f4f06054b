// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Tokenizer: text to tokens and back, and the chat template, by llama.cpp's library on the same GGUF file.
#pragma once

#include <string>
#include <vector>

struct llama_model;

namespace kvt_llm {

class Tokenizer {
 public:
  explicit Tokenizer(const std::string& model_path);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  std::vector<int> encode(const std::string& text, bool add_special, bool parse_special) const;
  std::string decode(int token) const;
  bool ends_generation(int token) const;
  // One user message in the model's chat template, up to where the answer begins.
  std::string chat(const std::string& message) const;

 private:
  llama_model* model_;
};

}  // namespace kvt_llm
