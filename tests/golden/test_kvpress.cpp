// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The rows that stay are those that kvpress' own code keeps of the same tensors of a real model: golden/kvpress, made by
// bench/peers/kvpress_golden.py.
#include <doctest/doctest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "kvtailor/budget/any_allocator.hpp"
#include "kvtailor/kvtailor.hpp"
#include "kvtailor/select/any_selector.hpp"

using namespace kvt;
using nlohmann::json;

namespace {

constexpr int dim = 64;
const std::string folder = "golden/kvpress/";

std::vector<float> numbers(const std::string& name, std::vector<std::size_t> shape) {
  Table table;
  const Status status = read_table(folder + name, table);
  REQUIRE_MESSAGE(status.ok(), name << ": " << status.message());
  REQUIRE(table.shape == shape);
  return table.numbers;
}

struct Golden {
  json data;
  int rows, q_heads, kv_heads, outputs;
  Rope rope;

  Golden() {
    std::ifstream file(folder + "kvpress.json");
    REQUIRE(file.is_open());
    data = json::parse(file);
    const json& about = data["about"];
    rows = about["tokens"];
    q_heads = about["num_q_heads"];
    kv_heads = about["num_kv_heads"];
    outputs = about["outputs"];
    REQUIRE(about["head_dim"] == dim);
    REQUIRE(about["rope_layout"] == "halves");
    rope = {.rotary_dim = dim, .base = about["rope_base"], .pairs = Rope::Pairs::halves};
  }
};

// One layer, in the order in which a cache takes it.
struct Layer {
  std::vector<float> keys, values, queries, output, scores;

  Layer(const Golden& g, int layer) {
    const auto n = static_cast<std::size_t>(g.rows), q = static_cast<std::size_t>(g.q_heads),
               h = static_cast<std::size_t>(g.kv_heads);
    const std::string name = "layer" + std::to_string(layer);
    keys = by_row(numbers(name + "_keys.npy", {h, n, dim}), h, n);
    values = by_row(numbers(name + "_values.npy", {h, n, dim}), h, n);
    queries = by_row(numbers(name + "_queries.npy", {q, n, dim}), q, n);
    for (std::size_t i = 0; i < n * q; ++i) g.rope.apply(queries.data() + i * dim, static_cast<int>(i / q));
    output = numbers(name + "_output.npy", {static_cast<std::size_t>(g.outputs), q * dim});
    scores = numbers(name + "_scores.npy", {23, h, n});
  }

 private:
  static std::vector<float> by_row(const std::vector<float>& x, std::size_t heads, std::size_t n) {
    std::vector<float> to(x.size());
    for (std::size_t h = 0; h < heads; ++h) {
      for (std::size_t i = 0; i < n; ++i) {
        std::copy_n(x.begin() + static_cast<std::ptrdiff_t>((h * n + i) * dim), dim,
                    to.begin() + static_cast<std::ptrdiff_t>((i * heads + h) * dim));
      }
    }
    return to;
  }
};

using Kept = std::vector<std::vector<int>>;  // positions of each head
using Cache = KvCache<AnyAllocator, AnySelector, KvCodec<Dense<float, dim>>>;

struct Names {
  std::string allocator = "uniform", selector;
  int sinks = 0;
};

// The names of a kvpress method here.
std::string selector_of(const json& m) {
  const std::string press = m["press"];
  const auto text = [&](const char* key) { return m[key].dump(); };
  if (press == "KnormPress") return "key_norm";
  if (press == "KeyDiffPress") return "key_diff";
  if (press == "SnapKVPress" || press == "PyramidKVPress") {
    return "snap_kv:window=" + text("window_size") + ",kernel=" + text("kernel_size");
  }
  if (press == "TOVAPress") return "tova";
  if (press == "ObservedAttentionPress") return "heavy_hitter";
  if (press == "StreamingLLMPress") return "sink_recent:num_sinks=" + text("n_sink");
  if (press == "ExpectedAttentionPress") {
    return "expected_attention:future=" + text("n_future_positions") + ",num_sinks=" + text("n_sink") +
           ",epsilon=" + text("epsilon") + ",covariance=" + (m["use_covariance"] ? "on" : "off") +
           ",value_norm=" + (m["use_vnorm"] ? "on" : "off");
  }
  if (press == "LagKVPress") {
    return "lag_kv:lag=" + text("lag_size") + ",num_sinks=" + text("n_sink") + ",cross=" + (m["cross_scoring"] ? "on" : "off");
  }
  if (press == "CriticalKVPress") {
    return "critical_kv:epsilon=" + text("epsilon") + ",first_stage=" + text("first_stage_ratio") + "(" + selector_of(m["of"]) +
           ")";
  }
  if (press == "ChunkKVPress") return "chunk_kv:length=" + text("chunk_length") + "(" + selector_of(m["of"]) + ")";
  if (press == "AdaKVPress") return selector_of(m["of"]);
  if (press == "KVzipPress") return "reconstruction";
  FAIL("no selector for " << press);
  return {};
}

Names names_of(const json& m) {
  Names names{"uniform", selector_of(m), 0};
  // Rows that its presses keep above all are a zone of the cache here, whose queries count for no mean.
  if (names.selector.find("expected_attention") != std::string::npos) names.sinks = 4;
  if (m["press"] == "AdaKVPress") names.allocator = "adaptive:safeguard=" + m["alpha_safeguard"].dump();
  if (m["press"] == "KVzipPress") {
    names.allocator = m["layerwise"] ? "adaptive:safeguard=0" : "global:safeguard=0";
    names.sinks = m["n_sink"];
  }
  return names;
}

// What stays of each head of the given layers.
std::vector<Kept> kept_here(const Golden& g, const std::vector<const Layer*>& layers, const Names& names, const json& method,
                            std::size_t total) {
  AnyAllocator allocator;
  AnySelector selector;
  REQUIRE(detail::parse_allocator(names.allocator, allocator) == "");
  REQUIRE(detail::parse_selector(names.selector, selector) == "");
  Cache cache(allocator, selector);
  std::vector<OutputProjection> outputs;
  for (const Layer* layer : layers) outputs.push_back({layer->output.data(), g.outputs});
  CacheOptions options{.sink_rows = names.sinks, .recent_rows = 0, .ropes = {&g.rope, 1}, .output_projections = outputs};
  REQUIRE(cache.init({static_cast<int>(layers.size()), g.kv_heads, g.q_heads, dim}, options).ok());
  std::vector<int> positions(static_cast<std::size_t>(g.rows));
  for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int>(i);
  const bool repeats = method["press"] == "KVzipPress";
  const int first = repeats ? method["rows"].get<int>() : 0;  // query that is shown
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const int layer = static_cast<int>(l);
    REQUIRE(cache.append(layer, layers[l]->keys.data(), layers[l]->values.data(), positions).ok());
    const float* const queries = layers[l]->queries.data() + static_cast<std::ptrdiff_t>(first) * g.q_heads * dim;
    REQUIRE(cache.observe(layer, queries, std::span(positions).subspan(static_cast<std::size_t>(first))).ok());
  }
  if (repeats) REQUIRE(cache.truncate(first).ok());
  const auto rows = static_cast<double>(repeats ? first : g.rows) * g.kv_heads * static_cast<double>(layers.size());
  const Status status = cache.compress(Retain::ratio(static_cast<double>(total) / rows));
  REQUIRE_MESSAGE(status.ok(), names.selector << ": " << status.message());
  std::vector<Kept> kept;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    Kept& own = kept.emplace_back();
    for (int h = 0; h < g.kv_heads; ++h) {
      const auto have = cache.positions(static_cast<int>(l), h);
      own.emplace_back(have.begin(), have.end());
    }
  }
  return kept;
}

struct Agreement {
  long long same = 0, all = 0, tied = 0;
};

// Rows of equal scores may stay instead of one another: kvpress leaves open which.
void compare(const std::vector<int>& ours, const std::vector<int>& theirs, const float* scores, Agreement& agreement) {
  const std::set<int> own(ours.begin(), ours.end()), other(theirs.begin(), theirs.end());
  float least = std::numeric_limits<float>::infinity();
  for (const int row : theirs) least = scores == nullptr ? least : std::min(least, scores[row]);
  for (const int row : theirs) {
    ++agreement.all;
    if (own.count(row) != 0) {
      ++agreement.same;
    } else if (scores != nullptr && scores[row] == least) {
      ++agreement.tied;
    }
  }
  // A row of ours instead of a tied one must be tied itself.
  for (const int row : ours) {
    if (other.count(row) == 0 && scores != nullptr && scores[row] != least && agreement.tied > 0) --agreement.tied;
  }
}

}  // namespace

TEST_CASE("selectors and allocators keep the rows that kvpress keeps") {
  const Golden g;
  std::map<int, Layer> layers;
  for (const int layer : g.data["about"]["layers"]) layers.emplace(layer, Layer(g, layer));
  std::map<std::string, json> methods;
  for (const json& m : g.data["methods"]) methods[m["name"]] = m;
  std::map<std::string, Agreement> found;
  std::map<std::string, std::vector<Kept>> joint;  // of the methods whose layers compete, by name and ratio
  for (const json& entry : g.data["kept"]) {
    const json& m = methods[entry["method"]];
    // Its matrix is its own random one; the cache sees a repetition in one piece; and ties of these go on into other rows.
    const std::string press = m["press"];
    if (press == "LeverageScorePress" || (press == "KVzipPress" && m["chunks"].size() > 1) ||
        (entry.contains("tied") && (press == "CriticalKVPress" || press == "ChunkKVPress" || press == "AdaKVPress"))) {
      continue;
    }
    const bool together = press == "KVzipPress" && !m["layerwise"];
    const auto theirs = entry["kept"].get<Kept>();
    std::size_t total = 0;
    for (const auto& head : theirs) total += head.size();
    Kept ours;
    if (together) {
      // Both layers of this ratio are asked for at once.
      std::vector<const Layer*> both;
      total = 0;
      for (const auto& [number, layer] : layers) both.push_back(&layer);
      for (const json& other : g.data["kept"]) {
        if (other["method"] != entry["method"] || other["ratio"] != entry["ratio"]) continue;
        for (const auto& head : other["kept"]) total += head.size();
      }
      auto& kept = joint[entry["ratio"].dump()];
      if (kept.empty()) kept = kept_here(g, both, names_of(m), m, total);
      ours = kept[static_cast<std::size_t>(std::distance(layers.begin(), layers.find(entry["layer"].get<int>())))];
    } else {
      ours = kept_here(g, {&layers.at(entry["layer"])}, names_of(m), m, total)[0];
    }
    Agreement& agreement = found[entry["method"]];
    for (std::size_t h = 0; h < theirs.size(); ++h) {
      REQUIRE((press == "AdaKVPress" || press == "KVzipPress" || ours[h].size() == theirs[h].size()));
      const json& scored = m.contains("scores") ? m : methods["SnapKV(" + m.value("window_size", json(0)).dump() + ",5)"];
      const bool tied = entry.contains("tied") && scored.contains("scores");
      const std::size_t at =
          tied ? (scored["scores"].get<std::size_t>() * theirs.size() + h) * static_cast<std::size_t>(g.rows) : 0;
      compare(ours[h], theirs[h], tied ? layers.at(entry["layer"]).scores.data() + at : nullptr, agreement);
    }
  }
  int agreeing = 0;
  for (const auto& [name, a] : found) {
    MESSAGE(name << ": " << a.same << " of " << a.all << " rows, " << a.tied << " more are ties");
    CHECK(static_cast<double>(a.same + a.tied) >= 0.99 * static_cast<double>(a.all));
    agreeing += a.same + a.tied == a.all;
  }
  CHECK(found.size() >= 25);
  CHECK(agreeing >= 20);
}

TEST_CASE("Pyramid gives layers what kvpress gives them, where that does not fall back to an even budget") {
  const Golden g;
  int tried = 0;
  for (const json& b : g.data["budgets"]) {
    const auto theirs = b["budgets"].get<std::vector<int>>();
    const int layers = static_cast<int>(theirs.size()), rows = b["rows"];
    if (theirs.front() == theirs.back()) continue;  // its even budget
    const std::vector<int> seen(theirs.size(), rows), floor(theirs.size(), b["window_size"]);
    std::int64_t total = 0;
    for (const int n : theirs) total += n;
    std::vector<int> keep(theirs.size());
    REQUIRE(Pyramid{.beta = b["beta"]}.allocate({total, layers, 1, seen, floor, {}}, keep).ok());
    for (std::size_t l = 0; l < keep.size(); ++l) CHECK(std::abs(keep[l] - theirs[l]) <= 1);  // rounded each for itself
    ++tried;
  }
  CHECK(tried >= 5);
}
