// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Budgets by marginal utility against all there are, on small instances.
#include <doctest/doctest.h>

#include <chrono>
#include <cmath>
#include <ctime>
#include <functional>
#include <random>

#include "kvtailor/budget/curve.hpp"
#include "kvtailor/learn/marginal_utility.hpp"
#include "kvtailor/store/cut.hpp"

using namespace kvt;

namespace {

using Losses = std::vector<Option>;

std::vector<float> uniforms(std::mt19937& random, std::size_t n, bool coarse) {
  std::vector<float> x(n);
  for (float& v : x) v = coarse ? float(random() % 4) : std::uniform_real_distribution<float>()(random);
  return x;
}

// Losses whose steps fall: those of importance in falling order.
Losses convex_losses(std::mt19937& random, std::size_t n, bool coarse) {
  const std::vector<float> importance = uniforms(random, n, coarse);
  Losses losses;
  REQUIRE(retention_losses(importance, importance, losses).ok());
  return losses;
}

// The lower convex hull at a whole number of rows, by all chords above it.
double hull_at(const Losses& losses, std::size_t k) {
  double least = losses[k].loss;
  for (std::size_t a = 0; a < k; ++a) {
    for (std::size_t b = k + 1; b < losses.size(); ++b) {
      const double part = double(k - a) / double(b - a);
      least = std::min(least, (1 - part) * losses[a].loss + part * losses[b].loss);
    }
  }
  return least;
}

// The least sum of loss(head, rows) over all ways to give `total` rows to heads.
double least_of_all(const std::vector<Losses>& heads, std::size_t total,
                    const std::function<double(std::size_t, std::size_t)>& loss, std::size_t first = 0) {
  if (first + 1 == heads.size()) {
    return total < heads[first].size() ? loss(first, total) : std::numeric_limits<double>::infinity();
  }
  double least = std::numeric_limits<double>::infinity();
  for (std::size_t k = 0; k < heads[first].size() && k <= total; ++k) {
    least = std::min(least, loss(first, k) + least_of_all(heads, total - k, loss, first + 1));
  }
  return least;
}

// The hull of one head's losses at any number of rows.
double hull_loss(const Losses& losses, double rows) {
  const auto below = std::min(static_cast<std::size_t>(rows), losses.size() - 1),
             above = std::min(below + 1, losses.size() - 1);
  const double part = rows - double(below);
  return (1 - part) * hull_at(losses, below) + part * hull_at(losses, above);
}

}  // namespace

TEST_CASE("losses are the importance of the rows that a cut drops") {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    const std::size_t n = random() % 40;
    const auto score = uniforms(random, n, round % 2 == 0), importance = uniforms(random, n, false);
    Losses losses;
    REQUIRE(retention_losses(score, importance, losses).ok());
    REQUIRE(losses.size() == n + 1);
    for (std::size_t k = 0; k <= n; ++k) {
      std::vector<unsigned char> mark(n);
      cut(score, static_cast<int>(k), mark);
      double dropped = 0;
      for (std::size_t i = 0; i < n; ++i) dropped += mark[i] == 0 ? double(importance[i]) : 0;
      CHECK(losses[k].cost == double(k));
      CHECK(losses[k].loss == doctest::Approx(dropped).epsilon(1e-12));
    }
  }
}

TEST_CASE("losses refuse what is not a number or negative") {
  Losses losses = {{1, 2}};
  const float nan = std::nanf("");
  CHECK(retention_losses(std::vector<float>{1, nan}, std::vector<float>{1, 1}, losses).message() ==
        "the score of row 1 is NaN");
  CHECK(retention_losses(std::vector<float>{1}, std::vector<float>{1, 1}, losses).code == Errc::bad_shape);
  for (const float bad : {nan, -1.f, std::numeric_limits<float>::infinity()}) {
    CHECK(retention_losses(std::vector<float>{1, 2}, std::vector<float>{1, bad}, losses).code == Errc::bad_value);
  }
  CHECK(losses.size() == 1);
}

TEST_CASE("convex losses are shared out as well as in the best of all ways") {
  std::mt19937 random(2);
  for (int round = 0; round < 1000; ++round) {
    std::vector<Losses> heads;
    std::size_t rows = 0;
    for (unsigned h = 0; h < 1 + random() % 4; ++h) {
      heads.push_back(convex_losses(random, random() % 6, round % 3 == 0));
      rows += heads.back().size() - 1;
    }
    std::vector<double> totals, given;
    for (std::size_t k = 0; k <= rows; ++k) totals.push_back(double(k));
    REQUIRE(share_totals(heads, totals, given).ok());
    for (std::size_t k = 0; k <= rows; ++k) {
      double sum = 0, loss = 0;
      for (std::size_t h = 0; h < heads.size(); ++h) {
        const double own = given[k * heads.size() + h];
        sum += own;
        loss += hull_loss(heads[h], own);
      }
      const double least = least_of_all(heads, k, [&](std::size_t h, std::size_t r) { return heads[h][r].loss; });
      if (!(std::fabs(sum - double(k)) < 1e-9)) FAIL("gives " << sum << " rows, not " << k);
      if (!(std::fabs(loss - least) < 1e-9)) FAIL("loses " << loss << " with " << k << " rows; the least is " << least);
    }
  }
}

TEST_CASE("any losses are shared out as well as their hulls can be, and never better than in the best of all ways") {
  std::mt19937 random(3);
  for (int round = 0; round < 1000; ++round) {
    std::vector<Losses> heads;
    std::size_t rows = 0;
    for (unsigned h = 0; h < 1 + random() % 3; ++h) {
      const std::size_t n = random() % 7;
      heads.emplace_back();
      REQUIRE(retention_losses(uniforms(random, n, false), uniforms(random, n, round % 3 == 0), heads.back()).ok());
      rows += n;
    }
    const auto at = static_cast<std::size_t>(random() % (rows + 1));
    std::vector<double> given;
    REQUIRE(share_totals(heads, std::vector<double>{double(at)}, given).ok());
    double loss = 0;
    for (std::size_t h = 0; h < heads.size(); ++h) loss += hull_loss(heads[h], given[h]);
    const double of_hulls = least_of_all(heads, at, [&](std::size_t h, std::size_t r) { return hull_at(heads[h], r); });
    const double of_rows = least_of_all(heads, at, [&](std::size_t h, std::size_t r) { return heads[h][r].loss; });
    if (!(std::fabs(loss - of_hulls) < 1e-9)) FAIL("loses " << loss << "; the hulls' least is " << of_hulls);
    CHECK(of_hulls <= of_rows + 1e-9);
  }
}

TEST_CASE("equal heads get the same, whatever their order, and rows that nothing tells apart are shared in proportion") {
  const Losses falling = {{0, 9}, {1, 4}, {2, 1}, {3, 0}}, nothing = {{0, 0}, {1, 0}, {2, 0}, {3, 0}, {4, 0}};
  std::vector<double> given;
  REQUIRE(share_totals(std::vector<Losses>{falling, falling, falling}, std::vector<double>{1, 4}, given).ok());
  CHECK(given[0] == doctest::Approx(1. / 3));
  CHECK(given[1] == doctest::Approx(1. / 3));
  CHECK(given[3] == doctest::Approx(4. / 3));
  CHECK(given[5] == doctest::Approx(4. / 3));
  REQUIRE(share_totals(std::vector<Losses>{nothing, falling}, std::vector<double>{0, 2, 3, 5, 7}, given).ok());
  CHECK(given == std::vector<double>{0, 0, 0, 2, 0, 3, 2, 3, 4, 3});
}

TEST_CASE("totals that cannot be shared out are refused") {
  const std::vector<Losses> heads = {{{0, 9}, {1, 4}}};
  std::vector<double> given = {7};
  CHECK(share_totals(heads, std::vector<double>{2}, given).code == Errc::bad_budget);
  CHECK(share_totals(heads, std::vector<double>{1, 0}, given).code == Errc::bad_budget);
  CHECK(share_totals(heads, std::vector<double>{std::nan("")}, given).code == Errc::bad_budget);
  CHECK(share_totals(std::vector<Losses>{{}}, std::vector<double>{0}, given).code == Errc::bad_shape);
  CHECK(share_totals(std::vector<Losses>{{{1, 1}}}, std::vector<double>{0}, given).code == Errc::bad_value);
  CHECK(share_totals(std::vector<Losses>{{{0, 1}, {1, std::nan("")}}}, std::vector<double>{0}, given).code == Errc::bad_value);
  CHECK(given == std::vector<double>{7});
}

TEST_CASE("a table drops what its step says, more of what matters less, and a cache's budget follows it") {
  std::mt19937 random(4);
  constexpr int layers = 3, heads = 2;
  LossPool pool(layers * heads);
  // Head h's rows matter h times as much; a quarter of them hold nearly everything.
  for (int text = 0; text < 5; ++text) {
    for (int h = 0; h < layers * heads; ++h) {
      const std::size_t n = 50 + random() % 200;
      std::vector<float> importance(n);
      for (std::size_t i = 0; i < n; ++i) {
        importance[i] =
            float(h + 1) / float(n) * (i % 4 == 0 ? 1.f : 0.01f) * std::uniform_real_distribution<float>(.5f, 1)(random);
      }
      Losses losses;
      REQUIRE(retention_losses(importance, importance, losses).ok());
      pool.add(h, losses);
    }
  }
  for (const bool per_layer : {false, true}) {
    Table table;
    REQUIRE(utility_table(pool.curves(), layers, {.per_layer = per_layer}, table).ok());
    REQUIRE(table.shape == std::vector<std::size_t>{99, layers, heads});
    for (std::size_t i = 0; i < 99; ++i) {
      for (std::size_t l = 0; l < layers; ++l) {
        double own = 0;
        for (std::size_t h = 0; h < heads; ++h) own += double(table.numbers[(i * layers + l) * heads + h]) / heads;
        if (per_layer) CHECK(own == doctest::Approx(double(i + 1) / 100).epsilon(1e-6));
      }
      double mean = 0;
      for (std::size_t h = 0; h < layers * heads; ++h) mean += double(table.numbers[i * layers * heads + h]) / (layers * heads);
      CHECK(mean == doctest::Approx(double(i + 1) / 100).epsilon(1e-6));
    }
    const float* const half = table.numbers.data() + 49 * layers * heads;
    if (!per_layer) CHECK(half[0] > half[5]);
    const Curve curve{table.numbers, layers, heads};
    REQUIRE(curve.check({layers, heads, heads, 64}).ok());
    const std::vector<int> seen(6, 1000), floor(6, 10);
    std::vector<int> keep(6);
    const BudgetRequest want{60 + 6 * 495, layers, heads, seen, floor, {}};
    REQUIRE(curve.allocate(want, keep).ok());
    for (std::size_t h = 0; h < 6; ++h) CHECK(std::fabs(keep[h] - (10 + 990 * (1 - double(half[h])))) <= 1);
  }
  Table table;
  CHECK(utility_table(pool.curves(), 4, {}, table).code == Errc::bad_shape);
  CHECK(table.numbers.empty());
}

TEST_CASE("curves of texts of other lengths are added at equal shares") {
  LossPool pool(1);
  pool.add(0, Losses{{0, 1}, {1, 0}});
  pool.add(0, Losses{{0, 3}, {1, 2}, {2, 0}});
  CHECK(pool.curves()[0][0].loss == doctest::Approx(4));
  CHECK(pool.curves()[0][250].loss == doctest::Approx(.75 + 2.5));
  CHECK(pool.curves()[0][500].loss == doctest::Approx(.5 + 2));
  CHECK(pool.curves()[0][1000].loss == doctest::Approx(0));
}

TEST_CASE("32 layers of 8 heads with 32,768 rows are solved in two seconds" * doctest::skip()) {
  std::mt19937 random(5);
  std::vector<Losses> heads;
  for (int h = 0; h < 256; ++h) {
    heads.emplace_back();
    auto importance = uniforms(random, 32768, false);
    for (float& x : importance) x = std::pow(x, 8.f);
    REQUIRE(retention_losses(uniforms(random, 32768, false), importance, heads.back()).ok());
  }
  Table table;
  const std::clock_t start = std::clock();
  REQUIRE(utility_table(heads, 32, {}, table).ok());
  const double seconds = double(std::clock() - start) / CLOCKS_PER_SEC;
  MESSAGE("random order: " << seconds << " s");
  for (auto& losses : heads) losses = convex_losses(random, 32768, false);
  const std::clock_t again = std::clock();
  REQUIRE(utility_table(heads, 32, {}, table).ok());
  MESSAGE("every row a step: " << double(std::clock() - again) / CLOCKS_PER_SEC << " s");
}
