// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention with tensor cores, on the simulated warp, against double precision on the rows as the host's codecs decode them.
#include <doctest/doctest.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "kvtailor/codec/kivi.hpp"
#include "reference/slice_rows.hpp"

using namespace kvt;

namespace {

struct Case {
  int rows, vectors, warps;
  double sharpness = 1;  // of the queries
  float cap = 0;
  int window = 0;
  double value_size = 1;
  bool hide = false;  // queries in the middle of the rows
};

// Returns the largest error of an output relative to what rounding may do.
//
// Queries are rounded to fp16, and so are weights times scales: with a relative error of at most 2^-11, rms 2^-12.2,
// each independent of the others. A logit is off by 2^-12.2 |q| |k| / sqrt(dim) / sqrt(dim), which is 2^-12.2 `sharpness` for
// rows and queries of normal elements, and an output by sqrt(1 + sharpness^2) 2^-12.2 sqrt(sum p^2) of a value's size. Six
// times that is the bound, since it is the largest of up to 2,048 elements. The levels of two bits are right to 5e-4. Elements
// of groups are rounded as well, which doubles the square of the error. Where few rows have weight, what these are rounded by
// is up to 2.3 times the average (over lengths 17 to 59): trellises and groups, which are many cases more, have eight times.
template <class Key, class Value, bool limited = false>
double error_of(const Case& c) {
  constexpr int dim = Key::head_dim;
  using F = reference::SliceRows<Key, Value>;
  using Layout = typename F::Layout;
  std::mt19937 random(static_cast<unsigned>(c.rows * 31 + c.vectors));
  const F f(c.rows, static_cast<float>(c.value_size), random);
  std::normal_distribution<float> normal;
  std::vector<float> query(static_cast<std::size_t>(c.vectors * dim)), prepared(query.size());
  for (float& x : query) x = static_cast<float>(c.sharpness) * normal(random);
  std::vector<int> position(static_cast<std::size_t>(c.vectors));
  for (int j = 0; j < c.vectors; ++j) {
    position[static_cast<std::size_t>(j)] = c.hide ? 3 * (c.rows * (j + 1) / (c.vectors + 1)) : 3 * c.rows;
  }
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  constexpr float log2e = 1.44269504f;
  for (int j = 0; j < c.vectors; ++j) {
    Key{}.prepare(Serial{}, query.data() + j * dim, scale * log2e, prepared.data() + j * dim);
  }
  std::vector<std::uint32_t> table(static_cast<std::size_t>(Layout::table_bytes / 4 + 1), 0xffffffffu);
  auto* const bytes = reinterpret_cast<std::byte*>(table.data());
  for (int thread = 0; thread < 3; ++thread) Layout::fill_tables(bytes, thread, 3);
  const auto queries = std::make_unique<QueryFragments<dim>>();
  queries->template pack<typename Layout::Keys>(SimulatedWarp{}, prepared.data(), c.vectors);
  const int slices = (c.rows + slice_rows - 1) / slice_rows;
  std::vector<float> max(static_cast<std::size_t>(8 * c.warps), NAN), sum(max), rows(max.size() * dim, NAN);
  for (int w = 0; w < c.warps; ++w) {
    using Warp = DecodeWarp<Layout, SimulatedWarp, limited>;
    const auto warp = std::make_unique<Warp>();
    const typename Warp::Queries q{queries.get(), position.data(), c.vectors, c.cap * log2e, c.window};
    warp->run(SimulatedWarp{}, f.pages, q, bytes, w, slices, c.warps);
    const float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    warp->store_state(SimulatedWarp{}, max.data() + 8 * w, sum.data() + 8 * w);
    warp->store_rows(SimulatedWarp{}, ones, false, rows.data() + 8 * w * dim);
  }
  double worst = 0;
  for (int j = 0; j < c.vectors; ++j) {
    std::vector<double> logit(static_cast<std::size_t>(c.rows)), out(dim, 0.0);
    double top = -INFINITY, total = 0, square = 0;
    int seen = 0;
    for (int r = 0; r < c.rows; ++r) {
      double s = 0;
      for (int d = 0; d < dim; ++d) {
        s += static_cast<double>(query[static_cast<std::size_t>(j * dim + d)]) *
             static_cast<double>(f.keys[static_cast<std::size_t>(r * dim + d)]);
        square += std::pow(static_cast<double>(f.values[static_cast<std::size_t>(r * dim + d)]), 2);
      }
      s *= static_cast<double>(scale);
      if (c.cap > 0) s = static_cast<double>(c.cap) * std::tanh(s / static_cast<double>(c.cap));
      const int own = position[static_cast<std::size_t>(j)];
      if (limited && (3 * r > own || (c.window > 0 && 3 * r <= own - c.window))) s = -INFINITY;
      seen += std::isfinite(s);
      logit[static_cast<std::size_t>(r)] = s;
      top = std::max(top, s);
    }
    for (int r = 0; r < c.rows && seen > 0; ++r) {
      const double p = std::exp(logit[static_cast<std::size_t>(r)] - top);
      total += p;
      for (int d = 0; d < dim; ++d) {
        out[static_cast<std::size_t>(d)] += p * static_cast<double>(f.values[static_cast<std::size_t>(r * dim + d)]);
      }
    }
    // Join the warps, and leave the basis.
    float most = -INFINITY, sums = 0;
    std::vector<float> acc(dim, 0), got(dim, 0);
    for (int w = 0; w < c.warps; ++w) most = std::max(most, max[static_cast<std::size_t>(8 * w + j)]);
    for (int w = 0; w < c.warps; ++w) {
      const auto at = static_cast<std::size_t>(8 * w + j);
      const float factor = max[at] == -INFINITY ? 0.f : std::exp2(max[at] - most);
      sums += factor * sum[at];
      for (int d = 0; d < dim; ++d) acc[static_cast<std::size_t>(d)] += factor * rows[at * dim + static_cast<std::size_t>(d)];
    }
    CHECK((sums > 0) == (seen > 0));
    if (seen == 0) {
      for (const float x : acc) CHECK(x == 0);
      continue;
    }
    for (float& x : acc) x /= sums;
    Value{}.finish(Serial{}, acc.data(), got.data());
    const double size = std::sqrt(square / (c.rows * dim));
    double spread = 0, length = 0;
    for (int r = 0; r < c.rows; ++r) spread += std::pow(std::exp(logit[static_cast<std::size_t>(r)] - top) / total, 2);
    for (const double x : out) length += x * x / (total * total * dim);
    constexpr int of_keys = Layout::Keys::grouped ? 2 : 1, of_values = Layout::Values::grouped ? 2 : 1;
    constexpr bool of_many = Layout::grouped || Layout::Keys::follows || Layout::Values::follows;
    double bound =
        (of_many ? 8 : 6) * std::exp2(-12.2) * std::sqrt((of_values + of_keys * c.sharpness * c.sharpness) * spread) * size;
    if (std::is_same_v<Key, TurboQuant<2, dim>>) bound += 5e-4 * 4 * c.sharpness * std::sqrt(spread) * size;
    if (std::is_same_v<Value, TurboQuant<2, dim>>) bound += 5e-4 * 4 * std::sqrt(length);
    for (int d = 0; d < dim; ++d) {
      const double exact = out[static_cast<std::size_t>(d)] / total;
      const double difference = std::fabs(static_cast<double>(got[static_cast<std::size_t>(d)]) - exact);
      if (!(difference / bound <= worst)) worst = difference / bound;
    }
  }
  return worst;
}

template <int key_bits, int value_bits, int dim, bool limited = false>
double error_of(const Case& c) {
  return error_of<typename reference::Format<key_bits, dim>::Codec, typename reference::Format<value_bits, dim>::Codec,
                  limited>(c);
}

template <class Key, class Value>
void check_lengths() {
  for (const int rows : {1, 7, 32, 33, 129, 300}) {
    for (const int vectors : {1, 3, 8}) {
      CAPTURE(rows);
      CAPTURE(vectors);
      CHECK(error_of<Key, Value>({rows, vectors, 1 + rows % 3}) <= 1);
    }
  }
  CHECK(error_of<Key, Value>({1001, 4, 2, 12}) <= 1);
}
template <int key_bits, int value_bits, int dim>
void check_lengths() {
  check_lengths<typename reference::Format<key_bits, dim>::Codec, typename reference::Format<value_bits, dim>::Codec>();
}
template <int bits, int dim, int window = 8, class Scale = LogScale>
using RotatedTrellis = Rotated<Trellis<bits, dim, window, Scale>>;
// Every width as keys or as values.
template <int dim, bool swapped = false>
void check_dim() {
  CAPTURE(dim);
  check_lengths<16, 16, dim>();
  check_lengths<swapped ? 2 : 1, swapped ? 1 : 2, dim>();
  check_lengths<swapped ? 4 : 3, swapped ? 3 : 4, dim>();
  check_lengths<swapped ? 6 : 5, swapped ? 5 : 6, dim>();
}

}  // namespace

TEST_CASE("slices attend as the host's codecs decode, for every head dim and width") {
  check_dim<64>();
  check_dim<80, true>();
  check_dim<96>();
  check_dim<112>();
  check_dim<128, true>();
  check_dim<192>();
  check_dim<256, true>();
  check_lengths<16, 4, 64>();
  check_lengths<4, 16, 64>();
}

TEST_CASE("trellises attend as the host's codecs decode, whatever ends in another lane") {
  check_lengths<RotatedTrellis<2, 64>, RotatedTrellis<2, 64>>();
  check_lengths<RotatedTrellis<1, 64>, RotatedTrellis<3, 64>>();
  check_lengths<RotatedTrellis<4, 80>, RotatedTrellis<1, 80>>();
  check_lengths<RotatedTrellis<3, 96>, RotatedTrellis<4, 96>>();
  check_lengths<RotatedTrellis<3, 112>, RotatedTrellis<1, 112, 6>>();
  check_lengths<RotatedTrellis<2, 128, 6>, RotatedTrellis<2, 128, 6>>();
  check_lengths<RotatedTrellis<3, 128>, TurboQuant<4, 128>>();
  check_lengths<Dense<Half, 128>, RotatedTrellis<2, 128, 8, Half>>();
  check_lengths<RotatedTrellis<2, 192, 8, Half>, RotatedTrellis<3, 192>>();
  check_lengths<RotatedTrellis<3, 256>, RotatedTrellis<2, 256>>();
  check_lengths<RotatedTrellis<2, 256, 6>, RotatedTrellis<1, 256>>();
}

TEST_CASE("groups attend as the host's codecs decode") {
  check_lengths<Q8_0<64>, Q4_0<64>>();
  check_lengths<Q4_1<64>, Q5_0<64>>();
  check_lengths<Rotated<Q5_0<80>>, KiviValues<2, 80>>();
  check_lengths<Q4_0<96>, Q8_0<96>>();
  check_lengths<KiviValues<3, 112>, Q4_1<112>>();
  check_lengths<Q8_0<128>, Q8_0<128>>();
  check_lengths<TurboQuant<4, 128>, Rotated<Q4_0<128>>>();
  check_lengths<Q5_0<128>, KiviValues<2, 128>>();
  check_lengths<Q4_1<192>, RotatedTrellis<2, 192>>();
  check_lengths<Q5_0<256>, Q4_1<256>>();
  check_lengths<Q8_0<256>, Q8_0<256>>();
}

TEST_CASE("long and flat: nothing is lost in sums") {
  CHECK(error_of<4, 4, 64>({16384, 2, 1, .05}) <= 1);
  CHECK(error_of<2, 2, 64>({16384, 2, 1, .05}) <= 1);
  CHECK(error_of<RotatedTrellis<2, 64>, RotatedTrellis<2, 64>>({16384, 2, 1, .05}) <= 1);
  CHECK(error_of<Q8_0<64>, Q4_1<64>>({16384, 2, 1, .05}) <= 1);
  CHECK(error_of<16, 16, 64>({16384, 2, 1, .05}) <= 1);
}

TEST_CASE("large queries and values neither overflow nor lose their digits") {
  CHECK(error_of<4, 4, 64, true>({300, 3, 2, 30, 50.f}) <= 1);  // capped
  CHECK(error_of<4, 4, 64>({300, 3, 2, 1, 0, 0, 5000}) <= 1);   // near the largest row that is stored
  CHECK(error_of<4, 4, 64>({300, 3, 2, 1, 0, 0, .01}) <= 1);
  CHECK(error_of<RotatedTrellis<2, 64>, RotatedTrellis<3, 64>>({300, 3, 2, 1, 0, 0, 7000}) <= 1);  // LogScale::max
  CHECK(error_of<Q8_0<64>, Q8_0<64>>({300, 3, 2, 1, 0, 0, 15000}) <= 1);                           // elements up to 60,000
  CHECK(error_of<RotatedTrellis<2, 64>, RotatedTrellis<3, 64>>({300, 3, 2, 1, 0, 0, .01}) <= 1);
}

TEST_CASE("rows after a query and before its window are out of sight") {
  for (const int window : {0, 99, 100, 900}) {  // rows are three positions apart
    CAPTURE(window);
    CHECK(error_of<4, 3, 64, true>({500, 7, 3, 1, 0, window, 1, true}) <= 1);
    CHECK(error_of<16, 16, 64, true>({500, 7, 3, 1, 0, window, 1, true}) <= 1);
  }
}
