// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Layers of different shapes behind one cache are what each shape's own cache is: in what they attend to, keep and weigh. A cut
// that one shape fails leaves all as they were.
#include <doctest/doctest.h>

#include <random>

#include "kvtailor/compose.hpp"
#include "kvtailor/mixed_cache.hpp"

using namespace kvt;

namespace {

const std::vector<LayerShape> shapes = {{2, 4, 40}, {1, 4, 64}, {2, 4, 40}, {1, 4, 64}, {2, 4, 40}};
const std::vector<int> narrow = {0, 2, 4}, wide = {1, 3};
const Geometry narrow_shape{3, 2, 4, 40}, wide_shape{2, 1, 4, 64};
const Composition names{"adaptive", "key_diff", ""};

MadeCache compose(const Composition& of, const Geometry& geometry, const CacheOptions& options) {
  if (geometry.head_dim == 40) return make_cache_of<KvCodec<TurboQuant<4, 40>>>(of, geometry, options);
  return make_cache_of<KvCodec<TurboQuant<4, 64>>>(of, geometry, options);
}

std::unique_ptr<AnyCache> make_mixed(const Composition& of, const CacheOptions& options) {
  MadeCache made = MixedCache::make(
      shapes, options, [&](const Geometry& g, const CacheOptions& told, std::span<const int>) { return compose(of, g, told); });
  INFO(made.message);
  REQUIRE(made.status.ok());
  return std::move(made.cache);
}

struct Text {
  int rows;
  std::vector<std::vector<float>> keys, values, queries;  // of each layer
  std::vector<int> positions;

  explicit Text(int n, unsigned seed) : rows(n), positions(static_cast<std::size_t>(n)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::iota(positions.begin(), positions.end(), 0);
    for (const LayerShape& shape : shapes) {
      const auto fill = [&](int heads) {
        std::vector<float> x(static_cast<std::size_t>(n * heads * shape.head_dim));
        for (float& y : x) y = normal(random);
        return x;
      };
      keys.push_back(fill(shape.num_kv_heads));
      values.push_back(fill(shape.num_kv_heads));
      queries.push_back(fill(shape.num_q_heads));
    }
  }
};

// Layers of a cache, and of the model.
void append(AnyCache& cache, const std::vector<int>& layers, const Text& text) {
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const auto of = static_cast<std::size_t>(layers[l]);
    REQUIRE(cache.append(static_cast<int>(l), text.keys[of].data(), text.values[of].data(), text.positions).ok());
    REQUIRE(cache.observe(static_cast<int>(l), text.queries[of].data(), text.positions, {}).ok());
  }
}

std::vector<float> attend(const AnyCache& cache, int layer, const std::vector<float>& queries, const LayerShape& shape) {
  const auto width = static_cast<std::size_t>(shape.num_q_heads * shape.head_dim);
  std::vector<float> out(width);
  const int last = 1 << 20;
  AttendPlan plan;
  REQUIRE(cache.plan(layer, queries.data() + queries.size() - width, {&last, 1}, {}, out.data(), plan).ok());
  for (int task = 0; task < plan.num_tasks(); ++task) plan.run(task);
  return out;
}

const std::vector<int> all = {0, 1, 2, 3, 4};

struct Three {
  std::unique_ptr<AnyCache> mixed, narrow_part, wide_part;
  Text text{300, 1};

  explicit Three(const Composition& of, const CacheOptions& options = {.recent_rows = 8}) : mixed(make_mixed(of, options)) {
    narrow_part = compose(of, narrow_shape, options).cache;
    wide_part = compose(of, wide_shape, options).cache;
    append(*mixed, all, text);
    append(*narrow_part, narrow, text);
    append(*wide_part, wide, text);
  }
  const AnyCache& part(int layer) const { return layer % 2 == 0 ? *narrow_part : *wide_part; }

  void check_same() const {
    for (const int l : all) {
      CAPTURE(l);
      const LayerShape& shape = shapes[static_cast<std::size_t>(l)];
      CHECK(mixed->layer_shape(l) == shape);
      for (int h = 0; h < shape.num_kv_heads; ++h) {
        const auto have = mixed->positions(l, h), want = part(l).positions(l / 2, h);
        CHECK(std::vector<int>(have.begin(), have.end()) == std::vector<int>(want.begin(), want.end()));
        CHECK(mixed->num_rows(l, h) == static_cast<int>(want.size()));
      }
      CHECK(mixed->num_rows(l, shape.num_kv_heads) == 0);
      CHECK(mixed->end_position(l) == part(l).end_position(l / 2));
      const auto& queries = text.queries[static_cast<std::size_t>(l)];
      CHECK(attend(*mixed, l, queries, shape) == attend(part(l), l / 2, queries, shape));
    }
    CHECK(mixed->memory().total() == narrow_part->memory().total() + wide_part->memory().total());
    CHECK(mixed->memory().payload_bytes == narrow_part->memory().payload_bytes + wide_part->memory().payload_bytes);
    CHECK(mixed->memory().dense_fp16_bytes == narrow_part->memory().dense_fp16_bytes + wide_part->memory().dense_fp16_bytes);
  }
};

class Bounded : public std::pmr::memory_resource {
 public:
  int left = 1 << 30;  // allocations
 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (left-- <= 0) throw std::bad_alloc();
    return std::pmr::new_delete_resource()->allocate(bytes, alignment);
  }
  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override {
    std::pmr::new_delete_resource()->deallocate(p, bytes, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

}  // namespace

TEST_CASE("each layer is in the cache of its shape") {
  Three three(names);
  CHECK(three.mixed->geometry() == Geometry{5, 2, 8, 64});
  three.check_same();
  for (const auto& cache : {three.mixed.get(), three.narrow_part.get(), three.wide_part.get()}) REQUIRE(cache->flush().ok());
  three.check_same();
  for (const auto& cache : {three.mixed.get(), three.narrow_part.get(), three.wide_part.get()})
    REQUIRE(cache->compress(Retain::ratio(0.4)).ok());
  three.check_same();
  CHECK(three.mixed->num_rows(0, 0) + three.mixed->num_rows(0, 1) < 2 * 300);

  // All elements together: between the two, nearer to the one that has more of them.
  const double bits = three.mixed->bits_per_element();
  CHECK(std::min(three.narrow_part->bits_per_element(), three.wide_part->bits_per_element()) < bits);
  CHECK(std::max(three.narrow_part->bits_per_element(), three.wide_part->bits_per_element()) > bits);

  std::unique_ptr<AnyCache> child;
  REQUIRE(three.mixed->fork(child).ok());
  for (const auto& cache : {three.mixed.get(), three.narrow_part.get(), three.wide_part.get()})
    REQUIRE(cache->truncate(200).ok());
  three.check_same();
  three.mixed->clear();
  CHECK(three.mixed->num_rows(3, 0) == 0);
  CHECK(child->end_position(3) == 300);
  three.mixed = std::move(child);
  REQUIRE(three.mixed->truncate(200).ok());
  three.check_same();
}

TEST_CASE("scores come layer by layer") {
  const Three three(names);
  std::vector<float> mixed, of_narrow, of_wide;
  REQUIRE(three.mixed->scores(0.5, mixed).ok());
  REQUIRE(three.narrow_part->scores(0.5, of_narrow).ok());
  REQUIRE(three.wide_part->scores(0.5, of_wide).ok());
  std::vector<float> want;
  for (const int l : all) {
    const auto& from = l % 2 == 0 ? of_narrow : of_wide;
    const std::ptrdiff_t rows = l % 2 == 0 ? 600 : 300, at = l / 2 * rows;
    want.insert(want.end(), from.begin() + at, from.begin() + at + rows);
  }
  CHECK(mixed == want);
}

TEST_CASE("bytes are kept, and divided by what each shape takes") {
  Three three(names);
  // Codes alone, so that bytes are rows.
  for (const auto& cache : {three.mixed.get(), three.narrow_part.get()}) REQUIRE(cache->compress(Retain::ratio(0.99)).ok());
  const long long before = three.mixed->memory().total(), narrow_before = three.narrow_part->memory().total();
  REQUIRE(three.mixed->compress(Retain::bytes(before / 2)).ok());
  CHECK(three.mixed->memory().total() <= before / 2);
  CHECK(three.mixed->memory().total() > 0.4 * static_cast<double>(before));
  REQUIRE(three.narrow_part->compress(Retain::bytes(narrow_before * (before / 2) / before)).ok());
  CHECK(three.mixed->num_rows(2, 1) == three.narrow_part->num_rows(1, 1));
  CHECK(three.mixed->compress(Retain::bytes(before)).code == Errc::bad_budget);
  CHECK(three.mixed->compress(Retain::ratio(0)).code == Errc::bad_budget);
}

TEST_CASE("a cut that fails anywhere changes nothing") {
  Bounded memory;
  const CacheOptions options{.recent_rows = 8, .memory = &memory};
  int failures = 0;
  for (int allowed = 0;; ++allowed) {
    Three three(names, options);
    memory.left = allowed;
    const Status status = three.mixed->compress(Retain::ratio(0.3));
    const bool failed = memory.left < 0;
    memory.left = 1 << 30;
    // Where blocks could not be moved a cut goes through without.
    if (status.ok() && !failed) break;
    if (status.ok()) continue;
    ++failures;
    CHECK(status.code == Errc::out_of_memory);
    three.check_same();
  }
  CHECK(failures > 20);
}

TEST_CASE("what a shape cannot have is refused for all") {
  const auto made_of = [&](const Composition& of, const CacheOptions& options) {
    return MixedCache::make(shapes, options, [&](const Geometry& g, const CacheOptions& told, std::span<const int>) {
      return compose(of, g, told);
    });
  };
  const Rope rope{.rotary_dim = 40}, ropes[2] = {rope, rope};
  CHECK(made_of(names, {.ropes = ropes}).message == "there are 2 ropes; it must be one, or one for each of 5 layers");
  const float weights[4] = {};
  const OutputProjection outputs[3] = {{weights, 1}, {weights, 1}, {weights, 1}};
  CHECK(made_of(names, {.output_projections = outputs}).status.code == Errc::bad_shape);
  CHECK(made_of({"uniform", "no_such", ""}, {}).status.code == Errc::bad_name);
  CHECK(MixedCache::make(std::span<const LayerShape>(), {}, [](const auto&...) { return MadeCache(); }).status.code ==
        Errc::bad_shape);

  // Policies that want what is not there: the old ones stay.
  Three three(names);
  const ParsedPolicies wants_rope({"uniform", "expected_attention", ""});
  CHECK(three.mixed->set_policies(wants_rope.allocator, wants_rope.selector).code == Errc::no_evidence);
  CHECK(!three.mixed->wants_queries());
  const ParsedPolicies wants_queries({"uniform", "snap_kv", ""});
  CHECK(three.mixed->set_policies(wants_queries.allocator, wants_queries.selector).ok());
  CHECK(three.mixed->wants_queries());
  CHECK(three.mixed->append(5, nullptr, nullptr, {}).code == Errc::bad_shape);
  CHECK(three.mixed->encode(1, 1).ok());
  CHECK(!three.mixed->encode(1, 2).ok());
}

TEST_CASE("what is told of layers goes to their own cache, and lives as long as its forks") {
  std::vector<std::vector<float>> weights;
  std::vector<OutputProjection> outputs;
  std::vector<Rope> ropes;
  for (const LayerShape& shape : shapes) {
    weights.emplace_back(static_cast<std::size_t>(3 * shape.num_q_heads * shape.head_dim), 0.5f);
    outputs.push_back({weights.back().data(), 3});
    ropes.push_back({.rotary_dim = shape.head_dim});
  }
  std::unique_ptr<AnyCache> child;
  {
    const auto cache = make_mixed({"uniform", "expected_attention", ""}, {.ropes = ropes, .output_projections = outputs});
    append(*cache, all, Text(60, 2));
    REQUIRE(cache->fork(child).ok());
  }
  ropes.clear();
  outputs.clear();
  CHECK(child->compress(Retain::ratio(0.8)).ok());
}

TEST_CASE("one shape needs no other cache around its own") {
  const std::vector<LayerShape> alike(3, {2, 4, 40});
  const MadeCache made = MixedCache::make(
      alike, {}, [&](const Geometry& g, const CacheOptions& told, std::span<const int>) { return compose(names, g, told); });
  REQUIRE(made.status.ok());
  CHECK(made.cache->geometry() == narrow_shape);
  CHECK(dynamic_cast<MixedCache*>(made.cache.get()) == nullptr);
}
