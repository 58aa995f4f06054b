// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The low rank of a block: the noise fit against its oracles, and blocks of LowRank and Shifted.
#include <doctest/doctest.h>

#include <Eigen/SVD>
#include <random>

#include "kvtailor/budget/uniform.hpp"
#include "kvtailor/cache.hpp"
#include "kvtailor/codec/dense.hpp"
#include "kvtailor/codec/low_rank.hpp"
#include "kvtailor/codec/shifted.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant.hpp"
#include "kvtailor/select/key_diff.hpp"
#include "unit/codecs.hpp"

using namespace kvt;

namespace {

template <int bits, int dim>
using Short = LloydMax<bits, dim, NormCorrection::least_squares, LogScale>;

Eigen::MatrixXd gaussian(std::mt19937& random, int n, int d) {
  std::normal_distribution<double> normal;
  return Eigen::MatrixXd::NullaryExpr(n, d, [&] { return normal(random); });
}
Eigen::MatrixXd orthonormal(std::mt19937& random, int n, int d) {
  const Eigen::HouseholderQR<Eigen::MatrixXd> qr(gaussian(random, n, d));
  return qr.householderQ() * Eigen::MatrixXd::Identity(n, d);
}
std::vector<double> squared_values(const Eigen::MatrixXd& x) {
  const Eigen::BDCSVD<Eigen::MatrixXd> svd(x);
  std::vector<double> lambda;
  for (const double s : svd.singularValues()) lambda.push_back(s * s);
  return lambda;
}

template <class Codec>
LowRankOptions& options(Codec& codec) {
  return codec;
}
// As published, but for the closed loop.
template <class Residual>
auto by_margin() {
  Rotated<LowRank<Residual>> codec;
  options(codec).rule = RankRule::bbp;
  options(codec).max_rank = 8;
  return codec;
}

template <class Codec>
double relative_error(const Codec& codec, const std::vector<float>& rows) {
  const int n = static_cast<int>(rows.size()) / Codec::head_dim;
  const std::vector<float> zero(rows.size(), 0.f);
  return codecs::squared_distance(rows, codecs::decode(codec, codecs::encode(codec, rows), n)) /
         codecs::squared_distance(rows, zero);
}

}  // namespace

TEST_CASE("noise has rank 0, three spikes are found and shrunk as on white noise") {
  struct Case {
    int n, d, window;
    double mean, spread;  // of shrunk values over those of Gavish and Donoho, IEEE Trans. Inf. Theory 63, 2017
  };
  std::mt19937 random(1);
  for (const Case& expected : {Case{128, 128, 11, 1.0097, .009}, {128, 64, 7, 1.0067, .006}, {512, 128, 11, 1.0016, .002}}) {
    const int n = expected.n, d = expected.d;
    CAPTURE(n);
    CAPTURE(d);
    const double size = std::max(n, d), beta = std::min(n, d) / size;
    double sum = 0;
    const int draws = 50;
    for (int draw = 0; draw < draws; ++draw) {
      const Eigen::MatrixXd noise = gaussian(random, n, d);
      const auto flat = squared_values(noise);
      REQUIRE(NoiseFit(flat, n, d).rank() == 0);
      const Eigen::Vector3d spikes = Eigen::Vector3d(6, 4, 2.5) * std::sqrt(size);
      const auto lambda =
          squared_values(noise + orthonormal(random, n, 3) * spikes.asDiagonal() * orthonormal(random, d, 3).transpose());
      const NoiseFit fit(lambda, n, d);
      REQUIRE(fit.window() == expected.window);
      REQUIRE(fit.rank() == 3);
      for (int i = 0; i < 3; ++i) {
        const double shrunk = fit.shrink(i, Shrinkage::frobenius), observed = std::sqrt(lambda[static_cast<std::size_t>(i)]);
        const double operator_norm = fit.shrink(i, Shrinkage::operator_norm), nuclear = fit.shrink(i, Shrinkage::nuclear);
        const double y = observed / std::sqrt(size), shift = y * y - beta - 1;
        const double optimum = std::sqrt(shift * shift - 4 * beta) / y * std::sqrt(size);
        sum += shrunk / optimum / (3 * draws);
        // The operator norm shrinks least and the nuclear norm most; nothing grows.
        REQUIRE(nuclear <= shrunk);
        REQUIRE(shrunk <= operator_norm);
        REQUIRE(operator_norm <= observed);
        REQUIRE(fit.shrink(i, Shrinkage::none) == observed);
      }
    }
    CAPTURE(sum);
    CHECK(std::fabs(sum - 1) <= 0.015);
    // Means of 150 values on both sides.
    CHECK(std::fabs(sum - expected.mean) <= 4 * expected.spread * std::sqrt(2.0 / draws));
  }
}

TEST_CASE("a spectrum that is too short, empty of energy or flat has rank 0") {
  for (const int p : {1, 2, 3, 4, 7, 64}) {
    const std::vector<double> zeros(static_cast<std::size_t>(p), 0.0), flat(static_cast<std::size_t>(p), 3.0);
    CHECK(NoiseFit(zeros, p, 64).rank() == 0);
    CHECK(NoiseFit(flat, p, 64).rank() == 0);
  }
}

TEST_CASE("a block of noise is stored by the residual codec alone, and says so") {
  std::mt19937 random(2);
  const auto rows = codecs::normal_rows(random, 128, 64);
  const auto margin = by_margin<Short<2, 64>>();
  CHECK(margin.rank(codecs::encode(margin, rows).data()) == 0);
  const LowRank<Short<2, 64>> codec;
  const auto block = codecs::encode(codec, rows);
  CHECK(codec.rank(block.data()) == 0);
  const auto plain = codecs::encode(Short<2, 64>{}, rows);
  CHECK(block.size() == plain.size() + 4);
  CHECK(std::equal(plain.begin(), plain.end(), block.begin() + 4));
}

TEST_CASE("the closed loop leaves the error of the residual codec, the open loop adds that of the factors") {
  std::mt19937 random(3);
  const int n = 128, dim = 64;
  const auto rows = codecs::low_rank_rows(random, n, dim, 3, 6.f);
  auto closed = by_margin<Short<2, dim>>(), open = closed, truncated = closed;
  options(open).loop = Loop::open;
  options(truncated).shrinkage = Shrinkage::none;
  CHECK(closed.rank(codecs::encode(closed, rows).data()) == 3);
  const double turbo = relative_error(TurboQuant<2, dim>{}, rows);
  const double a = relative_error(closed, rows), b = relative_error(open, rows), c = relative_error(truncated, rows);
  MESSAGE("TurboQuant " << turbo << ", closed " << a << ", open " << b << ", truncated " << c);
  // Of 50 parts 1 is noise; each of two factors at 4 bits leaves .0095 of the other 49. The residual codec gets both.
  CHECK(a <= 1.05 * .1145 * (1.0 / 50 + 2 * .0095));
  CHECK(a < b);
  CHECK(a < turbo / 10);
  // Truncation leaves the least residual.
  CHECK(c <= a);
  options(closed).max_rank = 1;
  CHECK(closed.rank(codecs::encode(closed, rows).data()) == 1);
  options(closed).max_rank = 0;
  CHECK(closed.rank(codecs::encode(closed, rows).data()) == 0);
}

TEST_CASE("bits by rate and distortion buy less error than the same bytes spent on the residual") {
  std::mt19937 random(4);
  const int n = 128, dim = 64;
  // Directions whose strength falls slowly: no rank is the right one.
  const auto rows = codecs::low_rank_rows(random, n, dim, 12, 8.f);
  auto fixed = by_margin<Short<2, dim>>();
  options(fixed).max_rank = 16;
  const Rotated<LowRank<Short<2, dim>>> rate;
  const auto bits = [&](const auto& codec) {
    return 8.0 * static_cast<double>(codecs::encode(codec, rows).size()) / (n * dim);
  };
  // In units of error at equal bytes: an additional bit of the residual divides the error by 3.5.
  const double by_margin = relative_error(fixed, rows) * std::pow(3.5, bits(fixed));
  const double by_rate = relative_error(rate, rows) * std::pow(3.5, bits(rate));
  MESSAGE("margin " << by_margin << " at " << bits(fixed) << " bits, rate " << by_rate << " at " << bits(rate));
  CHECK(by_rate <= by_margin);
  CHECK(by_rate < 0.5 * relative_error(TurboQuant<2, dim>{}, rows) * std::pow(3.5, 2.25));
  std::vector<float> noise = codecs::normal_rows(random, n, dim);
  CHECK(rate.rank(codecs::encode(rate, noise).data()) == 0);
}

TEST_CASE("attention on low-rank and shifted blocks is that of the rows they decode to; erased rows leave no trace") {
  std::mt19937 random(5);
  const auto check = [&](auto codec) {
    constexpr int dim = decltype(codec)::head_dim;
    for (const int n : {1, 2, 7, 40, 128, 131}) {
      const auto block = codecs::encode(codec, codecs::low_rank_rows(random, n, dim, 4, 5.f));
      codecs::check_attention(codec, block, n);
      codecs::check_erase(codec, block, n);
    }
  };
  for (const int bits : {1, 2, 3, 4, 5, 6, 16}) {
    auto codec = by_margin<Short<2, 64>>();
    options(codec).factor_bits = bits;
    check(codec);
  }
  check(Rotated<LowRank<Short<3, 40>>>{});
  Rotated<LowRank<Trellis<2, 64>>> trellis;
  check(trellis);
  CHECK(set_precision(trellis, Precision::accurate));
  check(trellis);
  check(Rotated<LowRank<Short<1, 256>>>{});
  check(Rotated<LowRank<Short<2, 512>>>{});
  check(LowRank<Dense<Half, 96>>{});
  check(Rotated<Shifted<Short<2, 64>>>{});
  check(Shifted<Dense<Half, 40>>{});
}

TEST_CASE("a shifted block costs nothing for the mean of its rows") {
  std::mt19937 random(6);
  auto rows = codecs::normal_rows(random, 128, 64);
  const double alone = relative_error(TurboQuant<2, 64>{}, rows) * 128 * 64;
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] += 5.f;
  const double shifted = relative_error(Rotated<Shifted<LloydMax<2, 64>>>{}, rows) * 128 * 64 * 26;
  MESSAGE("error without a mean " << alone << ", with " << shifted);
  CHECK(shifted <= 1.05 * alone);
}

TEST_CASE("whatever the rows are, what comes back is finite") {
  codecs::check_hostile(Rotated<LowRank<Short<2, 64>>>{});
  codecs::check_hostile(Rotated<LowRank<Trellis<3, 80>>>{});
  auto wide = by_margin<Short<3, 80>>();
  options(wide).factor_bits = 16;
  codecs::check_hostile(wide);
  codecs::check_hostile(Rotated<Shifted<Short<2, 128>>>{});
  codecs::check_hostile(TurboQuant<2, 64>{});
  codecs::check_hostile(Rotated<Short<4, 96>>{});
}

TEST_CASE("a block written by an earlier version decodes to the rows it always did") {
  // Rank 1 at 4 bits, 2 rows of 40: right factor all of code 8 and 9 in turn, left factor codes 15 and 0, residual zero.
  constexpr int dim = 40;
  std::vector<unsigned char> bytes = {1, 0, 4};
  const auto half = [&](float x) {
    const Half h = from_float<Half>(x);
    bytes.push_back(static_cast<unsigned char>(h.bits & 255));
    bytes.push_back(static_cast<unsigned char>(h.bits >> 8));
  };
  half(2.f);
  half(1.f);
  for (int i = 0; i < dim / 2; ++i) bytes.push_back(0x98);
  bytes.push_back(0x0f);
  bytes.resize(28);
  bytes.resize(28 + 2 * (1 + dim * 2 / 8), 0);  // LogScale 0
  std::vector<float> rows(2 * dim);
  const LowRank<Short<2, dim>> codec;
  for (int row = 0; row < 2; ++row)
    codec.decode(reinterpret_cast<const std::byte*>(bytes.data()), 2, row, rows.data() + row * dim);
  // Levels of the 128-sphere at 4 bits.
  for (int d = 0; d < dim; ++d) {
    using Levels = HalfLevels<128, 4>;
    const float right = 2 * Levels::whole[d % 2] * Levels::unit, left = Levels::whole[7] * Levels::unit;
    CHECK(rows[static_cast<std::size_t>(d)] == doctest::Approx(right * left));
    CHECK(rows[static_cast<std::size_t>(dim + d)] == doctest::Approx(-right * left));
  }
}

TEST_CASE("a budget of bytes is used and never exceeded, also where blocks lose rows and stay apart") {
  constexpr int dim = 64, heads = 2, n = 700;
  using Codec = KvCodec<Rotated<LowRank<Short<2, dim>>>, Rotated<Shifted<Short<2, dim>>>>;
  std::mt19937 random(7);
  KvCache<Uniform, KeyDiff, Codec> cache;
  REQUIRE(cache.init({1, heads, heads, dim}, {.recent_rows = 32}).ok());
  std::vector<int> positions(n);
  for (int i = 0; i < n; ++i) positions[static_cast<std::size_t>(i)] = i;
  const auto keys = codecs::low_rank_rows(random, n, heads * dim, 5, 3.f), values = codecs::normal_rows(random, n, heads * dim);
  REQUIRE(cache.append(0, keys.data(), values.data(), positions).ok());
  REQUIRE(cache.flush().ok());
  for (const double share : {0.9, 0.7, 0.7, 0.8}) {
    const auto most = static_cast<std::int64_t>(share * static_cast<double>(cache.memory().total()));
    REQUIRE(cache.compress(Retain::bytes(most)).ok());
    CHECK(cache.memory().total() <= most);
    // One more row a head does not fit, or the cheapest of other cuts does not: less than a twentieth is left.
    CHECK(static_cast<double>(cache.memory().total()) >= 0.95 * static_cast<double>(most));
  }
}

TEST_CASE("a cache takes no codec whose options are out of range, and is as it was") {
  using Key = OneOf<Rotated<Short<2, 64>>, Shifted<LowRank<Short<2, 64>>>>;
  using Codec = KvCodec<Key, Rotated<LowRank<Short<2, 64>>>>;
  const Geometry geometry{1, 2, 2, 64};
  KvCache<Uniform, KeyDiff, Codec> cache;
  REQUIRE(cache.init(geometry).ok());
  const auto refused = [&](auto change) {
    Codec wrong;
    wrong.keys.index = 1;
    change(wrong, std::get<1>(wrong.keys.codecs).codec);
    const Codec heads[] = {Codec{}, wrong};
    const Status status = cache.init({1, 1, 1, 64}, {}, std::span(heads).last(1)), mixed = cache.init(geometry, {}, heads);
    CHECK(mixed.code == status.code);
    CHECK(cache.geometry() == geometry);
    KvCache<Uniform, KeyDiff, Codec> own({}, {}, wrong);
    CHECK(own.init(geometry).code == status.code);
    return status.code == Errc::bad_value;
  };
  CHECK(!refused([](Codec&, LowRankOptions&) {}));
  REQUIRE(cache.init(geometry).ok());
  for (const int index : {-1, 2}) CHECK(refused([&](Codec& c, LowRankOptions&) { c.keys.index = index; }));
  for (const int rank : {-1, 33}) CHECK(refused([&](Codec&, LowRankOptions& o) { o.max_rank = rank; }));
  for (const int bits : {0, 7, 15, 17, -3})
    CHECK(refused([&](Codec& c, LowRankOptions&) { options(c.values).factor_bits = bits; }));
  for (const float x : {1.f, -2.f, std::nanf(""), INFINITY}) {
    CHECK(refused([&](Codec& c, LowRankOptions&) { options(c.values).error_per_bit = x; }));
  }
}
