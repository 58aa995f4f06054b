// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The selectors that test_policies.cpp leaves out, and the evidence they go by, against plain loops.
#include <doctest/doctest.h>

#include <array>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>

#include "kvtailor/budget/squeeze_attention.hpp"
#include "kvtailor/kvtailor.hpp"
#include "kvtailor/learn/importance.hpp"
#include "kvtailor/select/any_selector.hpp"
#include "reference/counting.hpp"
#include "reference/selectors.hpp"
#include "unit/codecs.hpp"

using namespace kvt;
using reference::Index;
using reference::Vector;

namespace {

constexpr double eps = 0x1p-24;  // of one rounding in fp32, relative

std::vector<float> normals(std::mt19937& random, std::size_t n, float size = 1) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = size * normal(random);
  return x;
}

std::vector<int> increasing(std::mt19937& random, int n, int first = 0) {
  std::vector<int> x;
  for (int i = 0, at = first; i < n; ++i, at += 1 + static_cast<int>(random() % 3)) x.push_back(at);
  return x;
}

reference::Turning turning(const Rope& rope) {
  return {rope.rotary_dim,
          static_cast<double>(rope.base),
          static_cast<double>(rope.scale),
          rope.pairs == Rope::Pairs::adjacent,
          {rope.factors.begin(), rope.factors.end()}};
}

// Both layouts, parts of a row, factors and a scale, for rows of 64.
struct Ropes {
  std::vector<float> factors;
  std::vector<Rope> all;

  Ropes() {
    for (int i = 0; i < 24; ++i) factors.push_back(1.f + 0.5f * static_cast<float>(i % 8));
    for (const auto pairs : {Rope::Pairs::adjacent, Rope::Pairs::halves}) {
      all.push_back({.rotary_dim = 64, .base = 10000.f, .pairs = pairs});
      all.push_back({.rotary_dim = 32, .base = 500000.f, .scale = 0.25f, .pairs = pairs});
      all.push_back({.rotary_dim = 48, .base = 500000.f, .pairs = pairs, .factors = factors});
    }
  }
};

// The longest of rows [n, dim].
double longest(const std::vector<float>& rows, Index dim) {
  double most = 0;
  for (Index at = 0; at < rows.size(); at += dim) most = std::max(most, reference::norm(&rows[at], dim));
  return most;
}

// By which factor a softmax weight over n rows is off: logits, sums of dim products that are at most `size` together, are off
// by (dim + 3) eps size each; e^x doubles that at worst, its own error is 4 eps; the sum adds n roundings.
double weight_error(double size, Index dim, std::size_t n) {
  return std::expm1(2 * static_cast<double>(dim + 3) * eps * size) + static_cast<double>(n + 8) * eps;
}

// Fails unless scores are within tolerance(row), NaN included, and rows that the oracle has at infinity are above the others.
template <class Tolerance>
void compare(std::span<const float> score, const Vector& want, const Tolerance& tolerance) {
  REQUIRE(score.size() == want.size());
  double below = -reference::infinite, above = reference::infinite;
  for (std::size_t r = 0; r < want.size(); ++r) {
    const auto own = static_cast<double>(score[r]);
    if (!std::isfinite(own)) FAIL("row " << r << " scores " << own);
    if (std::isinf(want[r])) {
      above = std::min(above, own);
      continue;
    }
    below = std::max(below, own);
    const double error = std::fabs(own - want[r]);
    if (!(error <= tolerance(r))) FAIL("row " << r << " scores " << own << ", not " << want[r] << " +- " << tolerance(r));
  }
  if (!(above > below)) FAIL("a row that has to stay scores " << above << ", another " << below);
}

// One head with all that there is to know.
struct Head : reference::SelectorInput {
  std::vector<float> mean, covariance, output, scratch, score;
  std::vector<RowAttention> attention;
  Rope rope;
  HeadEvidence seen;
  static constexpr Index width = 20;

  Head(std::mt19937& random, int dim_, int group_, int n, int window) {
    dim = static_cast<Index>(dim_), group = static_cast<Index>(group_);
    const auto rows = static_cast<Index>(n);
    keys = normals(random, rows * dim);
    values = normals(random, rows * dim);
    queries = normals(random, static_cast<Index>(window) * group * dim);
    positions = increasing(random, n);
    for (int w = 0; w < window; ++w) {
      window_positions.push_back(std::max(0, (n > 0 ? positions.back() : 0) - window + 1) + w);
    }
    mean = normals(random, group * dim, 0.5f);
    for (Index g = 0; g < group; ++g) {
      const auto root = normals(random, dim * dim, 1 / std::sqrt(static_cast<float>(dim)));
      for (Index i = 0; i < dim; ++i) {
        for (Index j = 0; j < dim; ++j) {
          covariance.push_back(std::inner_product(&root[i * dim], &root[i * dim] + dim, &root[j * dim], 0.f));
        }
      }
    }
    output = normals(random, width * (group + 2) * dim, 0.3f);
    std::vector<reference::Given> given;
    reference::give(given, keys, positions, queries, window_positions, group, dim);
    for (const auto& g : given) attention.push_back({static_cast<float>(g.sum), static_cast<float>(g.largest), g.queries});
    rope = {.rotary_dim = dim_, .pairs = Rope::Pairs::halves};
  }
  Index rows() const { return positions.size(); }
  // The group's first query head is the second of the projection.
  const float* weights() const { return output.data() + dim; }
  Index stride() const { return (group + 2) * dim; }
  void link() {
    scratch.resize(4 * (rows() + dim));
    score.assign(rows(), std::nanf(""));
    seen.head_dim = static_cast<int>(dim);
    seen.group_size = static_cast<int>(group);
    seen.positions = positions;
    seen.keys = keys;
    seen.values = values;
    seen.window_queries = queries.data();
    seen.window_stride = static_cast<std::int64_t>(group * dim);
    seen.window_positions = window_positions;
    seen.attend = {
        .scale = static_cast<float>(attend.scale), .window = attend.sliding, .soft_cap = static_cast<float>(attend.soft_cap)};
    seen.moments = {100, mean.data(), covariance.data()};
    seen.attention = attention;
    seen.rope = &rope;
    seen.output = {weights(), static_cast<int>(width)};
    seen.output_stride = static_cast<std::int64_t>(stride());
    seen.end_position = rows() > 0 ? positions.back() + 1 : 0;
    seen.scratch = scratch;
  }
  template <class Selector>
  Status by(const Selector& selector) {
    link();
    return selector.score(seen, score);
  }
  // No logit is larger in size.
  double logit_size() const {
    const double scale = attend.scale != 0 ? attend.scale : 1 / std::sqrt(static_cast<double>(dim));
    return scale * longest(keys, dim) * longest(queries, dim);
  }
  double error_of_weights() const { return weight_error(logit_size(), dim, rows()) + 8 * eps * attend.soft_cap; }
};

// A selector whose scores, and attention, are given.
struct Fixed {
  static constexpr EvidenceSet needs = {};
  const std::vector<float>* given = nullptr;
  Status score(const HeadEvidence&, std::span<float> score) const noexcept {
    std::copy(given->begin(), given->end(), score.begin());
    return success();
  }
  Status attention(const HeadEvidence& seen, std::span<float> out) const noexcept { return score(seen, out); }
  int first_kept(const HeadEvidence& seen) const noexcept { return seen.num_rows(); }
};
// The same without attention, for scores that are no weights.
struct Plain {
  static constexpr EvidenceSet needs = {};
  const std::vector<float>* given = nullptr;
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept { return Fixed{given}.score(seen, score); }
};
static_assert(AttentionSelector<Fixed> && !AttentionSelector<Plain>);

Vector doubles(std::span<const float> x) { return {x.begin(), x.end()}; }

AnySelector named(const std::string& name) {
  AnySelector selector;
  const std::string wrong = detail::parse_selector(name, selector);
  REQUIRE_MESSAGE(wrong.empty(), wrong);
  return selector;
}

// All there are, in a form that fits heads of a few dozen rows.
const std::vector<std::string> all_names = {"random",
                                            "sink_recent",
                                            "key_norm",
                                            "key_diff",
                                            "snap_kv:window=8",
                                            "tova",
                                            "last_query",
                                            "heavy_hitter",
                                            "heavy_hitter:over=all",
                                            "expected_attention:future=64",
                                            "expected_attention:future=64,covariance=off,value_norm=off",
                                            "lag_kv:lag=8",
                                            "lag_kv:lag=8,cross=on",
                                            "leverage:sketch=24",
                                            "lava:window=8",
                                            "reconstruction",
                                            "value_norm(snap_kv:window=8)",
                                            "value_norm(key_norm)",
                                            "value_norm:through=output(key_norm)",
                                            "value_norm:through=output(reconstruction)",
                                            "value_norm(expected_attention:future=64)",
                                            "critical_kv(snap_kv:window=8)",
                                            "critical_kv(expected_attention:future=64)",
                                            "caote(snap_kv:window=8)",
                                            "caote(last_query)",
                                            "caote(heavy_hitter)",
                                            "chunk_kv:length=5(snap_kv:window=8)",
                                            "chunk_kv:length=5(tova)",
                                            "chunk_kv:length=5(value_norm:through=output(key_norm))"};

// ---- caches ----

constexpr int dim = 64;
using Exact = KvCodec<Dense<float, dim>>;
using Coded = KvCodec<TurboQuant<4, dim>>;
template <class Selector = AnySelector, class Codec = Exact, class Budget = Uniform>
using Cache = KvCache<Budget, Selector, Codec>;

// What an engine gives to one layer.
struct Text {
  Geometry shape;
  std::vector<float> keys, values, queries;
  std::vector<int> positions;

  Text(std::mt19937& random, const Geometry& of, int first, int n) : shape(of) {
    keys = normals(random, static_cast<Index>(n * of.num_kv_heads * dim));
    values = normals(random, keys.size());
    queries = normals(random, static_cast<Index>(n * of.num_q_heads * dim));
    positions.resize(static_cast<Index>(n));
    std::iota(positions.begin(), positions.end(), first);
  }
  // Rows `first` to `last` of heads `from` to `to`, of rows [n, heads, dim].
  static std::vector<float> part(const std::vector<float>& x, int heads, int first, int last, int from, int to) {
    std::vector<float> out;
    for (int r = first; r < last; ++r) {
      const auto at = x.begin() + static_cast<std::ptrdiff_t>(r * heads) * dim;
      out.insert(out.end(), at + from * dim, at + to * dim);
    }
    return out;
  }
  std::vector<float> keys_of(int head) const {
    return part(keys, shape.num_kv_heads, 0, static_cast<int>(positions.size()), head, head + 1);
  }
  std::vector<float> values_of(int head) const {
    return part(values, shape.num_kv_heads, 0, static_cast<int>(positions.size()), head, head + 1);
  }
  // Of the group that reads a KV head.
  std::vector<float> queries_of(int head) const {
    const int group = shape.group_size();
    return part(queries, shape.num_q_heads, 0, static_cast<int>(positions.size()), head * group, (head + 1) * group);
  }
};

template <class C>
void append(C& cache, int layer, const Text& text) {
  const Status status = cache.append(layer, text.keys.data(), text.values.data(), text.positions);
  REQUIRE_MESSAGE(status.ok(), status.message());
}
template <class C>
void observe(C& cache, int layer, const Text& text, const AttendOptions& attend = {}) {
  const Status status = cache.observe(layer, text.queries.data(), text.positions, attend);
  REQUIRE_MESSAGE(status.ok(), status.message());
}
template <class C>
void add(C& cache, const Text& text) {
  for (int layer = 0; layer < text.shape.num_layers; ++layer) append(cache, layer, text), observe(cache, layer, text);
}
template <class C>
std::vector<int> held(const C& cache, int layer, int head) {
  const auto have = cache.positions(layer, head);
  return {have.begin(), have.end()};
}
template <class C>
std::vector<std::vector<int>> held(const C& cache) {
  std::vector<std::vector<int>> all;
  for (int l = 0; l < cache.geometry().num_layers; ++l) {
    for (int h = 0; h < cache.geometry().num_kv_heads; ++h) all.push_back(held(cache, l, h));
  }
  return all;
}

// Rows that stay are those with the highest scores; rows within the tolerance of the last may take its place.
void check_kept(const std::vector<int>& kept, const std::vector<int>& positions, const Vector& score, double tolerance) {
  const std::set<int> stays(kept.begin(), kept.end());
  REQUIRE(stays.size() == kept.size());
  double least = reference::infinite, most = -reference::infinite;
  for (std::size_t r = 0; r < positions.size(); ++r) {
    if (stays.count(positions[r]) != 0) {
      least = std::min(least, score[r]);
    } else {
      most = std::max(most, score[r]);
    }
  }
  if (!(least >= most - tolerance)) FAIL("a row that scores " << least << " stays, one that scores " << most << " does not");
}

// What a cache shows to its selector, head after head.
struct Shown {
  std::vector<int> positions, window_positions;
  std::vector<float> keys, window_queries, mean, covariance;
  std::vector<RowAttention> attention;
  long long count = 0;
  int chosen_before = 0;
};
struct Probe {
  static constexpr EvidenceSet needs = Evidence::keys | Evidence::positions | query_evidence | Evidence::rope;
  std::vector<Shown>* shown = nullptr;
  EvidenceSet wanted = needs;
  int window = 5;

  EvidenceSet active_needs() const noexcept { return wanted; }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    Shown own;
    own.positions.assign(seen.positions.begin(), seen.positions.end());
    own.window_positions.assign(seen.window_positions.begin(), seen.window_positions.end());
    own.keys.assign(seen.keys.begin(), seen.keys.end());
    own.attention.assign(seen.attention.begin(), seen.attention.end());
    for (std::size_t w = 0; w < own.window_positions.size(); ++w) {
      const float* const query = seen.window_queries + static_cast<std::int64_t>(w) * seen.window_stride;
      own.window_queries.insert(own.window_queries.end(), query, query + seen.group_size * seen.head_dim);
    }
    own.count = seen.moments.count;
    own.chosen_before = seen.chosen_before;
    if (own.count > 0) {
      const auto d = seen.head_dim, g = seen.group_size;
      own.mean.assign(seen.moments.mean, seen.moments.mean + g * d);
      own.covariance.assign(seen.moments.covariance, seen.moments.covariance + g * d * d);
    }
    shown->push_back(std::move(own));
    for (std::size_t row = 0; row < score.size(); ++row) score[row] = static_cast<float>(seen.positions[row] * 7919 % 1000);
    return success();
  }
};
// What it would see now: a copy of the cache is cut.
template <class C>
std::vector<Shown> look(const C& cache, std::vector<Shown>& shown) {
  shown.clear();
  C copy;
  REQUIRE(cache.fork(copy).ok());
  double rows = 0;
  for (const auto& head : held(cache)) rows += static_cast<double>(head.size());
  const Status status = copy.compress(Retain::ratio((rows - 1) / rows));  // if all stay, nothing is shown
  REQUIRE_MESSAGE(status.ok(), status.message());
  REQUIRE(!shown.empty());
  return shown;
}

bool same(const std::vector<RowAttention>& a, const std::vector<RowAttention>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const RowAttention& x, const RowAttention& y) {
    return x.sum == y.sum && x.largest == y.largest && x.queries == y.queries;
  });
}

}  // namespace

// ---- selectors ----

TEST_CASE("Random is uniform, goes by seed, layer, head and position alone, and by each of them") {
  constexpr int n = 20000;
  std::vector<int> positions(n);
  std::iota(positions.begin(), positions.end(), 0);
  const auto scores = [&](std::uint64_t seed, int layer, int head, const std::vector<int>& at) {
    HeadEvidence seen;
    seen.layer = layer;
    seen.kv_head = head;
    seen.positions = at;
    std::vector<float> score(at.size());
    REQUIRE(Random{seed}.score(seen, score).ok());
    return score;
  };
  const auto first = scores(5, 1, 2, positions);
  // 100 bins of 200: chi-square with 99 degrees of freedom is above 160 once in 10^4.
  std::vector<int> bins(100);
  double mean = 0;
  for (const float x : first) {
    REQUIRE((x >= 0.f && x < 1.f));
    ++bins[static_cast<std::size_t>(x * 100.f)];
    mean += static_cast<double>(x) / n;
  }
  double chi = 0;
  for (const int b : bins) chi += (b - 200.0) * (b - 200.0) / 200;
  CHECK(chi < 160);
  CHECK(std::fabs(mean - 0.5) < 5 / std::sqrt(12.0 * n));
  CHECK(scores(5, 1, 2, positions) == first);
  const auto others = {scores(6, 1, 2, positions), scores(5, 2, 2, positions), scores(5, 1, 3, positions),
                       scores(5, 2, 1, positions)};
  for (const auto& other : others) {
    // Correlation of independent numbers: 1 / sqrt(n).
    double product = 0;
    for (std::size_t i = 0; i < n; ++i) {
      product += (static_cast<double>(first[i]) - 0.5) * (static_cast<double>(other[i]) - 0.5) * 12 / n;
    }
    CHECK(std::fabs(product) < 5 / std::sqrt(static_cast<double>(n)));
  }
  std::mt19937 random(1);
  auto order = positions;
  std::shuffle(order.begin(), order.end(), random);
  const auto permuted = scores(5, 1, 2, order);
  for (std::size_t i = 0; i < n; ++i) REQUIRE(permuted[i] == first[static_cast<std::size_t>(order[i])]);
  CHECK(mixed_bits(0, 0) == 0xe220a8397b1dcdafull);  // what splitmix64 begins with, as published
}

TEST_CASE("KeyNorm scores are those of the plain loops") {
  std::mt19937 random(2);
  for (const int d : {40, 64, 128}) {
    Head head(random, d, 1, 50, 1);
    head.keys[3] = 1e12f;
    REQUIRE(head.by(KeyNorm{}).ok());
    const auto want = reference::key_norm(head.keys, head.dim);
    // A sum of dim squares, halved by the root.
    compare(head.score, want, [&](std::size_t r) { return (d / 2 + 2) * eps * -want[r]; });
  }
}

TEST_CASE("Tova and LastQuery score by the last query alone: its mean, or its maximum, over the group") {
  std::mt19937 random(3);
  for (int round = 0; round < 40; ++round) {
    Head head(random, round % 2 == 0 ? 40 : 64, 1 + round % 5, 1 + static_cast<int>(random() % 150), 1 + round % 3);
    head.attend = {round % 3 == 2 ? 0.25 : 0, round % 4 == 3 ? 3.0 : 0, round % 5 == 4 ? 20 : 0};
    const double relative = head.error_of_weights();
    for (const bool maximum : {false, true}) {
      const Status status = maximum ? head.by(LastQuery{}) : head.by(Tova{});
      REQUIRE(status.ok());
      const auto want = reference::last_query(head, maximum);
      compare(head.score, want, [&](std::size_t r) { return relative * want[r] + 1e-30; });
    }
  }
}

TEST_CASE("Tova gives a row the mean over the heads that hold its position, even at positions of two billion") {
  std::mt19937 random(4);
  for (int round = 0; round < 50; ++round) {
    reference::Layer positions;
    std::vector<std::vector<float>> scores;
    std::vector<Vector> want;
    for (int h = 0; h < 1 + round % 4; ++h) {
      positions.push_back(increasing(random, static_cast<int>(random() % 30), static_cast<int>(random() % 5)));
      if (round % 3 == 0) positions.back().push_back(2000000000);
      scores.push_back(normals(random, positions.back().size()));
      want.push_back(doubles(scores.back()));
    }
    reference::join_mean(positions, want);
    std::vector<std::span<const int>> at(positions.begin(), positions.end());
    std::vector<std::span<float>> own(scores.begin(), scores.end());
    REQUIRE(Tova{}.join({at, own}).ok());
    for (std::size_t h = 0; h < want.size(); ++h) {
      // Sums in double, rounded once.
      compare(scores[h], want[h], [&](std::size_t r) { return eps * std::fabs(want[h][r]) + 1e-15; });
    }
  }
}

TEST_CASE("HeavyHitter scores are what rows were given, over the queries that saw them or in all") {
  std::mt19937 random(5);
  Head head(random, 64, 3, 60, 25);
  head.attention[7] = {};  // nobody saw it
  REQUIRE(head.by(HeavyHitter{}).ok());
  for (std::size_t r = 0; r < head.rows(); ++r) {
    const RowAttention& own = head.attention[r];
    const double want = own.queries > 0 ? static_cast<double>(own.sum) / own.queries : 0;
    if (!(std::fabs(static_cast<double>(head.score[r]) - want) <= eps * want)) FAIL("row " << r);
  }
  REQUIRE(head.by(HeavyHitter{HeavyHitter::Over::all}).ok());
  for (std::size_t r = 0; r < head.rows(); ++r) REQUIRE(head.score[r] == head.attention[r].sum);
  REQUIRE(head.by(Reconstruction{}).ok());
  for (std::size_t r = 0; r < head.rows(); ++r) REQUIRE(head.score[r] == head.attention[r].largest);
}

TEST_CASE("ExpectedAttention scores are those of the plain loops, for every kind of RoPE and all its fields") {
  std::mt19937 random(6);
  const Ropes ropes;
  for (int round = 0; round < 24; ++round) {
    const Rope& rope = ropes.all[static_cast<std::size_t>(round) % ropes.all.size()];
    ExpectedAttention selector{.future = round % 4 == 0 ? 1 : round % 4 == 1 ? 512 : 37, .num_sinks = round % 5};
    selector.covariance = round % 3 != 0;
    selector.value_norm = round % 2 == 0;
    selector.epsilon = round % 4 == 2 ? 0.02f : 0.f;
    Head head(random, 64, 1 + round % 3, 5 + static_cast<int>(random() % 60), 1);
    if (round >= 12) {
      for (int& p : head.positions) p += p >= 4 ? 30000 : 0;
    }
    head.rope = rope;
    head.attend.scale = round % 6 == 5 ? 0.25 : 0;
    REQUIRE(head.by(selector).ok());
    const auto want = reference::expected_attention(
        {64, head.group, head.keys, head.values, head.mean, selector.covariance ? head.covariance : std::vector<float>(),
         head.positions, turning(rope), head.attend.scale, static_cast<double>(selector.epsilon), head.seen.end_position,
         selector.future, selector.num_sinks, selector.value_norm});
    // Logits are products of two sums of 64 and two turns of rounded cosines, so as if of 3 * 64 + 8 terms. Then |v|.
    const double relative = weight_error(want.size, 3 * 64 + 8, head.rows()) + 64 * eps;
    compare(head.score, want.score, [&](std::size_t r) { return relative * want.score[r] + 1e-30; });
  }
}

TEST_CASE("LagKv ranks are those of the plain loops") {
  std::mt19937 random(7);
  for (int round = 0; round < 60; ++round) {
    const LagKv selector{.lag = 2 + round % 9, .num_sinks = round % 5, .cross = round % 2 == 1};
    Head head(random, 40, 1, 1 + static_cast<int>(random() % 60), 1);
    // A channel that stays the same, and one far off.
    for (std::size_t r = 0; r < head.rows() && round % 3 == 0; ++r) head.keys[r * 40] = 2.f, head.values[r * 40 + 5] += 100.f;
    if (round % 7 == 6) std::fill(head.keys.begin(), head.keys.end(), 1.f);
    REQUIRE(head.by(selector).ok());
    const auto want = reference::lag_kv(head.keys, head.values, 40, selector.lag, selector.num_sinks, selector.cross);
    // In double, rounded once.
    compare(head.score, want, [&](std::size_t r) { return 2 * eps * want[r]; });
  }
}

TEST_CASE("LagKv ranks the first of equal rows highest") {
  std::mt19937 random(8);
  Head head(random, 40, 1, 24, 1);
  std::fill(head.keys.begin(), head.keys.end(), 1.f);
  std::fill(head.values.begin(), head.values.end(), -2.f);
  REQUIRE(head.by(LagKv{.lag = 8, .num_sinks = 0}).ok());
  for (std::size_t r = 0; r < 16; ++r) CHECK(head.score[r] == static_cast<float>(7 - r % 8) / 8.f);
  for (std::size_t r = 16; r < 24; ++r) CHECK(head.score[r] == 1.f);
}

TEST_CASE("LagKv takes parts whose channels hardly differ") {
  std::mt19937 random(9);
  for (const float size : {1e-45f, 1e-40f, 1e-30f, 1e-20f}) {
    for (const bool cross : {false, true}) {
      Head head(random, 40, 1, 24, 1);
      for (std::size_t i = 0; i < 16 * 40; ++i) head.keys[i] = 1e18f * head.keys[i] / 8;
      for (std::size_t i = 8 * 40; i < 16 * 40; ++i) head.keys[i] = i % 3 == 0 ? size : 0.f;
      const LagKv selector{.lag = 8, .num_sinks = 0, .cross = cross};
      REQUIRE(head.by(selector).ok());
      const auto want = reference::lag_kv(head.keys, head.values, 40, 8, 0, cross);
      // Deviations of up to 1e63 in the first part: the softmax has one row, and the other scores are halves of that of values.
      compare(head.score, want, [&](std::size_t r) { return 2 * eps * want[r] + 1e-15; });
    }
  }
}

TEST_CASE("Leverage scores are those of the plain loops") {
  std::mt19937 random(10);
  const Ropes ropes;
  int round = 0;
  for (const int n : {1, 2, 20, 100, 300}) {
    for (const int sketch : {1, 16, 48}) {
      Head head(random, 64, 1, n, 1);
      head.rope = ropes.all[static_cast<std::size_t>(round) % ropes.all.size()];
      const float length = round % 2 == 0 ? 1.f : 0.03f;  // of short keys the ridge is a large part
      for (std::size_t r = 0; r < head.rows(); ++r) head.keys[r * 64 + 7] += 6.f;
      for (float& x : head.keys) x *= length;
      const Leverage selector{.sketch = sketch, .seed = static_cast<std::uint64_t>(round++)};
      REQUIRE(head.by(selector).ok());
      Vector matrix;
      for (int i = 0; i < 64 * sketch; ++i) {
        matrix.push_back(normal_number(selector.seed, static_cast<std::uint64_t>(i)) / std::sqrt(static_cast<double>(sketch)));
      }
      const auto want = reference::leverage(head.keys, head.positions, turning(head.rope), matrix, 64, 0.01);
      // With y = (X'X + 0.01)^-1 x, an error d of x and D of X'X move the score by 2 |y| d + |y|^2 D, and by what D does to y
      // itself, |y|^2 D^2 / 0.01. Roundings of a sum of 64 go by its root: d = sqrt(64) eps |k| |P|, D = 2 |X| d. Four times
      // that for the few that go together. Keys are turned and lose a mean that is larger than they are: + 8 eps.
      const double size = std::sqrt(std::inner_product(matrix.begin(), matrix.end(), matrix.begin(), 0.0));
      const double d = std::sqrt(64.0) * eps * (want.key + 8 * static_cast<double>(length)) * size, square = 2 * want.rows * d;
      compare(head.score, want.score, [&](std::size_t r) {
        const double y = want.solved[r];
        return 4 * (2 * y * d + y * y * square + y * y * square * square / 0.01) + 1e-12 + 4 * eps * want.score[r];
      });
    }
  }
}

TEST_CASE("ValueNorm multiplies by the length of values, or by that of what the output projection makes of them") {
  std::mt19937 random(11);
  for (int round = 0; round < 12; ++round) {
    const int size = std::array{64, 40, 24}[static_cast<Index>(round) % 3];
    const Index n = round < 6 ? 40 : 400;  // more than a block
    Head head(random, size, 1 + round % 4, static_cast<int>(n), 1);
    const auto base = normals(random, n);
    const float epsilon = round % 2 == 0 ? 0.f : 0.5f;
    REQUIRE(head.by(ValueNorm<Plain>{{&base}, epsilon}).ok());
    Vector want(n);
    const auto factor = [&](std::size_t r) { return static_cast<double>(base[r] + epsilon); };
    for (std::size_t r = 0; r < n; ++r) want[r] = factor(r) * reference::norm(&head.values[r * head.dim], head.dim);
    // A sum of up to 64 squares, halved by the root, and two products.
    compare(head.score, want, [&](std::size_t r) { return 36 * eps * std::fabs(want[r]); });

    using Through_ = ValueNorm<Plain, Through::output>;
    REQUIRE(head.by(Through_{{&base}, epsilon}).ok());
    const auto projected = reference::projected(head.values, head.dim, head.weights(), Head::width, head.stride(), head.group);
    for (std::size_t r = 0; r < n; ++r) want[r] = factor(r) * projected.root[r];
    // v'(W'W)v: sums of 20, up to 64 and up to 64 products; the root divides the error by twice the length.
    compare(head.score, want, [&](std::size_t r) {
      return std::fabs(factor(r)) * ((20 + 2 * 64 + 4) * eps * projected.square_terms[r] + 8 * eps * projected.root[r]);
    });
  }
}

TEST_CASE("rows that the selector inside keeps above all stay so whatever their values are") {
  std::mt19937 random(12);
  Head head(random, 64, 2, 40, 8);
  // Sinks and the window without values.
  std::fill_n(head.values.begin(), 2 * 64, 0.f);
  std::fill(head.values.end() - 2 * 64, head.values.end(), 0.f);
  for (const char* name :
       {"value_norm(snap_kv:window=8)", "value_norm:through=output(snap_kv:window=8)", "caote(snap_kv:window=8)",
        "value_norm(lava:window=8)", "value_norm:through=output(lava:window=8)"}) {
    INFO(std::string(name));
    REQUIRE(head.by(named(name)).ok());
    float before = 0;
    for (std::size_t r = 0; head.positions[r] < head.window_positions.front(); ++r) before = std::max(before, head.score[r]);
    for (std::size_t r = 0; r < head.rows(); ++r) {
      if (head.positions[r] >= head.window_positions.front()) CHECK(head.score[r] > before);
    }
  }
  for (const char* name :
       {"value_norm(expected_attention:num_sinks=2)", "value_norm:through=output(expected_attention:num_sinks=2)"}) {
    INFO(std::string(name));
    REQUIRE(head.by(named(name)).ok());
    for (std::size_t r = 0; r < head.rows(); ++r) {
      if (head.positions[r] < 2) CHECK(head.score[r] > *std::max_element(head.score.begin() + 2, head.score.end()));
    }
  }
}

TEST_CASE("OracleImportance is what a query head gives a row times the norm of its value through the output projection") {
  std::mt19937 random(91);
  for (int round = 0; round < 60; ++round) {
    const int size = round % 2 == 0 ? 64 : 40, window = 1 + round % 7 * 30;
    Head head(random, size, 1 + round % 4, 1 + static_cast<int>(random() % 300), window);
    head.attend.sliding = round % 5 == 4 ? 40 : 0;
    const OverQueries over = round % 3 == 0 ? OverQueries::sum : OverQueries::largest;
    REQUIRE(head.by(OracleImportance{.window = window, .over = over}).ok());
    Vector want(head.rows(), 0.0), error(head.rows(), 0.0);
    for (Index g = 0; g < head.group; ++g) {
      std::vector<float> own;
      for (int w = 0; w < window; ++w) {
        const auto from =
            head.queries.begin() + static_cast<std::ptrdiff_t>((static_cast<Index>(w) * head.group + g) * head.dim);
        own.insert(own.end(), from, from + size);
      }
      std::vector<reference::Given> given;
      reference::give(given, head.keys, head.positions, own, head.window_positions, 1, head.dim, head.attend);
      const auto projected =
          reference::projected(head.values, head.dim, head.weights() + g * head.dim, Head::width, head.stride(), 1);
      for (Index r = 0; r < head.rows(); ++r) {
        const double weight = over == OverQueries::sum ? given[r].sum : given[r].largest;
        want[r] = std::max(want[r], weight * projected.root[r]);
        // As of a weight, with a rounding for each query that is added, and as of ValueNorm's norms.
        error[r] = std::max(error[r], weight * projected.root[r] * (head.error_of_weights() + (window + 4) * eps) +
                                          weight * ((20 + 2 * double(size) + 4) * eps * projected.square_terms[r] +
                                                    8 * eps * projected.root[r]));
      }
    }
    compare(head.score, want, [&](std::size_t r) { return error[r] + 1e-30; });
  }
  Head none(random, 64, 2, 5, 0);
  CHECK(none.by(OracleImportance{}).code == Errc::no_evidence);
}

TEST_CASE("CriticalKv keeps a first part by scores alone, and the others by the projected sum of magnitudes") {
  std::mt19937 random(13);
  for (int round = 0; round < 30; ++round) {
    const int n = 1 + static_cast<int>(random() % (round < 24 ? 60 : 400));
    Head head(random, 64, 1 + round % 3, n, 1);
    auto base = normals(random, head.rows());
    for (float& x : base) x = round % 3 == 0 ? std::round(std::fabs(x)) : std::fabs(x);  // with ties, or without
    const CriticalKv<Plain> selector{.base = {&base}, .epsilon = 0.01f, .first_stage = round % 2 == 0 ? 0.5 : 1.0};
    const int kept = static_cast<int>(random() % static_cast<unsigned>(n + 1));
    head.seen.share = static_cast<double>(kept) / n;
    REQUIRE(head.by(selector).ok());
    const int first = static_cast<int>(kept * (round % 2 == 0 ? 0.5 : 1.0));  // exact
    const auto stage = reference::highest(doubles(base), first);
    const auto projected = reference::projected(head.values, 64, head.weights(), Head::width, head.stride(), head.group);
    Vector want(head.rows());
    for (std::size_t r = 0; r < head.rows(); ++r) {
      want[r] = stage[r] ? reference::infinite : static_cast<double>(base[r] + 0.01f) * projected.sum[r];
    }
    INFO("keeps " << kept << " of " << n);
    // Each of 20 elements is a sum of 64 products; then they are added.
    compare(head.score, want,
            [&](std::size_t r) { return static_cast<double>(base[r] + 0.01f) * (64 + 20 + 8) * eps * projected.sum_terms[r]; });
  }
}

TEST_CASE("the first part of CriticalKv is that of whole rows, whatever the share is in binary") {
  std::mt19937 random(36);
  Head head(random, 40, 1, 100, 1);
  std::vector<float> base(100);
  for (std::size_t r = 0; r < 100; ++r) base[r] = static_cast<float>(r);
  for (int kept = 0; kept <= 100; ++kept) {
    head.seen.share = kept / 100.0;
    REQUIRE(head.by(CriticalKv<Plain>{.base = {&base}, .first_stage = 1}).ok());
    REQUIRE(std::count(head.score.begin(), head.score.end(), std::numeric_limits<float>::max()) == kept);
  }
}

TEST_CASE("Caote scores are how far the output moves when a row is really taken out") {
  std::mt19937 random(14);
  for (int round = 0; round < 30; ++round) {
    Head head(random, 40, 1, 2 + static_cast<int>(random() % 50), 1);
    auto weight = normals(random, head.rows());
    for (float& w : weight) w = 0.02f * std::fabs(w);
    if (round % 3 == 0) weight[1] = 1.5f;  // nearly all of it
    if (round % 4 == 0) weight[0] = 0.f;
    REQUIRE(head.by(Caote<Fixed>{{&weight}}).ok());
    const auto want = reference::output_movement(doubles(weight), head.values, 40);
    // In double but for the length of a difference of 40 elements, which are rounded and summed in 16 parts. What is left of
    // the weights may be a thousandth of all: 1e-16 * 1000 of values of size 6.
    compare(head.score, want, [&](std::size_t r) { return (40 / 16 + 8) * eps * want[r] + 1e-12; });
  }
  // With all the weight on one row nothing can take its place: it is the last to go of those that may.
  Head head(random, 40, 1, 5, 1);
  const std::vector<float> one{0, 0, 1, 0, 0};
  REQUIRE(head.by(Caote<Fixed>{{&one}}).ok());
  CHECK(head.score[2] > 1e37f);
  CHECK(std::isfinite(head.score[2]));
}

TEST_CASE("Caote around selectors of attention takes theirs, and what they keep above all stays") {
  std::mt19937 random(15);
  Head head(random, 64, 2, 50, 1);
  REQUIRE(head.by(Caote<LastQuery>{}).ok());
  const auto marks = reference::last_query(head, true);
  // Its attention is without marks.
  Vector weight(head.rows(), 0.0);
  for (Index g = 0; g < head.group; ++g) {
    const auto own =
        reference::weights(head.keys, head.positions, &head.queries[g * head.dim], head.dim, head.window_positions[0]);
    for (std::size_t r = 0; r < weight.size(); ++r) weight[r] = std::max(weight[r], own[r]);
  }
  Vector want = reference::output_movement(weight, head.values, 64);
  for (std::size_t r = 0; r < want.size(); ++r) want[r] = std::isinf(marks[r]) ? reference::infinite : want[r];
  // Weights are off by this factor; a / (1 - a) with a below 0.9 by ten times that, and the output that is compared with by
  // weights times values.
  const double most = *std::max_element(weight.begin(), weight.end()) / std::accumulate(weight.begin(), weight.end(), 0.0);
  REQUIRE(most < 0.9);
  const double relative = head.error_of_weights(), length = longest(head.values, 64);
  compare(head.score, want, [&](std::size_t r) { return 11 * relative * (want[r] + weight[r] * length) + 1e-30; });
}

TEST_CASE("ChunkKv gives all rows of a run the same score, with and without a base that joins heads") {
  std::mt19937 random(16);
  for (int round = 0; round < 60; ++round) {
    reference::Layer positions;
    std::vector<std::vector<float>> scores;
    for (int h = 0; h < 1 + round % 4; ++h) {
      positions.push_back(increasing(random, static_cast<int>(random() % 50), static_cast<int>(random() % 30)));
      scores.push_back(normals(random, positions.back().size()));
    }
    const std::vector<std::span<const int>> at(positions.begin(), positions.end());
    for (const bool joins : {false, true}) {
      auto given = scores;
      std::vector<Vector> want;
      for (const auto& s : scores) want.push_back(doubles(s));
      const int length = 1 + round % 23;
      if (joins) reference::join_mean(positions, want);
      reference::join_chunks(positions, want, length);
      const std::vector<std::span<float>> own(given.begin(), given.end());
      const Status status =
          joins ? ChunkKv<Tova>{.length = length}.join({at, own}) : ChunkKv<Plain>{.length = length}.join({at, own});
      REQUIRE(status.ok());
      for (std::size_t h = 0; h < want.size(); ++h) {
        // Sums in double of numbers below 5, rounded to fp32 once in Tova and once here.
        compare(given[h], want[h], [&](std::size_t r) { return eps * (std::fabs(want[h][r]) + 5 * 4); });
        for (std::size_t r = 1; r < want[h].size(); ++r) {
          if (positions[h][r] / length == positions[h][r - 1] / length) REQUIRE(given[h][r] == given[h][r - 1]);
        }
      }
    }
  }
}

TEST_CASE("LavaScore is that of the plain loops") {
  std::mt19937 random(17);
  for (int round = 0; round < 40; ++round) {
    // The last rounds: more queries and rows than are met at a time.
    const bool many = round >= 34;
    const int window = many ? 110 + 10 * (round % 6) : 1 + round % 9;
    const int n = (many ? 180 : 1) + static_cast<int>(random() % (many ? 400 : 120));
    Head head(random, round % 2 == 0 ? 40 : 64, 1 + round % 4, n, window);
    head.attend = {0, round % 4 == 3 ? 3.0 : 0, round % 5 == 4 ? 20 : 0};
    const LavaScore selector{.window = window, .kernel = 1 + 2 * (round % 5)};
    REQUIRE(head.by(selector).ok());
    const auto want = reference::lava(head, selector.kernel);
    const double relative = head.error_of_weights() + (window + 4) * eps;
    compare(head.score, want, [&](std::size_t r) { return relative * want[r] + 1e-30; });
  }
}

// ---- selectors in caches ----

TEST_CASE("LastQuery chooses once; from then on the rows it chose stay and the window slides") {
  std::mt19937 random(18);
  const Geometry shape{2, 2, 4, dim};
  const auto prompt = Text(random, shape, 0, 60);
  for (const bool observes : {false, true}) {
    Cache<LastQuery> cache;
    REQUIRE(cache.init(shape, {.sink_rows = 2, .recent_rows = 6, .block_rows = 8}).ok());
    add(cache, prompt);
    REQUIRE(cache.compress(Retain::rows(20)).ok());
    const auto begin = held(cache);
    for (int l = 0; l < 2; ++l) {
      for (int h = 0; h < 2; ++h) {
        reference::SelectorInput in{
            dim, 2, prompt.keys_of(h), prompt.values_of(h), prompt.queries_of(h), prompt.positions, prompt.positions};
        auto score = reference::last_query(in, true);
        for (std::size_t r : {0u, 1u, 54u, 55u, 56u, 57u, 58u, 59u}) score[r] = reference::infinite;
        check_kept(held(cache, l, h), prompt.positions, score, 1e-5);  // shares below one, with logits of size 8
      }
    }
    for (int step = 60; step < 90; ++step) {
      const Text next(random, shape, step, 1);
      for (int l = 0; l < 2; ++l) {
        append(cache, l, next);
        if (observes) observe(cache, l, next);
      }
      REQUIRE(cache.compress(Retain::rows(20)).ok());
      for (std::size_t h = 0; h < 4; ++h) {
        auto want = begin[h];
        want.resize(14);  // sinks and chosen rows
        for (int p = step - 5; p <= step; ++p) want.push_back(p);
        REQUIRE(held(cache)[h] == want);
      }
    }
    // Rows that come together are a prompt again: the last query chooses anew.
    const Text more(random, shape, 90, 10);
    add(cache, more);
    const auto before = held(cache, 0, 0);
    std::vector<float> keys(before.size() * dim);
    cache.decode(0, 0, keys.data(), nullptr);
    REQUIRE(cache.compress(Retain::rows(20)).ok());
    reference::SelectorInput in{dim, 2, keys, {}, more.queries_of(0), before, more.positions};
    auto score = reference::last_query(in, true);
    for (std::size_t r = 0; r < score.size(); ++r)
      score[r] = before[r] < 2 || r >= score.size() - 6 ? reference::infinite : score[r];
    check_kept(held(cache, 0, 0), before, score, 1e-5);
  }
}

TEST_CASE("Reconstruction keeps what the repetition of a text looked at, and forgets what came before it") {
  std::mt19937 random(19);
  const Geometry shape{2, 2, 6, dim};
  const Text text(random, shape, 0, 40), repeat(random, shape, 40, 40);
  for (const bool observes : {false, true}) {
    Cache<Reconstruction> cache;
    REQUIRE(cache.init(shape, {.sink_rows = 2, .recent_rows = 0, .block_rows = 8}).ok());
    for (int l = 0; l < 2; ++l) {
      append(cache, l, text);
      if (observes) observe(cache, l, text);
    }
    cache.forget();
    CHECK(cache.compress(Retain::rows(15)).code == Errc::no_evidence);
    add(cache, repeat);
    REQUIRE(cache.truncate(40).ok());
    REQUIRE(cache.compress(Retain::rows(15)).ok());
    for (int l = 0; l < 2; ++l) {
      for (int h = 0; h < 2; ++h) {
        auto keys = text.keys_of(h);
        const auto more = repeat.keys_of(h);
        keys.insert(keys.end(), more.begin(), more.end());
        auto positions = text.positions;
        positions.insert(positions.end(), repeat.positions.begin(), repeat.positions.end());
        std::vector<reference::Given> given;
        reference::give(given, keys, positions, repeat.queries_of(h), repeat.positions, 3, dim);
        Vector score;
        for (std::size_t r = 0; r < 40; ++r) score.push_back(r < 2 ? reference::infinite : given[r].largest);
        CHECK(held(cache, l, h).size() == 15);
        check_kept(held(cache, l, h), text.positions, score, 1e-5);  // as above
      }
    }
  }
}

TEST_CASE("heads that change places keep the rows that they kept") {
  std::mt19937 random(20);
  constexpr int kv = 3, group = 2, width = 12;
  const Geometry shape{1, kv, kv * group, dim};
  const Text text(random, shape, 0, 80);
  const auto output = normals(random, static_cast<std::size_t>(width * kv * group * dim));
  const int order[kv] = {2, 0, 1};
  Text moved = text;
  auto moved_output = output;
  const auto move = [&](std::vector<float>& to, const std::vector<float>& from, int rows, int block) {
    for (int r = 0; r < rows; ++r) {
      for (int h = 0; h < kv; ++h) {
        std::copy_n(from.begin() + (r * kv + order[h]) * block, block, to.begin() + (r * kv + h) * block);
      }
    }
  };
  move(moved.keys, text.keys, 80, dim);
  move(moved.values, text.values, 80, dim);
  move(moved.queries, text.queries, 80, group * dim);
  move(moved_output, output, width, group * dim);
  const Rope rope{.rotary_dim = dim};
  for (const std::string& name : all_names) {
    if (name.starts_with("random")) continue;  // which goes by the head's number
    INFO(name);
    std::vector<std::vector<int>> kept[2];
    for (const bool moves : {false, true}) {
      Cache<> cache({}, named(name));
      const OutputProjection projection{(moves ? moved_output : output).data(), width};
      const CacheOptions options{
          .sink_rows = 2, .recent_rows = 6, .block_rows = 8, .ropes = {&rope, 1}, .output_projections = {&projection, 1}};
      REQUIRE(cache.init(shape, options).ok());
      add(cache, moves ? moved : text);
      const Status status = cache.compress(Retain::rows(33));
      REQUIRE_MESSAGE(status.ok(), status.message());
      kept[moves] = held(cache);
    }
    for (int h = 0; h < kv; ++h) CHECK(kept[1][static_cast<std::size_t>(h)] == kept[0][static_cast<std::size_t>(order[h])]);
  }
}

TEST_CASE("of rows with equal scores the earlier stay") {
  std::mt19937 random(21);
  const Geometry shape{1, 2, 4, dim};
  Text text(random, shape, 0, 64);
  const auto repeat_first = [&](std::vector<float>& x) {
    for (std::size_t at = x.size() / 64; at < x.size(); ++at) x[at] = x[at % (x.size() / 64)];
  };
  repeat_first(text.keys);
  repeat_first(text.values);
  const auto output = normals(random, 4 * 4 * dim);
  const OutputProjection projection{output.data(), 4};
  for (const char* name : {"key_norm", "key_diff", "value_norm(key_norm)", "value_norm:through=output(key_norm)",
                           "chunk_kv(key_norm)", "critical_kv(key_norm)", "tova", "last_query"}) {
    INFO(std::string(name));
    Cache<> cache({}, named(name));
    REQUIRE(
        cache.init(shape, {.sink_rows = 2, .recent_rows = 4, .block_rows = 8, .output_projections = {&projection, 1}}).ok());
    add(cache, text);
    REQUIRE(cache.compress(Retain::rows(20)).ok());
    std::vector<int> want(16);
    std::iota(want.begin(), want.end(), 0);
    for (int p = 60; p < 64; ++p) want.push_back(p);
    CHECK(held(cache, 0, 0) == want);
    CHECK(held(cache, 0, 1) == want);
  }
}

// ---- RoPE ----

TEST_CASE("RoPE is turned back exactly, up to positions of a million") {
  std::mt19937 random(22);
  for (const Rope& rope : Ropes().all) {
    RopeInverse inverse(rope);
    std::vector<int> positions{0, 1, 17, 4095, 131071, 999983, 1000000};
    for (int p = 1000001; p < 1000520; ++p) positions.push_back(p);  // angles from those before
    for (const int position : positions) {
      const auto before = normals(random, 3 * 64);
      auto rows = before;
      inverse.turn_back(rows.data(), 3, 64, position);
      const auto matrix = turning(rope).matrix(64, position);
      for (std::size_t r = 0; r < 3; ++r) {
        const auto want = reference::times(matrix, Vector(&before[r * 64], &before[r * 64] + 64), true);
        for (std::size_t d = 0; d < 64; ++d) {
          // Elements of size 5 times a rounded cosine, twice, and their sum: 3 * 2 * 5 eps; angles of 1e6 in double: 5e-9.
          if (!(std::fabs(static_cast<double>(rows[r * 64 + d]) - want[d]) <= 30 * eps + 5e-9)) FAIL(position << " " << d);
        }
        rope.apply(&rows[r * 64], position);
        for (std::size_t d = 0; d < 64; ++d) {
          // Twice; what is not turned stays as it is.
          const double e = std::fabs(static_cast<double>(rows[r * 64 + d]) - static_cast<double>(before[r * 64 + d]));
          if (!(e <= (d < static_cast<std::size_t>(rope.rotary_dim) ? 60 * eps : 0))) FAIL(position << " " << d);
        }
      }
    }
  }
}

// ---- evidence ----

TEST_CASE("moments of queries are those of all of them before RoPE, however many come at a time, without those of sinks") {
  std::mt19937 random(23);
  const Ropes ropes;
  const Geometry shape{2, 2, 6, dim};
  for (std::size_t round = 0; round + 1 < ropes.all.size(); ++round) {
    std::vector<Shown> shown;
    Cache<Probe> cache({}, {&shown, Evidence::query_moments | Evidence::positions | Evidence::keys});
    REQUIRE(cache.init(shape, {.sink_rows = 4, .recent_rows = 3, .ropes = std::span(ropes.all).subspan(round, 2)}).ok());
    std::vector<std::vector<Vector>> queries(2 * 6);
    double longest_query = 0;
    int at = 0, parts = 0;
    for (const int n : {1, 2, 300, 7, 1, 63}) {
      Text text(random, shape, at, n);
      for (std::size_t i = 0; i < text.queries.size(); ++i) {  // of means and spreads of their own
        text.queries[i] =
            3.f * std::sin(static_cast<float>(i % (6 * dim))) + text.queries[i] * (0.1f + static_cast<float>(i % 5));
      }
      longest_query = std::max(longest_query, longest(text.queries, dim));
      for (std::size_t l = 0; l < 2; ++l) {
        append(cache, static_cast<int>(l), text);
        observe(cache, static_cast<int>(l), text);
        for (std::size_t q = 0; q < text.positions.size(); ++q) {
          if (text.positions[q] < 4) continue;
          for (std::size_t h = 0; h < 6; ++h) {
            queries[l * 6 + h].push_back(reference::turned_back(turning(ropes.all[round + l]), &text.queries[(q * 6 + h) * dim],
                                                                dim, text.positions[q]));
          }
        }
      }
      at += n;
      ++parts;
    }
    const auto seen = look(cache, shown);
    REQUIRE(seen.size() == 4);
    for (std::size_t h = 0; h < 12; ++h) {
      const Shown& own = seen[h / 3];
      REQUIRE(own.count == 374 - 4);
      const auto want = reference::moments(queries[h]);
      double spread = 0;
      for (std::size_t d = 0; d < dim; ++d) spread = std::max(spread, std::sqrt(want.covariance[d * dim + d]));
      for (std::size_t i = 0; i < dim; ++i) {
        // A turn is off by 6 eps of an element at most (see above), the mean by a rounding a part.
        const double e = std::fabs(static_cast<double>(own.mean[h % 3 * dim + i]) - want.mean[i]);
        if (!(e <= (6 + parts) * eps * longest_query)) FAIL("mean " << h << " " << i << " off by " << e);
        for (std::size_t j = 0; j < dim; ++j) {
          // A sum of so many products, which are at most those of the spreads together, and products of errors of queries with
          // spreads, on both sides.
          const double si = std::sqrt(want.covariance[i * dim + i]), sj = std::sqrt(want.covariance[j * dim + j]);
          const double most = static_cast<double>(own.count + parts + 4) * eps * si * sj + 2 * 8 * eps * longest_query * spread;
          const double c =
              std::fabs(static_cast<double>(own.covariance[(h % 3 * dim + i) * dim + j]) - want.covariance[i * dim + j]);
          if (!(c <= most)) FAIL("covariance " << h << " " << i << " " << j << " off by " << c << ", not " << most);
        }
      }
    }
  }
}

namespace {

// The attention of rows that a cache gathers from three pieces of text is that of its decoded rows.
// Sums have `terms` products, and logits are off by `rounding` of their size beside that.
template <class Codec>
void check_row_attention(std::uint32_t seed, Index terms, double rounding) {
  std::mt19937 random(seed);
  const Geometry shape{1, 2, 6, dim};
  for (int round = 0; round < 8; ++round) {
    const auto sinks = normals(random, 6, 2);
    AttendOptions attend;
    if (round & 1) attend.window = 23;
    if (round & 2) attend.soft_cap = 4;
    if (round & 4) attend.sink_logits = sinks;
    if (round == 7) attend.scale = 0.3f;
    std::vector<Shown> shown;
    Cache<Probe, Codec> cache({}, {&shown, Evidence::attention | Evidence::positions});
    REQUIRE(cache.init(shape, {.sink_rows = 3, .recent_rows = 9, .block_rows = 16}).ok());
    std::vector<reference::Given> given[2];
    double size = 0;
    int at = 0;
    std::size_t queries = 0;
    for (const int n : {70, 1, 37}) {
      const Text text(random, shape, at, n);
      append(cache, 0, text);
      if (at > 0 || round % 2 == 0) REQUIRE(cache.flush().ok());
      observe(cache, 0, text, attend);
      for (int h = 0; h < 2; ++h) {
        const auto positions = held(cache, 0, h);
        std::vector<float> keys(positions.size() * dim);
        cache.decode(0, h, keys.data(), nullptr);
        Vector sink_logits;
        if (!attend.sink_logits.empty()) sink_logits.assign(sinks.begin() + h * 3, sinks.begin() + (h + 1) * 3);
        reference::give(given[h], keys, positions, text.queries_of(h), text.positions, 3, dim,
                        {static_cast<double>(attend.scale), static_cast<double>(attend.soft_cap), attend.window}, sink_logits);
        const double scale = attend.scale != 0 ? static_cast<double>(attend.scale) : 1 / std::sqrt(double(dim));
        size = std::max(size, scale * longest(keys, dim) * longest(text.queries, dim));
      }
      at += n;
      queries += static_cast<std::size_t>(n);
    }
    const auto seen = look(cache, shown);
    // The sum over queries and the group adds its roundings.
    const double one =
        weight_error(size, terms, 108) + std::expm1(2 * rounding * size) + 8 * eps * static_cast<double>(attend.soft_cap);
    const double all = one + static_cast<double>(3 * queries + 3) * eps;
    for (std::size_t h = 0; h < 2; ++h) {
      REQUIRE(seen[h].attention.size() == given[h].size());
      for (std::size_t r = 0; r < given[h].size(); ++r) {
        const RowAttention& own = seen[h].attention[r];
        REQUIRE(own.queries == given[h][r].queries);
        const double e = std::fabs(static_cast<double>(own.sum) - given[h][r].sum);
        const double f = std::fabs(static_cast<double>(own.largest) - given[h][r].largest);
        if (!(e <= all * given[h][r].sum + 1e-30)) FAIL("round " << round << " row " << r << " off by " << e);
        if (!(f <= one * given[h][r].largest + 1e-30)) FAIL("round " << round << " row " << r << " off by " << f);
      }
    }
  }
}

}  // namespace

TEST_CASE("the attention of rows is that of the plain loops, on rows as they are") { check_row_attention<Exact>(24, dim, 0); }

TEST_CASE("the attention of rows is that of the plain loops, on codes") {
  // Queries are turned into the codes' basis and rows are turned out of it here: sums of 64 each, beside that of the logit. A
  // host rounds elements of a query to 2^-16 of its largest, or to bytes, this way and that: an error of a logit of 0.6 of
  // that, times the largest, which is less than half of the query's length once turned; seven times what is expected then.
  const double unit = std::max(0x1p-16, codecs::host_units<TurboQuant<4, dim>>().query / 2);
  check_row_attention<Coded>(25, 3 * dim, 2 * unit);
}

TEST_CASE("evidence stays with its rows through cuts, truncation and copies") {
  std::mt19937 random(26);
  const Geometry shape{2, 2, 4, dim};
  const Rope rope{.rotary_dim = dim};
  std::vector<Shown> shown;
  Cache<Probe> cache({}, {&shown});
  REQUIRE(cache.init(shape, {.sink_rows = 2, .recent_rows = 5, .block_rows = 8, .ropes = {&rope, 1}}).ok());
  add(cache, Text(random, shape, 0, 50));
  add(cache, Text(random, shape, 50, 1));
  const auto before = look(cache, shown);
  CHECK(before[3].window_positions == std::vector<int>{46, 47, 48, 49, 50});
  CHECK(before[3].count == 49);

  const auto follows = [](const Shown& now, const Shown& then) {
    for (std::size_t r = 0; r < now.positions.size(); ++r) {
      const auto at = std::find(then.positions.begin(), then.positions.end(), now.positions[r]) - then.positions.begin();
      const RowAttention& a = now.attention[r];
      const RowAttention none,
          &b = at < static_cast<std::ptrdiff_t>(then.positions.size()) ? then.attention[static_cast<std::size_t>(at)] : none;
      if (a.sum != b.sum || a.largest != b.largest || a.queries != b.queries) return false;
    }
    return true;
  };

  // Truncated: rows and the queries of the window go, what was given to others stays; moments stay too.
  Cache<Probe> shorter;
  REQUIRE(cache.fork(shorter).ok());
  REQUIRE(shorter.truncate(48).ok());
  auto now = look(shorter, shown);
  for (std::size_t h = 0; h < 4; ++h) {
    CHECK(now[h].positions.size() == 48);
    CHECK(follows(now[h], before[h]));
    CHECK(now[h].window_positions == std::vector<int>{46, 47});
    CHECK(std::equal(now[h].window_queries.begin(), now[h].window_queries.end(), before[h].window_queries.begin()));
    CHECK(now[h].count == 49);
  }
  // New rows at the old places have nothing yet.
  const Text anew(random, shape, 48, 3);
  for (int l = 0; l < 2; ++l) append(shorter, l, anew);
  now = look(shorter, shown);
  for (std::size_t h = 0; h < 4; ++h) {
    CHECK(std::equal(now[h].attention.begin(), now[h].attention.begin() + 48, before[h].attention.begin(),
                     [](const RowAttention& a, const RowAttention& b) { return a.sum == b.sum; }));
    for (std::size_t r = 48; r < 51; ++r) CHECK(now[h].attention[r].queries == 0);
  }

  // Cut: what rows were given stays with them, queries and moments are used up.
  Cache<Probe> copy;
  REQUIRE(cache.fork(copy).ok());
  for (auto* each : {&cache, &copy}) REQUIRE(each->compress(Retain::rows(23)).ok());
  CHECK(held(copy) == held(cache));
  for (int step = 0; step < 3; ++step) {
    const auto a = look(cache, shown), b = look(copy, shown);
    for (std::size_t h = 0; h < 4; ++h) {
      CHECK(a[h].positions == b[h].positions);
      CHECK(same(a[h].attention, b[h].attention));
      CHECK(a[h].window_queries == b[h].window_queries);
      CHECK(a[h].mean == b[h].mean);
      CHECK(a[h].covariance == b[h].covariance);
      CHECK(a[h].chosen_before == b[h].chosen_before);
      if (step == 0) {
        CHECK(a[h].positions.size() == 23);
        CHECK(follows(a[h], before[h]));
        CHECK(a[h].window_positions.empty());
        CHECK(a[h].count == 0);
      } else {
        CHECK(a[h].window_positions.size() == 5);
        CHECK(a[h].count == step * 6);
        CHECK(a[h].attention.back().queries == 1);
      }
    }
    const Text next(random, shape, 51 + step * 6, 6);
    add(cache, next);
    add(copy, next);
  }

  // Encoded rows, and rows of blocks of codes, stay in step.
  REQUIRE(cache.flush().ok());
  REQUIRE(same(look(cache, shown)[2].attention, look(copy, shown)[2].attention));
  cache.forget();
  now = look(cache, shown);
  CHECK(now[0].window_positions.empty());
  CHECK(now[0].count == 0);
  for (const RowAttention& row : now[0].attention) CHECK((row.sum == 0.f && row.largest == 0.f && row.queries == 0));
}

TEST_CASE("evidence is counted, collected only where a policy asks for it, and given back") {
  std::mt19937 random(27);
  const Geometry shape{2, 2, 4, dim};
  const Rope rope{.rotary_dim = dim};
  constexpr long long width = 4 * dim * sizeof(float);
  const auto bytes_of = [](EvidenceSet wanted, int rows, int queries) {
    long long bytes = 0;
    if (wanted.has(Evidence::window_queries)) bytes += std::min(queries, 5) * (width + 4);
    if (wanted.has(Evidence::query_moments)) bytes += 4 * (dim + dim * (dim + 1) / 2) * 4ll;
    if (wanted.has(Evidence::attention)) {
      bytes += 2 * static_cast<long long>(rows * sizeof(RowAttention) + sizeof(Buffer<RowAttention>));
    }
    return 2 * bytes;  // layers
  };
  for (const EvidenceSet wanted :
       {EvidenceSet(Evidence::positions), EvidenceSet(Evidence::window_queries), EvidenceSet(Evidence::query_moments),
        EvidenceSet(Evidence::attention), EvidenceSet(query_evidence)}) {
    reference::Counting memory;
    {
      std::vector<Shown> shown;
      Cache<Probe, Coded> cache({}, {&shown, wanted | Evidence::positions}), copy;
      REQUIRE(
          cache.init(shape, {.sink_rows = 2, .recent_rows = 5, .block_rows = 8, .memory = &memory, .ropes = {&rope, 1}}).ok());
      CHECK(cache.wants_queries() == !(wanted == EvidenceSet(Evidence::positions)));
      CHECK(cache.memory().evidence_bytes == 0);
      const auto balanced = [&] {
        const Memory now = cache.memory();
        REQUIRE(now.total() + copy.memory().total() == memory.outstanding);
        REQUIRE(now.slack_bytes >= 0);
        return now.evidence_bytes;
      };
      add(cache, Text(random, shape, 0, 3));
      CHECK(balanced() == bytes_of(wanted, 3, 3));
      add(cache, Text(random, shape, 3, 40));
      CHECK(balanced() == bytes_of(wanted, 43, 43));
      REQUIRE(cache.fork(copy).ok());
      CHECK(balanced() == copy.memory().evidence_bytes);
      REQUIRE(cache.truncate(41).ok());
      CHECK(balanced() == bytes_of(wanted, 41, 3));
      REQUIRE(cache.compress(Retain::rows(20)).ok());
      CHECK(balanced() == bytes_of(wanted.has(Evidence::attention) ? Evidence::attention : Evidence::positions, 20, 0));
      add(cache, Text(random, shape, 60, 1));
      CHECK(balanced() == bytes_of(wanted, 21, 1));
      cache.forget();
      CHECK(balanced() <= (wanted.has(Evidence::attention) ? bytes_of(Evidence::attention, 0, 0) : 0));
      cache.clear();
      CHECK(balanced() == 0);
      copy.clear();
    }
    CHECK(memory.outstanding == 0);
  }
}

TEST_CASE("a budget in bytes counts the attention that stays with rows") {
  std::mt19937 random(28);
  const Geometry shape{2, 2, 4, dim};
  for (const double ratio : {0.35, 0.5, 0.9}) {
    Cache<HeavyHitter, Coded> cache;
    REQUIRE(cache.init(shape, {.sink_rows = 2, .recent_rows = 5, .block_rows = 8}).ok());
    add(cache, Text(random, shape, 0, 300));
    REQUIRE(cache.flush().ok());
    const auto budget = static_cast<long long>(ratio * static_cast<double>(cache.memory().total()));
    REQUIRE(cache.compress(Retain::bytes(budget)).ok());
    CHECK(cache.memory().total() <= budget);
    CHECK(cache.memory().total() > budget * 8 / 10);
  }
}

namespace {

// Tells what an allocator is told.
struct Told {
  static constexpr EvidenceSet needs = Evidence::layer_similarity;
  std::vector<float>* similarity = nullptr;
  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept {
    similarity->assign(want.similarity.begin(), want.similarity.end());
    return Uniform{}.allocate(want, keep);
  }
};

}  // namespace

TEST_CASE("layers are compared by the mean cosine of all hidden states since the last cut") {
  std::mt19937 random(29);
  const Geometry shape{3, 1, 2, dim};
  std::vector<float> told;
  Cache<KeyDiff, Exact, Told> cache({&told});
  REQUIRE(cache.init(shape, {.sink_rows = 2, .recent_rows = 5}).ok());
  add(cache, Text(random, shape, 0, 30));
  CHECK(cache.compress(Retain::rows(20)).code == Errc::no_evidence);
  for (int cut = 0; cut < 2; ++cut) {
    constexpr int width = 50;
    double sums[3] = {};
    int rows = 0;
    for (const int n : {1, 17, 0, 4}) {
      for (int l = 0; l < 3; ++l) {
        auto before = normals(random, static_cast<std::size_t>(n * width)), after = normals(random, before.size());
        for (std::size_t i = 0; i < before.size(); ++i) after[i] = before[i] + static_cast<float>(l) * after[i];
        for (int i = 0; i < n; ++i) {
          if (i == 3) std::fill_n(&after[static_cast<std::size_t>(i * width)], width, 0.f);  // no direction: counts as zero
          double xy = 0;
          for (int d = 0; d < width; ++d) {
            const auto k = static_cast<std::size_t>(i * width + d);
            xy += static_cast<double>(before[k]) * static_cast<double>(after[k]);
          }
          const auto k = static_cast<std::size_t>(i * width);
          const double size = reference::norm(&before[k], width) * reference::norm(&after[k], width);
          sums[l] += size > 0 ? xy / size : 0;
        }
        REQUIRE(cache.observe_hidden(l, before.data(), after.data(), n, width).ok());
      }
      rows += n;
    }
    const std::vector<float> bad(50, std::nanf(""));
    CHECK(cache.observe_hidden(1, bad.data(), bad.data(), 1, width).code == Errc::bad_value);
    CHECK(cache.observe_hidden(1, nullptr, bad.data(), 1, width).code == Errc::bad_shape);
    CHECK(cache.observe_hidden(1, bad.data(), bad.data(), 1, 0).code == Errc::bad_shape);
    Cache<KeyDiff, Exact, Told> copy;
    REQUIRE(cache.fork(copy).ok());
    for (auto* each : {&copy, &cache}) {
      told.clear();
      REQUIRE(each->compress(Retain::rows(20 - cut)).ok());
      REQUIRE(told.size() == 3);
      for (std::size_t l = 0; l < 3; ++l) {
        if (!(std::fabs(static_cast<double>(told[l]) - sums[l] / rows) <= 2 * eps)) FAIL("layer " << l);  // rounded once
      }
    }
    CHECK(cache.compress(Retain::rows(10)).code == Errc::no_evidence);  // used up
  }
}

TEST_CASE("a cache without policies that ask keeps nothing of hidden states") {
  std::mt19937 random(30);
  const Geometry shape{1, 1, 1, dim};
  Cache<KeyDiff> cache;
  REQUIRE(cache.init(shape).ok());
  const auto before = cache.memory().total();
  const auto hidden = normals(random, 100);
  REQUIRE(cache.observe_hidden(0, hidden.data(), hidden.data(), 2, 50).ok());
  REQUIRE(cache.observe(0, hidden.data(), std::vector<int>{0}).ok());
  CHECK(cache.memory().total() == before);
}

// ---- bad input ----

TEST_CASE("no selector makes a number that is not finite of what a cache takes") {
  struct Case {
    const char* name;
    int rows;
    void (*change)(Head&, std::mt19937&);
  };
  const auto fill = [](std::vector<float>& x, std::mt19937& random, float size) {
    for (float& v : x) v = random() % 2 == 0 ? size : -size;
  };
  static const auto huge = fill;
  const Case cases[] = {
      {"keys of 1e18", 40, [](Head& h, std::mt19937& r) { huge(h.keys, r, 1e18f); }},
      {"keys of 1e18 of one sign", 40, [](Head& h, std::mt19937&) { std::fill(h.keys.begin(), h.keys.end(), 1e18f); }},
      {"values of 1e18 against one another, where some rows got nothing", 40,
       [](Head& h, std::mt19937&) {
         for (std::size_t r = 0; r < 40; ++r) std::fill_n(&h.values[r * h.dim], h.dim, r % 2 == 0 ? 1e18f : -1e18f);
         for (std::size_t r = 1; r < 40; r += 2) h.attention[r] = {};
         for (float& x : h.queries) x *= 1000.f;
       }},
      {"values of 1e18", 40, [](Head& h, std::mt19937& r) { huge(h.values, r, 1e18f); }},
      {"values of 1e18 through a large projection", 40,
       [](Head& h, std::mt19937& r) { huge(h.values, r, 1e18f), huge(h.output, r, 100.f); }},
      {"one key of 1e18 among zeros", 40,
       [](Head& h, std::mt19937&) { std::fill(h.keys.begin(), h.keys.end(), 0.f), h.keys[20 * h.dim + 3] = 1e18f; }},
      {"all of it as large as can be", 40,
       [](Head& h, std::mt19937& r) {
         huge(h.keys, r, 1e18f), huge(h.values, r, 1e18f), huge(h.queries, r, 1e16f), huge(h.mean, r, 1e16f);
         huge(h.covariance, r, 1e32f), huge(h.output, r, 1.f);
       }},
      {"the smallest there are", 40,
       [](Head& h, std::mt19937& r) {
         huge(h.keys, r, 1e-45f), huge(h.values, r, 1e-45f), huge(h.queries, r, 1e-45f), huge(h.mean, r, 1e-45f);
         huge(h.covariance, r, 1e-45f), huge(h.output, r, 1e-45f);
       }},
      {"zeros", 40,
       [](Head& h, std::mt19937&) {
         for (auto* x : {&h.keys, &h.values, &h.queries, &h.mean, &h.covariance, &h.output})
           std::fill(x->begin(), x->end(), 0.f);
       }},
      {"one row", 1, [](Head&, std::mt19937&) {}},
      {"no row", 0, [](Head&, std::mt19937&) {}},
      {"equal rows", 40,
       [](Head& h, std::mt19937&) {
         for (std::size_t i = h.dim; i < h.keys.size(); ++i) h.keys[i] = h.keys[i % h.dim], h.values[i] = h.values[i % h.dim];
       }},
      {"no rows before the window", 5,
       [](Head& h, std::mt19937&) { h.window_positions.assign(8, 0), h.window_positions[7] = 1000; }},
      {"no rows that the window sees", 5,
       [](Head& h, std::mt19937&) {
         std::iota(h.window_positions.begin(), h.window_positions.end(), 5000), h.attend.sliding = 3;
       }},
  };
  for (std::size_t k = 0; k < 2 * std::size(cases); ++k) {
    const Case& c = cases[k / 2];
    std::mt19937 random(31);
    Head changed(random, k % 2 == 0 ? 64 : 256, 2, c.rows, 8);
    c.change(changed, random);
    for (const std::string& name : all_names) {
      Head head = changed;
      INFO(name << " with " << std::string(c.name) << " of dim " << head.dim);
      const AnySelector selector = named(name);
      Status status = head.by(selector);
      if (status.ok()) {
        const std::span<const int> positions(head.positions);
        const std::span<float> scores(head.score);
        status = selector.join({{&positions, 1}, {&scores, 1}});
      }
      // Keys of 1e18 leave no room for their products with each other, which Leverage says.
      if (!status.ok() && name.starts_with("leverage")) {
        CHECK(status.code == Errc::bad_value);
        CHECK(status.message().find("too large") != std::string::npos);
        continue;
      }
      CHECK_MESSAGE(status.ok(), status.message());
      int bad = 0;
      for (const float x : head.score) bad += std::isfinite(x) ? 0 : 1;
      CHECK(bad == 0);
    }
  }
}

TEST_CASE("huge rows score as the plain loops have it") {
  std::mt19937 random(32);
  // Through a projection that would make squares leave fp32.
  Head head(random, 64, 2, 30, 1);
  for (std::size_t i = 0; i < 15 * 64; ++i) head.values[i] *= 1e17f;
  for (float& w : head.output) w *= 100.f;
  const std::vector<float> base(30, 1.f);
  REQUIRE(head.by(ValueNorm<Plain, Through::output>{{&base}}).ok());
  const auto projected = reference::projected(head.values, 64, head.weights(), Head::width, head.stride(), 2);
  compare(head.score, projected.root,
          [&](std::size_t r) { return (20 + 2 * 64 + 4) * eps * projected.square_terms[r] + 8 * eps * projected.root[r]; });
  // One key far above all has all the weight, where its form is large.
  for (int d = 0; d < 64; ++d) head.keys[10 * 64 + static_cast<std::size_t>(d)] = (d % 3 == 0 ? 1e18f : -1e18f);
  REQUIRE(head.by(ExpectedAttention{.num_sinks = 0, .value_norm = false}).ok());
  CHECK(head.score[10] == 1.f);
}

TEST_CASE("fields out of range are named") {
  std::mt19937 random(33);
  Head head(random, 64, 2, 30, 4);
  const Geometry shape{1, 1, 2, dim};
  const Rope rope{.rotary_dim = dim};
  const OutputProjection projection{head.output.data(), 4};
  const CacheOptions options{.ropes = {&rope, 1}, .output_projections = {&projection, 1}};
  const auto refused = [&](const auto& selector, const char* part) {
    using Selector = std::decay_t<decltype(selector)>;
    Cache<Selector> cache({}, selector);
    const Status said = cache.init(shape, options);
    for (const Status& status : {check_policy(selector, Geometry{1, 1, 1, 64}), said}) {
      INFO(status.message());
      CHECK(status.code == Errc::bad_value);
      CHECK(status.message().find(part) != std::string::npos);
    }
    if constexpr (requires { Selector::needs; }) {
      Status status = head.by(selector);
      if constexpr (JoinsHeads<Selector>) status = selector.join({});
      CHECK(status.code == Errc::bad_value);
    }
  };
  const float nan = std::nanf("");
  refused(ExpectedAttention{.future = 0}, "future is 0");
  refused(ExpectedAttention{.num_sinks = -1}, "num_sinks is -1");
  refused(ExpectedAttention{.epsilon = -1.f}, "epsilon is -1");
  refused(ExpectedAttention{.epsilon = nan}, "epsilon is nan");
  refused(LagKv{.lag = 1}, "lag is 1");
  refused(LagKv{.num_sinks = -2}, "num_sinks is -2");
  refused(Leverage{.sketch = 0}, "sketch is 0");
  refused(Leverage{.sketch = 257}, "sketch is 257");
  refused(LavaScore{.window = 0}, "window is 0");
  refused(LavaScore{.kernel = 4}, "kernel is 4");
  refused(ValueNorm<KeyNorm>{.epsilon = 1e7f}, "epsilon is 10000000");
  refused(ValueNorm<SnapKv>{.base = {.kernel = 2}}, "kernel is 2");
  refused(CriticalKv<KeyNorm>{.epsilon = -0.5f}, "epsilon is -0.5");
  refused(CriticalKv<KeyNorm>{.first_stage = 1.5}, "first_stage is 1.5");
  refused(CriticalKv<KeyNorm>{.first_stage = std::nan("")}, "first_stage is nan");
  refused(Caote<SnapKv>{.base = {.window = 0}}, "window is 0");
  refused(ChunkKv<KeyNorm>{.length = 0}, "length is 0");
  Cache<AnySelector> none;
  CHECK(none.init(shape, options).message() == "no token selector was chosen");
}

TEST_CASE("a cache that is not told what its selector needs says so") {
  std::mt19937 random(34);
  const Geometry shape{2, 2, 4, dim};
  const Rope ropes[3] = {{.rotary_dim = dim}, {.rotary_dim = dim}, {.rotary_dim = dim}};
  const auto weights = normals(random, 4 * 4 * dim);
  const OutputProjection outputs[3] = {{weights.data(), 4}, {weights.data(), 4}, {weights.data(), 4}};
  const auto code = [&](const char* name, std::size_t num_ropes, std::size_t num_outputs) {
    Cache<> cache({}, named(name));
    const CacheOptions options{.ropes = {ropes, num_ropes}, .output_projections = {outputs, num_outputs}};
    return cache.init(shape, options).code;
  };
  for (const char* name : {"leverage", "expected_attention", "chunk_kv(leverage)", "value_norm(expected_attention)"}) {
    CHECK(code(name, 0, 2) == Errc::no_evidence);
    CHECK(code(name, 1, 0) == Errc::ok);
    CHECK(code(name, 2, 0) == Errc::ok);
    CHECK(code(name, 3, 0) == Errc::bad_shape);
  }
  for (const char* name : {"value_norm:through=output(key_norm)", "critical_kv(key_norm)", "chunk_kv(critical_kv(key_norm))"}) {
    CHECK(code(name, 2, 0) == Errc::no_evidence);
    CHECK(code(name, 0, 1) == Errc::bad_shape);
    CHECK(code(name, 0, 3) == Errc::bad_shape);
    CHECK(code(name, 0, 2) == Errc::ok);
  }
  CHECK(code("key_norm", 0, 0) == Errc::ok);
  {
    Cache<KeyNorm> cache;
    const OutputProjection empty[2] = {{weights.data(), 0}, {weights.data(), 4}}, null[2] = {{nullptr, 4}, {weights.data(), 4}};
    const Rope odd{.rotary_dim = 7};
    CHECK(cache.init(shape, {.output_projections = empty}).code == Errc::bad_shape);
    CHECK(cache.init(shape, {.output_projections = null}).code == Errc::bad_shape);
    CHECK(cache.init(shape, {.ropes = {&odd, 1}}).code == Errc::bad_shape);
  }
  // Rows without a query: those that go by queries say so, and the cache is as it was; the others need none.
  int without = 0;
  for (const std::string& name : all_names) {
    INFO(name);
    Cache<> cache({}, named(name));
    REQUIRE(
        cache.init(shape, {.sink_rows = 2, .recent_rows = 3, .ropes = {ropes, 1}, .output_projections = {outputs, 2}}).ok());
    const Text text(random, shape, 0, 40);
    for (int l = 0; l < 2; ++l) append(cache, l, text);
    const Status status = cache.compress(Retain::rows(20));
    if (cache.wants_queries()) {
      ++without;
      CHECK(status.code == Errc::no_evidence);
      CHECK(status.message().find("observe()") != std::string::npos);
      CHECK(cache.num_rows(0, 0) == 40);
      for (int l = 0; l < 2; ++l) observe(cache, l, text);
      const Status then = cache.compress(Retain::rows(20));
      CHECK_MESSAGE(then.ok(), then.message());
    } else {
      CHECK_MESSAGE(status.ok(), status.message());
    }
    CHECK(cache.num_rows(0, 0) == 20);
  }
  CHECK(without >= 18);
}

namespace {

// All of the layer goes to one head, then the other has none.
struct Greedy {
  static constexpr EvidenceSet needs = {};
  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept {
    std::int64_t left = want.total;
    for (std::size_t h = 0; h < keep.size(); ++h) {
      keep[h] = static_cast<int>(std::min<std::int64_t>(want.seen[h], left));
      left -= keep[h];
    }
    return success();
  }
};

}  // namespace

TEST_CASE("a head that has lost all its rows is no trouble for any selector") {
  std::mt19937 random(35);
  const Geometry shape{1, 2, 4, dim};
  const Rope rope{.rotary_dim = dim};
  const auto weights = normals(random, 4 * 4 * dim);
  const OutputProjection output{weights.data(), 4};
  for (const std::string& name : all_names) {
    INFO(name);
    Cache<AnySelector, Exact, Greedy> cache({}, named(name));
    REQUIRE(
        cache.init(shape, {.sink_rows = 0, .recent_rows = 0, .ropes = {&rope, 1}, .output_projections = {&output, 1}}).ok());
    const Text text(random, shape, 0, 30);
    add(cache, text);
    Status status = cache.compress(Retain::ratio(0.5));
    REQUIRE_MESSAGE(status.ok(), status.message());
    REQUIRE(cache.num_rows(0, 1) == 0);
    const auto queries = normals(random, 4 * dim);
    REQUIRE(cache.observe(0, queries.data(), std::vector<int>{30}).ok());
    status = cache.compress(Retain::ratio(0.5));
    CHECK_MESSAGE(status.ok(), status.message());
    CHECK(cache.num_rows(0, 0) == 15);
  }
}
