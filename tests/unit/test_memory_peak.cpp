// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The most memory that a cache takes while a long text is read in chunks and cut after each, inside calls too.
#include <doctest/doctest.h>

#include <numeric>
#include <random>
#include <vector>

#include "kvtailor/codec/low_rank.hpp"
#include "kvtailor/kvtailor.hpp"
#include "reference/counting.hpp"

using namespace kvt;

namespace {

constexpr int dim = 64, text = 8000, chunk = 256;
constexpr Geometry shape{4, 4, 8, dim};
constexpr long long dense = 4ll * text * shape.num_heads() * dim;

// As a share of all rows in fp16, when a quarter of what was seen is kept.
template <class Selector, class Codec>
double peak(const Selector& selector) {
  reference::Counting memory;
  double share = 0;
  {
    KvCache<Adaptive, Selector, Codec> cache({}, selector);
    REQUIRE(cache.init(shape, {.memory = &memory}).ok());
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<float> rows(static_cast<std::size_t>(chunk * shape.num_q_heads * dim));
    std::vector<int> positions(chunk);
    for (int first = 0; first < text; first += chunk) {
      positions.resize(static_cast<std::size_t>(std::min(chunk, text - first)));
      std::iota(positions.begin(), positions.end(), first);
      for (int l = 0; l < shape.num_layers; ++l) {
        for (float& x : rows) x = uniform(random);
        REQUIRE(cache.append(l, rows.data(), rows.data() + rows.size() / 2, positions).ok());
        REQUIRE(cache.observe(l, rows.data(), positions).ok());
      }
      REQUIRE(cache.compress(Retain::rows((positions.back() + 1) / 4)).ok());
      REQUIRE(memory.outstanding == cache.memory().total());
    }
    REQUIRE(cache.memory().dense_fp16_bytes == dense);
    for (int h = 0; h < shape.num_heads(); ++h) share += cache.num_rows(h / shape.num_kv_heads, h % shape.num_kv_heads);
    CHECK(share == doctest::Approx(shape.num_heads() * text / 4));
    share = static_cast<double>(memory.peak) / static_cast<double>(dense);
  }
  CHECK(memory.outstanding == 0);
  return share;
}

}  // namespace

TEST_CASE("a long text that is cut to a quarter after each chunk takes a quarter, and a chunk, at any time") {
  using Fp16 = KvCodec<Dense<Half, dim>>;
  using Turbo = KvCodec<TurboQuant<3, dim>, TurboQuant<2, dim>>;
  using LowRanks = KvCodec<LowRank<LloydMax<2, dim, NormCorrection::least_squares, LogScale>>>;
  const double fp16 = peak<SnapKv, Fp16>({}), keys = peak<KeyDiff, Fp16>({}), hit = peak<HeavyHitter, Fp16>({}),
               turbo = peak<SnapKv, Turbo>({}), ranks = peak<KeyDiff, LowRanks>({});
  INFO(fp16 << " " << keys << " " << hit << " " << turbo << " " << ranks);
  // Rows that stay, a chunk of dense rows, what stays of it in new blocks, and .02 for queries, positions and one block more.
  const double read = 2. * chunk / text + 0.02;
  for (const double share : {fp16, keys, hit}) CHECK(share <= 0.25 + read);
  for (const double share : {turbo, ranks}) CHECK(share <= 0.25 * 3 / 16 + read);
}
