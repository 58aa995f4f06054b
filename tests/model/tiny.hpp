// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Models of random numbers, made where they are wanted.
#pragma once

#include <doctest/doctest.h>
#include <ggml.h>
#include <gguf.h>

#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

// Of one layer: embedding 80, 2 query heads and 1 KV head of 40, 32 tokens.
struct Tiny {
  std::string architecture = "llama";
  std::map<std::string, std::uint32_t> integers = {{"block_count", 1},           {"embedding_length", 80},
                                                   {"attention.head_count", 2},  {"attention.head_count_kv", 1},
                                                   {"rope.dimension_count", 40}, {"context_length", 64}};
  std::map<std::string, float> numbers = {{"attention.layer_norm_rms_epsilon", 1e-5f}, {"rope.freq_base", 10000.f}};
  std::map<std::string, std::string> texts;
  std::map<std::string, std::vector<std::int32_t>> lists;
  std::map<std::string, std::vector<std::uint8_t>> choices;  // written as booleans
  std::map<std::string, std::vector<std::int64_t>> shapes = {
      {"token_embd.weight", {80, 32}},        {"output_norm.weight", {80}},       {"blk.0.attn_norm.weight", {80}},
      {"blk.0.attn_q.weight", {80, 80}},      {"blk.0.attn_k.weight", {80, 40}},  {"blk.0.attn_v.weight", {80, 40}},
      {"blk.0.attn_output.weight", {80, 80}}, {"blk.0.ffn_norm.weight", {80}},    {"blk.0.ffn_gate.weight", {80, 96}},
      {"blk.0.ffn_up.weight", {80, 96}},      {"blk.0.ffn_down.weight", {96, 80}}};
  std::map<std::string, ggml_type> types;
  std::string tokenizer_of;  // a model file, if it is to have one

  void write(const std::string& path) const {
    gguf_context* const file = gguf_init_empty();
    ggml_context* const c = ggml_init({std::size_t{1} << 25, nullptr, false});
    if (tokenizer_of.empty()) {
      gguf_set_val_str(file, "tokenizer.ggml.model", "no_vocab");
    } else {
      gguf_context* const other = gguf_init_from_file(tokenizer_of.c_str(), {true, nullptr});
      REQUIRE(other != nullptr);
      gguf_set_kv(file, other);
      gguf_free(other);
    }
    gguf_set_val_str(file, "general.architecture", architecture.c_str());
    for (const auto& [key, value] : integers) gguf_set_val_u32(file, (architecture + "." + key).c_str(), value);
    for (const auto& [key, value] : numbers) gguf_set_val_f32(file, (architecture + "." + key).c_str(), value);
    for (const auto& [key, value] : texts) gguf_set_val_str(file, (architecture + "." + key).c_str(), value.c_str());
    for (const auto& [key, list] : lists)
      gguf_set_arr_data(file, (architecture + "." + key).c_str(), GGUF_TYPE_INT32, list.data(), list.size());
    for (const auto& [key, list] : choices)
      gguf_set_arr_data(file, (architecture + "." + key).c_str(), GGUF_TYPE_BOOL, list.data(), list.size());
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0.f, 0.1f);
    for (const auto& [name, shape] : shapes) {
      const auto type = types.count(name) != 0 ? types.at(name) : GGML_TYPE_F32;
      ggml_tensor* const t = ggml_new_tensor(c, type, static_cast<int>(shape.size()), shape.data());
      ggml_set_name(t, name.c_str());
      for (std::int64_t i = 0; i < ggml_nelements(t) && type == GGML_TYPE_F32; ++i) {
        static_cast<float*>(t->data)[i] = shape.size() == 1 ? 1.f + normal(random) : normal(random);
      }
      gguf_add_tensor(file, t);
    }
    REQUIRE(gguf_write_to_file(file, path.c_str(), false));
    ggml_free(c);
    gguf_free(file);
  }
};

// Of several layers, embedding 64, 4 query heads and 1 KV head.
inline Tiny small_model(const std::string& architecture, int layers, unsigned dim, std::initializer_list<const char*> norms,
                        unsigned tokens = 50) {
  Tiny tiny;
  tiny.architecture = architecture;
  const unsigned embedding = 64, heads = 4, inner = 96;
  tiny.integers = {{"block_count", static_cast<unsigned>(layers)},
                   {"embedding_length", embedding},
                   {"feed_forward_length", inner},
                   {"attention.head_count", heads},
                   {"attention.head_count_kv", 1},
                   {"attention.key_length", dim},
                   {"attention.value_length", dim},
                   {"rope.dimension_count", dim},
                   {"vocab_size", tokens},
                   {"context_length", 1024}};
  tiny.shapes = {{"token_embd.weight", {embedding, tokens}}, {"output_norm.weight", {embedding}}};
  for (int l = 0; l < layers; ++l) {
    const std::string block = "blk." + std::to_string(l) + ".";
    tiny.shapes[block + "attn_norm.weight"] = tiny.shapes[block + "ffn_norm.weight"] = {embedding};
    for (const std::string norm : norms) {
      tiny.shapes[block + norm + ".weight"] = {norm.ends_with("q_norm") || norm.ends_with("k_norm") ? dim : embedding};
    }
    tiny.shapes[block + "attn_q.weight"] = {embedding, heads * dim};
    tiny.shapes[block + "attn_k.weight"] = tiny.shapes[block + "attn_v.weight"] = {embedding, dim};
    tiny.shapes[block + "attn_output.weight"] = {heads * dim, embedding};
    tiny.shapes[block + "ffn_gate.weight"] = tiny.shapes[block + "ffn_up.weight"] = {embedding, inner};
    tiny.shapes[block + "ffn_down.weight"] = {inner, embedding};
  }
  return tiny;
}

// A small model whose layers are of two kinds, one after the other: windows with two KV heads of 40, and all of the text with
// one of 64, whose values are made of what its keys are. The last two layers attend to the keys of the two before.
inline Tiny small_gemma4(unsigned tokens = 50) {
  const int layers = 6, own = 4;
  const unsigned embedding = 64, heads = 4;
  Tiny tiny = small_model("gemma4", layers, 64, {"post_attention_norm", "attn_q_norm", "attn_k_norm", "post_ffw_norm"}, tokens);
  tiny.integers["attention.key_length_swa"] = tiny.integers["attention.value_length_swa"] = 40;
  tiny.integers["rope.dimension_count_swa"] = 40;
  tiny.integers["attention.sliding_window"] = 40;
  tiny.integers["attention.shared_kv_layers"] = layers - own;
  tiny.integers["embedding_length_per_layer_input"] = 0;
  tiny.integers.erase("attention.head_count_kv");
  tiny.numbers["rope.freq_base_swa"] = 1000;
  tiny.shapes["rope_freqs.weight"] = {32};
  for (int l = 0; l < layers; ++l) {
    const std::string block = "blk." + std::to_string(l) + ".";
    const bool window = l % 2 == 0;
    const unsigned dim = window ? 40 : 64, kv_heads = window ? 2 : 1;
    tiny.lists["attention.head_count_kv"].push_back(static_cast<std::int32_t>(kv_heads));
    tiny.choices["attention.sliding_window_pattern"].push_back(window ? 1 : 0);
    tiny.shapes[block + "attn_q.weight"] = {embedding, heads * dim};
    tiny.shapes[block + "attn_output.weight"] = {heads * dim, embedding};
    tiny.shapes[block + "attn_q_norm.weight"] = {dim};
    for (const char* const made : {"attn_k.weight", "attn_v.weight", "attn_k_norm.weight"}) tiny.shapes.erase(block + made);
    if (l >= own) continue;
    tiny.shapes[block + "attn_k.weight"] = {embedding, kv_heads * dim};
    if (window) tiny.shapes[block + "attn_v.weight"] = {embedding, kv_heads * dim};
    tiny.shapes[block + "attn_k_norm.weight"] = {dim};
  }
  return tiny;
}
