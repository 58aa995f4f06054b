// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// GGUF files whose tensors and numbers do not fit one another: each is refused while it is loaded, in one sentence that names
// what is wrong. The files are made here, one fault each.
#include <doctest/doctest.h>
#include <ggml.h>

#include <cmath>
#include <functional>
#include <map>
#include <stdexcept>

#include "caches.hpp"
#include "engine.hpp"
#include "model/program.hpp"
#include "model/tiny.hpp"

using namespace kvt_llm;

namespace {

using Change = std::function<void(Tiny&)>;

void refused(const Change& change, const std::string& sentence) {
  const TemporaryFolder folder;
  Tiny tiny;
  change(tiny);
  tiny.write(folder.file("tiny.gguf"));
  std::string message = "it was loaded";
  try {
    const Model model(folder.file("tiny.gguf"));
  } catch (const std::runtime_error& e) {
    message = e.what();
  }
  INFO(message);
  CHECK(message.find(sentence) != std::string::npos);
}

std::vector<float> logits(const Change& change) {
  const TemporaryFolder folder;
  Tiny tiny;
  change(tiny);
  tiny.write(folder.file("tiny.gguf"));
  const Model model(folder.file("tiny.gguf"));
  Engine engine(model, 1);
  const auto cache = make_cache({"uniform", "sink_recent", "fp32"}, model.parameters().geometry(), {});
  const std::vector<int> tokens = {3, 1, 4, 1, 5, 9, 2, 6};
  const auto out = engine.eval(*cache, tokens, 0, Engine::Logits::all);
  CHECK_THROWS_AS((void)engine.eval(*cache, std::vector<int>{32}, 8, Engine::Logits::last), std::runtime_error);
  CHECK_THROWS_AS((void)engine.eval(*cache, std::vector<int>{-1}, 8, Engine::Logits::last), std::runtime_error);
  CHECK(cache->end_position(0) == 8);
  return {out.begin(), out.end()};
}

void change_number(const std::string& key, float value, const std::string& sentence) {
  refused([&](Tiny& t) { t.numbers[key] = value; }, sentence);
}

void change_integer(const std::string& key, std::uint32_t value, const std::string& sentence) {
  refused([&](Tiny& t) { t.integers[key] = value; }, sentence);
}

}  // namespace

TEST_CASE("a small model of either architecture runs, with biases and with scaled RoPE") {
  init_engine();
  const auto plain = logits([](Tiny&) {});
  CHECK(plain.size() == 8 * 32);
  for (const float x : plain) CHECK(std::isfinite(x));
  const auto linear = logits([](Tiny& t) { t.numbers["rope.scaling.factor"] = 4; });
  const auto none = logits([](Tiny& t) {
    t.numbers["rope.scaling.factor"] = 4;
    t.texts["rope.scaling.type"] = "none";
  });
  CHECK(none == plain);
  CHECK(linear != plain);
  CHECK(std::equal(plain.begin(), plain.begin() + 32, linear.begin()));  // position zero is not turned
  const auto biased = logits([](Tiny& t) {
    t.architecture = "qwen2";
    t.shapes["blk.0.attn_q.bias"] = {80};
    t.shapes["blk.0.attn_k.bias"] = {40};
    t.shapes["blk.0.attn_v.bias"] = {40};
  });
  for (const float x : biased) CHECK(std::isfinite(x));
  CHECK(biased != plain);
}

TEST_CASE("tensors of another shape, another type, or not there") {
  const Tiny tiny;
  for (const auto& [name, shape] : tiny.shapes) {
    const std::string tensor = name;
    CAPTURE(tensor);
    refused([&](Tiny& t) { t.shapes.erase(tensor); }, tensor);
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
      if ((tensor == "token_embd.weight" && axis == 1)) continue;  // says how many tokens there are
      refused([&](Tiny& t) { t.shapes[tensor][axis] += 8; }, "the shape");
      refused([&](Tiny& t) { t.shapes[tensor][axis] = 1; }, "the shape");
    }
    refused([&](Tiny& t) { t.types[tensor] = GGML_TYPE_I32; }, tensor + " is of the type i32");
    refused([&](Tiny& t) { t.shapes[tensor] = {shape[0], shape.size() > 1 ? shape[1] : 1, 2}; }, tensor + " has the shape");
  }
  refused([](Tiny& t) { t.types["output_norm.weight"] = GGML_TYPE_F16; }, "output_norm.weight is of the type f16");
  refused([](Tiny& t) { t.shapes["output.weight"] = {80, 31}; }, "output.weight has the shape [80, 31]; it must have [80, 32]");
  refused([](Tiny& t) { t.shapes["rope_freqs.weight"] = {21}; }, "rope_freqs.weight has the shape [21]; it must have [20]");
  refused([](Tiny& t) { t.shapes["blk.0.attn_q.bias"] = {40}; }, "blk.0.attn_q.bias has the shape [40]; it must have [80]");
  refused([](Tiny& t) { t.shapes["blk.0.attn_output.bias"] = {80}; }, "blk.0.attn_output.bias");
}

TEST_CASE("numbers that fit nothing") {
  const float nan = std::nanf("");
  change_integer("block_count", 0, "block_count = 0; it must be between 1 and 4096");
  change_integer("block_count", 4000000000u, "block_count = 4000000000");
  change_integer("block_count", 2, "blk.1.");
  change_integer("embedding_length", 0, "embedding_length = 0");
  change_integer("attention.head_count", 0, "head_count = 0");
  change_integer("attention.head_count_kv", 3, "num_q_heads is 2; it must be a multiple of num_kv_heads, which is 3");
  change_integer("attention.key_length", 41, "head_dim is 41");
  change_integer("attention.value_length", 64, "values of 64 elements and keys of 40");
  change_integer("rope.dimension_count", 39, "rotary_dim is 39");
  change_integer("rope.dimension_count", 42, "rotary_dim is 42");
  change_integer("context_length", 0, "context_length = 0");
  for (const float bad : {0.f, -1.f, nan, std::numeric_limits<float>::infinity()}) {
    change_number("attention.layer_norm_rms_epsilon", bad, "layer_norm_rms_epsilon");
    change_number("rope.freq_base", bad, "rope.freq_base");
    change_number("rope.scaling.factor", bad, "rope.scaling.factor");
  }
}

TEST_CASE("what the engine would not compute is refused by name") {
  refused([](Tiny& t) { t.texts["rope.scaling.type"] = "yarn"; }, "scales RoPE by yarn");
  change_integer("expert_count", 8, "llama.expert_count");
  change_integer("attention.sliding_window", 1024, "llama.attention.sliding_window");
  change_number("final_logit_softcapping", 30.f, "llama.final_logit_softcapping");
  refused([](Tiny& t) { t.architecture = "mamba"; }, "the architecture mamba is not supported; it must be llama or qwen2");
}
