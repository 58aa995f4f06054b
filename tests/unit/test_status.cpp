// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What a cache says of itself and of input it cannot take.
#include <doctest/doctest.h>

#include <random>

#include "kvtailor/kvtailor.hpp"
#include "reference/counting.hpp"

using namespace kvt;

namespace {

constexpr int dim = 40;
const Geometry shape{2, 2, 4, dim};
const CacheOptions small{.sink_rows = 2, .recent_rows = 5, .block_rows = 8};
using Exact = KvCodec<Dense<float, dim>, Dense<float, dim>, float>;
using Turbo = KvCodec<TurboQuant<4, dim>, TurboQuant<3, dim>>;

using reference::Counting;

struct Rows {
  std::vector<float> keys, values, queries;
  std::vector<int> positions;

  Rows(int first, int n, int step = 1) {
    std::mt19937 random(static_cast<unsigned>(first + n));
    std::normal_distribution<float> normal;
    keys.resize(static_cast<std::size_t>(n * shape.num_kv_heads * dim));
    values.resize(keys.size());
    queries.resize(static_cast<std::size_t>(n * shape.num_q_heads * dim));
    for (auto* x : {&keys, &values, &queries}) {
      for (float& v : *x) v = normal(random);
    }
    for (int i = 0; i < n; ++i) positions.push_back(first + i * step);
  }
};

template <class Cache>
void append(Cache& cache, const Rows& rows) {
  for (int l = 0; l < shape.num_layers; ++l) {
    REQUIRE(cache.append(l, rows.keys.data(), rows.values.data(), rows.positions).ok());
    REQUIRE(cache.observe(l, rows.queries.data(), rows.positions).ok());
  }
}

// Everything a user can see, attention included.
template <class Cache>
std::vector<float> state(const Cache& cache) {
  std::vector<float> all;
  const auto add = [&](long long x) { all.push_back(static_cast<float>(x)); };
  const auto memory = cache.memory();
  for (const long long x : {memory.payload_bytes, memory.index_bytes, memory.evidence_bytes, memory.slack_bytes}) add(x);
  add(memory.dense_fp16_bytes);
  const Rows query(1000, 1);
  for (int l = 0; l < shape.num_layers; ++l) {
    add(cache.end_position(l));
    std::vector<float> out(query.queries.size());
    REQUIRE(cache.attend(l, query.queries.data(), query.positions, {}, out.data()).ok());
    all.insert(all.end(), out.begin(), out.end());
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      std::vector<float> keys(cache.positions(l, h).size() * dim), values(keys.size());
      cache.decode(l, h, keys.data(), values.data());
      all.insert(all.end(), keys.begin(), keys.end());
      all.insert(all.end(), values.begin(), values.end());
      for (const int p : cache.positions(l, h)) add(p);
    }
  }
  return all;
}

void check(const Status& status, Errc code, const char* part) {
  INFO(status.message());
  CHECK(status.code == code);
  CHECK(status.message().find(part) != std::string::npos);
  CHECK(status.message().find("{}") == std::string::npos);
}

struct NanScores {
  static constexpr EvidenceSet needs = {};
  Status score(const HeadEvidence&, std::span<float> score) const noexcept {
    score[20] = std::nanf("");
    return success();
  }
};

struct Greedy {
  static constexpr EvidenceSet needs = {};
  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept {
    std::copy(want.seen.begin(), want.seen.end(), keep.begin());
    return success();
  }
};

}  // namespace

TEST_CASE("a message says what was given and what would be accepted") {
  CHECK(error(Errc::bad_value, "got {}, not {}", 3, 4).message() == "got 3, not 4");
  CHECK(error(Errc::bad_value, "got {}", 0.25).message() == "got 0.25");
  CHECK(error(Errc::bad_value, "got {}", std::nan("")).message().find("nan") != std::string::npos);
  CHECK(error(Errc::bad_value, "got {}", -std::numeric_limits<double>::infinity()).message() == "got -inf");
  CHECK(error(Errc::bad_value, "got {}", 1e30).message() == "got 1e+30");
  CHECK(success().ok());
  CHECK(success().message().empty());
}

TEST_CASE("a shape that cannot be served is refused, and the cache keeps the one it has") {
  KvCache<Uniform, KeyDiff, Exact> cache;
  REQUIRE(cache.init(shape, small).ok());
  append(cache, Rows(0, 20));
  const auto before = state(cache);
  const int many = 1 << 20;
  check(cache.init({0, 1, 1, dim}), Errc::bad_shape, "num_layers is 0");
  check(cache.init({4097, 1, 1, dim}), Errc::bad_shape, "num_layers is 4097");
  check(cache.init({1, 0, 1, dim}), Errc::bad_shape, "num_kv_heads is 0");
  check(cache.init({1, -3, -3, dim}), Errc::bad_shape, "num_kv_heads is -3");
  check(cache.init({1, 4, 2, dim}), Errc::bad_shape, "num_q_heads is 2");
  check(cache.init({1, 3, 7, dim}), Errc::bad_shape, "num_q_heads is 7");
  check(cache.init({1, 1, 1, 41}), Errc::bad_shape, "head_dim is 41");
  check(cache.init({1, 1, 1, 64}), Errc::bad_shape, "head_dim is 64; this cache was composed for 40");
  check(cache.init(shape, {.sink_rows = -1}), Errc::bad_shape, "sink_rows is -1");
  check(cache.init(shape, {.sink_rows = many + 1}), Errc::bad_shape, "sink_rows is 1048577");
  check(cache.init(shape, {.recent_rows = -2}), Errc::bad_shape, "recent_rows is -2");
  check(cache.init(shape, {.recent_rows = many + 1}), Errc::bad_shape, "recent_rows is 1048577");
  check(cache.init(shape, {.block_rows = 0}), Errc::bad_shape, "block_rows is 0; it must be between 1 and 512");
  check(cache.init(shape, {.block_rows = 513}), Errc::bad_shape, "block_rows is 513");
  CHECK(state(cache) == before);
  CHECK(cache.geometry() == shape);
}

TEST_CASE("a cache without a shape says so and does not fail") {
  KvCache<Uniform, SinkRecent, Exact> cache, child;
  const Rows rows(0, 2);
  std::vector<float> out(rows.queries.size());
  check(cache.append(0, rows.keys.data(), rows.values.data(), rows.positions), Errc::bad_shape, "init()");
  check(cache.observe(0, rows.queries.data(), rows.positions), Errc::bad_shape, "init()");
  check(cache.attend(0, rows.queries.data(), rows.positions, {}, out.data()), Errc::bad_shape, "init()");
  check(cache.compress(Retain::rows(1)), Errc::bad_shape, "init()");
  check(cache.fork(child), Errc::bad_shape, "init()");
  CHECK(cache.flush().ok());
  CHECK(cache.truncate(0).ok());
  cache.clear();
  CHECK(cache.memory().total() == 0);
  CHECK(cache.bits_per_element() == 0);
}

TEST_CASE("input that cannot be taken is named and changes nothing") {
  KvCache<Adaptive, SnapKv, Turbo> cache({}, {.window = 4});
  REQUIRE(cache.init(shape, small).ok());
  append(cache, Rows(0, 60));
  const auto before = state(cache);
  const Rows next(60, 2);
  std::vector<float> out(next.queries.size());
  const float* const null = nullptr;
  const float nan = std::nanf(""), infinite = std::numeric_limits<float>::infinity();
  const auto with = [](std::vector<float> x, std::size_t at, float bad) {
    x[at] = bad;
    return x;
  };
  const auto refused = [&](const Status& status, Errc code, const char* part) {
    check(status, code, part);
    CHECK(state(cache) == before);
  };
  const auto append_keys = [&](const std::vector<float>& keys) {
    return cache.append(0, keys.data(), next.values.data(), next.positions);
  };
  const auto attend = [&](const AttendOptions& options) {
    return cache.attend(0, next.queries.data(), next.positions, options, out.data());
  };
  const std::size_t last = next.keys.size() - 1;  // in the last row of the last head: nothing may have been stored before it
  refused(append_keys(with(next.keys, last, nan)), Errc::bad_value, "nan");
  refused(append_keys(with(next.keys, last, -infinite)), Errc::bad_value, "-inf");
  refused(append_keys(with(next.keys, last, 65536.f)), Errc::bad_value, "65536; it must be finite and at most 65504");
  refused(append_keys(std::vector<float>(next.keys.size(), 20000.f)), Errc::bad_value, "norm 126491");
  refused(cache.append(0, next.keys.data(), with(next.values, last, nan).data(), next.positions), Errc::bad_value, "value");
  refused(cache.append(0, null, next.values.data(), next.positions), Errc::bad_shape, "null");
  refused(cache.append(0, next.keys.data(), null, next.positions), Errc::bad_shape, "null");
  refused(cache.append(-1, next.keys.data(), next.values.data(), next.positions), Errc::bad_shape, "layer is -1");
  refused(cache.append(2, next.keys.data(), next.values.data(), next.positions), Errc::bad_shape, "layer is 2");
  for (const auto& bad : {std::vector{59, 60}, {60, 60}, {61, 60}, {-5, 60}, {60, std::numeric_limits<int>::max()}}) {
    refused(cache.append(0, next.keys.data(), next.values.data(), bad), Errc::bad_position, "position");
  }
  refused(cache.observe(0, null, next.positions), Errc::bad_shape, "null");
  refused(cache.observe(5, next.queries.data(), next.positions), Errc::bad_shape, "layer is 5");
  refused(cache.observe(0, with(next.queries, 3, nan).data(), next.positions), Errc::bad_value, "nan");
  refused(cache.observe(0, next.queries.data(), std::vector{3, 4}), Errc::bad_position, "position 3");
  refused(cache.attend(9, next.queries.data(), next.positions, {}, out.data()), Errc::bad_shape, "layer is 9");
  refused(cache.attend(0, null, next.positions, {}, out.data()), Errc::bad_shape, "null");
  refused(cache.attend(0, next.queries.data(), std::vector{-1, 60}, {}, out.data()), Errc::bad_position, "-1");
  refused(cache.attend(0, with(next.queries, 0, infinite).data(), next.positions, {}, out.data()), Errc::bad_value, "inf");
  refused(attend({.scale = nan}), Errc::bad_value, "scale is nan");
  refused(attend({.window = -4}), Errc::bad_value, "window is -4");
  refused(attend({.soft_cap = -1}), Errc::bad_value, "soft_cap is -1");
  const float sinks[4] = {0, nan, 0, 0};
  refused(attend({.sink_logits = sinks}), Errc::bad_value, "nan");
  refused(attend({.sink_logits = {sinks, 3}}), Errc::bad_shape, "3 sink logits; num_q_heads is 4");
  for (const double ratio : {0.0, -0.5, 1.01, std::nan(""), double(infinite)}) {
    refused(cache.compress(Retain::ratio(ratio)), Errc::bad_budget, "of the rows");
  }
  refused(cache.compress(Retain::ratio(1e-6)), Errc::bad_budget, "below the 28");
  refused(cache.compress(Retain::rows(0)), Errc::bad_budget, "0 rows");
  refused(cache.compress(Retain::rows(-7)), Errc::bad_budget, "-7 rows");
  refused(cache.compress(Retain::rows(61)), Errc::bad_budget, "61 rows a head is above the 60");
  refused(cache.compress(Retain::rows(6)), Errc::bad_budget, "24 rows in all is below the 28");
  refused(cache.compress(Retain::bytes(0)), Errc::bad_budget, "0 bytes");
  refused(cache.compress(Retain::bytes(1)), Errc::bad_budget, "1 bytes is below");
  refused(cache.compress(Retain::bytes(cache.memory().total() + 1)), Errc::bad_budget, "above");
  refused(cache.truncate(-1), Errc::bad_position, "-1");
}

TEST_CASE("SnapKv without a query says that observe() is missing") {
  KvCache<Uniform, SnapKv, Turbo> cache;
  REQUIRE(cache.init(shape, small).ok());
  const Rows rows(0, 60);
  for (int l = 0; l < 2; ++l) REQUIRE(cache.append(l, rows.keys.data(), rows.values.data(), rows.positions).ok());
  const auto before = state(cache);
  check(cache.compress(Retain::ratio(0.5)), Errc::no_evidence, "observe()");
  CHECK(state(cache) == before);
}

TEST_CASE("a policy that breaks its contract is found out") {
  KvCache<Uniform, NanScores, Exact> scores;
  KvCache<Greedy, SinkRecent, Exact> budget;
  const auto run = [](auto& cache, const char* part) {
    REQUIRE(cache.init(shape, small).ok());
    append(cache, Rows(0, 60));
    const auto before = state(cache);
    check(cache.compress(Retain::ratio(0.5)), Errc::bad_policy, part);
    CHECK(state(cache) == before);
  };
  run(scores, "row 20");
  run(budget, "240 rows in all; 120 were asked for");
}

TEST_CASE("a budget of bytes is never exceeded, wherever the newest rows lie") {
  const auto run = [](auto codec) {
    for (const int back : {60, 57, 50, 33}) {
      KvCache<Adaptive, KeyDiff, decltype(codec)> cache, cut;
      REQUIRE(cache.init(shape, small).ok());
      append(cache, Rows(0, 60));
      REQUIRE(cache.flush().ok());
      REQUIRE(cache.truncate(back).ok());
      for (long long bytes = cache.memory().total(); bytes > 0; bytes -= 37) {
        REQUIRE(cache.fork(cut).ok());
        const Status status = cut.compress(Retain::bytes(bytes));
        if (!status.ok()) {
          REQUIRE(status.code == Errc::bad_budget);
          break;
        }
        REQUIRE(cut.memory().total() <= bytes);
      }
    }
  };
  run(Exact{});
  run(Turbo{});
}

TEST_CASE("dense_fp16_bytes counts the rows appended and not truncated, also with gaps between positions") {
  KvCache<Uniform, SinkRecent, Exact> cache;
  REQUIRE(cache.init(shape, small).ok());
  const long long row = shape.num_heads() * dim * 4;
  append(cache, Rows(0, 10, 100));
  CHECK(cache.memory().dense_fp16_bytes == 10 * row);
  REQUIRE(cache.truncate(850).ok());  // drops the row at 900 alone
  CHECK(cache.num_rows(0, 0) == 9);
  CHECK(cache.memory().dense_fp16_bytes == 9 * row);
  REQUIRE(cache.truncate(1).ok());
  CHECK(cache.num_rows(0, 0) == 1);
  CHECK(cache.memory().dense_fp16_bytes == row);
}

TEST_CASE("a fork lives in the memory resource of its parent, also if that was the default one of its time") {
  Counting first, second;
  {
    auto* const before = std::pmr::set_default_resource(&first);
    KvCache<Uniform, SinkRecent, Exact> cache, child;
    REQUIRE(cache.init(shape, small).ok());
    append(cache, Rows(0, 30));
    std::pmr::set_default_resource(&second);
    REQUIRE(cache.fork(child).ok());
    std::pmr::set_default_resource(before);
    CHECK(first.outstanding == cache.memory().total() + child.memory().total());
    CHECK(second.outstanding == 0);
  }
  CHECK(first.outstanding == 0);
}

TEST_CASE("a cache goes on where it was moved to, with its codec's state") {
  using Choice = OneOf<Dense<Half, dim>, TurboQuant<4, dim>>;
  using Cache = KvCache<Uniform, KeyDiff, KvCodec<Choice, Choice>>;
  const KvCodec<Choice, Choice> codec{{1}, {1}};
  Cache stays({}, {}, codec), target;
  REQUIRE(stays.init(shape, small).ok());
  append(stays, Rows(0, 20));
  {
    Cache source({}, {}, codec);
    REQUIRE(source.init(shape, small).ok());
    append(source, Rows(0, 20));
    target = std::move(source);
    source = Cache();  // another codec in the old place
    CHECK(source.memory().total() == 0);
  }
  for (Cache* cache : {&stays, &target}) {
    append(*cache, Rows(20, 30));
    REQUIRE(cache->compress(Retain::ratio(0.6)).ok());
  }
  CHECK(state(stays) == state(target));
  CHECK(target.bits_per_element() < 12);
}

TEST_CASE("heads keep codecs of their own in a fork, where a cache is moved to, and when it is cleared") {
  using Choice = OneOf<Dense<Half, dim>, TurboQuant<4, dim>>;
  using Codec = KvCodec<Choice, Choice>;
  KvCache<Uniform, KeyDiff, Codec> cache, child;
  std::vector<Codec> codecs(static_cast<std::size_t>(shape.num_heads()));
  for (std::size_t h = 0; h < codecs.size(); ++h) codecs[h] = {{static_cast<int>(h % 2)}, {static_cast<int>(h % 3 == 0)}};
  REQUIRE(cache.init(shape, small, codecs).ok());
  append(cache, Rows(0, 20));
  const auto keeps = [&](const auto& one) {
    for (int h = 0; h < shape.num_heads(); ++h) {
      const Codec& codec = one.codec(h / shape.num_kv_heads, h % shape.num_kv_heads);
      CHECK(codec.keys.index == codecs[static_cast<std::size_t>(h)].keys.index);
      CHECK(codec.values.index == codecs[static_cast<std::size_t>(h)].values.index);
    }
  };
  keeps(cache);
  REQUIRE(cache.fork(child).ok());
  keeps(child);
  CHECK(state(child) == state(cache));
  child = std::move(cache);
  keeps(child);
  child.clear();
  keeps(child);
}

// Last, since it crashes where it is not refused.
TEST_CASE("attention without a place for the output is refused") {
  KvCache<Uniform, SinkRecent, Exact> cache;
  REQUIRE(cache.init(shape, small).ok());
  const Rows rows(0, 20);
  append(cache, rows);
  check(cache.attend(0, rows.queries.data(), rows.positions, {}, nullptr), Errc::bad_shape, "null");
}
