// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Random sequences of operations against a plain model made of vectors, bad input, memory that runs out, and threads.
#include <doctest/doctest.h>

#include <cstdlib>
#include <map>
#include <random>
#include <thread>

#include "kvtailor/codec/low_rank.hpp"
#include "kvtailor/kvtailor.hpp"
#include "reference/counting.hpp"

using namespace kvt;

namespace {

constexpr int dim = 40;
const Geometry shape{2, 2, 6, dim};
const CacheOptions small{.sink_rows = 2, .recent_rows = 5, .block_rows = 8};

using reference::Counting;

struct Rows {
  std::vector<float> keys, values, queries;
  std::vector<int> positions;
};

Rows make_rows(std::mt19937& random, int n, int& position) {
  std::normal_distribution<float> normal;
  Rows rows;
  rows.keys.resize(static_cast<std::size_t>(n * shape.num_kv_heads * dim));
  rows.values.resize(rows.keys.size());
  rows.queries.resize(static_cast<std::size_t>(n * shape.num_q_heads * dim));
  for (auto* x : {&rows.keys, &rows.values, &rows.queries}) {
    for (float& v : *x) v = normal(random);
  }
  for (int i = 0; i < n; ++i) rows.positions.push_back(position += 1 + static_cast<int>(random() % 3));
  return rows;
}

template <class Cache>
Status append(Cache& cache, const Rows& rows) {
  for (int l = 0; l < shape.num_layers; ++l) {
    KVT_TRY(cache.append(l, rows.keys.data(), rows.values.data(), rows.positions));
    KVT_TRY(cache.observe(l, rows.queries.data(), rows.positions));
  }
  return success();
}

// Everything a user can see of a cache.
template <class Cache>
std::vector<float> state(const Cache& cache) {
  std::vector<float> all;
  for (int l = 0; l < shape.num_layers; ++l) {
    all.push_back(static_cast<float>(cache.end_position(l)));
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      const auto n = static_cast<std::size_t>(cache.num_rows(l, h));
      std::vector<float> keys(n * dim), values(n * dim);
      cache.decode(l, h, keys.data(), values.data());
      all.insert(all.end(), keys.begin(), keys.end());
      all.insert(all.end(), values.begin(), values.end());
      for (const int p : cache.positions(l, h)) all.push_back(static_cast<float>(p));
    }
  }
  return all;
}

// One row of one head: what was given, and what the codec made of it once it was encoded.
struct ModelRow {
  std::vector<float> key, value;
};
using Model = std::vector<std::map<int, ModelRow>>;  // [heads], by position

template <class Codec>
void random_operations(int operations, unsigned seed, bool exact) {
  Counting memory;
  {
    auto options = small;
    options.memory = &memory;
    KvCache<Adaptive, SnapKv, Codec> cache({}, {.window = 6}), spare({}, {.window = 6});
    REQUIRE(cache.init(shape, options).ok());
    REQUIRE(spare.init(shape, options).ok());
    std::mt19937 random(seed);
    int position = -1;
    Model model(static_cast<std::size_t>(shape.num_heads()));
    for (int step = 0; step < operations; ++step) {
      const int what = static_cast<int>(random() % 100);
      long long rows = 0;
      for (const auto& head : model) rows += static_cast<long long>(head.size());
      if (what < 45 || rows == 0) {
        const auto fresh = make_rows(random, 1 + static_cast<int>(random() % 12), position);
        REQUIRE(append(cache, fresh).ok());
        for (std::size_t h = 0; h < model.size(); ++h) {
          for (std::size_t i = 0; i < fresh.positions.size(); ++i) {
            const auto at = (i * 2 + h % 2) * dim;
            model[h][fresh.positions[i]] = {{fresh.keys.begin() + long(at), fresh.keys.begin() + long(at) + dim},
                                            {fresh.values.begin() + long(at), fresh.values.begin() + long(at) + dim}};
          }
        }
      } else if (what < 65) {
        const auto all = rows;
        const double ratio = 0.3 + 0.7 * static_cast<double>(random() % 1000) / 1000;
        Status status;
        const bool bytes = what < 48;
        const auto limit = static_cast<long long>(ratio * static_cast<double>(cache.memory().total()));
        status = bytes ? cache.compress(Retain::bytes(limit)) : cache.compress(Retain::ratio(ratio));
        if (status.ok()) {
          long long left = 0;
          for (int l = 0; l < 2; ++l) left += cache.num_rows(l, 0) + cache.num_rows(l, 1);
          if (bytes) REQUIRE(cache.memory().total() <= limit);
          if (!bytes) REQUIRE(left == std::llround(ratio * static_cast<double>(all)));
          for (int h = 0; h < shape.num_heads(); ++h) {
            // Survivors are a subset; sinks and the newest rows are among them.
            auto& head = model[std::size_t(h)];
            const auto have = cache.positions(h / 2, h % 2);
            std::map<int, ModelRow> kept;
            for (const int p : have) {
              REQUIRE(head.count(p) == 1);
              kept[p] = head[p];
            }
            int index = 0;
            for (const auto& [p, row] : head) {
              if (index < 2 || index + 5 >= static_cast<int>(head.size())) REQUIRE(kept.count(p) == 1);
              ++index;
            }
            head = kept;
          }
        } else {
          // Below what is protected, or no queries since the last cut.
          const bool known = status.code == Errc::bad_budget || status.code == Errc::no_evidence;
          REQUIRE(known);
        }
      } else if (what < 75) {
        REQUIRE(cache.flush().ok());
      } else if (what < 85) {
        const int to = std::max(0, position - static_cast<int>(random() % 30));
        REQUIRE(cache.truncate(to).ok());
        for (auto& head : model) head.erase(head.lower_bound(to), head.end());
        position = std::min(position, to - 1);
        if (to == 0) position = -1;
      } else if (what < 90) {
        REQUIRE(cache.fork(spare).ok());
        REQUIRE(state(spare) == state(cache));
        if (what < 87) REQUIRE(spare.fork(cache).ok());
        spare.clear();
      } else if (what == 99 && random() % 8 == 0) {
        cache.clear();
        position = -1;
        for (auto& head : model) head.clear();
      } else {
        const auto q = make_rows(random, 1, position);
        --position;  // nothing was appended
        std::vector<float> out(q.queries.size(), std::nanf(""));
        REQUIRE(cache.attend(0, q.queries.data(), q.positions, {}, out.data()).ok());
        for (const float x : out) REQUIRE(std::isfinite(x));
        position = cache.end_position(0) - 1;
      }
      REQUIRE(memory.outstanding == cache.memory().total() + spare.memory().total());
      REQUIRE(cache.memory().slack_bytes >= 0);
      for (int h = 0; h < shape.num_heads(); ++h) {
        auto& head = model[std::size_t(h)];
        const auto have = cache.positions(h / 2, h % 2);
        REQUIRE(have.size() == head.size());
        std::vector<float> keys(have.size() * dim), values(have.size() * dim);
        cache.decode(h / 2, h % 2, keys.data(), values.data());
        std::size_t r = 0;
        for (auto& [p, row] : head) {
          REQUIRE(have[r] == p);
          const auto same = [&](const std::vector<float>& x, const float* y) { return std::equal(x.begin(), x.end(), y); };
          const bool equal = same(row.key, keys.data() + r * dim) && same(row.value, values.data() + r * dim);
          if (exact) REQUIRE(equal);
          if (!equal) {
            // Encoded since: near what was given, and from now on for ever the same.
            double error = 0, norm = 0;
            for (std::size_t d = 0; d < dim; ++d) {
              error +=
                  std::pow(double(row.key[d] - keys[r * dim + d]), 2) + std::pow(double(row.value[d] - values[r * dim + d]), 2);
              norm += std::pow(double(row.key[d]), 2) + std::pow(double(row.value[d]), 2);
            }
            REQUIRE(!row.key.empty());
            REQUIRE(error <= 0.35 * norm);
            REQUIRE(row.key.capacity() != 0);
            row.key.assign(keys.begin() + long(r * dim), keys.begin() + long((r + 1) * dim));
            row.value.assign(values.begin() + long(r * dim), values.begin() + long((r + 1) * dim));
          }
          ++r;
        }
      }
    }
  }
  CHECK(memory.outstanding == 0);
}

int operations() {
  const char* const text = std::getenv("KVT_OPERATIONS");
  return text != nullptr ? std::atoi(text) : 100000;
}

using Turbo = KvCodec<TurboQuant<4, dim>, TurboQuant<3, dim>>;

}  // namespace

TEST_CASE("random operations on dense fp32 rows agree with the plain model exactly") {
  random_operations<KvCodec<Dense<float, dim>, Dense<float, dim>, float>>(operations() / 2, 1, true);
}

TEST_CASE("random operations on encoded rows agree with the plain model") {
  random_operations<Turbo>(operations() / 2, 2, false);
}

TEST_CASE("random operations on blocks that cannot be taken apart agree with the plain model") {
  using Keys = Rotated<LowRank<LloydMax<4, dim, NormCorrection::least_squares, LogScale>>>;
  random_operations<KvCodec<Keys, Rotated<Shifted<LloydMax<3, dim>>>>>(operations() / 10, 3, false);
}

TEST_CASE("drafts that are taken back leave no trace") {
  std::mt19937 random(4);
  for (int round = 0; round < 50; ++round) {
    KvCache<Adaptive, KeyDiff, Turbo> cache, plain;
    REQUIRE(cache.init(shape, small).ok());
    int position = -1;
    REQUIRE(append(cache, make_rows(random, 10 + round, position)).ok());
    REQUIRE(cache.fork(plain).ok());
    const int end = cache.end_position(0);
    int drafts = position;
    REQUIRE(append(cache, make_rows(random, 1 + round % 6, drafts)).ok());
    REQUIRE(cache.truncate(end).ok());
    const auto next = make_rows(random, 1, position);
    REQUIRE(append(cache, next).ok());
    REQUIRE(append(plain, next).ok());
    REQUIRE(state(cache) == state(plain));
  }
}

TEST_CASE("heads take turns to encode their blocks, and threads may do it") {
  std::mt19937 random(6);
  const CacheOptions options{.sink_rows = 2, .recent_rows = 5, .block_rows = 16};
  Counting counting;  // no lock of its own
  KvCache<Uniform, SinkRecent, Turbo> cache, plain;
  CacheOptions counted = options;
  counted.memory = &counting;
  REQUIRE(cache.init(shape, counted).ok());
  REQUIRE(plain.init(shape, options).ok());
  int position = -1, most = 0, encoded = 0;
  for (int token = 0; token < 200; ++token) {
    // The first is a text, of which several blocks are encoded at once.
    Rows rows = make_rows(random, token == 0 ? 90 : 1, position);
    for (int& p : rows.positions) p = cache.end_position(0) + static_cast<int>(&p - rows.positions.data());
    int turns = 0;
    std::vector<int> before;
    for (int h = 0; h < shape.num_heads(); ++h) before.push_back(cache.store(h / 2, h % 2).body_rows());
    const auto work = [&](int first) {
      for (int h = first; h < shape.num_heads(); h += 2) CHECK(cache.encode(h / 2, h % 2).ok());
    };
    {
      const std::jthread other(work, 1);
      work(0);
    }
    for (int h = 0; h < shape.num_heads(); ++h) {
      const auto& store = cache.store(h / 2, h % 2);
      turns += store.body_rows() > before[static_cast<std::size_t>(h)] ? 1 : 0;
      REQUIRE(store.recent().rows() < (token <= 1 ? 90 : options.recent_rows + options.block_rows * 3 / 2));
      for (const auto& block : store.blocks()) REQUIRE(block.rows == options.block_rows);
    }
    REQUIRE(append(cache, rows).ok());
    REQUIRE(append(plain, rows).ok());
    REQUIRE(state(cache) == state(plain));
    REQUIRE(cache.memory().total() == counting.outstanding);
    if (token > 1) most = std::max(most, turns);
    encoded += turns;
  }
  CHECK(most == 1);  // four heads, eight tokens
  CHECK(encoded >= 40);
  CHECK(cache.encode(0, 2).code == Errc::bad_shape);
  CHECK(cache.encode(2, 0).code == Errc::bad_shape);
}

TEST_CASE("bad input is one sentence and changes nothing") {
  std::mt19937 random(5);
  KvCache<Adaptive, SnapKv, Turbo> cache;
  CHECK(cache.init({1, 1, 1, 64}).code == Errc::bad_shape);
  CHECK(cache.init({1, 1, 1, 63}).code == Errc::bad_shape);
  CHECK(cache.init({1, 2, 3, dim}).message() == "num_q_heads is 3; it must be a multiple of num_kv_heads, which is 2");
  CHECK(cache.init(shape, {.block_rows = 0}).code == Errc::bad_shape);
  CHECK(cache.init(shape, {.block_rows = 513}).code == Errc::bad_shape);
  CHECK(cache.compress(Retain::ratio(.5)).code == Errc::bad_shape);
  REQUIRE(cache.init(shape, small).ok());
  CHECK(cache.compress(Retain::ratio(.5)).code == Errc::bad_budget);
  int position = -1;
  const auto rows = make_rows(random, 60, position);
  for (int l = 0; l < 2; ++l) REQUIRE(cache.append(l, rows.keys.data(), rows.values.data(), rows.positions).ok());
  CHECK(cache.compress(Retain::ratio(.5)).code == Errc::no_evidence);  // no query was observed
  for (int l = 0; l < 2; ++l) REQUIRE(cache.observe(l, rows.queries.data(), rows.positions).ok());
  const auto before = state(cache);
  const auto bytes = cache.memory().total();
  auto next = make_rows(random, 1, position);
  std::vector<float> out(next.queries.size());
  const auto refused = [&](const Status& status, Errc code, const char* part) {
    INFO(status.message());
    CHECK(status.code == code);
    CHECK(status.message().find(part) != std::string::npos);
    CHECK(state(cache) == before);
    CHECK(cache.memory().total() == bytes);
  };
  const auto with = [&](std::vector<float> x, float bad) {
    x[5] = bad;
    return x;
  };
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  refused(cache.append(0, with(next.keys, nan).data(), next.values.data(), next.positions), Errc::bad_value, "nan");
  refused(cache.append(0, next.keys.data(), with(next.values, inf).data(), next.positions), Errc::bad_value, "inf");
  refused(cache.append(0, with(next.keys, 70000.f).data(), next.values.data(), next.positions), Errc::bad_value, "70000");
  refused(cache.append(2, next.keys.data(), next.values.data(), next.positions), Errc::bad_shape, "layer is 2");
  refused(cache.append(0, static_cast<const float*>(nullptr), next.values.data(), next.positions), Errc::bad_shape, "null");
  const int back[1] = {3};
  refused(cache.append(0, next.keys.data(), next.values.data(), back), Errc::bad_position, "position 3 goes back");
  refused(cache.attend(0, with(next.queries, nan).data(), next.positions, {}, out.data()), Errc::bad_value, "nan");
  refused(cache.attend(0, next.queries.data(), next.positions, {.window = -1}, out.data()), Errc::bad_value, "-1");
  refused(cache.attend(0, next.queries.data(), next.positions, {.soft_cap = inf}, out.data()), Errc::bad_value, "inf");
  refused(cache.compress(Retain::ratio(0)), Errc::bad_budget, "0");
  refused(cache.compress(Retain::ratio(1.5)), Errc::bad_budget, "1.5");
  refused(cache.compress(Retain::ratio(std::nan(""))), Errc::bad_budget, "nan");
  refused(cache.compress(Retain::rows(0)), Errc::bad_budget, "0");
  refused(cache.compress(Retain::rows(61)), Errc::bad_budget, "61");
  refused(cache.compress(Retain::rows(3)), Errc::bad_budget, "never dropped");
  refused(cache.compress(Retain::bytes(100)), Errc::bad_budget, "100");
  refused(cache.compress(Retain::bytes(bytes + 1)), Errc::bad_budget, "above");
  refused(cache.truncate(-1), Errc::bad_position, "-1");
}

TEST_CASE("memory that runs out at any allocation loses nothing") {
  const auto attempt = [](auto&& operation) {
    for (int allowed = 0;; ++allowed) {
      Counting memory;
      bool done = false;
      {
        auto options = small;
        options.memory = &memory;
        KvCache<Adaptive, KeyDiff, Turbo> cache;
        REQUIRE(cache.init(shape, options).ok());
        std::mt19937 random(6);
        int position = -1;
        REQUIRE(append(cache, make_rows(random, 45, position)).ok());
        const auto before = state(cache);
        memory.until_failure = allowed;
        const Status status = operation(cache, make_rows(random, 20, position));
        memory.until_failure = -1;
        done = status.ok();
        if (!done) {
          REQUIRE(status.code == Errc::out_of_memory);
          REQUIRE(state(cache) == before);
        }
        REQUIRE(memory.outstanding == cache.memory().total());
      }
      REQUIRE(memory.outstanding == 0);
      if (done) return;
    }
  };
  attempt([](auto& c, const Rows& r) { return c.append(0, r.keys.data(), r.values.data(), r.positions); });
  attempt([](auto& c, const Rows&) { return c.compress(Retain::ratio(0.5)); });
  attempt([](auto& c, const Rows&) { return c.flush(); });
  attempt([](auto& c, const Rows&) { return c.truncate(20); });
  attempt([](auto& c, const Rows&) {
    KvCache<Adaptive, KeyDiff, Turbo> child;
    return c.fork(child);
  });
}

TEST_CASE("threads attend while another cache is cut") {
  std::mt19937 random(8);
  KvCache<Adaptive, KeyDiff, Turbo> cache, other;
  REQUIRE(cache.init(shape, small).ok());
  REQUIRE(other.init(shape, small).ok());
  int position = -1;
  const auto rows = make_rows(random, 300, position);
  REQUIRE(append(cache, rows).ok());
  REQUIRE(cache.flush().ok());
  REQUIRE(append(other, rows).ok());
  std::vector<float> want(rows.queries.size());
  REQUIRE(cache.attend(0, rows.queries.data(), rows.positions, {}, want.data()).ok());
  std::atomic<int> wrong = 0;
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        AttendPlan plan;
        std::vector<float> out(want.size());
        for (int round = 0; round < 5; ++round) {
          wrong += !cache.plan(0, rows.queries.data(), rows.positions, {}, out.data(), plan).ok();
          run_tasks(plan, 2);
          wrong += out != want;
        }
      });
    }
    for (int percent = 90; percent >= 30; percent -= 10)
      wrong += !other.compress(Retain::ratio(percent / 100.0)).ok() && percent > 90;
  }
  CHECK(wrong == 0);
}
