// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The bytes of encoded blocks. They are the library's storage format: a change of any number here means that blocks
// encoded by an earlier version no longer decode to the same rows, so it goes with a new version and a line in the change
// log. They may change when levels, states' values, signs of the rotation, plane or tile layout or the rule of a scale change
// on purpose; never because of a compiler, its options or the machine.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "kvtailor/codec/dense.hpp"
#include "kvtailor/codec/group_int.hpp"
#include "kvtailor/codec/rotated.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant.hpp"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"

using namespace kvt;

namespace {

// Whole numbers between -127 and 127, and one of 128 a row: norms and rotations are then sums without rounding.
std::vector<float> input(int rows, int dim) {
  std::vector<float> x;
  std::uint32_t state = 20240607u;
  for (int i = 0; i < rows * dim; ++i) {
    state = state * 1664525u + 1013904223u;
    x.push_back(i % dim == i / dim % dim ? 128.f : static_cast<float>(static_cast<int>(state >> 16) % 255 - 127));
  }
  return x;
}

// FNV-1a.
std::uint64_t hash(const std::vector<std::byte>& bytes) {
  std::uint64_t h = 0xcbf29ce484222325ull;
  for (const std::byte b : bytes) h = (h ^ static_cast<std::uint64_t>(b)) * 0x100000001b3ull;
  return h;
}

template <class Codec>
std::vector<std::byte> encoded(int rows) {
  const Codec codec;
  std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(rows)));
  block.resize(static_cast<std::size_t>(codec.encode(input(rows, Codec::head_dim).data(), rows, block.data())));
  return block;
}

void check(const char* name, const std::vector<std::byte>& bytes, std::uint64_t want) {
  const std::uint64_t have = hash(bytes);
  char text[20];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(have));
  INFO(std::string(name) << " has the hash 0x" << text);
  CHECK(have == want);
}
// Of 50 rows, the scales, then the codes, each row as in a block of its own: however they lie in a block together.
template <class Codec>
void check(const char* name, std::uint64_t want) {
  constexpr int n = 50, scale = Codec::scale_bytes, code = Codec::code_bytes;
  const std::vector<std::byte> block = encoded<Codec>(n);
  std::vector<std::byte> rows(block.size()), one(Codec::row_bytes);
  for (int row = 0; row < n; ++row) {
    Codec{}.copy_row(block.data(), n, row, one.data(), 1, 0);
    std::copy_n(one.data(), scale, rows.data() + scale * row);
    std::copy_n(one.data() + scale, code, rows.data() + scale * n + code * row);
  }
  check(name, rows, want);
}

}  // namespace

TEST_CASE("dense blocks have the bytes they always had") {
  check<Dense<Half, 64>>("fp16", 0xcea69caa74373a14ull);
  check<Dense<BFloat16, 64>>("bf16", 0xef73f669b62a7359ull);
  check<Dense<float, 64>>("fp32", 0xdf168da4741ba2f1ull);
}

TEST_CASE("TurboQuant blocks have the bytes they always had") {
  check<TurboQuant<1, 64>>("1 bit", 0xb00891c4cf819122ull);
  check<TurboQuant<2, 64>>("2 bits", 0x52f281ea07af3ae7ull);
  check<TurboQuant<3, 64>>("3 bits", 0x5473a0af521a1ef9ull);
  check<TurboQuant<4, 64>>("4 bits", 0x748afdcdb5c32c15ull);
  check<TurboQuant<5, 64>>("5 bits", 0xb6ce373943b5438cull);
  check<TurboQuant<6, 64>>("6 bits", 0x3f473bc982693a00ull);
  check<TurboQuant<3, 64, NormCorrection::none>>("3 bits as published", 0xc331af18b4ff0519ull);
  check<TurboQuant<3, 64, NormCorrection::length>>("3 bits of the same length", 0xa2723f01428fd5bcull);
  check<TurboQuant<3, 40>>("head dim 40", 0xeb521f9020aea536ull);
  check<TurboQuant<3, 80>>("head dim 80", 0x6914bec581534dceull);
  check<TurboQuant<3, 96>>("head dim 96", 0xd37f07c63e454f03ull);
  check<TurboQuant<3, 112>>("head dim 112", 0x8d29459deb51ad03ull);
  check<TurboQuant<3, 128>>("head dim 128", 0x07976de0955d50ecull);
  check<TurboQuant<3, 192>>("head dim 192", 0x7bf3dfe32c3cc78dull);
  check<TurboQuant<3, 256>>("head dim 256", 0xcaad61e76d79d010ull);
}

TEST_CASE("trellis blocks have the bytes they always had") {
  check<Rotated<Trellis<1, 64>>>("trellis, 1 bit", 0x755280ca385ff0deull);
  check<Rotated<Trellis<2, 64>>>("trellis, 2 bits", 0x0f096bf7896d870eull);
  check<Rotated<Trellis<3, 64>>>("trellis, 3 bits", 0xdb2e57a2b3c3f3a6ull);
  check<Rotated<Trellis<4, 64>>>("trellis, 4 bits", 0xa4169ade3451f69full);
  check<Rotated<Trellis<1, 64, 6>>>("trellis, 1 bit, window 6", 0xb35442790b785104ull);
  check<Rotated<Trellis<2, 64, 6>>>("trellis, 2 bits, window 6", 0x1eba5438a795cd94ull);
  check<Rotated<Trellis<3, 64, 6>>>("trellis, 3 bits, window 6", 0xee319ead8cffd68full);
  check<Rotated<Trellis<2, 64, 8, Half>>>("trellis, 2 bits, 16-bit scale", 0xe5d2f67540f0834bull);
  check<Rotated<Trellis<2, 40>>>("trellis, head dim 40", 0x29eda36c228e1a22ull);
  check<Rotated<Trellis<2, 128>>>("trellis, head dim 128", 0x47646d7528b94b56ull);
  check<Trellis<2, 256>>("trellis, head dim 256, not rotated", 0xf2f17353cd71e01dull);
}

TEST_CASE("tiles have the bytes they always had") {
  check("2 bits", encoded<TurboQuant<2, 64>>(50), 0xfed8e4d7d3a69f33ull);
  check("trellis, 3 bits", encoded<Rotated<Trellis<3, 64>>>(50), 0x67c867acc1b5419eull);
  check("q8_0", encoded<Q8_0<96>>(50), 0xb15b5ff7a9d55fdbull);
  check("q5_1", encoded<Q5_1<64>>(50), 0xa0804c51f2c894d2ull);
  check("2 bits and a sketch", encoded<TurboQuantUnbiased<2, 64>>(50), 0xfee541581f8e804full);
}

TEST_CASE("a block of one row, byte by byte") {
  const std::vector<std::byte> block = encoded<TurboQuant<1, 40>>(1);
  CHECK(block.size() == 7);
  std::string text;
  for (const std::byte b : block) {
    text += "0123456789abcdef"[static_cast<int>(b) >> 4];
    text += "0123456789abcdef"[static_cast<int>(b) & 15];
  }
  CHECK(text == "a4543f305f7edc");
}
