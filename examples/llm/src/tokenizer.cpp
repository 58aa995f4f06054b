// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See tokenizer.hpp.
#include "tokenizer.hpp"

#include <llama.h>

#include <stdexcept>

namespace kvt_llm {

Tokenizer::Tokenizer(const std::string& model_path) {
  auto how = llama_model_default_params();
  how.vocab_only = true;
  model_ = llama_model_load_from_file(model_path.c_str(), how);
  if (model_ == nullptr)
    throw std::runtime_error("cannot read the vocabulary of " + model_path + "; it has to be a whole GGUF file");
}

Tokenizer::~Tokenizer() { llama_model_free(model_); }

std::vector<int> Tokenizer::encode(const std::string& text, bool add_special, bool parse_special) const {
  std::vector<int> tokens(text.size() + 8);
  const int n = llama_tokenize(llama_model_get_vocab(model_), text.data(), static_cast<int>(text.size()), tokens.data(),
                               static_cast<int>(tokens.size()), add_special, parse_special);
  if (n < 0) throw std::runtime_error("the text cannot be tokenized");
  tokens.resize(static_cast<std::size_t>(n));
  return tokens;
}

std::string Tokenizer::decode(int token) const {
  char piece[256];
  const int n = llama_token_to_piece(llama_model_get_vocab(model_), token, piece, sizeof piece, 0, false);
  return n > 0 ? std::string(piece, static_cast<std::size_t>(n)) : std::string();
}

bool Tokenizer::ends_generation(int token) const { return llama_vocab_is_eog(llama_model_get_vocab(model_), token); }

std::string Tokenizer::chat(const std::string& message) const {
  const char* const form = llama_model_chat_template(model_, nullptr);
  const llama_chat_message turn{"user", message.c_str()};
  std::string out(message.size() + 4096, '\0');
  const int n = llama_chat_apply_template(form, &turn, 1, true, out.data(), static_cast<int>(out.size()));
  if (n < 0 || n > static_cast<int>(out.size())) throw std::runtime_error("the model's chat template cannot be used");
  out.resize(static_cast<std::size_t>(n));
  return out;
}

}  // namespace kvt_llm
