// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Selectors, allocators and the cut against plain loops.
#include <doctest/doctest.h>

#include <numeric>
#include <random>

#include "kvtailor/kvtailor.hpp"
#include "reference/policies.hpp"

using namespace kvt;

namespace {

std::vector<float> normals(std::mt19937& random, std::size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(random);
  return x;
}

std::vector<int> increasing(std::mt19937& random, int n) {
  std::vector<int> x;
  for (int i = 0, at = 0; i < n; ++i, at += 1 + static_cast<int>(random() % 3)) x.push_back(at);
  return x;
}

// What the cache hands to a selector.
struct Head {
  std::vector<float> scratch, score;
  HeadEvidence seen;

  Head(std::span<const float> keys, std::span<const int> positions, int dim)
      : scratch(4 * (positions.size() + static_cast<std::size_t>(dim))), score(positions.size()) {
    seen.head_dim = dim;
    seen.group_size = 1;
    seen.keys = keys;
    seen.positions = positions;
    seen.scratch = scratch;
  }
};

// Largest difference; NaN if one of the two is.
double difference(const std::vector<float>& score, const std::vector<double>& want) {
  double worst = 0;
  for (std::size_t r = 0; r < score.size(); ++r) {
    const double e = std::fabs(static_cast<double>(score[r]) - want[r]);
    worst = e <= worst ? worst : e;
  }
  return worst;
}

struct Request {
  std::vector<int> seen, floor;
  std::vector<float> scores;
  BudgetRequest want;

  Request(std::mt19937& random, int layers, int heads, int most_rows) {
    for (int h = 0; h < layers * heads; ++h) {
      const int n = static_cast<int>(random() % static_cast<unsigned>(most_rows + 1));
      const int protected_rows = std::min(n, static_cast<int>(random() % 4));
      seen.push_back(n);
      floor.push_back(protected_rows);
      const auto own = normals(random, static_cast<std::size_t>(n));
      for (int r = 0; r < n; ++r) {
        scores.push_back(r >= n - protected_rows ? std::numeric_limits<float>::infinity() : own[static_cast<std::size_t>(r)]);
      }
    }
    const int least = std::accumulate(floor.begin(), floor.end(), 0), most = std::accumulate(seen.begin(), seen.end(), 0);
    want = {least + static_cast<int>(random() % static_cast<unsigned>(most - least + 1)), layers, heads, seen, floor, scores};
  }
};

template <class Budget>
void check_bounds(const Budget& budget) {
  std::mt19937 random(11);
  for (int round = 0; round < 2000; ++round) {
    const Request r(random, 1 + round % 4, 1 + round % 5, 1 + round % 60);
    std::vector<int> keep(r.seen.size(), -1);
    REQUIRE(budget.allocate(r.want, keep).ok());
    REQUIRE(std::accumulate(keep.begin(), keep.end(), 0) == r.want.total);
    for (std::size_t h = 0; h < keep.size(); ++h) {
      REQUIRE(keep[h] >= r.floor[h]);
      REQUIRE(keep[h] <= r.seen[h]);
    }
  }
}

}  // namespace

TEST_CASE("KeyDiff scores are those of the plain loops") {
  std::mt19937 random(1);
  for (const int dim : {40, 64, 128}) {
    for (const int n : {1, 2, 17, 300}) {
      auto keys = normals(random, static_cast<std::size_t>(n * dim));
      for (int i = 0; i < dim && n > 2; ++i) keys[static_cast<std::size_t>(dim + i)] = 0;  // a row without a direction
      const auto positions = increasing(random, n);
      Head head(keys, positions, dim);
      REQUIRE(KeyDiff{}.score(head.seen, head.score).ok());
      // n sums in fp32 of elements below one, divided by a mean of length about sqrt(n): a few 2^-24 * sqrt(n).
      CHECK(difference(head.score, reference::key_diff(keys, dim)) <= 4e-6);
    }
  }
}

TEST_CASE("KeyDiff scores do not depend on the length of keys, from 1e-18 to 1e18") {
  std::mt19937 random(2);
  auto keys = normals(random, 20 * 64);
  const auto want = reference::key_diff(keys, 64);
  const auto positions = increasing(random, 20);
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] *= i / 64 % 2 == 0 ? 1e-18f : 1e18f;
  Head head(keys, positions, 64);
  REQUIRE(KeyDiff{}.score(head.seen, head.score).ok());
  CHECK(difference(head.score, want) <= 4e-6);
}

TEST_CASE("SnapKv scores are those of the plain loops, and rows of the window are above all") {
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    reference::SnapKvInput in;
    in.dim = round % 2 == 0 ? 40 : 64;
    in.group = 1 + round % 5;
    in.kernel = 1 + 2 * (round % 4);
    in.maximum = round % 3 == 0;
    in.sliding = round % 4 == 3 ? 25 : 0;
    in.soft_cap = round % 5 == 4 ? 2 : 0;
    in.scale = round % 7 == 6 ? 0.3 : 0;
    const int n = 1 + static_cast<int>(random() % 200), queries = 1 + static_cast<int>(random() % 12);
    in.keys = normals(random, static_cast<std::size_t>(n * in.dim));
    in.queries = normals(random, static_cast<std::size_t>(queries * in.group * in.dim));
    in.positions = increasing(random, n);
    for (int w = 0; w < queries; ++w) in.window_positions.push_back(std::max(0, in.positions.back() - queries) + w);

    // More queries than the window takes lie before them, and heads of other groups beside them.
    const SnapKv selector{
        .window = queries, .kernel = in.kernel, .pool = in.maximum ? SnapKv::Pool::maximum : SnapKv::Pool::average};
    const int stride = (in.group + 2) * in.dim;
    auto stored = normals(random, static_cast<std::size_t>((queries + 1) * stride));
    std::vector<int> stored_positions{in.window_positions.front() - 1};
    for (int w = 0; w < queries; ++w) {
      const auto from = in.queries.begin() + w * in.group * in.dim;
      std::copy(from, from + in.group * in.dim, stored.begin() + (w + 1) * stride);
      stored_positions.push_back(in.window_positions[static_cast<std::size_t>(w)]);
    }
    Head head(in.keys, in.positions, in.dim);
    head.seen.group_size = in.group;
    head.seen.window_queries = stored.data();
    head.seen.window_stride = stride;
    head.seen.window_positions = stored_positions;
    head.seen.attend = {
        .scale = static_cast<float>(in.scale), .window = in.sliding, .soft_cap = static_cast<float>(in.soft_cap)};
    REQUIRE(selector.score(head.seen, head.score).ok());
    const auto want = reference::snap_kv(in);
    float above = std::numeric_limits<float>::infinity(), below = 0;
    for (std::size_t r = 0; r < want.size(); ++r) {
      if (std::isinf(want[r])) {
        above = std::min(above, head.score[r]);
        continue;
      }
      below = std::max(below, head.score[r]);
      // Shares of at most one; logits of size 8 are off by dim * 2^-24 at most, and shares by that factor.
      const double e = std::fabs(static_cast<double>(head.score[r]) - want[r]);
      if (!(e <= 2e-6 + 1e-5 * want[r])) FAIL("row " << r << " scores " << head.score[r] << ", not " << want[r]);
    }
    CHECK(above > below);
  }
}

TEST_CASE("SnapKv refuses a kernel or a window it cannot use, and names it") {
  const std::vector<float> keys(3 * 40, 1.f), queries(2 * 40, 1.f);
  const int positions[3] = {0, 1, 2};
  const int window_positions[2] = {1, 2};
  Head head(keys, positions, 40);
  const auto refused = [&](const SnapKv& selector, const char* part) {
    const Status status = selector.score(head.seen, head.score);
    INFO(status.message());
    CHECK(status.code == Errc::bad_value);
    CHECK(status.message().find(part) != std::string::npos);
  };
  CHECK(SnapKv{}.score(head.seen, head.score).code == Errc::no_evidence);
  head.seen.window_queries = queries.data();
  head.seen.window_stride = 40;
  head.seen.window_positions = {window_positions, 1};
  CHECK(SnapKv{}.score(head.seen, head.score).ok());
  refused({.kernel = 0}, "0");
  refused({.kernel = 4}, "4");
  refused({.kernel = -3}, "-3");
  refused({.window = 0}, "window is 0");
  refused({.window = -1}, "window is -1");
}

TEST_CASE("SinkRecent puts the first places above all and newer above older") {
  const std::vector<float> keys;
  const int positions[6] = {1, 3, 4, 9, 10, 50};
  Head head(keys, positions, 40);
  REQUIRE(SinkRecent{.num_sinks = 4}.score(head.seen, head.score).ok());
  for (const int sink : {0, 1}) {
    for (std::size_t r = 2; r < 6; ++r) CHECK(head.score[static_cast<std::size_t>(sink)] > head.score[r]);
  }
  for (std::size_t r = 3; r < 6; ++r) CHECK(head.score[r] > head.score[r - 1]);
  CHECK(SinkRecent{.num_sinks = -1}.score(head.seen, head.score).message() == "num_sinks is -1; it must be zero or more");
}

TEST_CASE("the cut keeps the highest scores, and of equal ones the earlier") {
  std::mt19937 random(4);
  for (int round = 0; round < 3000; ++round) {
    std::vector<float> score(random() % 40);
    for (float& s : score) {
      s = static_cast<float>(random() % 4);
      if (s == 3) s = std::numeric_limits<float>::infinity();
    }
    const int keep = static_cast<int>(random() % (score.size() + 1));
    std::vector<unsigned char> mark(score.size(), 7);
    cut(score, keep, mark);
    REQUIRE(mark == reference::cut(score, keep));
  }
}

TEST_CASE("allocators meet the total and every bound") {
  check_bounds(Uniform{});
  for (const double safeguard : {0.0, 0.2, 0.5, 1.0}) check_bounds(Adaptive{.safeguard = safeguard});
}

TEST_CASE("Uniform gives every head the same and a remainder to the first heads") {
  const std::vector<int> seen(6, 100), floor(6, 3);
  for (int total = 18; total <= 600; ++total) {
    std::vector<int> keep(6);
    REQUIRE(Uniform{}.allocate({total, 2, 3, seen, floor, {}}, keep).ok());
    for (int h = 0; h < 6; ++h) REQUIRE(keep[static_cast<std::size_t>(h)] == total / 6 + (h < total % 6 ? 1 : 0));
  }
}

TEST_CASE("Uniform hands on what a short head cannot take and what a floor takes away") {
  const std::vector<int> seen{5, 100, 100, 100}, floor{0, 0, 50, 0};
  std::vector<int> keep(4);
  REQUIRE(Uniform{}.allocate({95, 1, 4, seen, floor, {}}, keep).ok());
  CHECK(keep == std::vector<int>{5, 20, 50, 20});
}

TEST_CASE("Adaptive is the best way to share a layer out, of all there are") {
  std::mt19937 random(5);
  int tried = 0;
  for (int round = 0; round < 1500; ++round) {
    const int heads = 1 + round % 3;
    const Request r(random, 1, heads, 12);
    const Adaptive budget{.safeguard = static_cast<double>(round % 5) / 4};
    std::vector<int> least;
    std::vector<std::vector<double>> descending;
    std::size_t at = 0;
    for (std::size_t h = 0; h < r.seen.size(); ++h) {
      const double even = static_cast<double>(r.want.total) / heads;
      least.push_back(std::min(r.seen[h], std::max(r.floor[h], static_cast<int>(budget.safeguard * even))));
      std::vector<double> own;
      for (int i = 0; i < r.seen[h]; ++i, ++at) own.push_back(std::min(1e3, static_cast<double>(r.scores[at])));
      std::sort(own.rbegin(), own.rend());
      descending.push_back(own);
    }
    if (std::accumulate(least.begin(), least.end(), 0) > r.want.total) continue;  // floors break the safeguard
    ++tried;
    std::vector<int> keep(r.seen.size());
    REQUIRE(budget.allocate(r.want, keep).ok());
    REQUIRE(keep == reference::adaptive(static_cast<int>(r.want.total), least, descending));
  }
  CHECK(tried > 1000);
}

TEST_CASE("Adaptive shares the total between layers in proportion to their rows") {
  std::mt19937 random(6);
  const std::vector<int> seen{30, 30, 10, 10, 20, 20}, floor(6, 2);
  const auto scores = normals(random, 120);
  std::vector<int> keep(6);
  REQUIRE(Adaptive{}.allocate({60, 3, 2, seen, floor, scores}, keep).ok());
  CHECK(keep[0] + keep[1] == 30);
  CHECK(keep[2] + keep[3] == 10);
  CHECK(keep[4] + keep[5] == 20);
  CHECK(Adaptive{.safeguard = 1.5}.allocate({60, 3, 2, seen, floor, scores}, keep).message() ==
        "safeguard is 1.5; it must be between 0 and 1");
  CHECK(Adaptive{.safeguard = std::nan("")}.allocate({60, 3, 2, seen, floor, scores}, keep).code == Errc::bad_value);
}

TEST_CASE("equal scores are shared out the same way every time, earlier rows and heads first") {
  const std::vector<int> seen{4, 4}, floor{0, 0};
  const std::vector<float> scores(8, 1.f);
  std::vector<int> keep(2);
  for (const auto& [total, first, second] : {std::tuple{1, 1, 0}, {2, 1, 1}, {3, 2, 1}, {7, 4, 3}, {8, 4, 4}}) {
    REQUIRE(Adaptive{.safeguard = 0}.allocate({total, 1, 2, seen, floor, scores}, keep).ok());
    CHECK(keep == std::vector<int>{first, second});
  }
}
