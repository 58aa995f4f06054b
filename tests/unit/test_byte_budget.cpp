// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Bytes shared out as rows and bits: losses of options equal plain sums in double precision, choices are the best there are of
// small instances, and the curve of a choice keeps what was chosen.
#include <doctest/doctest.h>

#include <random>

#include "kvtailor/learn/byte_budget.hpp"
#include "kvtailor/learn/option_losses.hpp"

using namespace kvt;

namespace {

constexpr int dim = 40, group = 3, width = 50, rows = 90, window = 7;

struct Scene {
  std::vector<float> keys, values, coded_keys, coded_values, queries, weights;
  std::vector<int> positions, query_positions, order;

  explicit Scene(unsigned seed) : positions(rows), query_positions(window) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int n) {
      x.resize(static_cast<std::size_t>(n));
      for (float& y : x) y = normal(random);
    };
    fill(keys, rows * dim);
    fill(values, rows * dim);
    fill(queries, window * group * dim);
    fill(weights, width * group * dim);
    coded_keys = keys;
    coded_values = values;
    for (float& x : coded_keys) x += 0.1f * normal(random);
    for (float& x : coded_values) x += 0.1f * normal(random);
    for (int i = 0; i < rows; ++i) positions[static_cast<std::size_t>(i)] = 3 * i;
    // Of which the first see less than all.
    for (int w = 0; w < window; ++w) query_positions[static_cast<std::size_t>(w)] = 200 + 15 * w;
    for (int i = 4; i < 80; ++i) order.push_back(i);
    std::shuffle(order.begin(), order.end(), random);
  }
  HeadEvidence seen(AttendOptions attend = {}) const {
    HeadEvidence e;
    e.head_dim = dim;
    e.group_size = group;
    e.positions = positions;
    e.keys = keys;
    e.values = values;
    e.window_queries = queries.data();
    e.window_stride = group * dim;
    e.window_positions = query_positions;
    e.attend = attend;
    e.output = {weights.data(), width};
    e.output_stride = group * dim;
    return e;
  }
  CodedRows coded() const { return {coded_keys, coded_values}; }

  // What the group's heads add to the hidden state for query w, if `kept` of order stay (-1: all rows as they are).
  std::vector<double> output(int w, int kept, const AttendOptions& attend) const {
    std::vector<double> out(width, 0);
    const double scale = attend.scale != 0 ? double(attend.scale) : 1 / std::sqrt(double(dim));
    for (int g = 0; g < group; ++g) {
      std::vector<double> sum(dim, 0);
      double weight = 0;
      for (int r = 0; r < rows; ++r) {
        const auto at = std::find(order.begin(), order.end(), r) - order.begin();
        const bool free = at < static_cast<std::ptrdiff_t>(order.size());
        if (kept >= 0 && free && at >= kept) continue;
        const int p = positions[static_cast<std::size_t>(r)], q = query_positions[static_cast<std::size_t>(w)];
        if (p > q || (attend.window > 0 && p <= q - attend.window)) continue;
        const auto& k = kept >= 0 && free ? coded_keys : keys;
        const auto& v = kept >= 0 && free ? coded_values : values;
        double logit = 0;
        for (int d = 0; d < dim; ++d)
          logit += double(queries[static_cast<std::size_t>((w * group + g) * dim + d)]) *
                   double(k[static_cast<std::size_t>(r * dim + d)]);
        logit *= scale;
        if (attend.soft_cap > 0) logit = double(attend.soft_cap) * std::tanh(logit / double(attend.soft_cap));
        const double e = std::exp(logit);
        weight += e;
        for (int d = 0; d < dim; ++d) sum[static_cast<std::size_t>(d)] += e * double(v[static_cast<std::size_t>(r * dim + d)]);
      }
      for (int o = 0; o < width; ++o) {
        for (int d = 0; d < dim && weight > 0; ++d)
          out[static_cast<std::size_t>(o)] += double(weights[static_cast<std::size_t>(o * group * dim + g * dim + d)]) *
                                              sum[static_cast<std::size_t>(d)] / weight;
      }
    }
    return out;
  }
};

}  // namespace

TEST_CASE("losses of options are those of plain sums") {
  const Scene scene(1);
  const std::vector<int> kept = {0, 1, 2, 17, 17, 60, 76};
  for (const AttendOptions& attend : {AttendOptions{}, AttendOptions{.scale = 0.3f, .window = 120, .soft_cap = 2.f}}) {
    std::vector<float> losses;
    REQUIRE(option_losses(scene.seen(attend), scene.order, scene.coded(), kept, losses).ok());
    REQUIRE(losses.size() == kept.size() * window);
    for (int w = 0; w < window; ++w) {
      const auto whole = scene.output(w, -1, attend);
      for (std::size_t k = 0; k < kept.size(); ++k) {
        CAPTURE(w);
        CAPTURE(kept[k]);
        const auto part = scene.output(w, kept[k], attend);
        double want = 0;
        for (std::size_t o = 0; o < whole.size(); ++o) want += (part[o] - whole[o]) * (part[o] - whole[o]);
        CHECK(double(losses[k * window + static_cast<std::size_t>(w)]) == doctest::Approx(want).epsilon(1e-4));
      }
    }
  }
  // Rows as they are, all kept: nothing is lost, but for rounding.
  std::vector<float> losses;
  REQUIRE(option_losses(scene.seen(), scene.order, {scene.keys, scene.values}, std::vector{76}, losses).ok());
  for (const float loss : losses) CHECK(loss < 1e-8f);
}

TEST_CASE("many queries are those of few") {
  Scene scene(2);
  std::vector<float> few, many;
  const std::vector<int> kept = {0, 30};
  REQUIRE(option_losses(scene.seen(), scene.order, scene.coded(), kept, few).ok());
  constexpr int times = 30;  // more than go together
  const auto queries = scene.queries;
  const auto at = scene.query_positions;
  for (int i = 1; i < times; ++i) {
    scene.queries.insert(scene.queries.end(), queries.begin(), queries.end());
    scene.query_positions.insert(scene.query_positions.end(), at.begin(), at.end());
  }
  REQUIRE(option_losses(scene.seen(), scene.order, scene.coded(), kept, many).ok());
  for (std::size_t k = 0; k < kept.size(); ++k) {
    for (std::size_t i = 0; i < times * window; ++i)
      CHECK(many[k * times * window + i] == doctest::Approx(few[k * window + i % window]).epsilon(1e-3));
  }
}

TEST_CASE("what losses cannot be of is refused") {
  const Scene scene(3);
  std::vector<float> losses = {7};
  const auto of = [&](const HeadEvidence& seen, const std::vector<int>& order, CodedRows coded, const std::vector<int>& kept) {
    return option_losses(seen, order, coded, kept, losses).code;
  };
  HeadEvidence blind = scene.seen();
  blind.window_positions = {};
  CHECK(of(blind, {1}, scene.coded(), {1}) == Errc::no_evidence);
  blind = scene.seen();
  blind.output.weights = nullptr;
  CHECK(of(blind, {1}, scene.coded(), {1}) == Errc::no_evidence);
  CHECK(of(scene.seen(), {1, 2, 1}, scene.coded(), {1}) == Errc::bad_shape);
  CHECK(of(scene.seen(), {rows}, scene.coded(), {1}) == Errc::bad_shape);
  CHECK(of(scene.seen(), {-1}, scene.coded(), {1}) == Errc::bad_shape);
  CHECK(of(scene.seen(), {1, 2}, {std::span(scene.coded_keys).first(2 * dim), scene.coded_values}, {1}) == Errc::bad_shape);
  CHECK(of(scene.seen(), {1, 2}, scene.coded(), {2, 1}) == Errc::bad_shape);
  CHECK(of(scene.seen(), {1, 2}, scene.coded(), {3}) == Errc::bad_shape);
  CHECK(losses == std::vector<float>{7});
}

namespace {

ByteBudget small(unsigned seed, int heads = 3) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> unit(0.1f, 1.f);
  ByteBudget b;
  b.num_layers = heads;
  b.num_kv_heads = 1;
  b.selector = "key_diff";
  b.codecs = {"fp16", "turbo4", "turbo2"};
  b.shares = {0.f, 0.25f, 0.5f, 1.f};
  b.zone_bytes = 260;
  b.zone_rows = 12;
  for (int h = 0; h < heads; ++h) {
    const float size = unit(random) * (h + 1);
    for (const float bytes : {260.f, 72.f, 40.f}) {
      b.row_bytes.push_back(bytes);
      const float coding = bytes > 200 ? 0.f : bytes > 50 ? .02f : .2f;
      for (const float share : b.shares) b.losses.push_back(size * ((1 - share) * (1 - share) + share * coding * unit(random)));
    }
  }
  return b;
}

}  // namespace

TEST_CASE("choices are the best there are where the hulls' steps meet the limit, and never take more") {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    const ByteBudget b = small(seed);
    constexpr double text = 1012, free = 1000;
    for (const double bytes : {30e3, 60e3, 120e3, 300e3, 790e3}) {
      TailoredHeads tailored;
      REQUIRE(b.solve(bytes, text, tailored).ok());
      CHECK(tailored.bytes <= bytes);
      // All choices, by counting.
      double best = 1e30, best_of_same = 1e30;
      const int per_head = 12, all = per_head * per_head * per_head;
      for (int i = 0; i < all; ++i) {
        double cost = 3 * 12 * 260.0, loss = 0;
        for (int h = 0, rest = i; h < 3; ++h, rest /= per_head) {
          const int c = rest % per_head / 4, p = rest % 4;
          cost +=
              free * double(b.shares[static_cast<std::size_t>(p)]) * double(b.row_bytes[static_cast<std::size_t>(h * 3 + c)]);
          loss += double(b.losses[static_cast<std::size_t>((h * 3 + c) * 4 + p)]);
        }
        if (cost <= bytes) best = std::min(best, loss);
        if (cost <= tailored.bytes + 1e-6) best_of_same = std::min(best_of_same, loss);
      }
      CHECK(tailored.loss >= best - 1e-9);
      // Of its own bytes it is the best as long as no step was left out.
      if (bytes == 790e3) CHECK(tailored.loss == doctest::Approx(best_of_same));
    }
  }
}

TEST_CASE("the curve of a choice gives what was chosen") {
  const ByteBudget b = small(5, 8);
  for (const double bytes : {60e3, 120e3, 300e3, 600e3}) {
    TailoredHeads tailored;
    REQUIRE(b.solve(bytes, 1012, tailored).ok());
    const Geometry shape{8, 1, 2, 40};
    REQUIRE(tailored.curve.check(shape).ok());
    CHECK(tailored.curve.selector == "key_diff");
    double total = 0;
    for (const double kept : tailored.kept) total += kept;
    const std::vector<int> seen(8, 1012), floor(8, 12);
    std::vector<int> keep(8);
    BudgetRequest want{static_cast<std::int64_t>(8 * 12 + std::llround(1000 * total)), 8, 1, seen, floor, {}};
    REQUIRE(tailored.curve.allocate(want, keep).ok());
    double loss = 0;
    for (std::size_t h = 0; h < 8; ++h) {
      const double share = (keep[h] - 12) / 1000.0;
      // Between two points of the losses lies a line.
      const auto c = static_cast<std::size_t>(tailored.codecs[h]);
      std::size_t p = 0;
      while (p + 2 < b.shares.size() && double(b.shares[p + 1]) < share) ++p;
      const double part = (share - double(b.shares[p])) / double(b.shares[p + 1] - b.shares[p]);
      const auto at = [&](std::size_t i) { return double(b.losses[(h * 3 + c) * 4 + i]); };
      loss += std::lerp(at(p), at(p + 1), part);
    }
    // The table is in hundredths.
    CHECK(loss <= tailored.loss * 1.05 + 1e-3);
  }
}

TEST_CASE("budgets and profiles that make no sense are refused") {
  ByteBudget b = small(1);
  TailoredHeads tailored;
  CHECK(b.solve(9000, 1000, tailored).code == Errc::bad_budget);  // 3 * 12 * 260 are the dense zones
  CHECK(b.solve(1e6, 0, tailored).code == Errc::bad_shape);
  CHECK(tailored.codecs.empty());
  const auto broken = [&](auto&& change) {
    ByteBudget other = small(1);
    change(other);
    return !other.check().ok() && !other.solve(1e6, 1000, tailored).ok();
  };
  CHECK(broken([](ByteBudget& o) { o.losses.pop_back(); }));
  CHECK(broken([](ByteBudget& o) { o.losses[3] = NAN; }));
  CHECK(broken([](ByteBudget& o) { o.losses[3] = -1; }));
  CHECK(broken([](ByteBudget& o) { o.row_bytes[1] = INFINITY; }));
  CHECK(broken([](ByteBudget& o) { o.row_bytes[1] = 0; }));
  CHECK(broken([](ByteBudget& o) { o.shares[0] = .1f; }));
  CHECK(broken([](ByteBudget& o) { o.shares[2] = .1f; }));
  CHECK(broken([](ByteBudget& o) { o.shares[3] = .9f; }));
  CHECK(broken([](ByteBudget& o) { o.num_layers = 0; }));
  CHECK(broken([](ByteBudget& o) { o.codecs.clear(); }));
  CHECK(broken([](ByteBudget& o) { o.zone_bytes = NAN; }));
}
