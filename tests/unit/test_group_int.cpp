// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Uniform integers: layouts against a plain reading of the bytes, error bounds, lossless erase, lane groups, extreme rows.
// That the bytes are ggml's is tested where ggml is: model/test_ggml_formats.cpp.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "codecs.hpp"
#include "kvtailor/codec/kivi.hpp"
#include "kvtailor/codec/rotated.hpp"

using namespace kvt;

namespace {

constexpr double least_half = 5.960464477539063e-8;  // 2^-24

// What is known of a codec from its name alone.
template <class Codec>
struct Traits;
template <int bit_count, int dim, IntRange range>
struct Traits<GroupInt<bit_count, dim, range>> {
  static constexpr int bits = bit_count;
  static constexpr bool symmetric = range == IntRange::symmetric, per_channel = false;
};
template <int bit_count, int dim>
struct Traits<PerChannelInt<bit_count, dim>> {
  static constexpr int bits = bit_count;
  static constexpr bool symmetric = false, per_channel = true;
};
template <class Codec>
struct Traits<Rotated<Codec>> : Traits<Codec> {};

template <class Codec>
struct Block {
  static constexpr int dim = Codec::head_dim;
  Codec codec;
  int n;
  std::vector<float> rows;
  std::vector<std::byte> data;
  int bytes = 0;

  explicit Block(int rows_, unsigned seed = 1) : n(rows_), rows(static_cast<std::size_t>(n * dim)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& x : rows) x = normal(random);
  }
  Block(int n_, std::vector<float> rows_) : n(n_), rows(std::move(rows_)) {}

  void encode() {
    const auto most = static_cast<std::size_t>(codec.max_block_bytes(n));
    data.assign(most + 64, std::byte{0xa5});
    bytes = codec.encode(rows.data(), n, data.data());
    REQUIRE(bytes <= static_cast<int>(most));
    const auto untouched = [](std::byte b) { return b == std::byte{0xa5}; };
    REQUIRE(std::all_of(data.begin() + bytes, data.end(), untouched));
  }
  std::vector<float> decode() const {
    std::vector<float> out(rows.size());
    for (int r = 0; r < n; ++r) codec.decode(data.data(), n, r, out.data() + r * dim);
    return out;
  }
  const unsigned char* at(int byte) const { return reinterpret_cast<const unsigned char*>(data.data()) + byte; }
};

float half_at(const unsigned char* p) { return to_float(Half{static_cast<std::uint16_t>(p[0] | p[1] << 8)}); }

// Code i of n, bit by bit.
int code_at(const unsigned char* p, int bits, int n, int i) {
  int code = 0;
  if (bits % 2 != 0) {
    code = (p[i / 8] >> (i % 8) & 1) << (bits - 1);
    p += n / 8;
    --bits;
  }
  const int per_byte = 8 / bits, stride = n / per_byte;
  return code + (p[i % stride] >> (i / stride * bits)) % (1 << bits);
}

template <class Codec>
std::vector<float> read_plainly(const Block<Codec>& block) {
  using T = Traits<Codec>;
  constexpr int dim = Codec::head_dim, bits = T::bits;
  std::vector<float> out;
  int at = 0;
  if constexpr (T::per_channel) {
    for (int first = 0; first < block.n; first += 32) {
      const int rows = std::min(32, block.n - first);
      CHECK(*block.at(at) + 256 * *block.at(at + 1) == rows);
      const auto* scale = block.at(at + 2);
      const auto* least = scale + 2 * dim;
      const auto* codes = least + 2 * dim;
      constexpr int row_bytes = dim * bits / 8;
      for (int r = 0; r < rows; ++r) {
        unsigned char row[row_bytes];
        // Eight rows are a tile, if they can be: words of four bytes of each.
        const bool tiled = row_bytes % 4 == 0 && (bits % 2 == 0 || dim % 32 == 0) && r / 8 * 8 + 8 <= rows;
        for (int j = 0; j < row_bytes; ++j) {
          row[j] = tiled ? codes[(r / 8 * row_bytes + j / 4 * 4) * 8 + r % 8 * 4 + j % 4] : codes[r * row_bytes + j];
        }
        for (int d = 0; d < dim; ++d) {
          const int code = code_at(row, bits, dim, d);
          out.push_back(half_at(least + 2 * d) + half_at(scale + 2 * d) * static_cast<float>(code));
        }
      }
      at += 2 + 4 * dim + rows * dim * bits / 8;
      at += at % 2;
    }
  } else {
    for (int r = 0; r < block.n; ++r) {
      std::vector<unsigned char> row(Codec::row_bytes);  // in a block of its own a row is whole
      block.codec.copy_row(block.data.data(), block.n, r, reinterpret_cast<std::byte*>(row.data()), 1, 0);
      const unsigned char* group = row.data();
      for (int first = 0; first < dim; first += 32) {
        const int size = std::min(32, dim - first), header = T::symmetric ? 2 : 4;
        for (int i = 0; i < size; ++i) {
          const int code = code_at(group + header, bits, size, i);
          const float scale = half_at(group);
          if (!T::symmetric) {
            out.push_back(half_at(group + 2) + scale * static_cast<float>(code));
          } else if (bits == 8) {
            out.push_back(scale * static_cast<float>(code < 128 ? code : code - 256));
          } else {
            out.push_back(scale * static_cast<float>(code - (1 << (bits - 1))));
          }
        }
        group += header + size * bits / 8;
      }
      at += static_cast<int>(group - row.data());
    }
  }
  CHECK(at == block.bytes);
  return out;
}

// The error of each element: see the headers. 2^-20 of the largest stands for the roundings of fp32.
template <class Codec>
void check_error(const Block<Codec>& block, const std::vector<float>& decoded) {
  using T = Traits<Codec>;
  constexpr int dim = Codec::head_dim, bits = T::bits, most = (1 << bits) - 1;
  const auto check_group = [&](const std::vector<std::size_t>& group) {
    double least = 1e300, largest = -1e300;
    for (const std::size_t i : group) {
      least = std::min(least, double(block.rows[i]));
      largest = std::max(largest, double(block.rows[i]));
    }
    const double a = std::max(std::fabs(least), std::fabs(largest));
    const bool both_ends = !T::symmetric || bits == 8;
    const double step = !T::symmetric ? (largest - least) / most : bits == 8 ? a / 127 : a / (1 << (bits - 1));
    const double levels = T::symmetric ? a : std::fabs(least) + largest - least;
    const double bound = levels * (std::ldexp(1., -11) + std::ldexp(1., -20)) + (most + 1) * least_half / 2;
    for (const std::size_t i : group) {
      const double x = double(block.rows[i]), error = std::fabs(x - double(decoded[i]));
      const bool at_end = !both_ends && std::fabs(x) > a - step;
      if (!(error <= bound + step * (at_end ? 1 : 0.5))) FAIL(x << " comes back as " << double(decoded[i]));
    }
  };
  for (int first = 0; first < block.n; first += T::per_channel ? 32 : 1) {
    const int rows = T::per_channel ? std::min(32, block.n - first) : 1;
    for (int d = 0; d < dim; d += T::per_channel ? 1 : 32) {
      std::vector<std::size_t> group;
      for (int r = first; r < first + rows; ++r) {
        for (int e = d; e < (T::per_channel ? d + 1 : std::min(d + 32, dim)); ++e) group.push_back(std::size_t(r * dim + e));
      }
      check_group(group);
    }
  }
}

// Logits and accumulate on decoded rows, in double.
template <class Codec>
void check_attention(int n) {
  constexpr int dim = Codec::head_dim, m = 3;
  Block<Codec> block(n, 5);
  block.encode();
  const auto decoded = block.decode();
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  std::vector<float> q(m * dim), weights(static_cast<std::size_t>(m * n));
  for (auto* x : {&q, &weights}) {
    for (float& v : *x) v = normal(random);
  }
  const auto run = [&](auto lanes) {
    std::vector<float> prepared(m * dim), logits(weights.size()), sums(m * dim, 0.f), out(m * dim, 1.f);
    for (int j = 0; j < m; ++j) block.codec.prepare(lanes, q.data() + j * dim, 0.5f, prepared.data() + j * dim);
    block.codec.logits(lanes, block.data.data(), n, prepared.data(), m, logits.data(), n);
    block.codec.accumulate(lanes, block.data.data(), n, weights.data(), m, n, sums.data());
    for (int j = 0; j < m; ++j) block.codec.finish(lanes, sums.data() + j * dim, out.data() + j * dim);
    // Where rows are multiplied by bytes: see codecs.hpp.
    const auto units = decltype(lanes)::size == 1 ? codecs::host_units(block.codec) : codecs::HostUnits{};
    double longest = 0;
    for (int r = 0; r < n; ++r) {
      double square = 0;
      for (int d = 0; d < dim; ++d)
        square += double(decoded[std::size_t(r * dim + d)]) * double(decoded[std::size_t(r * dim + d)]);
      longest = std::max(longest, square);
    }
    for (int j = 0; j < m; ++j) {
      double query = 0, weight = 0, all = 0;
      for (int d = 0; d < dim; ++d) query += double(q[std::size_t(j * dim + d)]) * double(q[std::size_t(j * dim + d)]);
      for (int r = 0; r < n; ++r) {
        double sum = 0, square = 0;
        for (int d = 0; d < dim; ++d) {
          const double x = double(decoded[std::size_t(r * dim + d)]);
          sum += 0.5 * double(q[std::size_t(j * dim + d)]) * x;
          square += x * x;
        }
        all += square;
        weight += double(weights[std::size_t(j * n + r)]) * double(weights[std::size_t(j * n + r)]);
        // dim products and the steps of a rotation, each rounded to 24 bits; queries, of size 1 to 4 an element, to 16.
        const double bound =
            ((dim + 64) * std::ldexp(1., -24) + std::ldexp(8 / std::sqrt(double(dim)), -16)) * std::sqrt(query * square) +
            .25 * units.query * std::sqrt(query * longest);
        if (!(std::fabs(double(logits[std::size_t(j * n + r)]) - sum) <= bound)) FAIL("logit " << r << ", head_dim " << dim);
      }
      for (int d = 0; d < dim; ++d) {
        double sum = 1;
        for (int r = 0; r < n; ++r) sum += double(weights[std::size_t(j * n + r)]) * double(decoded[std::size_t(r * dim + d)]);
        const double bound = (n + 64) * std::ldexp(1., -24) * (1 + std::sqrt(weight * all));
        if (!(std::fabs(double(out[std::size_t(j * dim + d)]) - sum) <= bound)) FAIL("output " << d << ", head_dim " << dim);
      }
    }
  };
  run(Serial{});
  run(SimulatedWarp{});
}

// Rows go in several rounds; those that are left keep their bits.
template <class Codec>
void check_erase(int n) {
  constexpr int dim = Codec::head_dim;
  Block<Codec> block(n, 7);
  block.encode();
  const auto before = block.decode();
  std::vector<int> left(static_cast<std::size_t>(n));
  for (int r = 0; r < n; ++r) left[std::size_t(r)] = r;
  std::mt19937 random(8);
  for (int round = 0; !left.empty(); ++round) {
    std::vector<unsigned char> keep(left.size());
    std::vector<int> next;
    for (std::size_t i = 0; i < left.size(); ++i) {
      // In one round a whole group goes.
      keep[i] = static_cast<unsigned char>(round == 1 ? left[i] / 32 != 1 : random() % 3 != 0 && round < 12);
      if (keep[i] != 0) next.push_back(left[i]);
    }
    std::vector<std::byte> to(static_cast<std::size_t>(block.codec.max_block_bytes(block.n)));
    const int bytes = block.codec.erase(block.data.data(), block.n, keep.data(), to.data());
    CHECK(bytes <= block.bytes);
    int groups = 0;
    for (std::size_t i = 0; i < next.size(); ++i) groups += i == 0 || next[i] / 32 != next[i - 1] / 32;
    const int rows = static_cast<int>(next.size());
    CHECK(bytes <= block.codec.max_block_bytes(rows));
    if constexpr (Traits<Codec>::per_channel) {
      const int payload = groups * (2 + 4 * dim) + rows * (dim * Traits<Codec>::bits / 8);
      CHECK(bytes >= payload);
      CHECK(bytes <= payload + groups);
    } else {
      CHECK(bytes == block.codec.max_block_bytes(rows));
    }
    block.data = to;
    block.bytes = bytes;
    block.n = rows;
    left = next;
    for (int i = 0; i < rows; ++i) {
      float x[dim];
      block.codec.decode(block.data.data(), rows, i, x);
      if (std::memcmp(x, before.data() + left[std::size_t(i)] * dim, sizeof x) != 0) FAIL("row " << left[std::size_t(i)]);
    }
  }
}

// All finite, and near the row.
template <class Codec>
void check_extremes() {
  constexpr int dim = Codec::head_dim;
  const float top = static_cast<float>(Codec::max_row_norm());
  const std::vector<std::vector<float>> kinds = {
      {0.f}, {-0.f}, {1e-42f}, {-1e-38f, 1e-38f}, {1e-8f, 0.f}, {1.f}, {-1.f}, {1e4f, 1e-30f, -1e-3f}, {100.f, -1000.f},
  };
  for (const int n : {1, 5, 33}) {
    const auto check = [&](std::vector<float> rows) {
      Block<Codec> block(n, std::move(rows));
      block.encode();
      check_error(block, block.decode());
      CHECK(block.decode() == read_plainly(block));
    };
    for (const auto& kind : kinds) {
      std::vector<float> rows(static_cast<std::size_t>(n * dim));
      for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = kind[i * 7 / 5 % kind.size()];
      check(rows);
    }
    // The longest rows there may be, along each of some axes, one way and both.
    for (const int axis : {0, dim - 1}) {
      for (const float sign : {1.f, -1.f}) {
        std::vector<float> rows(static_cast<std::size_t>(n * dim), 0.f);
        for (int r = 0; r < n; ++r) rows[std::size_t(r * dim + axis)] = r % 2 == 0 ? sign * top : -top;
        check(rows);
      }
    }
  }
}

template <class Codec>
void check_codec() {
  CAPTURE(Codec::head_dim);
  CAPTURE(Traits<Codec>::bits);
  Block<Codec> block(45);
  for (int d = 0; d < Codec::head_dim; ++d) {
    block.rows[std::size_t(d)] = 0;
    block.rows[std::size_t(Codec::head_dim + d)] *= 1e3f;
  }
  block.encode();
  const auto decoded = block.decode();
  CHECK(decoded == read_plainly(block));
  check_error(block, decoded);
  check_attention<Codec>(45);
  check_erase<Codec>(101);
  check_extremes<Codec>();
}

template <template <int> class Codec, int... dims>
void check_dims() {
  (check_codec<Codec<dims>>(), ...);
}

template <int dim>
using Keys2 = KiviKeys<2, dim>;
template <int dim>
using Keys3 = KiviKeys<3, dim>;
template <int dim>
using Keys4 = KiviKeys<4, dim>;
template <int dim>
using Values2 = KiviValues<2, dim>;
template <int dim>
using Values3 = KiviValues<3, dim>;

}  // namespace

TEST_CASE("q4_0") { check_dims<Q4_0, 40, 64, 80, 96, 112, 128, 192, 256, 512>(); }
TEST_CASE("q4_1") { check_dims<Q4_1, 64, 80>(); }
TEST_CASE("q5_0") { check_dims<Q5_0, 40, 128>(); }
TEST_CASE("q5_1") { check_dims<Q5_1, 112>(); }
TEST_CASE("q8_0") { check_dims<Q8_0, 40, 64, 112>(); }
TEST_CASE("KIVI's keys of 2 bits") { check_dims<Keys2, 40, 64, 256>(); }
TEST_CASE("KIVI's keys of 3 bits") { check_dims<Keys3, 40, 96>(); }
TEST_CASE("KIVI's keys of 4 bits") { check_dims<Keys4, 80, 128, 192>(); }
TEST_CASE("KIVI's values of 2 bits") { check_dims<Values2, 40, 64, 112>(); }
TEST_CASE("KIVI's values of 3 bits") { check_dims<Values3, 40, 256>(); }

TEST_CASE("rotated integers attend as they decode") {
  check_attention<Rotated<Q4_0<64>>>(45);
  check_attention<Rotated<Q8_0<80>>>(45);
  check_attention<Rotated<KiviValues<2, 96>>>(45);
  check_attention<Rotated<KiviKeys<2, 64>>>(45);
  check_erase<Rotated<KiviKeys<3, 40>>>(101);
}

TEST_CASE("the simulated warp encodes what one lane encodes") {
  const auto check = []<class Codec>(const Codec& codec) {
    constexpr int dim = Codec::head_dim;
    Block<Codec> block(50, 9);
    block.encode();
    std::vector<std::byte> by_warp(block.data.size(), std::byte{0xa5});
    float scratch[dim];
    for (int r = 0; r < block.n; ++r) {
      codec.encode_row(SimulatedWarp{}, block.rows.data() + r * dim, by_warp.data(), block.n, r, scratch);
    }
    CHECK(by_warp == block.data);
  };
  check(Q4_0<64>{});
  check(Q4_1<40>{});
  check(Q5_0<112>{});
  check(Q8_0<80>{});
  check(KiviValues<2, 40>{});
  check(KiviValues<3, 96>{});
}

TEST_CASE("blocks of 1 to 512 rows") {
  using Codec = KiviKeys<3, 40>;  // an odd number of bytes a row
  for (int n = 1; n <= Codec::max_block_rows; ++n) {
    Block<Codec> block(n, static_cast<unsigned>(n));
    block.encode();
    const auto decoded = block.decode();
    if (decoded != read_plainly(block)) FAIL(n << " rows");
    check_error(block, decoded);
  }
  check_erase<Codec>(512);
  check_attention<Codec>(512);
}

TEST_CASE("a key far from the others takes nothing from their products") {
  constexpr int dim = 64;
  Block<KiviKeys<2, dim>> block(32, 4);
  for (int d = 0; d < dim; ++d) block.rows[std::size_t(7 * dim + d)] *= 1e4f;
  block.encode();
  const auto decoded = block.decode();
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> query(dim), logits(32);
  for (float& x : query) x = normal(random);
  block.codec.logits(Serial{}, block.data.data(), block.n, query.data(), 1, logits.data(), block.n);
  for (int r = 0; r < block.n; ++r) {
    if (r == 7) continue;
    double sum = 0, size = 0;
    for (int d = 0; d < dim; ++d) {
      const double product = double(query[std::size_t(d)]) * double(decoded[std::size_t(r * dim + d)]);
      sum += product;
      size += product * product;
    }
    CHECK(std::fabs(double(logits[std::size_t(r)]) - sum) <= 1e-5 * std::sqrt(size));
  }
}

TEST_CASE("a channel of 32 keys is coded as a group of 32 values") {
  constexpr int dim = 64;
  Block<KiviKeys<2, dim>> keys(32, 3);
  keys.encode();
  const auto decoded = keys.decode();
  Block<KiviValues<2, dim>> channels(dim, 3);
  for (int d = 0; d < dim; ++d) {
    for (int r = 0; r < dim; ++r) channels.rows[std::size_t(d * dim + r)] = keys.rows[std::size_t(r % 32 * dim + d)];
  }
  channels.encode();
  const auto expected = channels.decode();
  int different = 0;
  for (int d = 0; d < dim; ++d) {
    for (int r = 0; r < 32; ++r) different += decoded[std::size_t(r * dim + d)] != expected[std::size_t(d * dim + r)];
  }
  CHECK(different == 0);
}

TEST_CASE("a row of q4_0 and of q5_0 by hand") {
  float row[64] = {};
  for (int i = 0; i < 32; ++i) row[i] = static_cast<float>(i - 16) / 2;  // -8 .. 7.5, scale 1; halves go up
  std::byte block[64];
  CHECK(Q4_0<64>{}.encode(row, 1, block) == 36);
  const unsigned char q4_0[18] = {0x00, 0x3c, 0x80, 0x91, 0x91, 0xa2, 0xa2, 0xb3, 0xb3,
                                  0xc4, 0xc4, 0xd5, 0xd5, 0xe6, 0xe6, 0xf7, 0xf7, 0xf8};
  CHECK(std::memcmp(block, q4_0, sizeof q4_0) == 0);
  const unsigned char zeros[2] = {0x00, 0x80};  // the scale of zeros is -0
  CHECK(std::memcmp(block + 18, zeros, sizeof zeros) == 0);
  CHECK(Q5_0<64>{}.encode(row, 1, block) == 44);
  unsigned char q5_0[22] = {0x00, 0x38, 0x00, 0x00, 0xff, 0xff};  // scale 1/2: code i for element i
  for (int i = 0; i < 16; ++i) q5_0[6 + i] = static_cast<unsigned char>(i | i << 4);
  CHECK(std::memcmp(block, q5_0, sizeof q5_0) == 0);
}
