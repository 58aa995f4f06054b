// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention of many queries on long blocks, which the host does in integers where it can: against double precision, with the
// errors that rounding to 16 bits, or to 8 where a codec is fast, may make, and not more.
#include "codecs.hpp"
#include "kvtailor/codec/group_int.hpp"
#include "kvtailor/codec/kv_codec.hpp"
#include "kvtailor/codec/lloyd_max.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"

using namespace kvt;

namespace {

// What rows decode to, in the basis that queries are prepared for.
template <class Codec>
std::vector<float> rows_of(const std::vector<std::byte>& block, int n) {
  const Codec codec;
  const int basis = basis_dim(codec);
  std::vector<float> rows;
  for (int row = 0; row < n; ++row) {
    if constexpr (Codec::plain) {
      rows.resize(rows.size() + static_cast<std::size_t>(basis));
      codec.decode(block.data(), n, row, &rows[static_cast<std::size_t>(row * basis)]);
    } else {
      LaneRow<Codec::max_basis_dim, 1> x;
      codec.template load<1>(block.data(), n, row, 0, x);
      rows.insert(rows.end(), x.x, x.x + basis);
    }
  }
  return rows;
}

// `wide` is what integers times scales may be larger than rows: where levels are not around zero.
template <class Codec>
void check(const Codec& codec, int n, int m, double wide) {
  CAPTURE(Codec::head_dim);
  CAPTURE(n);
  CAPTURE(m);
  const int basis = basis_dim(codec);
  std::mt19937 random(static_cast<unsigned>(31 * n + m));
  auto input = codecs::normal_rows(random, n, Codec::head_dim);
  for (std::size_t i = 0; i < input.size(); ++i) input[i] *= 1 + static_cast<float>(i / Codec::head_dim % 7);
  const auto block = codecs::encode(codec, input);
  const auto rows = rows_of<Codec>(block, n);
  const auto at = [&](int row, int d) { return static_cast<double>(rows[static_cast<std::size_t>(row * basis + d)]); };
  auto queries = codecs::normal_rows(random, m, basis), weights = codecs::normal_rows(random, m, n);
  const float sizes[] = {1, 1e-20f, 1e25f, 0, 1};
  for (int j = 0; j < m; ++j) {
    for (int d = 0; d < basis; ++d) queries[static_cast<std::size_t>(j * basis + d)] *= sizes[j % 5];
    // Peaks, flat ones, and blocks whose weights are as good as zero.
    for (int row = 0; row < n; ++row) {
      float& w = weights[static_cast<std::size_t>(j * n + row)];
      if (j % 4 == 1) w = row == n / 2 ? 1.f : 1e-3f * w;
      if (j % 4 == 2) w = 1;
      if (j % 4 == 3) w *= row < 128 ? 1e-36f : 1.f;
    }
  }
  std::vector<float> logits(static_cast<std::size_t>(m * n)), sums(static_cast<std::size_t>(m * basis), 0.f);
  codec.logits(Serial{}, block.data(), n, queries.data(), m, logits.data(), n);
  codec.accumulate(Serial{}, block.data(), n, weights.data(), m, n, sums.data());
  // fp32 sums of products, and half a unit of 16 bits; at large head dims, sums of 32 bits leave a little less than 16.
  const codecs::HostUnits units = codecs::host_units(codec);
  const double fp32 = std::ldexp(basis + 8, -24),
               half_unit = units.query > 0 ? .5 * units.query : std::ldexp(basis > 128 ? 4 : 1, -16);
  for (int j = 0; j < m; ++j) {
    double top = 0;
    for (int d = 0; d < basis; ++d) top = std::max(top, std::fabs(double(queries[static_cast<std::size_t>(j * basis + d)])));
    for (int row = 0; row < n; ++row) {
      double want = 0, size = 0, length = 0;
      for (int d = 0; d < basis; ++d) {
        const double q = double(queries[static_cast<std::size_t>(j * basis + d)]);
        want += q * at(row, d);
        size += std::fabs(at(row, d));
        length += std::fabs(q * at(row, d));
      }
      const double error = std::fabs(double(logits[static_cast<std::size_t>(j * n + row)]) - want);
      if (!(error <= fp32 * wide * length + half_unit * wide * top * size + 1e-36)) {
        FAIL("query " << j << ", row " << row << ": " << logits[static_cast<std::size_t>(j * n + row)] << ", not " << want);
      }
    }
    double square = 0, expected = 0;  // of the error of the whole sum, if weights are off by a unit, but not all one way
    for (int d = 0; d < basis; ++d) {
      double want = 0, bound = 1e-29;
      for (int first = 0; first < n; first += 128) {
        const int last = std::min(n, first + 128);
        double most = 0, count = 0, own = 0;
        for (int row = first; row < last; ++row) {
          const double w = double(weights[static_cast<std::size_t>(j * n + row)]);
          want += w * at(row, d);
          bound += std::ldexp(n + 8, -24) * wide * std::fabs(w * at(row, d));
          double longest = 0;
          for (int e = 0; e < basis; ++e) longest = std::max(longest, std::fabs(at(row, e)));
          most = std::max(most, std::fabs(w) * longest);
          own += at(row, d) * at(row, d) / (longest * longest);
          ++count;
        }
        // Of scaled weights; levels are at most four times what a scale of 1 stands for.
        bound += 4 * std::ldexp(wide * most * count, -16);
        if (units.weight > 0) {
          bound += most * units.weight * count;
          expected += most * most * units.weight * units.weight * own;
        }
      }
      const double error = std::fabs(double(sums[static_cast<std::size_t>(j * basis + d)]) - want);
      square += error * error;
      if (!(error <= bound)) FAIL("query " << j << ": " << sums[static_cast<std::size_t>(j * basis + d)] << ", not " << want);
    }
    if (units.weight > 0 && n > 100 && !(square <= expected + 1e-50))
      FAIL("query " << j << ": " << square << " > " << expected);
  }
}

template <class Codec>
void check_sizes(double wide = 1) {
  Codec accurate;
  const bool has_choice = set_precision(accurate, Precision::accurate);
  for (const int n : {1, 2, 3, 7, 8, 9, 127, 128, 129, 300}) {
    check(Codec{}, n, n == 300 ? 37 : 5, wide);
    if (has_choice) check(accurate, n, n == 300 ? 37 : 5, wide);
  }
}

// Outputs of attention of m queries on one block of n rows, by a codec's integers after a softmax in double precision, for each
// way in which weights can be spread: rms of their error, as a share of their size.
enum class Spread { random, peaky, flat, sink };
template <class Codec>
double output_error(const Codec& codec, const std::vector<std::byte>& block, int n, int m, Spread spread) {
  constexpr int dim = Codec::head_dim;
  std::mt19937 random(static_cast<unsigned>(n + 100 * m));
  const auto rows = codecs::decode(codec, block, n);
  auto queries = codecs::normal_rows(random, m, dim);
  const float size = spread == Spread::peaky ? 6.f : spread == Spread::flat ? 1e-2f : 1.f;
  for (float& q : queries) q *= size / std::sqrt(static_cast<float>(dim));
  std::vector<float> logits(static_cast<std::size_t>(m * n)), sums(queries.size(), 0.f);
  std::vector<double> totals;
  codec.logits(Serial{}, block.data(), n, queries.data(), m, logits.data(), n);
  const auto shift = [&](int row) { return spread == Spread::sink && row == 0 ? 5.0 : 0.0; };
  for (int j = 0; j < m; ++j) {
    double total = 0;
    for (int row = 0; row < n; ++row) {
      float& w = logits[static_cast<std::size_t>(j * n + row)];
      w = static_cast<float>(std::exp(double(w) + shift(row)));
      total += double(w);
    }
    totals.push_back(total);
  }
  codec.accumulate(Serial{}, block.data(), n, logits.data(), m, n, sums.data());
  double wrong = 0, whole = 0;
  for (int j = 0; j < m; ++j) {
    std::vector<double> want(dim);
    double total = 0;
    for (int row = 0; row < n; ++row) {
      const float *const x = &rows[static_cast<std::size_t>(row * dim)], *const q = &queries[static_cast<std::size_t>(j * dim)];
      double logit = shift(row);
      for (int d = 0; d < dim; ++d) logit += double(q[d]) * double(x[d]);
      total += std::exp(logit);
      for (int d = 0; d < dim; ++d) want[static_cast<std::size_t>(d)] += std::exp(logit) * double(x[d]);
    }
    for (int d = 0; d < dim; ++d) {
      const double exact = want[static_cast<std::size_t>(d)] / total;
      const double have = double(sums[static_cast<std::size_t>(j * dim + d)]) / totals[static_cast<std::size_t>(j)];
      wrong += (have - exact) * (have - exact);
      whole += exact * exact;
    }
  }
  return std::sqrt(wrong / whole);
}

// Both precisions read what either of them wrote.
template <class Codec>
void check_precisions() {
  CAPTURE(Codec::head_dim);
  Codec fast, accurate;
  REQUIRE(set_precision(fast, Precision::fast));
  REQUIRE(set_precision(accurate, Precision::accurate));
  std::mt19937 random(17);
  for (const int n : {63, 301}) {
    const auto rows = codecs::normal_rows(random, n, Codec::head_dim);
    const auto block = codecs::encode(fast, rows);
    CHECK(codecs::encode(accurate, rows) == block);
    for (const int m : {1, 3, 8}) {
      for (const Spread spread : {Spread::random, Spread::peaky, Spread::flat, Spread::sink}) {
        CAPTURE(n);
        CAPTURE(m);
        CAPTURE(static_cast<int>(spread));
        const double coarse = output_error(fast, block, n, m, spread), fine = output_error(accurate, block, n, m, spread);
        CHECK(fine <= 1.5e-4);
#if defined(KVT_HOST_AVX512)
        CHECK(coarse <= .02);
#else
        CHECK(coarse <= .03);  // queries are bytes too
#endif
#if defined(KVT_HOST_AVX2)
        if (spread == Spread::random) CHECK(coarse > 1e-3);  // it is not the other
#endif
      }
    }
  }
}

}  // namespace

TEST_CASE("scalar codes") {
  check_sizes<LloydMax<1, 64>>();
  check_sizes<LloydMax<2, 64>>();
  check_sizes<LloydMax<3, 96>>();
  check_sizes<LloydMax<4, 128>>();
  check_sizes<LloydMax<5, 192>>();
  check_sizes<LloydMax<6, 256>>();
  check_sizes<LloydMax<4, 40>>();
  check_sizes<LloydMax<6, 80>>();
  check_sizes<LloydMax<2, 112>>();
  check_sizes<LloydMax<4, 512>>();
}
TEST_CASE("trellis codes") {
  check_sizes<Trellis<1, 64>>();
  check_sizes<Trellis<1, 96>>();
  check_sizes<Trellis<2, 64>>();
  check_sizes<Trellis<2, 128>>();
  check_sizes<Trellis<3, 64>>();
  check_sizes<Trellis<3, 192, 6>>();
  check_sizes<Trellis<4, 256>>();
  check_sizes<Trellis<2, 112>>();
  check_sizes<Trellis<2, 512>>();
}
TEST_CASE("groups") {
  check_sizes<Q8_0<64>>();
  check_sizes<Q5_0<128>>();
  check_sizes<Q4_0<96>>();
  check_sizes<Q4_1<64>>(3);
  check_sizes<Q5_1<256>>(3);
}
TEST_CASE("codes and a sketch") {
  check_sizes<TurboQuantUnbiased<3, 64>>();
  check_sizes<TurboQuantUnbiased<3, 128>>();  // groups that are read in parts
}

TEST_CASE("outputs at both precisions, of the same bytes, against double precision") {
  check_precisions<LloydMax<2, 64>>();
  check_precisions<LloydMax<4, 128>>();
  check_precisions<LloydMax<2, 112>>();
  check_precisions<Trellis<2, 64>>();
  check_precisions<Trellis<4, 256>>();
}

TEST_CASE("small weights beside a large one count together") {
  const LloydMax<4, 64> codec;
  std::mt19937 random(3);
  constexpr int n = 128;
  const auto row = codecs::normal_rows(random, 1, 64);
  std::vector<float> input;
  for (int k = 0; k < n; ++k) input.insert(input.end(), row.begin(), row.end());
  const auto block = codecs::encode(codec, input);
  const std::vector<float> rows = codecs::decode(codec, block, n);
  for (const float small : {3e-4f, 1e-3f, 3e-3f}) {
    std::vector<float> weights(n, small), sums(64, 0.f);
    weights[0] = 1;
    codec.accumulate(Serial{}, block.data(), n, weights.data(), 1, n, sums.data());
    const float total = 1 + (n - 1) * small;
    for (std::size_t d = 0; d < 64; ++d) CHECK(std::fabs(sums[d] - total * rows[d]) <= .006f * std::fabs(rows[d]));
  }
}

TEST_CASE("equal rows with equal weights, whose sum of integers would not fit") {
  const LloydMax<6, 64> codec;
  constexpr int n = 128;
  std::vector<float> input(n * 64, 0.f);
  for (int row = 0; row < n; ++row) input[static_cast<std::size_t>(64 * row + 5)] = 8;
  const auto block = codecs::encode(codec, input);
  const std::vector<float> weights(n, 1.f), rows = codecs::decode(codec, block, n);
  std::vector<float> sums(64, 0.f);
  codec.accumulate(Serial{}, block.data(), n, weights.data(), 1, n, sums.data());
  for (std::size_t d = 0; d < 64; ++d) CHECK(std::fabs(sums[d] - n * rows[d]) <= 0.06f);  // of 1024, in weights of 14 bits
}

TEST_CASE("what is not a number stays none") {
  const LloydMax<3, 64> codec;
  std::mt19937 random(1);
  const auto block = codecs::encode(codec, codecs::normal_rows(random, 8, 64));
  for (const float bad : {std::nanf(""), INFINITY}) {
    auto query = codecs::normal_rows(random, 1, 64), weights = codecs::normal_rows(random, 1, 8);
    query[7] = weights[3] = bad;
    std::vector<float> logits(8), sums(64);
    codec.logits(Serial{}, block.data(), 8, query.data(), 1, logits.data(), 8);
    codec.accumulate(Serial{}, block.data(), 8, weights.data(), 1, 8, sums.data());
    for (const float x : logits) CHECK(!std::isfinite(x));
    for (const float x : sums) CHECK(!std::isfinite(x));
  }
}

TEST_CASE("queries are made integers once, where there is room to keep them") {
  const Q8_0<64> codec;
  std::mt19937 random(2);
  constexpr int n = 128, m = 19;
  const std::vector<std::byte> blocks[] = {codecs::encode(codec, codecs::normal_rows(random, n, 64)),
                                           codecs::encode(codec, codecs::normal_rows(random, n, 64))};
  const auto queries = codecs::normal_rows(random, m, 64);
  alignas(64) std::byte memory[QueryMemory::places * 8192];
  for (const int place_bytes : {0, 8192}) {
    QueryMemory kept{memory, place_bytes};
    for (const auto& block : blocks) {
      const SerialReader reader(block.data(), static_cast<int>(block.size()), nullptr, kept);
      std::vector<float> expected(n * m), logits(n * m);
      codec.logits(Serial{}, block.data(), n, queries.data(), m, expected.data(), n);
      codec.logits(reader, block.data(), n, queries.data(), m, logits.data(), n);
      CHECK(logits == expected);
    }
#if defined(KVT_HOST_AVX2)
    CHECK(kept.queries[0] == (place_bytes == 0 ? nullptr : queries.data()));
#endif
  }
  // One place for each address and type.
  QueryMemory kept{memory, 64};
  const float *const a = queries.data(), *const b = a + 64, *const c = b + 64;
  int made = 0;
  const auto make = [&] { return ++made; };
  CHECK(*kept.find<int>(a, make) == 1);
  CHECK(*kept.find<int>(a, make) == 1);
  CHECK(*kept.find<long>(a, make) == 2);
  CHECK(kept.find<int>(b, make) == nullptr);
  CHECK(kept.find<int>(c, make) == nullptr);
  CHECK(*kept.find<int>(a, make) == 1);
  CHECK(made == 2);
}
