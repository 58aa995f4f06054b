// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A cache whose policies are changed, beside caches that had them from the beginning.
#include <doctest/doctest.h>

#include <numeric>
#include <random>

#include "kvtailor/budget/any_allocator.hpp"
#include "kvtailor/kvtailor.hpp"
#include "kvtailor/select/any_selector.hpp"

using namespace kvt;

namespace {

constexpr Geometry shape{2, 2, 4, 64};
using Codec = KvCodec<Dense<Half, 64>, Dense<Half, 64>>;
using Cache = KvCache<AnyAllocator, AnySelector, Codec>;

template <class Selector>
Cache cache_of(Selector selector) {
  return Cache(AnyAllocator(Uniform{}), AnySelector(selector));
}

std::vector<float> normals(std::mt19937& random, int n, int heads) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(n * heads * shape.head_dim));
  for (float& v : x) v = normal(random);
  return x;
}

// The same rows and queries for each cache: `steps` times seven rows.
void feed(std::initializer_list<Cache*> caches, int steps) {
  std::mt19937 random(5);
  for (int step = 0; step < steps; ++step) {
    std::vector<int> positions(7);
    std::iota(positions.begin(), positions.end(), 7 * step);
    for (int l = 0; l < shape.num_layers; ++l) {
      const auto keys = normals(random, 7, 2), values = normals(random, 7, 2), queries = normals(random, 7, 4);
      for (Cache* cache : caches) {
        REQUIRE(cache->append(l, keys.data(), values.data(), positions).ok());
        REQUIRE(cache->observe(l, queries.data(), positions).ok());
      }
    }
  }
}

void check_same_rows(const Cache& a, const Cache& b) {
  for (int l = 0; l < shape.num_layers; ++l) {
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      CHECK(std::ranges::equal(a.positions(l, h), b.positions(l, h)));
    }
  }
}

}  // namespace

TEST_CASE("a shorter window of queries is the end of a longer one, from the next cut on") {
  Cache changed = cache_of(SnapKv{.window = 32}), always = cache_of(SnapKv{.window = 8});
  const CacheOptions options{.sink_rows = 2, .recent_rows = 4};
  REQUIRE(changed.init(shape, options).ok());
  REQUIRE(always.init(shape, options).ok());
  feed({&changed, &always}, 9);
  REQUIRE(changed.set_policies(AnyAllocator(Uniform{}), AnySelector(SnapKv{.window = 8})).ok());
  CHECK(changed.memory().evidence_bytes == always.memory().evidence_bytes);
  REQUIRE(changed.compress(Retain::rows(20)).ok());
  REQUIRE(always.compress(Retain::rows(20)).ok());
  check_same_rows(changed, always);
}

TEST_CASE("a longer window has the queries of the shorter one, and those that come") {
  Cache changed = cache_of(SnapKv{.window = 8}), always = cache_of(SnapKv{.window = 15});
  REQUIRE(changed.init(shape, {.sink_rows = 2, .recent_rows = 4}).ok());
  REQUIRE(always.init(shape, {.sink_rows = 2, .recent_rows = 4}).ok());
  std::mt19937 random(6);
  const auto keys = normals(random, 40, 2), values = normals(random, 40, 2), queries = normals(random, 40, 4);
  std::vector<int> positions(40);
  std::iota(positions.begin(), positions.end(), 0);
  for (Cache* cache : {&changed, &always}) {
    for (int l = 0; l < shape.num_layers; ++l) REQUIRE(cache->append(l, keys.data(), values.data(), positions).ok());
  }
  const auto observe = [&](Cache& cache, int first, int last) {
    const std::span<const int> where(positions.data() + first, positions.data() + last);
    for (int l = 0; l < shape.num_layers; ++l) REQUIRE(cache.observe(l, queries.data() + first * 4 * 64, where).ok());
  };
  observe(changed, 0, 33);
  observe(always, 25, 33);
  REQUIRE(changed.set_policies(AnyAllocator(Uniform{}), AnySelector(SnapKv{.window = 15})).ok());
  observe(changed, 33, 40);
  observe(always, 33, 40);
  REQUIRE(changed.compress(Retain::rows(20)).ok());
  REQUIRE(always.compress(Retain::rows(20)).ok());
  check_same_rows(changed, always);
}

TEST_CASE("what the new policies do not look at is given back, and what only they look at is asked for") {
  Cache cache = cache_of(HeavyHitter{});
  REQUIRE(cache.init(shape, {.sink_rows = 2, .recent_rows = 4}).ok());
  feed({&cache}, 5);
  CHECK(cache.memory().evidence_bytes > 0);
  REQUIRE(cache.set_policies(AnyAllocator(Uniform{}), AnySelector(KeyDiff{})).ok());
  CHECK(cache.memory().evidence_bytes == 0);
  CHECK(!cache.wants_queries());
  REQUIRE(cache.set_policies(AnyAllocator(Uniform{}), AnySelector(SnapKv{})).ok());
  CHECK(cache.compress(Retain::rows(20)).code == Errc::no_evidence);
  CHECK(cache.num_rows(0, 0) == 35);
  REQUIRE(cache.set_policies(AnyAllocator(Uniform{}), AnySelector(KeyDiff{})).ok());
  REQUIRE(cache.compress(Retain::rows(20)).ok());
  CHECK(cache.num_rows(0, 0) == 20);
}

TEST_CASE("policies that a cache cannot serve are refused, and the old ones stay") {
  Cache cache = cache_of(KeyDiff{});
  CHECK(cache.set_policies(AnyAllocator(Uniform{}), AnySelector(KeyDiff{})).code == Errc::bad_shape);  // no init() yet
  REQUIRE(cache.init(shape, {.sink_rows = 2, .recent_rows = 4}).ok());
  feed({&cache}, 5);
  const EvidenceSet needs = cache.needs();
  CHECK(cache.set_policies(AnyAllocator(Uniform{}), AnySelector(ExpectedAttention{})).code == Errc::no_evidence);
  CHECK(cache.set_policies(AnyAllocator(Uniform{}), AnySelector(SnapKv{.kernel = 4})).code == Errc::bad_value);
  CHECK(cache.set_policies(AnyAllocator(Uniform{}), AnySelector()).code == Errc::bad_policy);
  CHECK(cache.set_policies(AnyAllocator(), AnySelector(KeyDiff{})).code == Errc::bad_policy);
  CHECK(cache.needs() == needs);
  REQUIRE(cache.compress(Retain::rows(20)).ok());
}
