// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention of a query or a chunk of queries to heads of any length: the data, the step on simulated blocks of warps, and
// double precision beside it.
#pragma once

#include <cmath>
#include <memory>

#include "kvtailor/core/device.hpp"
#include "reference/slice_rows.hpp"

namespace reference {

struct DecodeCase {
  std::vector<int> body, near;  // rows of each entry, encoded and dense
  int group, blocks;            // query heads of an entry; blocks of threads
  int window = 0, n = 1;        // n: queries of each sequence, of its newest rows
  int kv_heads = 1;             // entries of a sequence
  float cap = 0;
  bool sinks = false;         // learned sink logits
  std::vector<int> own = {};  // queries of each sequence, if they are not n
};

template <class Codec>
struct DecodeProblem {
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  using Plain = typename Codec::near_type;
  using Body = SliceRows<Key, Value>;
  using Near = SliceRows<Plain, Plain>;
  static constexpr int dim = Codec::head_dim;
  // Whether all products and sums are fp32; then queries and outputs are too.
  static constexpr bool fp32 = !Body::Layout::fragments && !Near::Layout::fragments;
  using T = std::conditional_t<fp32, float, Half>;

  DecodeCase shape;
  std::vector<Body> body;
  std::vector<Near> near;
  std::vector<T> queries;        // [sequences, n, kv_heads, group, dim]
  std::vector<int> position;     // [sequences, n]
  std::vector<int> query_start;  // [sequences + 1]
  std::vector<float> sink_logits;

  explicit DecodeProblem(const DecodeCase& c) : shape(c) {
    std::mt19937 random(static_cast<unsigned>(dim + c.group));
    std::normal_distribution<float> normal;
    for (std::size_t e = 0; e < c.body.size(); ++e) {
      body.emplace_back(c.body[e], 1.f, random);
      near.emplace_back(c.near[e], 1.f, random, 3 * c.body[e]);
    }
    query_start.push_back(0);
    for (int s = 0; s * c.kv_heads < entries(); ++s) {
      int rows = 0;
      for (int h = 0; h < c.kv_heads; ++h) rows = std::max(rows, rows_of(s * c.kv_heads + h));
      const int own = c.own.empty() ? c.n : c.own[static_cast<std::size_t>(s)];
      for (int i = 0; i < own; ++i) position.push_back(3 * (rows - own + i));
      query_start.push_back(query_start.back() + own);
    }
    for (int i = 0; i < query_start.back() * c.kv_heads * c.group * dim; ++i) {
      queries.push_back(from_float<T>(normal(random)));
    }
    for (int h = 0; c.sinks && h < c.kv_heads * c.group; ++h) sink_logits.push_back(2 * normal(random));
  }
  int entries() const { return static_cast<int>(body.size()); }
  int rows_of(int e) const { return shape.body[static_cast<std::size_t>(e)] + shape.near[static_cast<std::size_t>(e)]; }
  static float scale() { return 1 / std::sqrt(static_cast<float>(dim)); }

  // Rows of all entries of one kind, and room for partial results.
  struct Side {
    std::vector<SlicePages> pages;
    std::vector<int> first_slice;  // counted by the step
    std::vector<SeenSlices> seen;
    std::vector<float> max, sum, rows;

    // row: elements of a partial result.
    template <class Rows>
    Side(const std::vector<Rows>& all, const DecodeCase& c, int width, int row) {
      for (const Rows& one : all) pages.push_back(one.pages);
      const auto items = all.size() * static_cast<std::size_t>((c.n * c.group + width - 1) / width);
      first_slice.assign(items + 1, -1);
      seen.assign(items, {-1, {-1, -1}});
      const std::size_t vectors = (items + static_cast<std::size_t>(c.blocks)) * static_cast<std::size_t>(width);
      max.assign(vectors, NAN);
      sum.assign(vectors, NAN);
      rows.assign(vectors * static_cast<std::size_t>(row), NAN);
    }
  };
  DecodeStep<T> step(Side& side) const {
    return {.entry = side.pages.data(),
            .entries = entries(),
            .kv_heads = shape.kv_heads,
            .split = {side.first_slice.data(), 0, shape.blocks},
            .seen = side.seen.data(),
            .partials = {side.max.data(), side.sum.data(), side.rows.data()},
            .queries = queries.data(),
            .position = position.data(),
            .query_start = shape.own.empty() ? nullptr : query_start.data(),
            .n = shape.n,
            .group = shape.group,
            .window = shape.window,
            .scale = scale(),
            .cap = shape.cap,
            .sink_logits = shape.sinks ? sink_logits.data() : nullptr,
            .width = 0};
  }

  Side body_side(int width) const { return Side(body, shape, width, max_basis_dim<Value>); }
  Side near_side(int width) const { return Side(near, shape, width, dim); }

  template <bool limited, int width = 8>
  std::vector<T> simulate() const {
    Side coded = body_side(width), dense = near_side(width);
    std::vector<T> out(queries.size(), from_float<T>(NAN));
    SimulatedDevice device;
    if (!launch_decode<Codec, limited, width>(device, step(coded), step(dense), out.data()).ok()) std::abort();
    return out;
  }

  // The largest error of an output relative to what rounding may do: see test_decode_warp.cpp, and the rounding of the output.
  double error(const std::vector<T>& out) const {
    double worst = 0;
    for (int e = 0; e < entries(); ++e) {
      const int coded = shape.body[static_cast<std::size_t>(e)], all = rows_of(e), sequence = e / shape.kv_heads;
      const auto element = [&](bool key, int r, int d) {
        const auto& from_body = body[static_cast<std::size_t>(e)];
        const auto& from_near = near[static_cast<std::size_t>(e)];
        const auto at = static_cast<std::size_t>((r < coded ? r : r - coded) * dim + d);
        return static_cast<double>(r < coded ? (key ? from_body.keys : from_body.values)[at]
                                             : (key ? from_near.keys : from_near.values)[at]);
      };
      const int begin = query_start[static_cast<std::size_t>(sequence)],
                end = query_start[static_cast<std::size_t>(sequence) + 1];
      for (int v = begin * shape.group; v < end * shape.group; ++v) {
        const int own = position[static_cast<std::size_t>(v / shape.group)];
        const int head = e % shape.kv_heads * shape.group + v % shape.group;
        const auto first = static_cast<std::size_t>((v / shape.group * shape.kv_heads * shape.group + head) * dim);
        std::vector<double> weight(static_cast<std::size_t>(all), 0), exact(dim, 0.0);
        double total = 0, spread = 0, length = 0, square = 0;
        for (int r = 0; r < all; ++r) {
          if (3 * r > own || (shape.window > 0 && 3 * r <= own - shape.window)) continue;
          double s = 0;
          for (int d = 0; d < dim; ++d)
            s += static_cast<double>(to_float(queries[first + static_cast<std::size_t>(d)])) * element(true, r, d);
          s *= static_cast<double>(scale());
          if (shape.cap > 0) s = static_cast<double>(shape.cap) * std::tanh(s / static_cast<double>(shape.cap));
          total += weight[static_cast<std::size_t>(r)] = std::exp(s);
        }
        if (shape.sinks && total > 0) total += std::exp(static_cast<double>(sink_logits[static_cast<std::size_t>(head)]));
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
        if (std::is_same_v<Key, TurboQuant<2, dim>>) bound += 5e-4 * 4 * std::sqrt(spread * square);
        if (std::is_same_v<Value, TurboQuant<2, dim>>) bound += 5e-4 * 4 * std::sqrt(length);
        // Logits up to 5 are sums of dim products, in turn and by halves, and so are sums over rows.
        if (fp32) bound = std::exp2(-20) * std::sqrt(spread * square) + std::exp2(-20) * std::sqrt(length) + 1e-30;
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

template <class Codec, bool limited = false, int width = 8>
double decode_error(const DecodeCase& c) {
  const DecodeProblem<Codec> problem(c);
  return problem.error(problem.template simulate<limited, width>());
}
// By bits: see Format.
template <int key_bits, int value_bits, int dim>
using TensorCodec = KvCodec<typename Format<key_bits, dim>::Codec, typename Format<value_bits, dim>::Codec>;
template <int key_bits, int value_bits, int dim, bool limited = false, int width = 8>
double decode_error(const DecodeCase& c) {
  return decode_error<TensorCodec<key_bits, value_bits, dim>, limited, width>(c);
}

}  // namespace reference
