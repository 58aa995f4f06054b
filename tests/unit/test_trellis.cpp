// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Trellis codes: the bit layout against a plain reading of it, the search against all paths, errors against recorded figures.
#include <doctest/doctest.h>

#include <bit>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kvtailor/codec/lloyd_max.hpp"
#include "kvtailor/codec/rotated.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "unit/codecs.hpp"

using namespace kvt;

namespace {

std::vector<float> normal_rows(int n, int dim, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(n) * static_cast<std::size_t>(dim));
  for (float& x : rows) x = normal(random);
  return rows;
}

template <class Codec>
std::vector<std::byte> encoded(const std::vector<float>& rows) {
  const int n = static_cast<int>(rows.size()) / Codec::head_dim;
  const Codec codec;
  std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(n)), std::byte{0xee});
  CHECK(codec.encode(rows.data(), n, block.data()) == codec.max_block_bytes(n));
  return block;
}

struct Error {
  double mean, sigma;  // relative to the squared norm
};
template <class Codec>
Error relative_error(int n, unsigned seed = 7) {
  constexpr int dim = Codec::head_dim;
  const auto rows = normal_rows(n, dim, seed);
  const auto block = encoded<Codec>(rows);
  double sum = 0, squares = 0;
  for (int r = 0; r < n; ++r) {
    float back[dim];
    Codec{}.decode(block.data(), n, r, back);
    double e = 0, s = 0;
    for (int d = 0; d < dim; ++d) {
      const double x = double(rows[std::size_t(r * dim + d)]), apart = x - double(back[d]);
      e += apart * apart;
      s += x * x;
    }
    sum += e / s;
    squares += e / s * (e / s);
  }
  const double mean = sum / n;
  return {mean, std::sqrt((squares / n - mean * mean) / n)};
}

template <int bits, int window>
float value_of(int state) {
  using Table = TrellisTable<bits, window>;
  const auto odd = [&](int mask) { return std::popcount(unsigned(state & mask)) % 2; };
  int k = 0;
  for (int i = 0; i < bits + 2; ++i) k += odd(Table::index[i]) << i;
  const float size = static_cast<float>(Table::size[k]) / TrellisSearch<bits, window>::table_grid;
  return odd(Table::sign) ? -size : size;
}

// Bit by bit, as the head of the header has it.
template <int bits, int dim, int window>
std::vector<float> plain_decode(const unsigned char* codes, float scale) {
  std::vector<float> row;
  constexpr int bytes = dim * bits / 8;
  for (int d = 0; d < dim; ++d) {
    int state = 0;
    for (int k = 0; k < window; ++k) {
      const int first = bits == 3 ? 3 * d : d % bytes * 8 + d / bytes * bits;
      const int at = (first + k) % (dim * bits);
      if ((codes[at / 8] >> (at % 8) & 1) != 0) state |= 1 << k;
    }
    row.push_back(value_of<bits, window>(state) * scale);
  }
  return row;
}

template <int bits, int dim, int window, class Scale>
void check_layout() {
  using Codec = Trellis<bits, dim, window, Scale>;
  CAPTURE(bits);
  CAPTURE(dim);
  constexpr int n = 5;
  const auto block = encoded<Codec>(normal_rows(n, dim, 11));
  CHECK(block.size() == n * (sizeof(Scale) + dim * bits / 8));
  for (int r = 0; r < n; ++r) {
    Scale scale;
    std::memcpy(&scale, block.data() + static_cast<std::size_t>(r) * sizeof(Scale), sizeof scale);
    const auto* codes = reinterpret_cast<const unsigned char*>(block.data()) + n * sizeof(Scale) + r * (dim * bits / 8);
    const auto want = plain_decode<bits, dim, window>(codes, to_float(scale));
    float back[dim];
    Codec{}.decode(block.data(), n, r, back);
    for (int d = 0; d < dim; ++d) CHECK(back[d] == want[static_cast<std::size_t>(d)]);
    for (int lane = 0; lane < 32; ++lane) {
      LaneRow<dim, 32> part;
      Codec{}.template load<32>(block.data(), n, r, lane, part);
      for (int i = 0; i < part.length; ++i) {
        const int d = i * 32 + lane;
        CHECK(part.x[i] * to_float(scale) == (d < dim ? want[static_cast<std::size_t>(d)] : 0.f));
      }
    }
  }
}

template <int bits>
void check_layouts() {
  check_layout<bits, 40, 8, LogScale>();
  check_layout<bits, 64, 8, Half>();
  check_layout<bits, 80, 8, LogScale>();
  check_layout<bits, 96, 8, LogScale>();
  check_layout<bits, 112, 8, LogScale>();
  check_layout<bits, 128, 8, LogScale>();
  check_layout<bits, 192, 8, Half>();
  check_layout<bits, 256, 8, LogScale>();
}

// The recorded error, less than `share` of Lloyd-Max's, and 8-bit scales add a fortieth at most, or 1.8e-4 of the squared norm.
template <int bits, int window>
void check_error(double share) {
  CAPTURE(bits);
  CAPTURE(window);
  constexpr int n = 1500;
  const Error half = relative_error<Trellis<bits, 64, window, Half>>(n), log = relative_error<Trellis<bits, 64, window>>(n);
  CAPTURE(half.mean);
  CAPTURE(log.mean);
  CHECK(std::fabs(half.mean - TrellisTable<bits, window>::distortion) <= 4 * half.sigma);
  CHECK(half.mean <= share * HalfLevels<64, bits>::distortion);
  CHECK(log.mean <= half.mean + std::max(.025 * half.mean, 1.8e-4));
}

// All rings of codes of a short row.
template <int bits, int window, int dim>
void check_search() {
  using Search = TrellisSearch<bits, window>;
  std::mt19937 random(bits * 100 + window);
  std::normal_distribution<float> normal;
  const auto next = [&] { return std::rint(normal(random) * 256) / 256; };
  std::vector<float> table(Search::num_states);
  for (float& v : table) v = next();
  std::vector<std::uint8_t> memory(Search::memory(dim));
  Search search;
  double found = 0, least_possible = 0;
  for (int round = 0; round < 50; ++round) {
    float x[dim];
    for (float& v : x) v = next();
    const auto error_of = [&](auto&& state_of) {
      float error = 0;
      for (int i = 0; i < dim; ++i) {
        const float apart = x[i] - table[static_cast<std::size_t>(state_of(i))];
        error += apart * apart;
      }
      return error;
    };
    float least = 1e30f;
    for (unsigned ring = 0; ring < 1u << (dim * bits); ++ring) {
      const unsigned long long twice = ring | static_cast<unsigned long long>(ring) << (dim * bits);
      least = std::min(least, error_of([&](int i) { return twice >> (i * bits) & (Search::num_states - 1); }));
    }
    float by_group = 1e30f;
    std::uint16_t state[dim];
    for (int group = 0; group < Search::num_groups; ++group) {
      const float error = search.closed_path(x, dim, table.data(), group, memory.data(), state);
      CHECK(error == error_of([&](int i) { return state[i]; }));
      CHECK(state[0] % Search::num_groups == group);
      by_group = std::min(by_group, error);
    }
    CHECK(by_group == least);
    search(x, dim, table.data(), memory.data(), state);
    for (int i = 0; i < dim; ++i) CHECK(state[i] / Search::fan == state[(i + 1) % dim] % Search::num_groups);
    const float error = error_of([&](int i) { return state[i]; });
    CHECK(error >= least);
    found += double(error);
    least_possible += double(least);
  }
  CAPTURE(bits);
  CAPTURE(window);
  CAPTURE(found / least_possible);
  CHECK(found <= 1.4 * least_possible);
}

template <class Codec>
void check_lanes() {
  constexpr int n = 37;
  codecs::check_attention(Codec{}, encoded<Codec>(normal_rows(n, Codec::head_dim, 3)), n);
}

// A warp finds the paths of the host's vectors: not a bit may differ, whatever the rows.
template <class Codec>
void check_lane_encoder() {
  constexpr int dim = Codec::head_dim, n = 60;
  const Codec codec;
  auto rows = normal_rows(n, dim, 21);
  const auto top = static_cast<float>(codec.max_row_norm());
  for (int r = 0; r < n; ++r) {
    float* const row = rows.data() + r * dim;
    const float size = std::pow(10.f, float(r % 11 - 6));
    for (int d = 0; d < dim; ++d) {
      if (r % 4 == 1) row[d] *= d % 7 == 0 ? size : 1.f;   // lopsided
      if (r % 4 == 2) row[d] *= size;                      // of any length
      if (r % 20 == 3) row[d] = d == r % dim ? top : 0.f;  // along an axis, as long as it may be
      if (r % 20 == 7) row[d] = r == 7 ? 0.f : 1e-42f;
      if (r % 20 == 11) row[d] = d % 2 == 0 ? .5f : -.5f;  // full of ties
      if (r % 20 == 15) row[d] = top / std::sqrt(float(dim)) * .999f;
      if (r == 50) row[d] = d == 3 ? std::nanf("") : 1.f;
      if (r == 51) row[d] = d == 3 ? INFINITY : 1.f;
      if (r == 52) row[d] = 3e38f;
    }
  }
  const auto block = encoded<Codec>(rows);
  std::vector<std::byte> by_warp(block.size(), std::byte{0xaa});
  std::vector<float> scratch(Codec::scratch_floats, NAN);
  for (int r = 0; r < n; ++r) {
    const float* const x = rows.data() + r * dim;
    std::copy_n(x, dim, scratch.data());  // which may begin with the row
    codec.encode_row(SimulatedWarp{}, r % 2 == 0 ? x : scratch.data(), by_warp.data(), n, r, scratch.data());
  }
  CAPTURE(dim);
  CHECK(by_warp == block);
}

template <class Codec>
void check_finite() {
  constexpr int dim = Codec::head_dim;
  const Codec codec;
  const auto top = static_cast<float>(codec.max_row_norm());
  const float even = top / std::sqrt(float(dim)) * 0.999f;
  std::vector<std::vector<float>> rows;
  for (const float size : {0.f, 1e-42f, 1e-20f, 1e-6f, 1.f, even}) {
    rows.emplace_back(dim, size);
    rows.emplace_back(dim, -size);
    for (int d = 0; d < dim; d += 2) rows.back()[std::size_t(d)] = size;
  }
  for (const float size : {1e-42f, 1e-3f, 1.f, top}) {
    for (const int at : {0, 1, dim - 1}) {
      rows.emplace_back(dim, 0.f);
      rows.back()[std::size_t(at)] = size;
      rows.emplace_back(dim, 1e-4f * size);
      rows.back()[std::size_t(at)] = -0.9f * size;
    }
  }
  for (const auto& row : rows) {
    const auto block = encoded<Codec>(row);
    float back[dim];
    codec.decode(block.data(), 1, 0, back);
    double error = 0, square = 0;
    for (std::size_t d = 0; d < dim; ++d) {
      error += std::pow(double(row[d]) - double(back[d]), 2);
      square += double(row[d]) * double(row[d]);
    }
    CAPTURE(row[0]);
    CAPTURE(row[1]);
    CHECK(error <= square * (1 + 1e-6));  // and not NaN
  }
}

}  // namespace

TEST_CASE("blocks are read as their layout says") {
  check_layouts<1>();
  check_layouts<2>();
  check_layouts<3>();
  check_layouts<4>();
  check_layout<2, 64, 6, LogScale>();
  check_layout<3, 80, 6, Half>();
}

TEST_CASE("the ring closes: the last elements read the first bits") {
  using Codec = Trellis<2, 64>;
  auto block = encoded<Codec>(normal_rows(1, 64, 2));
  float before[64], after[64];
  Codec{}.decode(block.data(), 1, 0, before);
  block[1] ^= std::byte{3};  // the code of element 0
  Codec{}.decode(block.data(), 1, 0, after);
  for (int d = 0; d < 64; ++d) {
    CAPTURE(d);
    if (d == 0 || d == 31 || d == 47 || d == 63) {  // the beginning of byte 0, and what lies above the lowest code of byte 15
      CHECK(before[d] != after[d]);
    } else {
      CHECK(before[d] == after[d]);
    }
  }
}

TEST_CASE("the search finds the best path that closes in a group, and mostly the best there is") {
  check_search<1, 2, 10>();
  check_search<1, 3, 12>();
  check_search<1, 4, 12>();
  check_search<1, 5, 12>();
  check_search<2, 4, 6>();
  check_search<2, 5, 6>();
  check_search<3, 6, 5>();
}

TEST_CASE("errors are those recorded beside the tables, below those of scalar codes") {
  check_error<1, 8>(.78);
  check_error<2, 8>(.64);
  check_error<3, 8>(.57);
  check_error<4, 8>(.55);
  check_error<1, 6>(.80);
  check_error<2, 6>(.67);
  check_error<3, 6>(.63);
}

TEST_CASE("a rotation makes rows of any kind as good as random ones") {
  using Codec = Rotated<Trellis<2, 64>>;
  constexpr int n = 200;
  auto rows = normal_rows(n, 64, 9);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] *= i % 64 == 5 ? 20.f : i % 64 < 32 ? 1.f : 0.1f;
  const auto block = encoded<Codec>(rows);
  double error = 0;
  for (int r = 0; r < n; ++r) {
    float back[64];
    Codec{}.decode(block.data(), n, r, back);
    double e = 0, s = 0;
    for (int d = 0; d < 64; ++d) {
      const double x = double(rows[std::size_t(r * 64 + d)]);
      e += (x - double(back[d])) * (x - double(back[d]));
      s += x * x;
    }
    error += e / s / n;
  }
  CHECK(error <= 1.1 * TrellisTable<2, 8>::distortion);
}

TEST_CASE("erased blocks are those of the survivors alone, and copied rows keep their bytes") {
  using Codec = Rotated<Trellis<3, 80>>;
  const Codec codec;
  constexpr int n = 50, dim = 80;
  const auto rows = normal_rows(n, dim, 5);
  const auto block = encoded<Codec>(rows);
  std::vector<unsigned char> keep(n);
  std::vector<float> survivors;
  for (int r = 0; r < n; ++r) {
    keep[std::size_t(r)] = r % 3 != 0;
    if (r % 3 != 0) survivors.insert(survivors.end(), rows.begin() + r * dim, rows.begin() + (r + 1) * dim);
  }
  const auto alone = encoded<Codec>(survivors);
  std::vector<std::byte> left(alone.size());
  CHECK(codec.erase(block.data(), n, keep.data(), left.data()) == static_cast<int>(alone.size()));
  CHECK(left == alone);
  const auto last = encoded<Codec>({rows.end() - dim, rows.end()});
  std::vector<std::byte> copied(last.size());
  codec.copy_row(block.data(), n, n - 1, copied.data(), 1, 0);
  CHECK(copied == last);
}

TEST_CASE("one lane and the simulated warp compute what the decoded rows give") {
  check_lanes<Trellis<1, 40>>();
  check_lanes<Trellis<2, 64>>();
  check_lanes<Rotated<Trellis<2, 112>>>();
  check_lanes<Rotated<Trellis<3, 80, 6, Half>>>();
  check_lanes<Rotated<Trellis<4, 96>>>();
}

TEST_CASE("a warp encodes to the bytes of the host") {
  check_lane_encoder<Trellis<1, 40>>();
  check_lane_encoder<Trellis<1, 128>>();
  check_lane_encoder<Trellis<2, 64>>();
  check_lane_encoder<Trellis<2, 256, 8, Half>>();
  check_lane_encoder<Trellis<3, 96>>();
  check_lane_encoder<Trellis<3, 192, 8, Half>>();
  check_lane_encoder<Trellis<4, 112>>();
  check_lane_encoder<Trellis<4, 80, 8, Half>>();
  check_lane_encoder<Trellis<1, 64, 6>>();
  check_lane_encoder<Trellis<2, 128, 6>>();
  check_lane_encoder<Trellis<3, 80, 6, Half>>();
  check_lane_encoder<Rotated<Trellis<2, 128>>>();
}

TEST_CASE("zero, tiny, huge and lopsided rows come back finite and no further away than zeros") {
  check_finite<Trellis<1, 64>>();
  check_finite<Trellis<2, 40>>();
  check_finite<Trellis<2, 64, 8, Half>>();
  check_finite<Trellis<3, 128>>();
  check_finite<Trellis<4, 256, 8, Half>>();
  check_finite<Trellis<2, 512>>();
}
