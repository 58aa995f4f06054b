// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Codecs at their limits: the rotation as a matrix, rows of every allowed size, bytes of copied rows, and every 16-bit pattern.
#include <doctest/doctest.h>

#include <random>

#include "kvtailor/kvtailor.hpp"

using namespace kvt;

namespace {

template <class F>
void each_head_dim(F&& f) {
  f.template operator()<40>();
  f.template operator()<64>();
  f.template operator()<80>();
  f.template operator()<96>();
  f.template operator()<112>();
  f.template operator()<128>();
  f.template operator()<192>();
  f.template operator()<256>();
}

template <class F>
void each_bits(F&& f) {
  f.template operator()<1>();
  f.template operator()<2>();
  f.template operator()<3>();
  f.template operator()<4>();
  f.template operator()<5>();
  f.template operator()<6>();
}

// Column `axis` of the inverse rotation, times `size`: after forward() one element holds everything.
template <int dim>
std::vector<float> axis_row(int axis, float size) {
  std::vector<float> x(dim, 0.f);
  x[static_cast<std::size_t>(axis)] = size;
  Rotation<dim>::inverse(Serial{}, x.data());
  return x;
}

template <int bits, int dim, NormCorrection correction>
void check_finite(const std::vector<float>& row) {
  const TurboQuant<bits, dim, correction> codec;
  std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(1)));
  std::vector<float> back(dim, std::nanf(""));
  codec.encode(row.data(), 1, block.data());
  codec.decode(block.data(), 1, 0, back.data());
  double size = 0, returned = 0;
  for (std::size_t d = 0; d < dim; ++d) {
    size += static_cast<double>(row[d]) * static_cast<double>(row[d]);
    returned += static_cast<double>(back[d]) * static_cast<double>(back[d]);
  }
  CAPTURE(bits);
  CAPTURE(dim);
  CAPTURE(static_cast<int>(correction));
  CAPTURE(std::sqrt(size));
  // Only the published scale can make a row longer; 2 bits take elements of size 1 to the level 1.5.
  const double most = correction == NormCorrection::none ? 2 : 1.001;
  CHECK(std::sqrt(returned) <= most * std::sqrt(size) + 1e-6);  // and not NaN
}

// Rows whose norm is the largest that append() lets through: along one element, along all, and along one rotated axis.
template <int bits, int dim, NormCorrection correction = NormCorrection::least_squares>
void check_largest() {
  const double most = std::min(TurboQuant<bits, dim>::max_row_norm(), 65504.0 * std::sqrt(double(dim)));
  const auto size = static_cast<float>(most * 0.9999);
  check_finite<bits, dim, correction>(axis_row<dim>(0, size));
  check_finite<bits, dim, correction>(axis_row<dim>(dim - 1, -size));
  check_finite<bits, dim, correction>(std::vector<float>(dim, static_cast<float>(double(size) / std::sqrt(double(dim)))));
  std::vector<float> single(dim, 0.f);
  single[1] = std::min(size, 65504.f);
  check_finite<bits, dim, correction>(single);
}

// The nearest of two 16-bit neighbours, the even one of a tie. `value` is exact for a pattern, also for the one after the last
// finite one, which stands for infinity.
template <class T, class Value>
void check_rounding(const Value& value, unsigned last_finite) {
  for (unsigned bits = 0; bits <= last_finite; ++bits) {
    const double low = value(bits), high = value(bits + 1), middle = 0.5 * (low + high);
    const unsigned even = bits % 2 == 0 ? bits : bits + 1;
    const struct {
      double x;
      unsigned want;
    } cases[] = {{low, bits},
                 {middle, even},
                 {std::nextafter(static_cast<float>(middle), 0.f), bits},
                 {std::nextafter(static_cast<float>(middle), std::numeric_limits<float>::infinity()), bits + 1}};
    for (const auto& c : cases) {
      const auto x = static_cast<float>(c.x);
      // Between the smallest fp32 numbers there is no number to round.
      if (static_cast<double>(x) != c.x) continue;
      if (from_float<T>(x).bits != c.want) FAIL("pattern " << bits << ": " << c.x << " gives " << from_float<T>(x).bits);
      if (from_float<T>(-x).bits != (c.want | 0x8000u)) FAIL("pattern " << bits << ": " << -c.x);
    }
  }
}

}  // namespace

TEST_CASE("the rotation is orthogonal at every head dim, and its inverse undoes it") {
  each_head_dim([]<int dim>() {
    CAPTURE(dim);
    std::vector<std::vector<double>> columns;
    for (int axis = 0; axis < dim; ++axis) {
      std::vector<float> x(dim, 0.f);
      x[static_cast<std::size_t>(axis)] = 1;
      Rotation<dim>::forward(Serial{}, x.data());
      columns.emplace_back(x.begin(), x.end());
      // Every element has the same size: no row is hard for the quantiser because of one axis.
      for (const float y : x) REQUIRE(std::fabs(std::fabs(static_cast<double>(y)) - 1 / std::sqrt(double(dim))) <= 1e-7);
      Rotation<dim>::inverse(Serial{}, x.data());
      for (int d = 0; d < dim; ++d) {
        REQUIRE(std::fabs(x[static_cast<std::size_t>(d)] - (d == axis ? 1.f : 0.f)) <= 1e-6f);
      }
    }
    for (int a = 0; a < dim; ++a) {
      for (int b = 0; b <= a; ++b) {
        double product = 0;
        for (std::size_t d = 0; d < dim; ++d) {
          product += columns[static_cast<std::size_t>(a)][d] * columns[static_cast<std::size_t>(b)][d];
        }
        REQUIRE(std::fabs(product - (a == b ? 1 : 0)) <= 1e-6);
      }
    }
  });
}

TEST_CASE("the rotation is the same on all lane groups") {
  std::mt19937 random(1);
  each_head_dim([&]<int dim>() {
    // Small whole numbers: sums are exact, so that only the common factor rounds.
    std::vector<float> a(dim), b;
    for (float& x : a) x = static_cast<float>(static_cast<int>(random() % 15) - 7);
    b = a;
    Rotation<dim>::forward(Serial{}, a.data());
    Rotation<dim>::forward(SimulatedWarp{}, b.data());
    REQUIRE(a == b);
    Rotation<dim>::inverse(Serial{}, a.data());
    Rotation<dim>::inverse(SimulatedWarp{}, b.data());
    REQUIRE(a == b);
  });
}

TEST_CASE("rows of the largest norm come back finite, whichever way they point") {
  each_head_dim([]<int dim>() { check_largest<5, dim>(); });
  each_bits([]<int bits>() {
    check_largest<bits, 256>();
    check_largest<bits, 256, NormCorrection::none>();
    check_largest<bits, 256, NormCorrection::length>();
  });
}

TEST_CASE("zero rows come back as zeros and tiny rows stay tiny") {
  for (const float size : {0.f, -0.f, 1e-45f, 1e-38f, 1e-30f, 1e-8f}) {
    check_finite<5, 40, NormCorrection::least_squares>(std::vector<float>(40, size));
    check_finite<2, 256, NormCorrection::none>(std::vector<float>(256, size));
    check_finite<2, 256, NormCorrection::length>(std::vector<float>(256, size));
  }
}

TEST_CASE("TurboQuant keeps the length of rows with NormCorrection::length") {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  each_bits([&]<int bits>() {
    const TurboQuant<bits, 96, NormCorrection::length> codec;
    for (int round = 0; round < 50; ++round) {
      float row[96], back[96];
      for (float& x : row) x = normal(random);
      std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(1)));
      codec.encode(row, 1, block.data());
      codec.decode(block.data(), 1, 0, back);
      double want = 0, have = 0;
      for (int d = 0; d < 96; ++d) want += double(row[d]) * double(row[d]), have += double(back[d]) * double(back[d]);
      // The scale is fp16.
      CHECK(std::fabs(std::sqrt(have / want) - 1) <= 1.0 / 2048 + 1e-5);
    }
  });
}

TEST_CASE("erase and copy_row move the bytes of rows and nothing else") {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const auto check = [&](const auto& codec) {
    constexpr int dim = std::remove_cvref_t<decltype(codec)>::head_dim, n = 23;
    std::vector<float> rows(n * dim);
    for (float& x : rows) x = normal(random);
    std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(n)));
    REQUIRE(codec.encode(rows.data(), n, block.data()) == codec.max_block_bytes(n));
    for (int round = 0; round < 20; ++round) {
      std::vector<unsigned char> keep(n);
      int kept = 0;
      for (auto& k : keep) kept += (k = static_cast<unsigned char>(random() % 3 != 0)) != 0;
      // Encoding the survivors alone gives the same bytes, and so does copying them one by one.
      std::vector<float> left;
      std::vector<std::byte> erased(static_cast<std::size_t>(codec.max_block_bytes(kept))), again = erased, copied = erased;
      int to = 0;
      for (int r = 0; r < n; ++r) {
        if (keep[static_cast<std::size_t>(r)] == 0) continue;
        left.insert(left.end(), rows.begin() + r * dim, rows.begin() + (r + 1) * dim);
        codec.copy_row(block.data(), n, r, copied.data(), kept, to++);
      }
      REQUIRE(codec.erase(block.data(), n, keep.data(), erased.data()) == codec.max_block_bytes(kept));
      codec.encode(left.data(), kept, again.data());
      REQUIRE(erased == again);
      REQUIRE(copied == again);
    }
  };
  check(Dense<Half, 40>{});
  check(Dense<BFloat16, 64>{});
  check(Dense<float, 80>{});
  check(TurboQuant<1, 40>{});
  check(TurboQuant<2, 64>{});
  check(TurboQuant<3, 112>{});
  check(TurboQuant<4, 96>{});
  check(TurboQuant<5, 40>{});
  check(TurboQuant<6, 256>{});
}

TEST_CASE("every fp16 pattern is the number IEEE 754 says, and rounding is to nearest even") {
  const auto value = [](unsigned bits) {
    const unsigned exponent = bits >> 10, fraction = bits & 1023u;
    return exponent == 0 ? std::ldexp(double(fraction), -24) : std::ldexp(1024.0 + double(fraction), int(exponent) - 25);
  };
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const float x = to_float(Half{static_cast<std::uint16_t>(bits)});
    const unsigned size = bits & 0x7fffu;
    const double sign = bits >= 0x8000u ? -1 : 1;
    if (size > 0x7c00u) {
      if (!std::isnan(x)) FAIL("pattern " << bits);
    } else if (size == 0x7c00u) {
      if (!(double(x) == sign * std::numeric_limits<double>::infinity())) FAIL("pattern " << bits);
    } else if (!(double(x) == sign * value(size)) || std::signbit(x) != (sign < 0)) {
      FAIL("pattern " << bits << " is " << x);
    }
  }
  check_rounding<Half>(value, 0x7bffu);
  CHECK(std::isnan(to_float(from_float<Half>(std::nanf("")))));
  CHECK(from_float<Half>(3e38f).bits == 0x7c00u);
}

TEST_CASE("every bf16 pattern is the upper half of an fp32 number, and rounding is to nearest even") {
  const auto value = [](unsigned bits) {
    const unsigned exponent = bits >> 7, fraction = bits & 127u;
    return exponent == 0 ? std::ldexp(double(fraction), -133) : std::ldexp(128.0 + double(fraction), int(exponent) - 134);
  };
  for (unsigned bits = 0; bits < 0x7f80u; ++bits) {
    const float x = to_float(BFloat16{static_cast<std::uint16_t>(bits)});
    if (!(double(x) == value(bits))) FAIL("pattern " << bits << " is " << x);
  }
  check_rounding<BFloat16>(value, 0x7f7eu);
  for (unsigned bits = 0x7f81u; bits < 0x8000u; ++bits) {
    if (!std::isnan(to_float(from_float<BFloat16>(to_float(BFloat16{static_cast<std::uint16_t>(bits)})))))
      FAIL("pattern " << bits);
  }
}

TEST_CASE("many halves at once are the same as one by one") {
  std::vector<Half> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i].bits = static_cast<std::uint16_t>(i);
  float many[64];
  for (std::size_t at = 0; at < all.size(); at += 64) {
    load_floats<64>(&all[at], many);
    for (std::size_t i = 0; i < 64; ++i) {
      const float one = to_float(all[at + i]);
      if (!(std::isnan(one) ? std::isnan(many[i]) : bits_from_float(one) == bits_from_float(many[i])))
        FAIL("pattern " << at + i);
    }
  }
}
