// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Blocks encoded by a simulated block of threads, and rows erased by a simulated warp: beside those of the host.
#include <doctest/doctest.h>

#include <memory>

#include "kvtailor/codec/block_encode.hpp"
#include "kvtailor/codec/dense.hpp"
#include "kvtailor/codec/kivi.hpp"
#include "kvtailor/codec/low_rank_work.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant.hpp"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"
#include "unit/codecs.hpp"

using namespace kvt;

namespace {

template <int bits, int dim>
using Short = LloydMax<bits, dim, NormCorrection::least_squares, LogScale>;

constexpr int max_rows = 128;
constexpr std::byte untouched{0xee};

// The first `bytes` of what was written; nothing was behind them.
std::vector<std::byte> written(std::vector<std::byte> out, int bytes) {
  const auto end = out.begin() + bytes;
  REQUIRE(std::all_of(end, out.end(), [](std::byte b) { return b == untouched; }));
  return {out.begin(), end};
}

template <class Codec>
std::vector<std::byte> encode_by_block(const Codec& codec, std::vector<float> rows) {
  using Encoder = BlockEncoder<Codec, max_rows>;
  const int n = static_cast<int>(rows.size()) / Codec::head_dim;
  const auto most = static_cast<std::size_t>(codec.max_block_bytes(n));
  const auto shared = std::make_unique<typename Encoder::Shared>();
  const auto memory = std::make_unique<typename Encoder::Memory>();
  std::memset(static_cast<void*>(shared.get()), 0xff, sizeof *shared);
  std::memset(static_cast<void*>(memory.get()), 0xff, sizeof *memory);
  std::vector<std::byte> out(most + 8, untouched);
  const int bytes = Encoder::encode(SimulatedBlock<Encoder::warps>{}, codec, rows.data(), n, out.data(), *shared, *memory);
  REQUIRE(bytes > 0);
  REQUIRE(bytes <= static_cast<int>(most));
  return written(std::move(out), bytes);
}

// Whether bytes are those of the host: not where sums over a row are those of a warp, nor where factors are found otherwise.
template <class Codec>
constexpr bool same_bytes = true;
template <int bits, int dim, NormCorrection correction, class Scale>
constexpr bool same_bytes<LloydMax<bits, dim, correction, Scale>> = false;
template <int bits, int dim>
constexpr bool same_bytes<TurboQuantUnbiased<bits, dim>> = false;
template <class Codec>
constexpr bool same_bytes<LowRank<Codec>> = false;
template <class Codec>
constexpr bool same_bytes<Shifted<Codec>> = same_bytes<Codec>;
template <class Codec>
constexpr bool same_bytes<Rotated<Codec>> = same_bytes<Codec>;

template <class Codec>
void check_encoded(const Codec& codec, const std::vector<float>& rows) {
  if constexpr (requires { typename Codec::codec_types; }) {
    // The chosen one's, byte for byte.
    codec.visit([&](const auto& chosen) { CHECK(encode_by_block(codec, rows) == encode_by_block(chosen, rows)); });
  } else {
    const int n = static_cast<int>(rows.size()) / Codec::head_dim;
    const auto have = encode_by_block(codec, rows), want = codecs::encode(codec, rows);
    REQUIRE(have.size() == want.size());
    if constexpr (same_bytes<Codec>) {
      CHECK(have == want);
    } else {
      if constexpr (requires { codec.rank(have.data()); }) {
        REQUIRE(codec.rank(have.data()) == codec.rank(want.data()));
      } else {
        int same = 0;
        for (std::size_t i = 0; i < have.size(); ++i) same += have[i] == want[i] ? 1 : 0;
        CHECK(same >= .98 * static_cast<double>(have.size()));
      }
      const double there = codecs::squared_distance(rows, codecs::decode(codec, have, n));
      const double here = codecs::squared_distance(rows, codecs::decode(codec, want, n));
      CHECK(std::fabs(there - here) <= .01 * here);
    }
  }
}

template <class Codec>
void check_erased(const Codec& codec, const std::vector<std::byte>& block, const std::vector<unsigned char>& keep) {
  const int n = static_cast<int>(keep.size());
  const auto erase = [&](auto... lanes) {
    std::vector<std::byte> to(static_cast<std::size_t>(codec.max_block_bytes(n)) + 8, untouched);
    const int bytes = codec.erase(lanes..., block.data(), n, keep.data(), to.data());
    return written(std::move(to), bytes);
  };
  const auto host = erase();
  CHECK(erase(SimulatedWarp{}) == host);
  const auto left = static_cast<int>(std::count_if(keep.begin(), keep.end(), [](unsigned char k) { return k != 0; }));
  if (left == n) CHECK(host == block);
  std::vector<float> rows;
  const auto all = codecs::decode(codec, block, n);
  for (int row = 0; row < n; ++row) {
    if (keep[static_cast<std::size_t>(row)] == 0) continue;
    rows.insert(rows.end(), all.begin() + row * Codec::head_dim, all.begin() + (row + 1) * Codec::head_dim);
  }
  CHECK(codecs::decode(codec, host, left) == rows);
}

template <class Codec>
void check_erased(const Codec& codec, const std::vector<std::byte>& block, int n, std::mt19937& random) {
  const auto size = static_cast<std::size_t>(n);
  std::vector<unsigned char> keep(size, 0);
  check_erased(codec, block, keep);
  keep[random() % size] = 7;
  check_erased(codec, block, keep);
  check_erased(codec, block, std::vector<unsigned char>(size, 1));
  for (const unsigned one_in : {2u, 3u, 20u}) {
    for (auto& k : keep) k = random() % one_in == 0 ? 1 : 0;
    check_erased(codec, block, keep);
    for (auto& k : keep) k = k == 0 ? 255 : 0;
    check_erased(codec, block, keep);
  }
}

template <class Codec>
void check_codec(unsigned seed, const Codec& codec = {}) {
  constexpr int dim = Codec::head_dim;
  CAPTURE(dim);
  std::mt19937 random(seed);
  for (const int n : {128, 100, 33, 1}) {
    CAPTURE(n);
    const auto size = static_cast<std::size_t>(n * dim);
    auto shared = codecs::low_rank_rows(random, n, dim, 4, 7.f);
    for (std::size_t i = 0; i < size; ++i) shared[i] += 5.f * std::sin(static_cast<float>(i % dim));
    for (const auto& rows : {codecs::normal_rows(random, n, dim), shared, std::vector<float>(size, 0.f)}) {
      check_encoded(codec, rows);
      check_erased(codec, codecs::encode(codec, rows), n, random);
    }
    // Beside a mean, or one pair of factors, there is only rounding.
    const std::vector<float> equal(size, 3.f);
    const auto there = codecs::squared_distance(equal, codecs::decode(codec, encode_by_block(codec, equal), n));
    const auto here = codecs::squared_distance(equal, codecs::decode(codec, codecs::encode(codec, equal), n));
    CHECK(std::fabs(there - here) <= .01 * here + 1e-5 * static_cast<double>(9 * size));
  }
}

}  // namespace

TEST_CASE("row codecs") {
  check_codec<TurboQuant<3, 40>>(1);
  check_codec<TurboQuant<3, 128>>(2);
  check_codec<Q8_0<40>>(3);
  check_codec<Q8_0<128>>(4);
  check_codec<Rotated<Q4_1<64>>>(5);
  check_codec<Trellis<3, 40>>(6);
  check_codec<TurboQuantUnbiased<2, 64>>(7);
  check_codec<Dense<Half, 64>>(8);
}

TEST_CASE("codecs that take the mean of a block") {
  check_codec<Shifted<Short<2, 40>>>(11);
  check_codec<Shifted<Short<2, 128>>>(12);
  check_codec<Rotated<Shifted<Trellis<2, 64>>>>(13);
  check_codec<Rotated<Shifted<Trellis<2, 128>>>>(14);
  check_codec<Shifted<KiviKeys<4, 64>>>(15);
}

TEST_CASE("codecs with levels for each channel") {
  check_codec<KiviKeys<2, 40>>(21);
  check_codec<KiviKeys<2, 128>>(22);
  check_codec<KiviKeys<4, 64>>(23);
  check_codec<KiviKeys<5, 40>>(24);
  check_codec<Rotated<KiviKeys<3, 64>>>(25);
}

TEST_CASE("codecs of low rank") {
  check_codec<Rotated<LowRank<Trellis<2, 64>>>>(31);
  check_codec<Rotated<LowRank<Short<2, 128>>>>(32);
  for (const int bits : {1, 3, 5, 6, 16}) {
    LowRank<Short<3, 64>> codec;
    codec.rule = RankRule::bbp;
    codec.factor_bits = bits;
    check_codec(33 + static_cast<unsigned>(bits), codec);
  }
}

TEST_CASE("one of several codecs") {
  OneOf<KiviKeys<2, 64>, Rotated<Shifted<Trellis<2, 64>>>, Rotated<LowRank<Short<2, 64>>>, TurboQuant<3, 64>> codec;
  for (codec.index = 0; codec.index < codec.size; ++codec.index) {
    CAPTURE(codec.index);
    check_codec(static_cast<unsigned>(50 + codec.index), codec);
  }
}

TEST_CASE("blocks that lost rows lose more") {
  std::mt19937 random(60);
  const auto check = [&](const auto& codec) {
    constexpr int dim = std::remove_cvref_t<decltype(codec)>::head_dim;
    int n = 128;
    auto block = codecs::encode(codec, codecs::low_rank_rows(random, n, dim, 3, 9.f));
    while (n > 4) {
      std::vector<unsigned char> keep(static_cast<std::size_t>(n));
      for (auto& k : keep) k = random() % 3 != 0 ? 1 : 0;
      keep[0] = 1;
      check_erased(codec, block, keep);
      std::vector<std::byte> to(block.size());
      to.resize(static_cast<std::size_t>(codec.erase(SimulatedWarp{}, block.data(), n, keep.data(), to.data())));
      block = to;
      n = static_cast<int>(std::count(keep.begin(), keep.end(), 1));
    }
  };
  check(KiviKeys<3, 40>{});
  check(Rotated<LowRank<Short<2, 64>>>{});
  check(Rotated<Shifted<Trellis<2, 64>>>{});
}
