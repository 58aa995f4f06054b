// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// llama.cpp with a cache of ours attached gives what it gives by itself: on the real model, on small ones of other
// architectures with windows, soft caps and one KV head, after its text was cut back, and for several caches in turns. What it
// cannot serve it refuses.
#include <doctest/doctest.h>
#include <llama.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "caches.hpp"
#include "engine.hpp"
#include "kvtailor/engine/llama_cpp.hpp"
#include "kvtailor/kvtailor.hpp"
#include "measure.hpp"
#include "model/program.hpp"
#include "model/tiny.hpp"
#include "tokenizer.hpp"

using namespace kvt_llm;

namespace {

using LoadedModel = std::unique_ptr<llama_model, void (*)(llama_model*)>;
using LoadedContext = std::unique_ptr<llama_context, void (*)(llama_context*)>;

LoadedModel load(const std::string& path) {
  init_engine();
  LoadedModel model(llama_model_load_from_file(path.c_str(), llama_model_default_params()), llama_model_free);
  REQUIRE(model);
  return model;
}

llama_context_params parameters() {
  auto how = llama_context_default_params();
  how.n_ctx = how.n_batch = 1024;
  how.n_ubatch = 48;
  how.n_threads = how.n_threads_batch = 2;
  // Its own attention at its most exact.
  how.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  how.type_k = how.type_v = GGML_TYPE_F32;
  how.swa_full = true;
  return how;
}

LoadedContext context_of(const LoadedModel& model, const llama_context_params& how) {
  LoadedContext context(llama_init_from_model(model.get(), how), llama_free);
  REQUIRE(context);
  return context;
}

// Logits after each of the tokens; empty if it cannot.
std::vector<float> decode(llama_context* context, const std::vector<int>& tokens, int first) {
  const int n = static_cast<int>(tokens.size());
  llama_batch batch = llama_batch_init(n, 0, 1);
  batch.n_tokens = n;
  for (int i = 0; i < n; ++i) {
    batch.token[i] = tokens[static_cast<std::size_t>(i)];
    batch.pos[i] = first + i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  const int failed = llama_decode(context, batch);
  llama_batch_free(batch);
  if (failed != 0) return {};
  const auto width = static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context))));
  const float* const logits = llama_get_logits(context);
  return {logits, logits + width * tokens.size()};
}

double furthest(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(!a.empty());
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double apart = std::fabs(double(a[i]) - double(b[i]));
    worst = apart <= worst ? worst : apart;  // a NaN stays
  }
  return worst;
}

double mean_kl(const std::vector<float>& a, const std::vector<float>& b, std::size_t width) {
  Fidelity fidelity;
  for (std::size_t at = 0; at < a.size(); at += width)
    fidelity.add(compare(std::span(a).subspan(at, width), std::span(b).subspan(at, width), 0));
  return fidelity.mean_kl();
}

std::vector<int> some_tokens(int n, int vocabulary) {
  std::mt19937 random(5);
  std::vector<int> tokens(static_cast<std::size_t>(n));
  for (int& token : tokens) token = static_cast<int>(random() % static_cast<unsigned>(vocabulary));
  return tokens;
}

// ggml's GELU goes by a table of fp16, where a difference in the last digit can become one of 5e-4; a token more or less in a
// window makes one ten times as large.
constexpr double tolerance = 1e-3;

// A text in two parts, some tokens one by one, and another end of it.
template <class Cache>
void check_same(const LoadedModel& model, Cache& cache, double within = tolerance) {
  kvt::LlamaCppAttention attention(cache);
  auto how = parameters();
  const LoadedContext plain = context_of(model, how);
  REQUIRE(attention.attach(how).ok());
  const LoadedContext attached = context_of(model, how);
  const auto both = [&](const std::vector<int>& tokens, int first) {
    CAPTURE(first);
    const auto want = decode(plain.get(), tokens, first), have = decode(attached.get(), tokens, first);
    const kvt::Status status = attention.finish();
    INFO(status.message());
    REQUIRE(status.ok());
    CHECK(furthest(want, have) < within);
    CHECK(cache.end_position(0) == first + static_cast<int>(tokens.size()));
  };
  both(some_tokens(150, 50), 0);
  both(some_tokens(70, 50), 150);
  for (int i = 0; i < 4; ++i) both({7 + i}, 220 + i);
  for (const auto& context : {plain.get(), attached.get()}) llama_memory_seq_rm(llama_get_memory(context), 0, 180, -1);
  both(some_tokens(33, 50), 180);
  CHECK(cache.num_rows(0, 0) == 213);
}

LoadedModel load(const Tiny& tiny) {
  const TemporaryFolder folder;
  tiny.write(folder.file("model.gguf"));
  return load(folder.file("model.gguf"));
}

template <int dim>
void check_same(const Tiny& tiny) {
  CAPTURE(tiny.architecture);
  const LoadedModel model = load(tiny);
  kvt::Geometry shape;
  REQUIRE(kvt::llama_geometry(model.get(), shape).ok());
  CHECK(shape == kvt::Geometry{static_cast<int>(tiny.integers.at("block_count")), 1, 4, dim});
  kvt::KvCache<kvt::Uniform, kvt::SinkRecent, kvt::KvCodec<kvt::Dense<float, dim>>> cache;
  REQUIRE(cache.init(shape).ok());
  check_same(model, cache);
}

}  // namespace

TEST_CASE("the real model gives the same logits, as near as its numbers are exact") {
  init_engine();
  const std::string quantised = environment("KVT_MODEL");
  const Tokenizer tokenizer(quantised);
  auto tokens = tokenizer.encode(read_all(text_path()), true, false);
  tokens.resize(200);
  for (const std::string& path : {dequantised(quantised), quantised}) {
    CAPTURE(path);
    const LoadedModel model = load(path);
    kvt::Geometry shape;
    REQUIRE(kvt::llama_geometry(model.get(), shape).ok());
    const auto cache = make_cache({"uniform", "sink_recent", "fp32"}, shape, {});
    kvt::LlamaCppAttention attention(*cache);
    auto how = parameters(), flash = how;
    flash.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    const auto want = decode(context_of(model, how).get(), tokens, 0);
    REQUIRE(attention.attach(how).ok());
    const auto have = decode(context_of(model, how).get(), tokens, 0);
    REQUIRE(attention.finish().ok());
    const auto width = want.size() / tokens.size();
    if (path == quantised) {
      // Its floor: what llama.cpp's own other way to attend changes.
      const double floor = mean_kl(want, decode(context_of(model, flash).get(), tokens, 0), width);
      CHECK(mean_kl(want, have, width) < 2 * floor);
    } else {
      CHECK(furthest(want, have) < 1e-3);
      CHECK(mean_kl(want, have, width) < 1e-9);
    }
  }
}

TEST_CASE("windows, one KV head, soft caps, other scales and head dims") {
  Tiny gemma3 = small_model("gemma3", 6, 256, {"post_attention_norm", "attn_q_norm", "attn_k_norm", "post_ffw_norm"});
  gemma3.integers["attention.sliding_window"] = 40;
  check_same<256>(gemma3);
  Tiny other = gemma3;
  ++other.integers["attention.sliding_window"];
  const auto logits_of = [](const Tiny& tiny) {
    const LoadedModel model = load(tiny);
    return decode(context_of(model, parameters()).get(), some_tokens(150, 50), 0);
  };
  CHECK(furthest(logits_of(gemma3), logits_of(other)) > 10 * tolerance);
  Tiny gemma2 = small_model("gemma2", 3, 128, {"post_attention_norm", "post_ffw_norm"});
  gemma2.integers["attention.sliding_window"] = 40;
  gemma2.numbers["attn_logit_softcapping"] = 5;
  gemma2.numbers["final_logit_softcapping"] = 3;
  check_same<128>(gemma2);
  check_same<80>(small_model("qwen3", 2, 80, {"attn_q_norm", "attn_k_norm"}));
}

TEST_CASE("layers of two shapes, of which some attend to the keys of others") {
  const LoadedModel model = load(small_gemma4());
  std::vector<kvt::LayerShape> shapes;
  std::vector<int> numbers;
  REQUIRE(kvt::llama_layers(model.get(), shapes, &numbers).ok());
  CHECK(shapes == std::vector<kvt::LayerShape>{{2, 4, 40}, {1, 4, 64}, {2, 4, 40}, {1, 4, 64}});
  CHECK(numbers == std::vector<int>{0, 1, 2, 3});
  kvt::Geometry alike;
  CHECK(kvt::llama_geometry(model.get(), alike).code == kvt::Errc::bad_shape);
  const auto cache = make_cache({"uniform", "sink_recent", "fp32"}, shapes, {});
  // Its products are not scaled, so that rounding weighs more: llama.cpp's flash attention is .1 from its other way.
  constexpr double unscaled = 1e-2;
  check_same(model, *cache, unscaled);
  Tiny other = small_gemma4();
  ++other.integers["attention.sliding_window"];
  const auto tokens = some_tokens(150, 50);
  const auto logits_of = [&](const Tiny& tiny) { return decode(context_of(load(tiny), parameters()).get(), tokens, 0); };
  CHECK(furthest(logits_of(small_gemma4()), logits_of(other)) > 100 * unscaled);
}

TEST_CASE("layers between those that attend") {
  Tiny lfm2 = small_model("lfm2", 4, 64, {});
  lfm2.integers.erase("attention.head_count_kv");
  lfm2.integers["attention.head_count"] = 1;
  lfm2.integers["shortconv.l_cache"] = 3;
  lfm2.shapes["token_embd_norm.weight"] = lfm2.shapes.at("output_norm.weight");
  lfm2.shapes.erase("output_norm.weight");
  for (int l = 0; l < 4; ++l) {
    const std::string block = "blk." + std::to_string(l) + ".";
    const bool attends = l % 2 == 1;
    lfm2.lists["attention.head_count_kv"].push_back(attends ? 1 : 0);
    if (attends) {
      lfm2.shapes[block + "attn_q.weight"] = lfm2.shapes[block + "attn_output.weight"] = {64, 64};
      lfm2.shapes[block + "attn_q_norm.weight"] = lfm2.shapes[block + "attn_k_norm.weight"] = {64};
      continue;
    }
    for (const char* const made : {"attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"})
      lfm2.shapes.erase(block + made);
    lfm2.shapes[block + "shortconv.conv.weight"] = {3, 64};
    lfm2.shapes[block + "shortconv.in_proj.weight"] = {64, 3 * 64};
    lfm2.shapes[block + "shortconv.out_proj.weight"] = {64, 64};
  }
  const LoadedModel model = load(lfm2);
  std::vector<kvt::LayerShape> shapes;
  std::vector<int> numbers;
  REQUIRE(kvt::llama_layers(model.get(), shapes, &numbers).ok());
  CHECK(numbers == std::vector<int>{1, 3});
  kvt::Geometry shape;
  REQUIRE(kvt::llama_geometry(model.get(), shape).ok());
  CHECK(shape == kvt::Geometry{2, 1, 1, 64});
  kvt::KvCache<kvt::Uniform, kvt::SinkRecent, kvt::KvCodec<kvt::Dense<float, 64>>> cache;
  REQUIRE(cache.init(shape).ok());
  kvt::LlamaCppAttention attention(cache);
  auto how = parameters();
  const LoadedContext plain = context_of(model, how);
  REQUIRE(attention.attach(how).ok());
  const LoadedContext attached = context_of(model, how);
  for (const int first : {0, 100}) {
    const auto tokens = some_tokens(100, 50);
    CHECK(furthest(decode(plain.get(), tokens, first), decode(attached.get(), tokens, first)) < tolerance);
    REQUIRE(attention.finish().ok());
  }
  CHECK(cache.num_rows(1, 0) == 200);
}

TEST_CASE("both engines agree, also where several caches take turns") {
  const std::string path = dequantised(environment("KVT_MODEL"));
  const Model ours(path), theirs(path, EngineKind::llama_cpp);
  CHECK(ours.parameters().geometry() == theirs.parameters().geometry());
  CHECK(theirs.parameters().context == ours.parameters().context);
  CHECK(theirs.ropes().front().base == ours.ropes().front().base);
  CHECK(theirs.ropes().front().pairs == ours.ropes().front().pairs);
  const auto &a = ours.output_projections()[7], &b = theirs.output_projections()[7];
  CHECK(a.width == b.width);
  CHECK(std::equal(a.weights, a.weights + 576 * 576, b.weights));

  Engine one(ours, 2), other(theirs, 2);
  const auto tokens = some_tokens(90, 40000);
  const kvt::Composition names{"uniform", "key_diff", "turbo3"};
  const auto options = told_of(ours, names, {.recent_rows = 4});
  struct Pair {
    std::unique_ptr<kvt::AnyCache> ours, theirs;
    int length;
  };
  std::vector<Pair> pairs;
  for (const int length : {30, 80, 50}) {
    pairs.push_back({make_cache(names, ours.parameters().geometry(), options),
                     make_cache(names, ours.parameters().geometry(), options), length});
  }
  for (auto& pair : pairs) {
    const auto text = std::span(tokens).first(static_cast<std::size_t>(pair.length));
    one.eval(*pair.ours, text, 0, Engine::Logits::last);
    other.eval(*pair.theirs, text, 0, Engine::Logits::last);
  }
  for (auto& pair : pairs) {
    for (auto* const cache : {pair.ours.get(), pair.theirs.get()}) check(cache->compress(kvt::Retain::ratio(0.8)));
    for (int i = 0; i < 3; ++i) {
      const auto next = std::span(tokens).subspan(static_cast<std::size_t>(pair.length + i), 1);
      const auto want = one.eval(*pair.ours, next, pair.length + i, Engine::Logits::last);
      const auto have = other.eval(*pair.theirs, next, pair.length + i, Engine::Logits::last);
      CHECK(furthest({want.begin(), want.end()}, {have.begin(), have.end()}) < 2e-3);
    }
  }
}

namespace {

// Attends with a cache of its own, beside llama.cpp or instead of it.
struct Observer {
  kvt::KvCache<kvt::Uniform, kvt::SinkRecent, kvt::KvCodec<kvt::Dense<float, 256>>> cache;
  bool instead = false;
  double apart = 0, largest = 0;
  int calls = 0, fails_at = -1;

  const kvt::Geometry& geometry() const { return cache.geometry(); }
  kvt::Status attended(const kvt::LlamaCppAttended& seen) {
    if (calls++ == fails_at) return kvt::error(kvt::Errc::bad_value, "seen enough");
    KVT_TRY(cache.append(seen.layer, seen.keys, seen.values, seen.positions));
    std::vector<float> own(seen.positions.size() * 4 * 256);
    KVT_TRY(cache.attend(seen.layer, seen.queries, seen.positions, seen.options, own.data()));
    apart = std::max(apart, furthest({seen.outputs, seen.outputs + own.size()}, own));
    largest = std::max(largest, furthest(own, std::vector<float>(own.size(), 0.f)));
    if (instead) std::copy(own.begin(), own.end(), seen.outputs);
    return kvt::success();
  }
};

}  // namespace

TEST_CASE("an observer sees what each layer attends with, and may change what comes of it") {
  init_engine();
  const TemporaryFolder folder;
  Tiny gemma3 = small_model("gemma3", 6, 256, {"post_attention_norm", "attn_q_norm", "attn_k_norm", "post_ffw_norm"});
  gemma3.integers["attention.sliding_window"] = 40;
  gemma3.write(folder.file("model.gguf"));
  const LoadedModel model = load(folder.file("model.gguf"));
  const auto tokens = some_tokens(100, 50);
  const auto plain = decode(context_of(model, parameters()).get(), tokens, 0);
  double apart[2];
  for (const bool instead : {false, true}) {
    Observer observer;
    observer.instead = instead;
    REQUIRE(observer.cache.init({6, 1, 4, 256}).ok());
    kvt::LlamaCppAttention attention(observer);
    auto how = parameters();
    REQUIRE(attention.attach(how).ok());
    CHECK(how.type_k == GGML_TYPE_F32);
    const LoadedContext context = context_of(model, how);
    apart[instead ? 1 : 0] = furthest(plain, decode(context.get(), tokens, 0));
    REQUIRE(attention.finish().ok());
    CHECK(observer.calls == 6 * 3);                   // parts of 48 tokens
    CHECK(observer.apart < 3e-3 * observer.largest);  // llama.cpp's flash attention rounds
    CHECK(observer.cache.num_rows(5, 0) == 100);
    observer.fails_at = observer.calls + 2;
    CHECK(decode(context.get(), {3}, 100).empty());
    CHECK(attention.finish().message() == "seen enough");
  }
  CHECK(apart[1] < tolerance);
  CHECK(apart[1] < apart[0]);
  {
    // Layers that attend to the keys of others have none to show.
    const LoadedModel mixed = load(small_gemma4());
    struct {
      kvt::Geometry shape{4, 2, 8, 64};
      std::vector<std::pair<int, bool>> seen;
      const kvt::Geometry& geometry() const { return shape; }
      kvt::LayerShape layer_shape(int layer) const {
        return layer % 2 == 0 ? kvt::LayerShape{2, 4, 40} : kvt::LayerShape{1, 4, 64};
      }
      kvt::Status attended(const kvt::LlamaCppAttended& layer) {
        seen.emplace_back(layer.layer, layer.keys != nullptr && layer.values != nullptr);
        return kvt::success();
      }
    } watcher;
    kvt::LlamaCppAttention attention(watcher);
    auto how = parameters();
    REQUIRE(attention.attach(how).ok());
    CHECK(!decode(context_of(mixed, how).get(), some_tokens(40, 50), 0).empty());
    CHECK(watcher.seen ==
          std::vector<std::pair<int, bool>>{{0, true}, {1, true}, {2, true}, {3, true}, {2, false}, {3, false}});
  }
  auto how = parameters();
  how.type_k = GGML_TYPE_Q8_0;
  Observer observer;
  CHECK(kvt::LlamaCppAttention(observer).attach(how).code == kvt::Errc::bad_value);
}

TEST_CASE("what it cannot serve is refused, and nothing is lost") {
  const TemporaryFolder folder;
  const Tiny tiny = small_model("qwen3", 2, 80, {"attn_q_norm", "attn_k_norm"});
  tiny.write(folder.file("model.gguf"));
  const LoadedModel model = load(folder.file("model.gguf"));
  kvt::KvCache<kvt::Uniform, kvt::SinkRecent, kvt::KvCodec<kvt::Dense<float, 80>>> cache, narrow;
  REQUIRE(cache.init({2, 1, 4, 80}).ok());
  REQUIRE(narrow.init({2, 2, 4, 80}).ok());
  kvt::LlamaCppAttention attention(narrow);
  auto how = parameters();
  how.n_seq_max = 2;
  CHECK(attention.attach(how).code == kvt::Errc::bad_value);
  CHECK((how.cb_eval == nullptr));
  how.n_seq_max = 1;
  bool stop = false;
  how.abort_callback = [](void* data) { return *static_cast<bool*>(data); };
  how.abort_callback_data = &stop;
  REQUIRE(attention.attach(how).ok());
  kvt::LlamaCppAttention second(cache);
  CHECK(second.attach(how).code == kvt::Errc::bad_value);
  const LoadedContext context = context_of(model, how);
  const auto tokens = some_tokens(20, 50);
  CHECK(decode(context.get(), tokens, 0).empty());
  const kvt::Status status = attention.finish();
  CHECK(status.code == kvt::Errc::bad_shape);
  CHECK(status.message() == "the model stores rows of 80 numbers; the cache has 160");
  CHECK(narrow.end_position(0) == 0);
  CHECK(attention.finish().ok());

  // With the right one the same context goes on.
  llama_memory_clear(llama_get_memory(context.get()), false);
  attention.set_cache(cache);
  CHECK(!decode(context.get(), tokens, 0).empty());
  CHECK(attention.finish().ok());
  CHECK(cache.num_rows(1, 0) == 20);
  // An engine that stops itself, in the middle of a graph.
  stop = true;
  CHECK(decode(context.get(), {1, 2}, 20).empty());
  CHECK(attention.finish().code == kvt::Errc::stopped);
  stop = false;
  CHECK(cache.num_rows(0, 0) == 20);
  CHECK(cache.num_rows(1, 0) == 20);
  CHECK(!decode(context.get(), {1, 2}, 20).empty());
  CHECK(cache.num_rows(1, 0) == 22);
  // What lies before moves: the cache cannot follow, and says so.
  llama_memory_seq_rm(llama_get_memory(context.get()), 0, 4, 10);
  llama_memory_seq_add(llama_get_memory(context.get()), 0, 10, -1, -6);
  CHECK(decode(context.get(), {3}, 16).empty());
  CHECK(attention.finish().code == kvt::Errc::unsupported);
  CHECK(cache.num_rows(1, 0) == 22);
}

TEST_CASE("the program answers with either engine") {
  std::vector<std::string> arguments = {"retrieve",
                                        "--text",
                                        text_path(),
                                        "--tokens",
                                        "150",
                                        "--tasks",
                                        "niah_single",
                                        "--samples",
                                        "2",
                                        "--json",
                                        "-",
                                        "--method",
                                        "adaptive,key_diff,turbo4",
                                        "--retain",
                                        "0.5",
                                        "--engine"};
  double found[2];
  for (const bool theirs : {false, true}) {
    auto with = arguments;
    with.push_back(theirs ? "llama.cpp" : "ggml");
    const auto json = nlohmann::json::parse(succeed(with).output);
    const auto& task = json["results"][1]["tasks"][0];
    CHECK(task["rows_share"] == doctest::Approx(0.5).epsilon(0.03));
    found[theirs ? 1 : 0] = json["results"][0]["tasks"][0]["log_prob"];
  }
  // The full cache's answers are as likely with both, but for activations of 8 bits.
  CHECK(found[0] == doctest::Approx(found[1]).epsilon(0.2));
}
