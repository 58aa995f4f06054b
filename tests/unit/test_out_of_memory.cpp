// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Memory that runs out at any allocation, of the cache's resource or of operator new, once or for good: nothing is lost, and a
// call either changes nothing or does what it does with all memory. With codecs whose rows are apart, and with some whose
// blocks are one piece.
#include <doctest/doctest.h>

#include <cstdlib>
#include <memory_resource>
#include <new>
#include <random>
#include <string>

#include "kvtailor/codec/low_rank.hpp"
#include "kvtailor/kvtailor.hpp"
#include "kvtailor/store/device_cache.hpp"

namespace {

int until_failure = -1;  // allocations that still succeed; -1: all
bool once = false;       // one fails, and all after it succeed
bool failed = false;     // one has failed

bool fails() {
  if (until_failure > 0)
    --until_failure;
  else if (until_failure == 0) {
    failed = true;
    if (once) until_failure = -1;
    return true;
  }
  return false;
}

// Whether an allocation failed while f ran.
template <class F>
bool meets_failure(int allowed, F&& f) {
  failed = false;
  until_failure = allowed;
  f();
  until_failure = -1;
  return failed;
}

}  // namespace

// Not inlined: GCC takes malloc and delete for a mismatch otherwise.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  void* const p = fails() ? nullptr : std::malloc(bytes > 0 ? bytes : 1);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return fails() ? nullptr : std::malloc(bytes > 0 ? bytes : 1);
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }

using namespace kvt;

namespace {

constexpr int dim = 40;
const Geometry shape{1, 2, 4, dim};

class Counting : public std::pmr::memory_resource {
 public:
  long long outstanding = 0;

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    void* const p = fails() ? nullptr : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (p == nullptr) throw std::bad_alloc();
    outstanding += static_cast<long long>(bytes);
    return p;
  }
  void do_deallocate(void* p, std::size_t bytes, std::size_t) override {
    outstanding -= static_cast<long long>(bytes);
    std::free(p);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

// A codec whose blocks cannot be taken apart.
template <int bits>
struct Whole : TurboQuant<bits, dim> {
  void copy_row() = delete;
};
static_assert(StorageCodec<Whole<3>> && !RowWiseCodec<Whole<3>>);

using Apart = KvCodec<TurboQuant<4, dim>, TurboQuant<3, dim>>;
using Plain = KvCodec<Dense<Half, dim>>;
using Blocks = KvCodec<Whole<4>, Whole<3>>;
using LowRanks = KvCodec<LowRank<LloydMax<2, dim, NormCorrection::least_squares, LogScale>>>;
using Either = KvCodec<OneOf<Whole<4>, Trellis<2, dim>>>;  // which says at run time whether rows are apart
template <class Codec, class Selector = SnapKv>
using Cache = KvCache<Adaptive, Selector, Codec>;

struct Rows {
  std::vector<float> keys, values, queries;
  std::vector<int> positions;

  Rows(int first, int n) {
    std::mt19937 random(static_cast<unsigned>(first + n));
    std::normal_distribution<float> normal;
    keys.resize(static_cast<std::size_t>(n * shape.num_kv_heads * dim));
    values.resize(keys.size());
    queries.resize(static_cast<std::size_t>(n * shape.num_q_heads * dim));
    for (auto* x : {&keys, &values, &queries}) {
      for (float& v : *x) v = normal(random);
    }
    // Keys share a direction, so that low ranks have something to take out.
    for (std::size_t at = 0; at < keys.size(); at += dim) {
      const float strength = 5 * normal(random);
      for (std::size_t d = 0; d < dim; ++d) keys[at + d] += d % 2 == 0 ? strength : -strength;
    }
    for (int i = 0; i < n; ++i) positions.push_back(first + i);
  }
};

template <class Codec, class Selector>
void append(Cache<Codec, Selector>& cache, const Rows& rows) {
  for (int l = 0; l < shape.num_layers; ++l) {
    REQUIRE(cache.append(l, rows.keys.data(), rows.values.data(), rows.positions).ok());
    REQUIRE(cache.observe(l, rows.queries.data(), rows.positions).ok());
  }
}

template <class Codec, class Selector>
std::vector<float> state(const Cache<Codec, Selector>& cache) {
  std::vector<float> all;
  for (int l = 0; l < shape.num_layers; ++l) {
    all.push_back(static_cast<float>(cache.end_position(l)));
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      std::vector<float> keys(cache.positions(l, h).size() * Codec::head_dim), values(keys.size());
      cache.decode(l, h, keys.data(), values.data());
      all.insert(all.end(), keys.begin(), keys.end());
      all.insert(all.end(), values.begin(), values.end());
      for (const int p : cache.positions(l, h)) all.push_back(static_cast<float>(p));
    }
  }
  return all;
}

// What an operation leaves that has all memory.
struct Want {
  std::vector<float> state;
  long long bytes = 0;
};

// What went wrong when `operation` could make only `allowed` allocations; empty if nothing did. The first time, with as many as
// it wants, `want` is set to what it leaves.
template <class C, class Operation>
std::string failure(const typename C::codec_type& codec, const Operation& operation, int allowed, bool& met, Want& want) {
  Counting memory;
  {
    typename C::selector_type selector;
    if constexpr (requires { selector.window; }) selector.window = 4;
    C cache({}, selector, codec);
    REQUIRE(cache.init(shape, {.sink_rows = 2, .recent_rows = 5, .block_rows = 8, .memory = &memory}).ok());
    append(cache, Rows(0, 45));
    append(cache, Rows(45, 3));
    REQUIRE(cache.flush().ok());
    append(cache, Rows(48, 30));
    const auto before = state(cache);
    const Rows rows(78, 20);
    Status status = success();
    met = meets_failure(allowed, [&] { status = operation(cache, rows); });
    if (allowed < 0) want = {state(cache), cache.memory().total()};
    if (!status.ok() && status.code != Errc::out_of_memory) return "it says: " + status.message();
    if (state(cache) != (status.ok() ? want.state : before)) return "the cache has changed";
    // One that fails is asked for again, but for attention, which keeps its place.
    if (status.ok() && once && !C::selector_type::needs.has(Evidence::attention) && cache.memory().total() != want.bytes) {
      return std::to_string(cache.memory().total() - want.bytes) + " bytes more than it takes";
    }
    const long long lost = memory.outstanding - cache.memory().total();
    if (lost != 0) return std::to_string(lost) + " bytes are not in memory().total()";
  }
  return memory.outstanding == 0 ? "" : "bytes are lost";
}

template <class C, class Operation>
void attempt(const typename C::codec_type& codec, const char* name, const Operation& operation) {
  for (const bool one : {false, true}) {
    once = one;
    bool met = false;
    Want want;
    std::string wrong = failure<C>(codec, operation, -1, met, want);
    int allowed = 0;
    do {
      if (wrong.empty()) wrong = failure<C>(codec, operation, allowed++, met, want);
    } while (met && wrong.empty() && allowed < 10000);
    once = false;
    INFO(std::string(name) << " with " << allowed - 1 << " allocations" << (one ? ", then one that fails" : ""));
    CHECK(wrong == "");
    CHECK(allowed > 1);  // something did fail
    CHECK(allowed < 10000);
  }
}

// Those that drop rows.
template <class Codec, class Selector = SnapKv>
void attempt_cuts(const Codec& codec = {}) {
  using C = Cache<Codec, Selector>;
  attempt<C>(codec, "compress to a ratio", [](C& c, const Rows&) { return c.compress(Retain::ratio(0.6)); });
  attempt<C>(codec, "compress to bytes",
             [](C& c, const Rows&) { return c.compress(Retain::bytes(c.memory().total() * 4 / 5)); });
  attempt<C>(codec, "flush", [](C& c, const Rows&) { return c.flush(); });
  attempt<C>(codec, "truncate", [](C& c, const Rows&) { return c.truncate(21); });
}

template <class Codec>
void attempt_all() {
  using C = Cache<Codec>;
  attempt_cuts<Codec>();
  attempt<C>({}, "append", [](C& c, const Rows& r) { return c.append(0, r.keys.data(), r.values.data(), r.positions); });
  attempt<C>({}, "fork", [](C& c, const Rows&) {
    C child;
    return c.fork(child);
  });
  attempt<C>({}, "init", [](C& c, const Rows&) {
    C other;
    return other.init(c.geometry(), c.options());
  });
  attempt<C>({}, "plan", [](C& c, const Rows& r) {
    static float out[20 * 4 * dim];
    AttendPlan plan(c.options().memory);
    return c.plan(0, r.queries.data(), r.positions, {}, out, plan);
  });
}

}  // namespace

TEST_CASE("memory that runs out anywhere loses nothing when rows are apart") {
  attempt_all<Apart>();
  attempt_cuts<Plain>();
  attempt_cuts<Apart, HeavyHitter>();
  Either either;
  either.keys.index = either.values.index = 1;
  attempt_cuts(either);
}

TEST_CASE("memory that runs out anywhere loses nothing when a block is one piece") {
  attempt_all<Blocks>();
  attempt_cuts<Blocks, HeavyHitter>();
  attempt_cuts<LowRanks>();
}

namespace {

// Goes by all evidence of queries.
struct Curious {
  static constexpr EvidenceSet needs = Evidence::keys | query_evidence;
  int window = 4;
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    for (std::size_t row = 0; row < score.size(); ++row) {
      const float* const key = seen.keys.data() + row * dim;
      score[row] = seen.attention[row].sum + seen.attention[row].largest + static_cast<float>(seen.attention[row].queries);
      for (int d = 0; d < dim && seen.moments.count > 0; ++d) {
        score[row] += key[d] * (seen.moments.mean[d] + 0.1f * seen.moments.covariance[d * dim + d] * key[d]);
      }
      for (std::size_t w = 0; w < seen.window_positions.size(); ++w) {
        for (int d = 0; d < dim; ++d) {
          score[row] += key[d] * seen.window_queries[static_cast<std::int64_t>(w) * seen.window_stride + d];
        }
      }
    }
    return success();
  }
};

}  // namespace

TEST_CASE("memory that runs out leaves the evidence as it was: the next cut is the one it would have been") {
  using Cached = KvCache<Adaptive, Curious, Apart>;
  const Geometry two{2, 2, 4, dim};
  const Rope rope{.rotary_dim = dim};
  const auto kept = [&](const Cached& cache) {
    std::vector<int> all;
    for (int h = 0; h < 4; ++h) {
      all.push_back(-1);
      for (const int p : cache.positions(h / 2, h % 2)) all.push_back(p);
    }
    return all;
  };
  // Calls in turn; the one numbered `failing` may make `allowed` allocations. Then it is made again, or left out.
  const auto run = [&](int failing, int allowed, bool again, bool& met, bool& refused) {
    Counting memory;
    std::vector<int> all;
    met = refused = false;
    {
      Cached cache;
      REQUIRE(
          cache.init(two, {.sink_rows = 2, .recent_rows = 5, .block_rows = 8, .memory = &memory, .ropes = {&rope, 1}}).ok());
      int number = 0;
      const auto call = [&](auto&& operation) {
        const bool fails_now = number++ == failing;
        if (fails_now && allowed < 0) return;  // as if it had never been made
        Status status = success();
        if (meets_failure(fails_now ? allowed : -1, [&] { status = operation(); })) met = true;
        if (fails_now && !status.ok()) {
          refused = true;
          REQUIRE(status.code == Errc::out_of_memory);
          REQUIRE(memory.outstanding == cache.memory().total());
          if (again) status = operation();
        }
        if (!fails_now || again) REQUIRE_MESSAGE(status.ok(), status.message());
      };
      for (const auto& [first, n] : {std::pair{0, 3}, {3, 30}, {33, 25}, {58, 1}, {59, 9}}) {
        const Rows rows(first, n);
        for (int l = 0; l < 2; ++l) {
          REQUIRE(cache.append(l, rows.keys.data(), rows.values.data(), rows.positions).ok());
          call([&] { return cache.observe(l, rows.queries.data(), rows.positions); });
        }
        if (first == 33) call([&] { return cache.compress(Retain::ratio(0.6)); });
        if (first == 58) call([&] { return cache.truncate(57); });
        if (first == 58) cache.forget();
        if (first == 59) call([&] { return cache.compress(Retain::bytes(cache.memory().total() / 2)); });
        const auto now = kept(cache);
        all.insert(all.end(), now.begin(), now.end());
      }
      REQUIRE(memory.outstanding == cache.memory().total());
    }
    REQUIRE(memory.outstanding == 0);
    return all;
  };
  bool met = false, refused = false;
  const auto want = run(-1, -1, true, met, refused);
  for (int failing = 0; failing < 13; ++failing) {
    const auto without = run(failing, -1, false, met, refused);
    int failures = 0;
    met = true;
    for (int allowed = 0; met; ++allowed) {
      REQUIRE(allowed < 2000);
      INFO("call " << failing << " with " << allowed << " allocations");
      const auto have = run(failing, allowed, true, met, refused);
      REQUIRE(have == want);
      if (refused) {
        ++failures;
        bool dropped = false, left_out = false;
        if (allowed % 3 == 0) REQUIRE(run(failing, allowed, false, dropped, left_out) == without);
      }
    }
    CHECK(failures > 1);
  }
}

TEST_CASE("memory that runs out on the way to a device, or back, changes neither cache") {
  using Codec = KvCodec<TurboQuant<4, 64>>;
  SimulatedDevice device;
  PagePool<Codec, SimulatedDevice> pool;
  DeviceCache<Codec, SimulatedDevice> cache;
  Counting memory;
  {
    const Geometry geometry{1, 2, 4, 64};
    Cache<Codec> small, large, third;
    REQUIRE(pool.init(device, 20).ok());
    REQUIRE(cache.init(device, pool, geometry, {.sink_rows = 2, .recent_rows = 5}).ok());
    for (auto* host : {&small, &large, &third}) {
      REQUIRE(host->init(geometry, {.sink_rows = 2, .recent_rows = 5, .block_rows = 8, .memory = &memory}).ok());
      const std::size_t n = host == &large ? 300 : 150;
      const std::vector<float> rows(n * 2 * 64, host == &third ? 2.f : 1.f);
      std::vector<int> positions;
      for (std::size_t i = 0; i < n; ++i) positions.push_back(static_cast<int>(i));
      REQUIRE(host->append(0, rows.data(), rows.data(), positions).ok());
      REQUIRE(host->flush().ok());
    }
    const auto try_out = [&](auto operation, auto check_unchanged) {
      for (int allowed = 0;; ++allowed) {
        REQUIRE(allowed < 1000);
        until_failure = allowed;
        const Status status = operation();
        until_failure = -1;
        if (status.ok()) {
          CHECK(allowed > 1);
          break;
        }
        CHECK(status.code == Errc::out_of_memory);
        check_unchanged();
      }
    };
    REQUIRE(cache.upload(small).ok());
    const int free = pool.free_pages();
    const auto before = state(third);
    try_out([&] { return cache.download(third); }, [&] { CHECK(state(third) == before); });
    CHECK(state(third) == state(small));
    try_out([&] { return cache.upload(large); },
            [&] {
              CHECK(pool.free_pages() == free);
              REQUIRE(cache.download(third).ok());
              CHECK(state(third) == state(small));
            });
    CHECK(pool.free_pages() < free);
    CHECK(memory.outstanding == small.memory().total() + large.memory().total() + third.memory().total());
  }
  CHECK(memory.outstanding == 0);
}

TEST_CASE("a codec whose blocks are one piece keeps the same rows as one whose rows are apart") {
  std::mt19937 random(1);
  Counting memory;
  {
    Cache<Apart> apart({}, {.window = 4});
    Cache<Blocks> blocks({}, {.window = 4});
    const CacheOptions options{.sink_rows = 2, .recent_rows = 5, .block_rows = 8, .memory = &memory};
    REQUIRE(apart.init(shape, options).ok());
    REQUIRE(blocks.init(shape, options).ok());
    int next = 0;
    for (int step = 0; step < 300; ++step) {
      const auto both = [&](auto&& operation) {
        const Status a = operation(apart), b = operation(blocks);
        REQUIRE(a.code == b.code);
      };
      const auto what = random() % 10;
      if (what < 5 || next == 0) {
        const Rows rows(next, 1 + static_cast<int>(random() % 12));
        append(apart, rows);
        append(blocks, rows);
        next = rows.positions.back() + 1;
      } else if (what < 8) {
        const double ratio = 0.4 + 0.6 * static_cast<double>(random() % 100) / 100;
        both([&](auto& cache) { return cache.compress(Retain::ratio(ratio)); });
      } else if (what == 8) {
        both([](auto& cache) { return cache.flush(); });
      } else {
        next = std::max(0, next - static_cast<int>(random() % 12));
        both([&](auto& cache) { return cache.truncate(next); });
      }
      REQUIRE(state(apart) == state(blocks));
      REQUIRE(memory.outstanding == apart.memory().total() + blocks.memory().total());
    }
  }
  CHECK(memory.outstanding == 0);
}
