// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// TurboQuantUnbiased: products that are right on average, and the error that costs.
#include <doctest/doctest.h>

#include "kvtailor/budget/uniform.hpp"
#include "kvtailor/cache.hpp"
#include "kvtailor/codec/turbo_quant.hpp"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"
#include "kvtailor/select/sink_recent.hpp"
#include "unit/codecs.hpp"

using namespace kvt;

namespace {

struct Quality {
  double slope, slope_error;  // of decoded on true products with the row itself; its standard error
  double error;               // squared, relative to the row's
};

template <class Codec>
Quality quality() {
  constexpr int dim = Codec::head_dim, n = 4000;
  std::mt19937 random(1);
  const Codec codec;
  const auto rows = codecs::normal_rows(random, n, dim);
  const auto back = codecs::decode(codec, codecs::encode(codec, rows), n);
  double sum = 0, square = 0, error = 0;
  for (int row = 0; row < n; ++row) {
    double xx = 0, xy = 0, ee = 0;
    for (int d = 0; d < dim; ++d) {
      const double x = static_cast<double>(rows[static_cast<std::size_t>(row * dim + d)]);
      const double y = static_cast<double>(back[static_cast<std::size_t>(row * dim + d)]);
      xx += x * x;
      xy += x * y;
      ee += (x - y) * (x - y);
    }
    sum += xy / xx / n;
    square += xy / xx * (xy / xx) / n;
    error += ee / xx / n;
  }
  return {sum, std::sqrt((square - sum * sum) / n), error};
}

}  // namespace

TEST_CASE("products are right on average, which those of the smallest error are not") {
  const auto check = [](const Quality& q, double left, double sketch) {
    MESSAGE("slope " << q.slope << " +- " << q.slope_error << ", error " << q.error);
    CHECK(std::fabs(q.slope - 1) <= 4 * q.slope_error + 2e-3);
    // The error of the code times that of the sketch, whose figures are for many dimensions.
    CHECK(std::fabs(q.error / (left * sketch) - 1) <= 0.06);
  };
  check(quality<TurboQuantUnbiased<2, 128>>(), HalfLevels<128, 1>::distortion, .571);
  check(quality<TurboQuantUnbiased<3, 128>>(), HalfLevels<128, 2>::distortion, .571);
  check(quality<TurboQuantUnbiased<1, 128>>(), 1, .571);
  check(quality<TurboQuantUnbiased<2, 128, Sketch::gaussian>>(), HalfLevels<128, 1>::distortion, 1.571);
  check(quality<TurboQuantUnbiased<3, 128, Sketch::gaussian>>(), HalfLevels<128, 2>::distortion, 1.571);
  const Quality plain = quality<TurboQuant<2, 128, NormCorrection::none>>();
  CHECK(plain.slope == doctest::Approx(1 - HalfLevels<128, 2>::distortion).epsilon(.01));
  CHECK(plain.error < quality<TurboQuantUnbiased<2, 128>>().error);
}

TEST_CASE("attention on both sketches is that of the decoded rows, also in a cache") {
  std::mt19937 random(2);
  const auto check = [&](auto codec) {
    for (const int n : {1, 6, 37}) {
      const auto block = codecs::encode(codec, codecs::normal_rows(random, n, decltype(codec)::head_dim));
      codecs::check_attention(codec, block, n);
      codecs::check_erase(codec, block, n);
    }
    codecs::check_hostile(codec);
  };
  check(TurboQuantUnbiased<1, 40>{});
  TurboQuantUnbiased<3, 64> codec;
  check(codec);
  CHECK(set_precision(codec, Precision::accurate));
  check(codec);
  check(TurboQuantUnbiased<4, 112>{});
  check(TurboQuantUnbiased<2, 64, Sketch::gaussian>{});
}

TEST_CASE("a cache attends in a basis that is wider than its rows") {
  constexpr int dim = 64, n = 200;
  using Choice = OneOf<TurboQuant<6, dim>, TurboQuantUnbiased<6, dim>>;  // which products are rounded least for
  KvCache<Uniform, SinkRecent, KvCodec<Choice, Choice>> cache;
  const Geometry shape{1, 1, 3, dim};
  // Wide keys with narrow values in one head, the reverse in another.
  for (const auto& [keys, values] : {std::pair{1, 0}, {0, 1}, {1, 1}}) {
    const std::vector<KvCodec<Choice, Choice>> codecs = {{{keys}, {values}}};
    REQUIRE(cache.init(shape, {.recent_rows = 16}, codecs).ok());
    std::mt19937 random(3);
    const auto k = codecs::normal_rows(random, n, dim), v = codecs::normal_rows(random, n, dim);
    const auto q = codecs::normal_rows(random, 3, dim);
    std::vector<int> positions(n);
    for (int i = 0; i < n; ++i) positions[static_cast<std::size_t>(i)] = i;
    REQUIRE(cache.append(0, k.data(), v.data(), positions).ok());
    REQUIRE(cache.flush().ok());
    std::vector<float> dk(n * dim), dv(n * dim), out(3 * dim);
    cache.decode(0, 0, dk.data(), dv.data());
    const int last[1] = {n};
    REQUIRE(cache.attend(0, q.data(), last, {}, out.data()).ok());
    for (std::size_t j = 0; j < 3; ++j) {
      double sum = 0;
      std::vector<double> want(dim, 0.0);
      for (std::size_t row = 0; row < n; ++row) {
        double logit = 0;
        for (std::size_t d = 0; d < dim; ++d)
          logit += static_cast<double>(q[j * dim + d]) * static_cast<double>(dk[row * dim + d]);
        const double weight = std::exp(logit / 8);
        sum += weight;
        for (std::size_t d = 0; d < dim; ++d) want[d] += weight * static_cast<double>(dv[row * dim + d]);
      }
      for (std::size_t d = 0; d < dim; ++d) CHECK(std::fabs(static_cast<double>(out[j * dim + d]) - want[d] / sum) <= 1e-4);
    }
  }
}
