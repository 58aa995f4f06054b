// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What the tests of codecs share: rows, and checks that hold for every codec.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kvtailor/codec/integer_rows.hpp"
#include "kvtailor/core/concepts.hpp"

namespace codecs {

inline std::vector<float> normal_rows(std::mt19937& random, int n, int dim) {
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(n * dim));
  for (float& x : rows) x = normal(random);
  return rows;
}

// Rows that share `rank` directions of falling strength, with noise of size 1 an element.
inline std::vector<float> low_rank_rows(std::mt19937& random, int n, int dim, int rank, float strength) {
  std::normal_distribution<float> normal;
  std::vector<float> rows = normal_rows(random, n, dim);
  for (int i = 0; i < rank; ++i) {
    const auto left = normal_rows(random, n, 1), right = normal_rows(random, 1, dim);
    for (int row = 0; row < n; ++row) {
      for (int d = 0; d < dim; ++d) {
        rows[static_cast<std::size_t>(row * dim + d)] +=
            strength / static_cast<float>(i + 1) * left[static_cast<std::size_t>(row)] * right[static_cast<std::size_t>(d)];
      }
    }
  }
  return rows;
}

template <class Codec>
std::vector<std::byte> encode(const Codec& codec, const std::vector<float>& rows) {
  const int n = static_cast<int>(rows.size()) / Codec::head_dim;
  std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(n)));
  block.resize(static_cast<std::size_t>(codec.encode(rows.data(), n, block.data())));
  return block;
}

template <class Codec>
std::vector<float> decode(const Codec& codec, const std::vector<std::byte>& block, int n) {
  std::vector<float> rows(static_cast<std::size_t>(n * Codec::head_dim));
  for (int row = 0; row < n; ++row) codec.decode(block.data(), n, row, rows.data() + row * Codec::head_dim);
  return rows;
}

inline double squared_distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double e = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += e * e;
  }
  return sum;
}

// What the host rounds to where it is fast (integer_rows.hpp), as shares of a query's largest element and of the largest
// weight; zero elsewhere.
struct HostUnits {
  double query = 0, weight = 0;
};
template <class Codec>
HostUnits host_units(const Codec& codec = {}) {
#if defined(KVT_HOST_AVX2)
#if defined(KVT_HOST_AVX512)
  constexpr bool words = true;  // of queries
#else
  constexpr bool words = false;
#endif
  if constexpr (requires { codec.codecs; }) {  // OneOf
    return codec.visit([](const auto& chosen) { return host_units(chosen); });
  } else if constexpr (requires { codec.residual; }) {  // LowRank
    return host_units(codec.residual);
  } else if constexpr (requires { codec.codec; }) {  // Shifted
    return host_units(codec.codec);
  } else if constexpr (kvt::HasPrecision<Codec>) {
    if (codec.precision != kvt::Precision::fast) return {};
    if constexpr (requires { typename Codec::Rows; }) {  // PerChannelInt, whose sums are those of decoded rows
      if (Codec::Rows::tiled && !words) return {1 / 127.0, 0};
    } else if constexpr (Codec::tiled) {
      constexpr double more = words ? 1 : std::max(1.0, Codec::Integers::most / 64.0);
      return {words ? 0 : more / 127, more / 255};
    }
  }
#endif
  return {};
}

// Logits and sums over a block are those of the rows it decodes to, in double precision, on both lane groups.
template <class Codec>
void check_attention(const Codec& codec, const std::vector<std::byte>& block, int n) {
  constexpr int dim = Codec::head_dim, m = 3;
  const int stride = n + 2, basis = kvt::basis_dim(codec);
  std::mt19937 random(11);
  const auto rows = decode(codec, block, n);
  const auto queries = normal_rows(random, m, dim), weights = normal_rows(random, m, stride);
  double energy = 0, longest = 0;
  for (int row = 0; row < n; ++row) {
    double own = 0;
    for (int d = 0; d < dim; ++d) {
      const double x = static_cast<double>(rows[static_cast<std::size_t>(row * dim + d)]);
      own += x * x;
    }
    energy += own;
    longest = std::max(longest, own);
  }
  // Sums of at most n * dim products, a rotation and a few more roundings: in units of 2^-24 of what is summed.
  const double unit = std::ldexp(4.0 * (dim + n), -24);
  const auto run = [&](auto lanes) {
    // Elements are rounded this way and that: five times what is expected of a query with elements like normal numbers.
    const HostUnits units = decltype(lanes)::size == 1 ? host_units(codec) : HostUnits{};
    std::vector<float> prepared(static_cast<std::size_t>(m * basis)), logits(static_cast<std::size_t>(m * stride), 7.f);
    std::vector<float> sums(prepared.size(), 0.f), out(static_cast<std::size_t>(m * dim), 1.f);
    for (int j = 0; j < m; ++j) codec.prepare(lanes, queries.data() + j * dim, 0.5f, prepared.data() + j * basis);
    codec.logits(lanes, block.data(), n, prepared.data(), m, logits.data(), stride);
    codec.accumulate(lanes, block.data(), n, weights.data(), m, stride, sums.data());
    for (int j = 0; j < m; ++j) codec.finish(lanes, sums.data() + j * basis, out.data() + j * dim);
    for (int j = 0; j < m; ++j) {
      for (int row = 0; row < n; ++row) {
        double want = 0, size = 0;
        for (int d = 0; d < dim; ++d) {
          const double q = 0.5 * static_cast<double>(queries[static_cast<std::size_t>(j * dim + d)]);
          want += q * static_cast<double>(rows[static_cast<std::size_t>(row * dim + d)]);
          size += q * q;
        }
        const double have = static_cast<double>(logits[static_cast<std::size_t>(j * stride + row)]);
        const double rounding = .5 * units.query * std::sqrt(size * longest);
        if (!(std::fabs(have - want) <= unit * std::sqrt(size * energy) + rounding + 1e-30))
          FAIL("logit " << have << ", not " << want);
      }
      for (int row = n; row < stride; ++row) REQUIRE(logits[static_cast<std::size_t>(j * stride + row)] == 7.f);
      for (int d = 0; d < dim; ++d) {
        double want = 1, size = 0, top = 0;
        for (int row = 0; row < n; ++row) {
          const double w = static_cast<double>(weights[static_cast<std::size_t>(j * stride + row)]);
          want += w * static_cast<double>(rows[static_cast<std::size_t>(row * dim + d)]);
          size += w * w;
          top = std::max(top, std::fabs(w));
        }
        const double rounding = 4 * units.weight * top * std::sqrt(n * longest / dim);
        const double have = static_cast<double>(out[static_cast<std::size_t>(j * dim + d)]);
        if (!(std::fabs(have - want) <= unit * (1 + std::sqrt(size * energy)) + rounding))
          FAIL("output " << have << ", not " << want);
      }
    }
  };
  run(kvt::Serial{});
  run(kvt::SimulatedWarp{});
}

// Rows that stay are bit for bit what they were, however often others go.
template <class Codec>
void check_erase(const Codec& codec, std::vector<std::byte> block, int n) {
  std::mt19937 random(12);
  auto rows = decode(codec, block, n);
  constexpr auto dim = static_cast<std::size_t>(Codec::head_dim);
  while (n > 1) {
    std::vector<unsigned char> keep(static_cast<std::size_t>(n), 1);
    for (auto& k : keep) k = static_cast<unsigned char>(random() % 3 != 0);
    keep[random() % keep.size()] = 1;
    std::vector<float> left;
    for (std::size_t row = 0; row < keep.size(); ++row) {
      if (keep[row] == 0) continue;
      left.insert(left.end(), rows.begin() + static_cast<std::ptrdiff_t>(row * dim),
                  rows.begin() + static_cast<std::ptrdiff_t>((row + 1) * dim));
    }
    std::vector<std::byte> erased(static_cast<std::size_t>(codec.max_block_bytes(n)));
    const int bytes = codec.erase(block.data(), n, keep.data(), erased.data());
    REQUIRE(bytes <= static_cast<int>(block.size()));
    erased.resize(static_cast<std::size_t>(bytes));
    block = erased;
    n = static_cast<int>(left.size() / dim);
    rows = decode(codec, block, n);
    REQUIRE(rows == left);
    check_attention(codec, block, n);
    if (n == static_cast<int>(keep.size()) && n < 3) return;
  }
}

// Rows a cache lets in, and some it does not: nothing that is stored or comes back is NaN or infinite.
template <class Codec>
void check_hostile(const Codec& codec) {
  constexpr int dim = Codec::head_dim;
  std::mt19937 random(13);
  const float nan = std::nanf(""), inf = INFINITY;
  const auto check = [&](const std::vector<float>& rows, double most) {
    const int n = static_cast<int>(rows.size()) / dim;
    const auto back = decode(codec, encode(codec, rows), n);
    double sum = 0;
    for (const float x : back) sum += static_cast<double>(x) * static_cast<double>(x);
    REQUIRE(std::sqrt(sum) <= most);  // and not NaN
  };
  for (const int n : {1, 2, 3, 5, 33, 128}) {
    const auto size = static_cast<std::size_t>(n * dim);
    check(std::vector<float>(size, 0.f), 1e-6);
    check(std::vector<float>(size, 1e-42f), 1e-3);
    check(std::vector<float>(size, 3.f), 2 * 3.0 * std::sqrt(static_cast<double>(size)));
    auto rows = normal_rows(random, n, dim);
    for (int row = 0; row < n; ++row) {  // from 1e-9 to 1e3
      for (int d = 0; d < dim; ++d)
        rows[static_cast<std::size_t>(row * dim + d)] *= std::pow(10.f, static_cast<float>(row % 13 - 9));
    }
    check(rows, 2e3 * std::sqrt(static_cast<double>(size)));
    std::vector<float> single(size, 0.f);  // as long as a row may be
    const double most = std::min(static_cast<double>(codec.max_row_norm()), 65504.0);
    single[size - 1] = static_cast<float>(0.9999 * most);
    check(single, 2 * most);
    for (const float bad : {nan, inf, -inf, 3e38f}) {
      auto wrong = normal_rows(random, n, dim);
      wrong[size / 2] = bad;
      check(wrong, 1e6 * std::sqrt(static_cast<double>(size)));
    }
  }
}

}  // namespace codecs
