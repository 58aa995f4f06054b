// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A decode step over heads of any length: the data, the step on simulated blocks of warps, and double precision beside it.
#pragma once

#include <cmath>
#include <memory>

#include "kvtailor/core/device.hpp"
#include "reference/slice_rows.hpp"

namespace reference {

struct DecodeCase {
  std::vector<int> body, near;  // rows of each entry, encoded and dense
  int group, blocks;            // query heads of an entry; blocks of threads
  int window = 0;
};

template <int key_bits, int value_bits, int dim>
struct DecodeProblem {
  using Body = SliceRows<key_bits, value_bits, dim>;
  using Near = SliceRows<16, 16, dim>;
  using Key = typename Body::Key::Codec;
  using Value = typename Body::Value::Codec;
  using Plain = Dense<Half, dim>;

  DecodeCase shape;
  std::vector<Body> body;
  std::vector<Near> near;
  std::vector<Half> queries;  // [entries, group, dim]
  std::vector<int> position;  // [entries]

  explicit DecodeProblem(const DecodeCase& c) : shape(c) {
    std::mt19937 random(static_cast<unsigned>(dim + c.group));
    std::normal_distribution<float> normal;
    for (std::size_t e = 0; e < c.body.size(); ++e) {
      body.emplace_back(c.body[e], 1.f, random);
      near.emplace_back(c.near[e], 1.f, random, 3 * c.body[e]);
      position.push_back(3 * (c.body[e] + c.near[e]) - 3);
      for (int i = 0; i < c.group * dim; ++i) queries.push_back(from_float<Half>(normal(random)));
    }
  }
  int entries() const { return static_cast<int>(body.size()); }
  static float scale() { return 1 / std::sqrt(static_cast<float>(dim)); }

  // Rows of all entries of one kind, and room for partial results.
  struct Side {
    std::vector<SlicePages> pages;
    std::vector<int> first_slice;  // counted by the step
    std::vector<float> max, sum, rows;

    template <class Rows>
    Side(const std::vector<Rows>& all, int blocks) {
      for (const Rows& one : all) {
        pages.push_back(one.pages);
      }
      first_slice.assign(all.size() + 1, -1);
      const std::size_t slots = all.size() + static_cast<std::size_t>(blocks);
      max.assign(8 * slots, NAN);
      sum.assign(8 * slots, NAN);
      rows.assign(8 * slots * dim, NAN);
    }
  };
  DecodeStep<Half> step(Side& side) const {
    return {{side.pages.data(), side.first_slice.data(), entries(), shape.blocks},
            {side.max.data(), side.sum.data(), side.rows.data()},
            queries.data(),
            position.data(),
            1,
            shape.group,
            0,
            shape.window,
            scale(),
            0};
  }

  template <bool limited>
  std::vector<Half> simulate() const {
    Side coded(body, shape.blocks), dense(near, shape.blocks);
    std::vector<Half> out(queries.size());
    SimulatedDevice device;
    if (!launch_decode<Key, Value, limited>(device, step(coded), step(dense), out.data()).ok()) std::abort();
    return out;
  }

  // The largest error of an output relative to what rounding may do: see test_decode_warp.cpp, and the rounding of the output.
  double error(const std::vector<Half>& out) const {
    double worst = 0;
    for (int e = 0; e < entries(); ++e) {
      const int coded = shape.body[static_cast<std::size_t>(e)], all = coded + shape.near[static_cast<std::size_t>(e)];
      const auto element = [&](bool key, int r, int d) {
        const auto& from_body = body[static_cast<std::size_t>(e)];
        const auto& from_near = near[static_cast<std::size_t>(e)];
        const auto at = static_cast<std::size_t>((r < coded ? r : r - coded) * dim + d);
        return static_cast<double>(r < coded ? (key ? from_body.keys : from_body.values)[at]
                                             : (key ? from_near.keys : from_near.values)[at]);
      };
      for (int j = 0; j < shape.group; ++j) {
        const auto first = static_cast<std::size_t>((e * shape.group + j) * dim);
        std::vector<double> weight(static_cast<std::size_t>(all), 0), exact(dim, 0.0);
        double total = 0, spread = 0, length = 0, square = 0;
        for (int r = 0; r < all; ++r) {
          if (shape.window > 0 && 3 * r <= position[static_cast<std::size_t>(e)] - shape.window) continue;
          double s = 0;
          for (int d = 0; d < dim; ++d)
            s += static_cast<double>(to_float(queries[first + static_cast<std::size_t>(d)])) * element(true, r, d);
          total += weight[static_cast<std::size_t>(r)] = std::exp(s * static_cast<double>(scale()));
        }
        for (int r = 0; r < all && total > 0; ++r) {
          const double p = weight[static_cast<std::size_t>(r)] / total;
          spread += p * p;
          for (int d = 0; d < dim; ++d) {
            const double x = element(false, r, d);
            exact[static_cast<std::size_t>(d)] += p * x;
            square += p * x * x / dim;
          }
        }
        for (const double x : exact) length += x * x / dim;
        double bound = 6 * std::exp2(-12.2) * std::sqrt(2 * spread * square) + std::exp2(-11) * 6 * std::sqrt(length) + 1e-30;
        if (key_bits == 2) bound += 5e-4 * 4 * std::sqrt(spread * square);
        if (value_bits == 2) bound += 5e-4 * 4 * std::sqrt(length);
        for (int d = 0; d < dim; ++d) {
          const double got = static_cast<double>(to_float(out[first + static_cast<std::size_t>(d)]));
          const double part = std::fabs(got - exact[static_cast<std::size_t>(d)]) / bound;
          if (!(part <= worst)) worst = part;
        }
      }
    }
    return worst;
  }
};

template <int key_bits, int value_bits, int dim, bool limited = false>
double decode_error(const DecodeCase& c) {
  const DecodeProblem<key_bits, value_bits, dim> problem(c);
  return problem.error(problem.template simulate<limited>());
}

}  // namespace reference
