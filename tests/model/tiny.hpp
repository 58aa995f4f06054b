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
  std::map<std::string, std::vector<std::int64_t>> shapes = {
      {"token_embd.weight", {80, 32}},        {"output_norm.weight", {80}},       {"blk.0.attn_norm.weight", {80}},
      {"blk.0.attn_q.weight", {80, 80}},      {"blk.0.attn_k.weight", {80, 40}},  {"blk.0.attn_v.weight", {80, 40}},
      {"blk.0.attn_output.weight", {80, 80}}, {"blk.0.ffn_norm.weight", {80}},    {"blk.0.ffn_gate.weight", {80, 96}},
      {"blk.0.ffn_up.weight", {80, 96}},      {"blk.0.ffn_down.weight", {96, 80}}};
  std::map<std::string, ggml_type> types;

  void write(const std::string& path) const {
    gguf_context* const file = gguf_init_empty();
    ggml_context* const c = ggml_init({std::size_t{1} << 25, nullptr, false});
    gguf_set_val_str(file, "general.architecture", architecture.c_str());
    gguf_set_val_str(file, "tokenizer.ggml.model", "no_vocab");
    for (const auto& [key, value] : integers) gguf_set_val_u32(file, (architecture + "." + key).c_str(), value);
    for (const auto& [key, value] : numbers) gguf_set_val_f32(file, (architecture + "." + key).c_str(), value);
    for (const auto& [key, value] : texts) gguf_set_val_str(file, (architecture + "." + key).c_str(), value.c_str());
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
