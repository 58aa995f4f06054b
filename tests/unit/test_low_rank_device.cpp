// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Blocks of LowRank encoded on the simulated device: beside those of the host.
#include <doctest/doctest.h>

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
      encode_low_rank<max_rows>(device, codec, rows.data(), blocks, n, scratch.data(), out.data(), stride, bytes.data()).ok());
  std::vector<std::vector<std::byte>> all;
  for (int i = 0; i < blocks; ++i) {
    const int size = bytes[static_cast<std::size_t>(i)];
    REQUIRE(size > 0);
    REQUIRE(size <= codec.max_block_bytes(n));
    all.emplace_back(out.begin() + i * stride, out.begin() + i * stride + size);
    for (int k = size; k < stride; ++k) REQUIRE(out[static_cast<std::size_t>(i * stride + k)] == std::byte{0xee});
  }
  return all;
}

template <class Codec>
LowRankOptions& options(Codec& codec) {
  return codec;
}

// Ranks, bits and sizes are those of the host; so are errors, but for rounding that moves a few codes.
template <int max_rows = 128, class Codec>
void check_like_host(const Codec& codec, const std::vector<float>& rows, int n, double apart = .01) {
  constexpr int dim = Codec::head_dim;
  const auto all = encode_on_device<max_rows>(codec, rows, n);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto* const from = rows.data() + i * static_cast<std::size_t>(n * dim);
    const std::vector<float> own(from, from + n * dim);
    const auto host = codecs::encode(codec, own);
    const auto& block = all[i];
    CAPTURE(n);
    CAPTURE(i);
    const int rank = codec.rank(host.data());
    REQUIRE(codec.rank(block.data()) == rank);
    for (int pair = 0; pair < rank; ++pair)
      REQUIRE(block[static_cast<std::size_t>(2 + 5 * pair)] == host[static_cast<std::size_t>(2 + 5 * pair)]);
    REQUIRE(block.size() == host.size());
    const double there = codecs::squared_distance(own, codecs::decode(codec, block, n));
    const double here = codecs::squared_distance(own, codecs::decode(codec, host, n));
    CHECK(std::fabs(there - here) <= apart * here);
  }
}

}  // namespace

TEST_CASE("debug") {
  std::mt19937 random(1);
  for (int rank : {0, 1, 3, 12})
    check_like_host(Rotated<LowRank<Short<2, 64>>>{}, codecs::low_rank_rows(random, 128, 64, rank, 6.f), 128);
  for (int rank : {0, 1, 3, 12})
    check_like_host(LowRank<Short<2, 128>>{}, codecs::low_rank_rows(random, 128, 128, rank, 6.f), 128);
}
