// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embedding against the formula in double precision.
#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kvtailor/core/rope.hpp"

using namespace kvt;

namespace {

std::vector<double> turned(const Rope& rope, const std::vector<float>& row, int position) {
  std::vector<double> out(row.begin(), row.end());
  const auto half = static_cast<std::size_t>(rope.rotary_dim / 2);
  for (std::size_t i = 0; i < half; ++i) {
    double angle = position * std::pow(double(rope.base), -double(2 * i) / rope.rotary_dim);
    if (!rope.factors.empty()) angle /= double(rope.factors[i]);
    const std::size_t x = rope.pairs == Rope::Pairs::adjacent ? 2 * i : i;
    const std::size_t y = rope.pairs == Rope::Pairs::adjacent ? 2 * i + 1 : i + half;
    out[x] = double(row[x]) * std::cos(angle) - double(row[y]) * std::sin(angle);
    out[y] = double(row[x]) * std::sin(angle) + double(row[y]) * std::cos(angle);
  }
  return out;
}

}  // namespace

TEST_CASE("both pair layouts follow the formula at every position, with and without factors") {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const auto pairs : {Rope::Pairs::adjacent, Rope::Pairs::halves}) {
    for (const int rotary_dim : {2, 20, 40, 64}) {
      std::vector<float> factors;
      for (int i = 0; i < rotary_dim / 2; ++i) factors.push_back(1.f + 0.5f * static_cast<float>(i % 8));
      for (const bool with_factors : {false, true}) {
        Rope rope{.rotary_dim = rotary_dim, .base = 500000.f, .pairs = pairs};
        if (with_factors) rope.factors = factors;
        REQUIRE(rope.validate(64).ok());
        for (const int position : {0, 1, 7, 4095, 131071}) {
          std::vector<float> row(64);
          for (float& x : row) x = normal(random);
          const std::vector<float> before = row;
          const auto want = turned(rope, row, position);
          rope.apply(row.data(), position);
          for (std::size_t d = 0; d < 64; ++d) {
            // Elements of size 5: two products and a sum in fp32.
            REQUIRE(std::fabs(double(row[d]) - want[d]) <= 2e-6);
            if (d >= static_cast<std::size_t>(rotary_dim)) REQUIRE(row[d] == before[d]);
          }
          rope.apply(row.data(), -position);
          for (std::size_t d = 0; d < 64; ++d) REQUIRE(std::fabs(row[d] - before[d]) <= 4e-6f);
        }
      }
    }
  }
}

TEST_CASE("settings that cannot be used are refused and named") {
  const float factors[5] = {1, 1, 1, 1, 1};
  CHECK(Rope{.rotary_dim = 7}.validate(40).message() ==
        "rotary_dim is 7; it must be even and between 2 and head_dim, which is 40");
  CHECK(Rope{.rotary_dim = 0}.validate(40).code == Errc::bad_shape);
  CHECK(Rope{.rotary_dim = 42}.validate(40).code == Errc::bad_shape);
  CHECK(Rope{.rotary_dim = 40}.validate(40).ok());
  CHECK(Rope{.rotary_dim = 40, .base = 0.f}.validate(40).message() == "the RoPE base is 0; it must be finite and above zero");
  CHECK(Rope{.rotary_dim = 40, .base = std::nanf("")}.validate(40).code == Errc::bad_value);
  CHECK(Rope{.rotary_dim = 40, .factors = factors}.validate(40).message() ==
        "there are 5 frequency factors; rotary_dim / 2 is 20");
}

TEST_CASE("a frequency factor that would turn a row into NaN is refused") {
  for (const float bad : {0.f, std::nanf("")}) {
    const float factors[2] = {1, bad};
    CHECK(Rope{.rotary_dim = 4, .factors = factors}.validate(40).code == Errc::bad_value);
  }
}
