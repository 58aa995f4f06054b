// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Blocks of LowRank encoded on the simulated device: beside those of the host.
#include <doctest/doctest.h>

#include <Eigen/SVD>
#include <random>

#include "kvtailor/codec/dense.hpp"
#include "kvtailor/codec/low_rank_work.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant.hpp"
#include "unit/codecs.hpp"

using namespace kvt;

namespace {

template <int bits, int dim>
using Short = LloydMax<bits, dim, NormCorrection::least_squares, LogScale>;

// Blocks of n rows each, as the device writes them.
template <int max_rows = 128, class Codec, class T>
std::vector<std::vector<std::byte>> encode_on_device(const Codec& codec, const std::vector<T>& rows, int n) {
  SimulatedDevice device;
  const int blocks = static_cast<int>(rows.size()) / (n * Codec::head_dim), stride = codec.max_block_bytes(n) + 8;
  std::vector<float> scratch(rows.size(), NAN);
  std::vector<std::byte> out(static_cast<std::size_t>(blocks * stride), std::byte{0xee});
  std::vector<int> bytes(static_cast<std::size_t>(blocks), -1);
  REQUIRE(
      encode_blocks<max_rows>(device, codec, rows.data(), blocks, n, scratch.data(), out.data(), stride, bytes.data()).ok());
  std::vector<std::vector<std::byte>> all;
  for (int i = 0; i < blocks; ++i) {
    const int size = bytes[static_cast<std::size_t>(i)];
    REQUIRE(size > 0);
    REQUIRE(size <= codec.max_block_bytes(n));
    all.emplace_back(out.begin() + i * stride, out.begin() + i * stride + size);
    for (int k = stride - 8; k < stride; ++k) REQUIRE(out[static_cast<std::size_t>(i * stride + k)] == std::byte{0xee});
  }
  return all;
}

template <class Codec>
LowRankOptions& options(Codec& codec) {
  return codec;
}

// Ranks, bits and sizes are those of the host; so are errors, but for rounding that moves a few codes, far at one bit.
template <int max_rows = 128, class Codec>
void check_like_host(const Codec& codec, const std::vector<float>& rows, int n) {
  constexpr int dim = Codec::head_dim;
  const auto all = encode_on_device<max_rows>(codec, rows, n);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto* const from = rows.data() + i * static_cast<std::size_t>(n * dim);
    const std::vector<float> own(from, from + n * dim);
    const auto host = codecs::encode(codec, own);
    const auto& block = all[i];
    CAPTURE(dim);
    CAPTURE(n);
    CAPTURE(i);
    const int rank = codec.rank(host.data());
    REQUIRE(codec.rank(block.data()) == rank);
    for (int pair = 0; pair < rank; ++pair)
      REQUIRE(block[static_cast<std::size_t>(2 + 5 * pair)] == host[static_cast<std::size_t>(2 + 5 * pair)]);
    REQUIRE(block.size() == host.size());
    const double apart = rank > 0 && block[2] == std::byte{1} ? .03 : .01;
    const double there = codecs::squared_distance(own, codecs::decode(codec, block, n));
    const double here = codecs::squared_distance(own, codecs::decode(codec, host, n));
    CHECK(std::fabs(there - here) <= apart * here);
  }
}

// What keys look like: channels that swing together along the rows, a few of them large, and noise.
std::vector<float> like_keys(std::mt19937& random, int n, int dim) {
  std::normal_distribution<float> normal;
  auto rows = codecs::normal_rows(random, n, dim);
  for (int d = 0; d < dim; ++d) {
    const float size = d % 16 == 3 ? 40.f : 4.f * std::fabs(normal(random)), phase = normal(random);
    const float turn = std::pow(10.f, -4.f * static_cast<float>(d / 2) / static_cast<float>(dim / 2));
    for (int row = 0; row < n; ++row) {
      rows[static_cast<std::size_t>(row * dim + d)] += size * std::cos(turn * static_cast<float>(row) + phase);
    }
  }
  return rows;
}

template <class Codec>
std::vector<Codec> every_rule() {
  std::vector<Codec> all(1);
  for (const int bits : {1, 3, 4, 6, 16}) {
    Codec codec;
    options(codec).rule = RankRule::bbp;
    options(codec).factor_bits = bits;
    options(codec).shrinkage = bits == 1 ? Shrinkage::none : bits == 3 ? Shrinkage::nuclear : Shrinkage::frobenius;
    options(codec).loop = bits == 6 ? Loop::open : Loop::closed;
    options(codec).max_rank = bits == 4 ? 32 : 8;
    all.push_back(codec);
  }
  return all;
}

template <class Residual, int max_rows = 128>
void check_codec(unsigned seed, std::initializer_list<int> sizes) {
  constexpr int dim = Residual::head_dim;
  std::mt19937 random(seed);
  for (const auto& codec : every_rule<Rotated<LowRank<Residual>>>()) {
    for (const int n : sizes) {
      check_like_host<max_rows>(codec, codecs::normal_rows(random, 2 * n, dim), n);
      for (const int rank : {1, 4, 12}) {
        check_like_host<max_rows>(codec, codecs::low_rank_rows(random, n, dim, rank, 7.f), n);
      }
      check_like_host<max_rows>(codec, like_keys(random, n, dim), n);
    }
  }
}

// The product of the factors of a block, whose pairs have 16 bits.
template <class Codec>
Eigen::MatrixXd product(const Codec& codec, const std::vector<std::byte>& block, int n) {
  constexpr int dim = Codec::head_dim;
  const int rank = codec.rank(block.data()), pair = 5 + 2 * (n + dim);
  const auto head = static_cast<std::size_t>((2 + rank * pair + 3) / 4 * 4);
  const std::vector<std::byte> rest(block.begin() + static_cast<std::ptrdiff_t>(head), block.end());
  const auto whole = codecs::decode(codec, block, n), residual = codecs::decode(codec.residual, rest, n);
  Eigen::MatrixXd out(n, dim);
  for (int i = 0; i < n * dim; ++i) {
    const auto at = static_cast<std::size_t>(i);
    out(i / dim, i % dim) = static_cast<double>(whole[at]) - static_cast<double>(residual[at]);
  }
  return out;
}

}  // namespace

TEST_CASE("blocks have the ranks, the bits and the errors of the host's") {
  check_codec<Short<2, 64>>(1, {1, 2, 7, 40, 65, 128});
  check_codec<Short<3, 40>>(2, {39, 41, 128});
  check_codec<LloydMax<4, 128>>(3, {128});
  check_codec<Trellis<2, 80>>(4, {5, 100});
  check_codec<Trellis<3, 256>>(5, {33});
  check_codec<Short<1, 64>, 256>(6, {200});
}

TEST_CASE("factors span what the singular vectors of the block span, be its values ten thousand times those of the noise") {
  using Codec = LowRank<Short<2, 64>>;
  std::mt19937 random(7);
  Codec codec;
  codec.rule = RankRule::bbp;
  codec.factor_bits = 16;
  for (const auto shrinkage : {Shrinkage::none, Shrinkage::frobenius}) {
    codec.shrinkage = shrinkage;
    for (const int n : {40, 64, 128}) {
      for (const float strength : {3.f, 30.f, 1000.f}) {
        codec.max_rank = 3;
        const auto rows = codecs::low_rank_rows(random, n, 64, 5, strength);
        const auto host = codecs::encode(codec, rows), block = encode_on_device(codec, rows, n)[0];
        CAPTURE(n);
        CAPTURE(strength);
        REQUIRE(codec.rank(host.data()) == 3);
        REQUIRE(codec.rank(block.data()) == 3);
        const Eigen::MatrixXd have = product(codec, block, n), want = product(codec, host, n);
        CHECK((have - want).norm() <= 5e-4 * want.norm());  // fp16
        if (shrinkage == Shrinkage::none) {
          const Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>> given(rows.data(), n,
                                                                                                              64);
          const Eigen::BDCSVD<Eigen::MatrixXd> svd(given.cast<double>(), Eigen::ComputeThinU | Eigen::ComputeThinV);
          const Eigen::MatrixXd truncated =
              svd.matrixU().leftCols(3) * svd.singularValues().head(3).asDiagonal() * svd.matrixV().leftCols(3).transpose();
          CHECK((have - truncated).norm() <= 5e-4 * truncated.norm());
        }
      }
    }
  }
}

TEST_CASE("rows of fp16 and bfloat16 are those of fp32 they stand for") {
  std::mt19937 random(8);
  const Rotated<LowRank<Trellis<2, 64>>> codec;
  const auto check = [&](auto one) {
    std::vector<decltype(one)> narrow;
    std::vector<float> wide;
    for (const float x : codecs::low_rank_rows(random, 2 * 100, 64, 3, 5.f)) {
      narrow.push_back(from_float<decltype(one)>(x));
      wide.push_back(to_float(narrow.back()));
    }
    CHECK(encode_on_device(codec, narrow, 100) == encode_on_device(codec, wide, 100));
  };
  check(Half{});
  check(BFloat16{});
}

TEST_CASE("whatever the rows are, what comes back is finite") {
  const auto check = [](const auto& codec) {
    struct OnDevice : std::remove_cvref_t<decltype(codec)> {
      int encode(const float* rows, int n, std::byte* block) const {
        const auto size = static_cast<std::size_t>(n * OnDevice::head_dim);
        const std::remove_cvref_t<decltype(codec)>& own = *this;
        const auto bytes = encode_on_device(own, std::vector<float>(rows, rows + size), n)[0];
        std::copy(bytes.begin(), bytes.end(), block);
        return static_cast<int>(bytes.size());
      }
    };
    OnDevice one;
    options(one) = codec;
    codecs::check_hostile(one);
  };
  for (const auto& codec : every_rule<Rotated<LowRank<Short<2, 64>>>>()) check(codec);
  check(Rotated<LowRank<Trellis<3, 80>>>{});
  check(LowRank<Short<4, 128>>{});
}

TEST_CASE("blocks without low rank, or with one that does not fit, are those of the host byte for byte") {
  std::mt19937 random(9);
  const auto same = [](const auto& codec, const std::vector<float>& rows, int n) {
    const auto host = codecs::encode(codec, rows);
    CHECK(codec.rank(host.data()) == 0);
    CHECK(encode_on_device(codec, rows, n)[0] == host);
  };
  const LowRank<Dense<float, 64>> dense;
  auto rows = codecs::normal_rows(random, 128, 64);
  same(dense, rows, 128);
  same(dense, std::vector<float>(rows.size(), 0.f), 128);
  for (const float bad : {std::nanf(""), INFINITY, 1e30f}) {
    auto wrong = rows;
    wrong[777] = bad;
    same(dense, wrong, 128);
  }
  same(dense, std::vector<float>(rows.size(), 1e6f), 128);  // one direction, of left factors beyond fp16
  // A row at right angles to the others, as long as it may be: at one bit its left factor is that of the others, and what is
  // left of it is longer.
  LowRank<LloydMax<2, 64>> coarse;
  coarse.rule = RankRule::bbp;
  coarse.factor_bits = 1;
  coarse.max_rank = 1;
  const auto top = static_cast<float>(.999 * coarse.max_row_norm()) / 8;
  for (int i = 0; i < 128 * 64; ++i) rows[static_cast<std::size_t>(i)] = i / 64 == 5 || i % 2 == 0 ? top : -top;
  for (int i = 0; i < 128 * 64; ++i)
    rows[static_cast<std::size_t>(i)] += i / 64 == 5 ? 0.f : .01f * top * std::sin(7.f * i * i);
  same(coarse, rows, 128);
  std::copy_n(rows.begin() + 4 * 64, 64, rows.begin() + 5 * 64);
  CHECK(coarse.rank(encode_on_device(coarse, rows, 128)[0].data()) == 1);  // without it they fit
}

TEST_CASE("equal rows, and rows of one direction, leave what the host leaves") {
  std::mt19937 random(10);
  const LowRank<Short<3, 64>> codec;
  const auto direction = codecs::normal_rows(random, 1, 64), along = codecs::normal_rows(random, 128, 1);
  for (const float size : {1e-3f, 1.f, 1e3f}) {
    std::vector<float> equal, line;
    for (int i = 0; i < 128 * 64; ++i) {
      equal.push_back(size * direction[static_cast<std::size_t>(i % 64)]);
      line.push_back(equal.back() * along[static_cast<std::size_t>(i / 64)]);
    }
    check_like_host(codec, equal, 128);
    check_like_host(codec, line, 128);
  }
}

TEST_CASE("blocks that are too long, ranks and strides are refused") {
  SimulatedDevice device;
  LowRank<Short<2, 64>> codec;
  float x = 0, scratch = 0;
  std::byte out{};
  int bytes = 0;
  const auto encode = [&](int blocks, int n, long long stride) {
    return encode_blocks<128>(device, codec, &x, blocks, n, &scratch, &out, stride, &bytes).code;
  };
  CHECK(encode(1, 129, 1 << 20) == Errc::bad_shape);
  CHECK(encode(1, 0, 1 << 20) == Errc::bad_shape);
  CHECK(encode(-1, 128, 1 << 20) == Errc::bad_shape);
  CHECK(encode(1, 128, codec.max_block_bytes(128) - 1) == Errc::bad_shape);
  CHECK(encode(0, 128, codec.max_block_bytes(128)) == Errc::ok);
  for (const int rank : {-1, 33}) {
    codec.max_rank = rank;
    CHECK(encode(1, 128, 1 << 20) == Errc::bad_value);
  }
}
