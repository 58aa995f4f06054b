// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Codecs: error against the numeric oracles, lossless erase, and the lane groups against one another.
#include <doctest/doctest.h>

#include <random>

#include "kvtailor/kvtailor.hpp"
#include "unit/codecs.hpp"

using namespace kvt;

namespace {

template <int bits, int dim, NormCorrection correction = NormCorrection::none>
double relative_error(double* standard_error = nullptr) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const TurboQuant<bits, dim, correction> codec;
  constexpr int n = 64, rounds = 120;
  std::vector<float> rows(n * dim), back(dim);
  std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(n)));
  double sum = 0, square = 0;
  for (int round = 0; round < rounds; ++round) {
    for (float& x : rows) x = normal(random);
    codec.encode(rows.data(), n, block.data());
    for (int r = 0; r < n; ++r) {
      codec.decode(block.data(), n, r, back.data());
      double e = 0, s = 0;
      for (int d = 0; d < dim; ++d) {
        const double x = double(rows[std::size_t(r * dim + d)]);
        e += (x - double(back[std::size_t(d)])) * (x - double(back[std::size_t(d)]));
        s += x * x;
      }
      sum += e / s;
      square += e / s * (e / s);
    }
  }
  const double count = n * rounds, mean = sum / count;
  if (standard_error != nullptr) *standard_error = std::sqrt((square / count - mean * mean) / count);
  return mean;
}

template <int bits, int dim>
void check_error(double oracle) {
  double sigma = 0;
  const double error = relative_error<bits, dim>(&sigma);
  CAPTURE(bits);
  CAPTURE(dim);
  CAPTURE(error);
  // Four standard errors of the sample and half a unit of the oracle's last place.
  CHECK(std::fabs(error - oracle) <= 4 * sigma + 0.5e-5);
  CHECK(relative_error<bits, dim, NormCorrection::least_squares>() <= error);
}

template <class Codec>
void check_lanes() {
  constexpr int dim = Codec::head_dim, n = 37;
  std::mt19937 random(3);
  const Codec codec;
  auto rows = codecs::normal_rows(random, n, dim);
  std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(n)));
  codec.encode(rows.data(), n, block.data());
  codecs::check_attention(codec, block, n);
  if constexpr (requires(float* f, std::byte* b) { codec.encode_row(SimulatedWarp{}, f, b, 1, 0, f); }) {
    std::vector<std::byte> by_warp(block.size());
    float scratch[dim];
    for (int r = 0; r < n; ++r) codec.encode_row(SimulatedWarp{}, rows.data() + r * dim, by_warp.data(), n, r, scratch);
    // Codes at a border between two levels and the last bit of a scale may differ; decoded rows are as near.
    int different = 0;
    for (std::size_t i = 0; i < block.size(); ++i) different += block[i] != by_warp[i];
    CHECK(different <= static_cast<int>(block.size()) / 50);
  }
}

}  // namespace

TEST_CASE("TurboQuant's mean squared error is that of Lloyd-Max on the sphere") {
  check_error<1, 64>(.35839);
  check_error<2, 64>(.11453);
  check_error<3, 64>(.03339);
  check_error<4, 64>(.00913);
  check_error<1, 128>(.36089);
  check_error<2, 128>(.11600);
  check_error<3, 128>(.03397);
  check_error<4, 128>(.00931);
  check_error<5, 64>(HalfLevels<64, 5>::distortion);
  check_error<6, 64>(HalfLevels<64, 6>::distortion);
  check_error<2, 40>(HalfLevels<40, 2>::distortion);
  check_error<3, 80>(HalfLevels<80, 3>::distortion);
  check_error<4, 96>(HalfLevels<96, 4>::distortion);
  check_error<2, 112>(HalfLevels<112, 2>::distortion);
  check_error<3, 192>(HalfLevels<192, 3>::distortion);
  check_error<4, 256>(HalfLevels<256, 4>::distortion);
  check_error<2, 512>(HalfLevels<512, 2>::distortion);
  check_error<6, 512>(HalfLevels<512, 6>::distortion);
}

TEST_CASE("one lane and the simulated warp compute what the decoded rows give") {
  check_lanes<Dense<Half, 64>>();
  check_lanes<Dense<float, 40>>();
  check_lanes<Dense<BFloat16, 112>>();
  check_lanes<Dense<float, 256>>();
  check_lanes<TurboQuant<1, 64>>();
  check_lanes<TurboQuant<3, 80>>();
  check_lanes<TurboQuant<5, 112>>();
  check_lanes<TurboQuant<6, 96>>();
}

TEST_CASE("erase keeps every other row bit for bit") {
  using Codec = TurboQuant<3, 64>;
  const Codec codec;
  constexpr int n = 50;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> rows(n * 64);
  for (float& x : rows) x = normal(random);
  std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(n))), left(block.size());
  codec.encode(rows.data(), n, block.data());
  std::vector<unsigned char> keep(n);
  int kept = 0;
  for (auto& k : keep) kept += k = static_cast<unsigned char>(random() % 2);
  CHECK(codec.erase(block.data(), n, keep.data(), left.data()) == codec.max_block_bytes(kept));
  int next = 0;
  for (int r = 0; r < n; ++r) {
    if (keep[static_cast<std::size_t>(r)] == 0) continue;
    float before[64], after[64];
    codec.decode(block.data(), n, r, before);
    codec.decode(left.data(), kept, next++, after);
    CHECK(std::memcmp(before, after, sizeof before) == 0);
  }
}

TEST_CASE("zero, tiny and huge rows come back finite") {
  const TurboQuant<2, 64> codec;
  for (const float size : {0.f, 1e-42f, 1e-20f, 1e-6f, 15000.f}) {
    float row[64], back[64];
    for (float& x : row) x = size;
    row[1] = -size;
    std::byte block[64];
    codec.encode(row, 1, block);
    codec.decode(block, 1, 0, back);
    for (const float x : back) CHECK(std::fabs(x) <= 2 * size + 1e-7f);
  }
}

TEST_CASE("16-bit conversions are exact there and round to nearest even back") {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const Half h{static_cast<std::uint16_t>(bits)};
    const float x = to_float(h);
    if (std::isnan(x)) continue;
    if (from_float<Half>(x).bits != bits) FAIL("fp16 pattern " << bits);
    if (from_float<BFloat16>(to_float(BFloat16{h.bits})).bits != bits && !std::isnan(to_float(BFloat16{h.bits})))
      FAIL("bf16 " << bits);
    if ((bits & 0x7fffu) < 0x7bffu) {
      const float y = to_float(Half{static_cast<std::uint16_t>(bits + 1)});
      const float middle = 0.5f * (x + y);
      const auto even = bits % 2 == 0 ? bits : bits + 1;
      if (from_float<Half>(middle).bits != even) FAIL("tie after pattern " << bits);
      if (from_float<Half>(std::nextafter(middle, x)).bits != bits) FAIL("below the tie after pattern " << bits);
    }
  }
}

TEST_CASE("RoPE turns pairs of both layouts and turns back") {
  const float factors[4] = {1.f, 2.f, 4.f, 8.f};
  for (const auto pairs : {Rope::Pairs::adjacent, Rope::Pairs::halves}) {
    const Rope rope{.rotary_dim = 8, .base = 100.f, .pairs = pairs, .factors = factors};
    CHECK(rope.validate(40).ok());
    float x[10], y[10];
    for (int i = 0; i < 10; ++i) x[i] = y[i] = static_cast<float>(i + 1);
    rope.apply(y, 5);
    for (int i = 0; i < 4; ++i) {
      const int a = pairs == Rope::Pairs::adjacent ? 2 * i : i, b = pairs == Rope::Pairs::adjacent ? 2 * i + 1 : i + 4;
      const double angle = 5 * std::pow(100.0, -i / 4.0) / double(factors[i]);
      CHECK(double(y[a]) == doctest::Approx(double(x[a]) * std::cos(angle) - double(x[b]) * std::sin(angle)).epsilon(1e-5));
      CHECK(double(y[b]) == doctest::Approx(double(x[a]) * std::sin(angle) + double(x[b]) * std::cos(angle)).epsilon(1e-5));
    }
    CHECK(y[9] == x[9]);
    rope.apply(y, -5);
    for (int i = 0; i < 10; ++i) CHECK(y[i] == doctest::Approx(x[i]).epsilon(1e-5));
  }
  CHECK(Rope{.rotary_dim = 7}.validate(40).code == Errc::bad_shape);
}
