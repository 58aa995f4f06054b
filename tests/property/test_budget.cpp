// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Sharing out and cutting, for whatever numbers come: rapidcheck makes them, and shrinks what fails.
#include <doctest/doctest.h>
#include <rapidcheck.h>

#include <numeric>

#include "kvtailor/kvtailor.hpp"

using namespace kvt;

namespace {

struct Bounds {
  std::vector<std::int64_t> lower, upper;
  std::vector<double> weight;
  std::int64_t total = 0;
};

Bounds any_bounds() {
  Bounds b;
  const auto heads = *rc::gen::inRange(1, 40);
  std::int64_t least = 0, most = 0;
  for (int h = 0; h < heads; ++h) {
    const std::int64_t upper = *rc::gen::inRange(0, 3000), lower = *rc::gen::inRange<std::int64_t>(0, upper + 1);
    b.lower.push_back(lower);
    b.upper.push_back(upper);
    b.weight.push_back(std::exp(*rc::gen::inRange(-200, 200) / 10.0));
    least += lower;
    most += upper;
  }
  b.total = *rc::gen::inRange(least, most + 1);
  return b;
}

std::vector<std::int64_t> shares(const Bounds& b) {
  std::vector<std::int64_t> share(b.lower.size());
  apportion(b.total, b.weight, b.lower, b.upper, share);
  return share;
}

}  // namespace

TEST_CASE("shares meet the total and every bound, whatever the weights") {
  CHECK(rc::check([] {
    const Bounds b = any_bounds();
    const auto share = shares(b);
    RC_ASSERT(std::accumulate(share.begin(), share.end(), std::int64_t{0}) == b.total);
    for (std::size_t h = 0; h < share.size(); ++h) RC_ASSERT(share[h] >= b.lower[h] && share[h] <= b.upper[h]);
  }));
}

TEST_CASE("of two heads between their bounds, the heavier has as much or more, and in proportion to one row") {
  CHECK(rc::check([] {
    const Bounds b = any_bounds();
    const auto share = shares(b);
    const auto free = [&](std::size_t h) { return share[h] > b.lower[h] + 1 && share[h] < b.upper[h] - 1; };
    for (std::size_t i = 0; i < share.size(); ++i) {
      for (std::size_t j = 0; j < share.size(); ++j) {
        if (!free(i) || !free(j) || b.weight[i] < b.weight[j]) continue;
        RC_ASSERT(share[i] + 1 >= share[j]);
        // share = weight * c, each off by less than one row.
        const double ratio = b.weight[i] / b.weight[j];
        RC_ASSERT(std::fabs(double(share[i]) - ratio * double(share[j])) <= 1 + ratio + 1e-6);
      }
    }
  }));
}

TEST_CASE("one row more for all never takes a row from a head") {
  CHECK(rc::check([] {
    Bounds b = any_bounds();
    const std::int64_t most = std::accumulate(b.upper.begin(), b.upper.end(), std::int64_t{0});
    RC_PRE(b.total < most);
    const auto before = shares(b);
    b.total += static_cast<std::int64_t>(before.size());
    RC_PRE(b.total <= most);
    const auto after = shares(b);
    for (std::size_t h = 0; h < before.size(); ++h) RC_ASSERT(after[h] + 1 >= before[h]);
  }));
}

TEST_CASE("the cut keeps what no dropped row is above") {
  CHECK(rc::check([](const std::vector<int>& numbers) {
    std::vector<float> score(numbers.begin(), numbers.end());
    const int keep = *rc::gen::inRange(0, static_cast<int>(score.size()) + 1);
    std::vector<unsigned char> mark(score.size(), 9);
    cut(score, keep, mark);
    int kept = 0;
    for (std::size_t i = 0; i < score.size(); ++i) {
      kept += mark[i] != 0;
      for (std::size_t j = 0; j < score.size(); ++j) {
        if (mark[i] == 0 && mark[j] != 0) RC_ASSERT(score[j] > score[i] || (score[j] == score[i] && j < i));
      }
    }
    RC_ASSERT(kept == keep);
  }));
}
