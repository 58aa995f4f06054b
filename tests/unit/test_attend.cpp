// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention of a cache against double precision, over the rows the cache itself gives back.
#include <doctest/doctest.h>

#include <numeric>
#include <random>

#include "codecs.hpp"
#include "kvtailor/kvtailor.hpp"
#include "reference/plain.hpp"

using namespace kvt;

namespace {

template <class Codec>
void check_attend(int num_kv_heads, int group, int rows, int queries, AttendOptions options, bool cut,
                  const Codec& codec = {}) {
  constexpr int dim = Codec::head_dim;
  CAPTURE(dim);
  CAPTURE(group);
  CAPTURE(rows);
  CAPTURE(queries);
  const Geometry shape{1, num_kv_heads, num_kv_heads * group, dim};
  KvCache<Uniform, SinkRecent, Codec> cache({}, {}, codec);
  REQUIRE(cache.init(shape, {.sink_rows = 4, .recent_rows = 8, .block_rows = 64}).ok());
  std::mt19937 random(static_cast<unsigned>(dim * 1000 + group * 100 + rows));
  std::normal_distribution<float> normal;
  const auto fill = [&](std::size_t n) {
    std::vector<float> x(n);
    for (float& v : x) v = normal(random);
    return x;
  };
  int position = 0;
  for (int done = 0; done < rows;) {
    const int n = std::min(rows - done, 100);
    const auto width = static_cast<std::size_t>(n * num_kv_heads * dim);
    std::vector<int> positions;
    for (int i = 0; i < n; ++i) positions.push_back(position += 1 + i % 2);
    REQUIRE(cache.append(0, fill(width).data(), fill(width).data(), positions).ok());
    done += n;
  }
  if (cut && rows > 40) REQUIRE(cache.compress(Retain::ratio(0.6)).ok());
  const auto q = fill(static_cast<std::size_t>(queries * num_kv_heads * group * dim));
  std::vector<int> at;
  for (int i = 0; i < queries; ++i) at.push_back(std::max(0, position - (queries - 1 - i) * 3));
  std::vector<float> sinks;
  if (!options.sink_logits.empty()) {
    sinks = fill(static_cast<std::size_t>(num_kv_heads * group));
    for (std::size_t i = 0; i < sinks.size(); i += 2) sinks[i] += 12.f;  // above every row
    options.sink_logits = sinks;
  }
  std::vector<float> out(q.size(), std::nanf("")), threaded(q.size(), std::nanf(""));
  REQUIRE(cache.attend(0, q.data(), at, options, out.data()).ok());
  AttendPlan plan;
  REQUIRE(cache.plan(0, q.data(), at, options, threaded.data(), plan).ok());
  run_tasks(plan, 4);
  CHECK(out == threaded);

  double worst = 0;
  for (int h = 0; h < num_kv_heads; ++h) {
    const auto n = static_cast<std::size_t>(cache.num_rows(0, h));
    std::vector<float> keys(n * dim), values(n * dim);
    cache.decode(0, h, keys.data(), values.data());
    const std::vector<int> positions(cache.positions(0, h).begin(), cache.positions(0, h).end());
    for (int t = 0; t < queries; ++t) {
      for (int g = 0; g < group; ++g) {
        const auto head = static_cast<std::size_t>(h * group + g);
        const auto place = (static_cast<std::size_t>(t * num_kv_heads * group) + head) * dim;
        const auto want = reference::attend(
            q.data() + place, at[static_cast<std::size_t>(t)], keys, values, positions, dim,
            {double(options.scale), double(options.soft_cap), options.window, sinks.empty() ? nullptr : &sinks[head]});
        for (std::size_t d = 0; d < dim; ++d) {
          const double error = std::fabs(want[d] - double(out[place + d]));
          worst = error <= worst ? worst : error;  // a NaN stays
        }
      }
    }
  }
  // A logit of size 6 sums dim products in fp32: 2^-24 * sqrt(dim) * 6 < 6e-6; weights and values of size 4 follow.
  // Where rows are codes, queries and weights are rounded to 16 bits: 2^-17 * 4 * sqrt(dim) / sqrt(dim), three times that; or
  // to bytes: four times what is expected of a logit of size 1, six times that of a weight of 1 beside others.
  const double rounding = 4 * codecs::host_units(codec.keys).query + 6 * codecs::host_units(codec.values).weight;
  CHECK(worst <= (std::is_same_v<typename Codec::key_type, Dense<Half, dim>> ? 2e-5 : 1e-4) + rounding);
}

template <class Codec>
void check_all(int group, const Codec& codec = {}) {
  for (const int rows : {0, 1, 63, 64, 65, 200}) check_attend<Codec>(2, group, rows, 1, {}, false, codec);
  check_attend<Codec>(2, group, 300, 7, {}, true, codec);
  check_attend<Codec>(1, group, 300, 5, {.window = 50}, true, codec);
  const float any[1] = {0};
  check_attend<Codec>(1, group, 150, 3, {.scale = 0.2f, .soft_cap = 5.f, .sink_logits = any}, false, codec);
}

// The zones around the blocks are dense rows.
template <int dim>
void check_dim(int group) {
  KvCodec<TurboQuant<3, dim>, TurboQuant<2, dim>> codec;
  for (const Precision precision : {Precision::fast, Precision::accurate}) {
    CHECK(set_precision(codec, precision));
    CHECK(codec.keys.precision == precision);
    CHECK(codec.values.precision == precision);
    check_all(group, codec);
  }
}

}  // namespace

TEST_CASE("exponentials are those of double precision, as many as are asked for") {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> below(-87.f, 0.f);
  for (int n = 1; n <= 50; ++n) {
    std::vector<float> x(static_cast<std::size_t>(n) + 1);
    const float top = n % 2 == 0 ? 3.f : -1e3f;
    double sum = 0;
    for (int i = 0; i < n; ++i) x[static_cast<std::size_t>(i)] = top + below(random) / (i % 3 == 0 ? 100.f : 1.f);
    x[0] = top;
    x[static_cast<std::size_t>(n) / 2] = top - 100;
    x.back() = 7;
    const auto before = x;
    const float total = exponentials(x.data(), n, top);
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
      const double want = before[i] - top < -87 ? 0 : std::exp(static_cast<double>(before[i] - top));
      CHECK(std::fabs(static_cast<double>(x[i]) - want) <= std::ldexp(want, -22));
      sum += static_cast<double>(x[i]);
    }
    CHECK(std::fabs(static_cast<double>(total) - sum) <= std::ldexp(sum, -22));
    CHECK(x.back() == 7);
  }
  float bad[] = {0.f, std::nanf(""), -INFINITY};
  CHECK(std::isnan(exponentials(bad, 3, 0.f)));
  CHECK(std::isnan(bad[1]));
  CHECK(bad[2] == 0);
}

TEST_CASE("attention equals double precision at every head dim and odd group sizes") {
  check_dim<40>(1);
  check_dim<64>(3);
  check_dim<80>(5);
  check_dim<96>(7);
  check_dim<112>(4);
  check_dim<128>(8);
  check_dim<192>(2);
  check_dim<256>(20);
  check_dim<512>(8);
}

TEST_CASE("attention equals double precision with every codec") {
  check_all<KvCodec<Dense<Half, 128>>>(8);
  check_all<KvCodec<TurboQuant<6, 128>, TurboQuant<5, 128>>>(5);
  check_all<KvCodec<TurboQuant<6, 40>, TurboQuant<5, 40>>>(1);
  check_all<KvCodec<Dense<float, 64>, Dense<float, 64>, float>>(3);
  check_all<KvCodec<Dense<BFloat16, 64>, Dense<BFloat16, 64>, BFloat16>>(3);
  check_all<KvCodec<TurboQuant<1, 64>, TurboQuant<6, 64>>>(3);
  check_all<KvCodec<TurboQuant<4, 64>, TurboQuant<5, 64>>>(3);
}

TEST_CASE("long decode is split into parts and joined") {
  check_attend<KvCodec<Dense<Half, 64>>>(2, 3, 5000, 1, {}, false);
  check_attend<KvCodec<TurboQuant<4, 64>>>(2, 3, 5000, 1, {.window = 1500}, true);
}

TEST_CASE("a batch of sequences of any length, in one plan, gives what each gives alone") {
  constexpr int dim = 64;
  using Cache = KvCache<Uniform, KeyDiff, KvCodec<TurboQuant<4, dim>>>;
  const Geometry shape{1, 2, 6, dim};
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const auto fill = [&](std::size_t n) {
    std::vector<float> x(n);
    for (float& v : x) v = normal(random);
    return x;
  };
  const std::vector<int> lengths{0, 1, 700, 5000, 33};
  std::vector<Cache> caches;  // a cache can be moved
  std::vector<std::vector<float>> queries, want, out;
  std::vector<std::vector<int>> positions;
  for (const int n : lengths) {
    caches.emplace_back();
    Cache cache;
    REQUIRE(cache.init(shape, {.block_rows = 64}).ok());
    std::vector<int> at(static_cast<std::size_t>(n));
    std::iota(at.begin(), at.end(), 0);
    const auto width = static_cast<std::size_t>(n * 2 * dim);
    REQUIRE(cache.append(0, fill(width).data(), fill(width).data(), at).ok());
    if (n > 40) REQUIRE(cache.flush().ok());
    const int tokens = n == 700 ? 9 : 1;
    positions.emplace_back(static_cast<std::size_t>(tokens), n);
    queries.push_back(fill(static_cast<std::size_t>(tokens * 6 * dim)));
    want.emplace_back(queries.back().size(), std::nanf(""));
    out.push_back(want.back());
    REQUIRE(cache.attend(0, queries.back().data(), positions.back(), {}, want.back().data()).ok());
    caches.back() = std::move(cache);
  }
  std::vector<AttendRequest<Cache>> batch;
  for (std::size_t i = 0; i < caches.size(); ++i) {
    batch.push_back({&caches[i], queries[i].data(), positions[i], out[i].data()});
  }
  AttendPlan plan;
  for (int round = 0; round < 2; ++round) {
    REQUIRE(plan_batch<Cache>(batch, 0, {}, plan).ok());
    run_tasks(plan, 3);
    CHECK(out == want);
  }
  batch[3].queries = nullptr;
  CHECK(plan_batch<Cache>(batch, 0, {}, plan).code == Errc::bad_shape);
  CHECK(plan.num_tasks() == 0);
}

TEST_CASE("the largest rows and queries that are accepted give finite output") {
  const auto check = [](auto codec) {
    constexpr int dim = decltype(codec)::head_dim;
    KvCache<Uniform, SinkRecent, decltype(codec)> cache;
    REQUIRE(cache.init({1, 1, 1, dim}, {.sink_rows = 1, .recent_rows = 1, .block_rows = 4}).ok());
    const float most = decltype(codec)::near_type::max_element();
    // As large as the codecs take: every element, or one of them.
    const double limit = std::min(cache.codec(0, 0).keys.max_row_norm(), cache.codec(0, 0).values.max_row_norm());
    const float even = std::min(most, static_cast<float>(0.999 * limit / std::sqrt(double(dim))));
    std::vector<float> rows(10 * dim), query(dim, max_query_element), out(dim);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = i / dim % 2 == 0 ? even : -even;
    std::vector<int> at(10);
    std::iota(at.begin(), at.end(), 0);
    REQUIRE(cache.append(0, rows.data(), rows.data(), at).ok());
    REQUIRE(cache.flush().ok());
    const int last[1] = {9};
    for (const float scale : {0.f, 1.f, -1.f}) {
      REQUIRE(cache.attend(0, query.data(), last, {.scale = scale}, out.data()).ok());
      for (const float x : out) CHECK(std::isfinite(x));
    }
    CHECK(cache.attend(0, query.data(), last, {.scale = 2}, out.data()).code == Errc::bad_value);
    query[3] = std::nextafter(max_query_element, 1e30f);
    CHECK(cache.attend(0, query.data(), last, {}, out.data()).code == Errc::bad_value);
  };
  check(KvCodec<Dense<Half, 256>>{});
  check(KvCodec<Dense<float, 256>, Dense<float, 256>, float>{});
  check(KvCodec<Dense<BFloat16, 40>, Dense<BFloat16, 40>, BFloat16>{});
  check(KvCodec<TurboQuant<2, 256>>{});
  check(KvCodec<TurboQuant<6, 112>>{});
}
