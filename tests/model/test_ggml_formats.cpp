// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// ggml's formats: the bytes are those of its reference quantisers, the numbers those it reads from them.
#include <doctest/doctest.h>
#include <ggml.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kvtailor/codec/group_int.hpp"

using namespace kvt;

namespace {

// Rows of all sizes and kinds; row r is of kind r % 10.
template <int dim>
std::vector<float> make_row(int r, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> exponent(-44.f, 4.f);
  std::vector<float> x(dim);
  const float size = std::pow(10.f, exponent(random));
  for (float& v : x) {
    const float sign = random() % 2 == 0 ? 1.f : -1.f;
    switch (r % 10) {
      case 0:
        v = normal(random);
        break;
      case 1:
        v = normal(random) * size;
        break;
      case 2:
        v = sign * 0.f;
        break;  // zeros of both signs
      case 3:
        v = sign * std::pow(10.f, exponent(random));
        break;  // huge range within a group
      case 4:
        v = static_cast<float>(static_cast<int>(random() % 33) - 16) / 2;
        break;  // halves: ties everywhere
      case 5:
        v = sign * size;
        break;  // two extremes of one size
      case 6:
        v = float_from_bits(static_cast<std::uint32_t>(random()) & 0x807fffffu);
        break;  // subnormal
      case 7:
        v = std::fabs(normal(random)) * static_cast<float>(random() % 2) * sign;
        break;  // many zeros
      case 8:
        v = size;
        break;
      default:
        v = static_cast<float>(static_cast<int>(random() % 255) - 127) / 2;
        break;
    }
  }
  if (r % 20 == 14) x[random() % dim] = 127.f;  // q8_0's ties need a scale of 1
  if (r % 20 == 4) x[0] = 8.f;                  // and those of q4_0 a scale of -1
  if (r % 20 == 9) x[0] = x[32] = 127.f;
  return x;
}

template <class Codec>
void compare(ggml_type type) {
  constexpr int dim = Codec::head_dim;
  const ggml_type_traits& traits = *ggml_get_type_traits(type);
  CAPTURE(std::string(traits.type_name));
  CAPTURE(dim);
  REQUIRE(Codec::row_bytes == ggml_row_size(type, dim));
  std::mt19937 random(dim);
  std::vector<std::byte> ours(Codec::row_bytes), by_warp(ours), theirs(ours);
  std::vector<float> decoded(dim), expected(dim), scratch(dim);
  const Codec codec;
  int bytes = 0, floats = 0, warps = 0;
  for (int r = 0; r < 10000; ++r) {
    const auto x = make_row<dim>(r, random);
    codec.encode(x.data(), 1, ours.data());
    codec.encode_row(SimulatedWarp{}, x.data(), by_warp.data(), 1, 0, scratch.data());
    traits.from_float_ref(x.data(), theirs.data(), dim);
    if (ours != theirs && bytes++ < 3) MESSAGE("row of kind " << r % 10 << ": bytes differ");
    if (by_warp != theirs && warps++ < 3) MESSAGE("row of kind " << r % 10 << ": bytes by warp differ");
    codec.decode(ours.data(), 1, 0, decoded.data());
    traits.to_float(ours.data(), expected.data(), dim);
    floats += std::memcmp(decoded.data(), expected.data(), sizeof(float) * dim) != 0;
  }
  CHECK(bytes == 0);
  CHECK(warps == 0);
  CHECK(floats == 0);
}

template <template <int> class Codec>
void compare_dims(ggml_type type) {
  compare<Codec<64>>(type);
  compare<Codec<96>>(type);
  compare<Codec<128>>(type);
  compare<Codec<192>>(type);
  compare<Codec<256>>(type);
}

}  // namespace

TEST_CASE("ggml's formats, byte for byte") {
  compare_dims<Q4_0>(GGML_TYPE_Q4_0);
  compare_dims<Q4_1>(GGML_TYPE_Q4_1);
  compare_dims<Q5_0>(GGML_TYPE_Q5_0);
  compare_dims<Q5_1>(GGML_TYPE_Q5_1);
  compare_dims<Q8_0>(GGML_TYPE_Q8_0);
}
