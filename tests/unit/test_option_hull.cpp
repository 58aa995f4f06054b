// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Choosing options under a limit: hulls by hand, and small cases against every choice there is.
#include <doctest/doctest.h>

#include <random>

#include "kvtailor/learn/option_hull.hpp"

using namespace kvt;

TEST_CASE("a lower hull leaves out what a mixture of its neighbours beats") {
  CHECK(lower_hull(std::vector<Option>{{1, 10}, {2, 9}, {3, 1}, {4, 1}, {3, 5}}) == std::vector<int>{0, 2});
  CHECK(lower_hull(std::vector<Option>{{4, 0}, {1, 8}, {2, 4}, {3, 1}}) == std::vector<int>{1, 2, 3, 0});
  CHECK(lower_hull(std::vector<Option>{{2, 3}, {2, 3}, {5, 3}}) == std::vector<int>{0});
}

TEST_CASE("the choice is the best there is wherever its own cost is the limit, and never over it") {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> unit;
  for (int round = 0; round < 300; ++round) {
    std::vector<std::vector<Option>> options(1 + random() % 4);
    double cheapest = 0, dearest = 0;
    for (auto& place : options) {
      place.resize(1 + random() % 4);
      for (auto& one : place) one = {1 + std::floor(4 * unit(random)), unit(random)};
      const auto by_cost = [](const Option& a, const Option& b) { return a.cost < b.cost; };
      cheapest += std::min_element(place.begin(), place.end(), by_cost)->cost;
      dearest += std::max_element(place.begin(), place.end(), by_cost)->cost;
    }
    const auto sum = [&](const std::vector<int>& chosen) {
      Option all{0, 0};
      for (std::size_t p = 0; p < options.size(); ++p) {
        const Option one = options[p][static_cast<std::size_t>(chosen[p])];
        all = {all.cost + one.cost, all.loss + one.loss};
      }
      return all;
    };
    std::vector<int> chosen;
    CHECK(choose_options(options, cheapest - 0.5, chosen).code == Errc::bad_budget);
    const double limit = cheapest + (dearest - cheapest) * unit(random);
    REQUIRE(choose_options(options, limit, chosen).ok());
    const Option have = sum(chosen);
    REQUIRE(have.cost <= limit);
    // Every choice; none of at most the same cost may lose less by more than the largest step of one place.
    double least = 1e300, step = 0;
    std::vector<int> each(options.size(), 0);
    for (bool more = true; more;) {
      const Option one = sum(each);
      if (one.cost <= have.cost) least = std::min(least, one.loss);
      more = false;
      for (std::size_t p = 0; p < options.size() && !more; ++p) {
        if (++each[p] < static_cast<int>(options[p].size())) {
          more = true;
        } else {
          each[p] = 0;
        }
      }
    }
    for (const auto& place : options) {
      for (const auto& a : place) {
        for (const auto& b : place) step = std::max(step, a.loss - b.loss);
      }
    }
    REQUIRE(have.loss <= least + step + 1e-12);
    // With everything affordable nothing is left to gain.
    REQUIRE(choose_options(options, dearest, chosen).ok());
    for (std::size_t p = 0; p < options.size(); ++p) {
      for (const auto& one : options[p]) REQUIRE(options[p][static_cast<std::size_t>(chosen[p])].loss <= one.loss);
    }
  }
}

TEST_CASE("a step that does not fit leaves room for a smaller one that gains less") {
  const std::vector<std::vector<Option>> options = {{{0, 10}, {5, 0}}, {{0, 1}, {1, .5}}};
  std::vector<int> chosen;
  REQUIRE(choose_options(options, 2, chosen).ok());
  CHECK(chosen == std::vector<int>{0, 1});
}

TEST_CASE("options that cannot be compared are refused") {
  std::vector<int> chosen;
  const std::vector<std::vector<Option>> nan = {{{1, std::nan("")}}}, empty = {{{1, 1}}, {}};
  CHECK(choose_options(nan, 5, chosen).code == Errc::bad_value);
  CHECK(choose_options(empty, 5, chosen).code == Errc::bad_shape);
  CHECK(choose_options(std::vector<std::vector<Option>>{{{1, 1}}}, std::nan(""), chosen).code == Errc::bad_budget);
}

TEST_CASE("pooled losses are the size of a place times what is usual for an option") {
  // Exact products stay what they are.
  const double share[] = {.75, .2, .05};
  std::vector<std::vector<Option>> places;
  for (const double size : {3.0, .5, 40.0, 1.0, 7.0, 2.0}) {
    auto& place = places.emplace_back();
    for (int k = 0; k < 3; ++k) place.push_back({k + 1.0, share[k] * size});
  }
  auto pooled = places;
  REQUIRE(pool_losses(pooled).ok());
  for (std::size_t p = 0; p < places.size(); ++p) {
    for (std::size_t k = 0; k < 3; ++k) {
      CHECK(pooled[p][k].loss == doctest::Approx(places[p][k].loss));
      CHECK(pooled[p][k].cost == places[p][k].cost);
    }
  }
  // Places of a group meet: all the way at a share of 0, by logarithms, and keep to themselves at 1.
  for (const double own : {0.0, .25, 1.0}) {
    pooled = places;
    REQUIRE(pool_losses(pooled, 3, own).ok());
    const double mean = std::cbrt(3 * .5 * 40), other_mean = std::cbrt(14.0);
    CHECK(pooled[0][1].loss == doctest::Approx(.2 * mean * std::pow(3 / mean, own)));
    CHECK(pooled[1][2].loss == doctest::Approx(.05 * mean * std::pow(.5 / mean, own)));
    CHECK(pooled[4][0].loss == doctest::Approx(.75 * other_mean * std::pow(7 / other_mean, own)));
  }
  // Noise that makes the dearest option of one place seem the worst one moves its size alone, by the cube root here.
  places[1][2].loss = .6;
  pooled = places;
  REQUIRE(pool_losses(pooled).ok());
  const double size = .5 * std::cbrt(.6 / .025);
  for (std::size_t k = 0; k < 3; ++k) CHECK(pooled[1][k].loss == doctest::Approx(share[k] * size));
  CHECK(lower_hull(pooled[1]) == std::vector<int>{0, 1, 2});
  CHECK(pooled[4][1].loss == doctest::Approx(.2 * 7));

  // A place that seems to gain is the smallest a place can be; an option that loses nothing at most places loses nothing.
  places[1] = {{1, -1e-7}, {2, 1e-8}, {3, 0}};
  for (auto& place : places) place.push_back({4, 0});
  places[2][3].loss = 1;
  pooled = places;
  REQUIRE(pool_losses(pooled).ok());
  for (std::size_t k = 0; k < 3; ++k) CHECK(pooled[1][k].loss == doctest::Approx(1e-3 * pooled[0][k].loss).epsilon(.9));
  for (const auto& place : pooled) CHECK(place[3].loss == 0);
  CHECK(pooled[2][1].loss == doctest::Approx(.2 * 40));

  CHECK(pool_losses(places, 4).code == Errc::bad_shape);
  CHECK(pool_losses(places, 0).code == Errc::bad_shape);
  CHECK(pool_losses(places, 3, NAN).code == Errc::bad_value);
  places[0].pop_back();
  CHECK(pool_losses(places).code == Errc::bad_shape);
  places[0].push_back({3, NAN});
  CHECK(pool_losses(places).code == Errc::bad_value);
  CHECK(pool_losses({}).ok());
}
