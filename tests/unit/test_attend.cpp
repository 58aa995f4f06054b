// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention of a cache against double precision, over the rows the cache itself gives back.
#include <doctest/doctest.h>

#include <random>

#include "kvtailor/kvtailor.hpp"
#include "reference/plain.hpp"

using namespace kvt;

namespace {

template <class Codec>
void check_attend(int num_kv_heads, int group, int rows, int queries, AttendOptions options, bool cut) {
  constexpr int dim = Codec::head_dim;
  CAPTURE(dim);
  CAPTURE(group);
  CAPTURE(rows);
  CAPTURE(queries);
  const Geometry shape{1, num_kv_heads, num_kv_heads * group, dim};
  KvCache<Uniform, SinkRecent, Codec> cache;
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
  CHECK(worst <= 2e-5);
}

template <class Codec>
void check_all(int group) {
  for (const int rows : {0, 1, 63, 64, 65, 200}) check_attend<Codec>(2, group, rows, 1, {}, false);
  check_attend<Codec>(2, group, 300, 7, {}, true);
  check_attend<Codec>(1, group, 300, 5, {.window = 50}, true);
  const float any[1] = {0};
  check_attend<Codec>(1, group, 150, 3, {.scale = 0.2f, .soft_cap = 5.f, .sink_logits = any}, false);
}

template <int dim>
void check_dim(int group) {
  check_all<KvCodec<Dense<Half, dim>>>(group);
  check_all<KvCodec<TurboQuant<3, dim>, TurboQuant<2, dim>>>(group);
}

}  // namespace

TEST_CASE("attention equals double precision at every head dim and odd group sizes") {
  check_dim<40>(1);
  check_dim<64>(3);
  check_dim<80>(5);
  check_dim<96>(7);
  check_dim<112>(4);
  check_dim<128>(8);
  check_dim<192>(2);
  check_dim<256>(20);
}

TEST_CASE("attention equals double precision with every codec") {
  check_all<KvCodec<Dense<float, 64>, Dense<float, 64>, float>>(3);
  check_all<KvCodec<Dense<BFloat16, 64>, Dense<BFloat16, 64>, BFloat16>>(3);
  check_all<KvCodec<TurboQuant<1, 64>, TurboQuant<6, 64>>>(3);
  check_all<KvCodec<TurboQuant<4, 64>, TurboQuant<5, 64>>>(3);
}

TEST_CASE("long decode is split into parts and joined") {
  check_attend<KvCodec<Dense<Half, 64>>>(2, 3, 5000, 1, {}, false);
  check_attend<KvCodec<TurboQuant<4, 64>>>(2, 3, 5000, 1, {.window = 1500}, true);
}
