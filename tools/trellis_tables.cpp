// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Writes include/kvtailor/codec/trellis_tables.hpp: the values of the states of Trellis, trained on random rows by Lloyd's
// iteration with the encoder's own search.
//
//   g++ -std=c++20 -O3 -march=native -Iinclude tools/trellis_tables.cpp -o trellis_tables && ./trellis_tables
//
// Rows of 64 normal numbers are encoded; each value becomes the mean of the elements it stood for. A
// value starts as a quantile of the normal distribution, in random order. Noise that fades away in the first part of a run
// keeps it out of poor minima; the best of some runs is refined. Complementary states have opposite values, as rows and their
// negatives are equally likely.
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kvtailor/codec/trellis_search.hpp"

namespace {

constexpr int dim = 64;

double normal_quantile(double p) {
  double low = -9, high = 9;
  for (int i = 0; i < 80; ++i) {
    const double middle = 0.5 * (low + high);
    (0.5 * std::erfc(-middle / std::sqrt(2.0)) < p ? low : high) = middle;
  }
  return low;
}

template <int bits, int window>
class Training {
 public:
  using Search = kvt::TrellisSearch<bits, window>;
  static constexpr int half = Search::num_states / 2;

  explicit Training(unsigned seed) : random_(seed) {
    std::vector<int> order(half);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    for (const int k : order) {
      const double x = normal_quantile((half + k + 0.5) / (2 * half));
      value.push_back(random_() % 2 == 0 ? x : -x);
    }
  }

  // Mean squared error of the table as stored on new rows; after it, if `noise` >= 0, the trained values, disturbed by that
  // much.
  double run(int rows, double noise) {
    const auto table = values();
    std::vector<double> sum(half), count(half);
    double total = 0;
    for (int row = 0; row < rows; ++row) {
      float x[dim];
      for (float& element : x) element = normal_(random_);
      std::uint16_t state[dim];
      (*search_)(x, dim, table.data(), memory_.data(), state);
      double error = 0;
      for (int i = 0; i < dim; ++i) {
        const bool mirrored = state[i] >= half;
        const auto s = static_cast<std::size_t>(mirrored ? 2 * half - 1 - state[i] : state[i]);
        sum[s] += static_cast<double>(mirrored ? -x[i] : x[i]);
        ++count[s];
        const double apart = static_cast<double>(x[i] - table[state[i]]);
        error += apart * apart / dim;
      }
      total += error;
    }
    for (std::size_t s = 0; s < half && noise >= 0; ++s) {
      if (count[s] > 0) value[s] = sum[s] / count[s];
      value[s] += noise * static_cast<double>(normal_(random_));
    }
    return total / rows;
  }

  // Mean squared error relative to the squared norm of new rows, which are searched at all sizes and scaled exactly.
  double scaled_error(int rows) {
    const auto table = values();
    double total = 0;
    for (int row = 0; row < rows; ++row) {
      float x[dim], unit[dim];
      double square = 0, best = 0;
      for (float& element : x) {
        element = normal_(random_);
        square += static_cast<double>(element * element);
      }
      for (const float size : Search::sizes) {
        for (int i = 0; i < dim; ++i) unit[i] = x[i] / (size * static_cast<float>(std::sqrt(square / dim)));
        std::uint16_t state[dim];
        (*search_)(unit, dim, table.data(), memory_.data(), state);
        double cross = 0, values_square = 0;
        for (int i = 0; i < dim; ++i) {
          const float v = table[state[i]];
          cross += static_cast<double>(x[i] * v);
          values_square += static_cast<double>(v * v);
        }
        best = std::max(best, cross * cross / values_square);
      }
      total += 1 - best / square;
    }
    return total / rows;
  }
  int stored(std::size_t state) const { return static_cast<int>(std::lrint(value[state] * Search::table_grid)); }

  std::vector<double> value;  // of the states whose upper bit is 0

 private:
  std::vector<float> values() const {
    std::vector<float> table(2 * half);
    for (std::size_t s = 0; s < half; ++s) {
      table[s] = static_cast<float>(stored(s)) / Search::table_grid;
      table[2 * half - 1 - s] = -table[s];
    }
    return table;
  }

  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  std::unique_ptr<Search> search_ = std::make_unique<Search>();
  std::vector<std::uint8_t> memory_ = std::vector<std::uint8_t>(Search::memory(dim));
};

template <int bits, int window>
void write_table(int runs, int iterations) {
  Training<bits, window> best(0);
  double least = 1e9;
  for (int seed = 1; seed <= runs; ++seed) {
    Training<bits, window> training(static_cast<unsigned>(seed));
    const double start = 0.6 * std::sqrt(training.run(500, -1));
    for (int i = 0; i < iterations; ++i) training.run(2000, std::max(0.0, start * (1 - i / (0.7 * iterations))));
    const double error = training.run(10000, -1);
    if (error < least) {
      least = error;
      best = std::move(training);
    }
  }
  for (int i = 0; i < 40; ++i) best.run(10000, 0);
  const double plain_error = best.run(40000, -1), error = best.scaled_error(40000);
  std::fprintf(stderr, "%d bits, window %d: %.6f, unscaled %.6f\n", bits, window, error, plain_error);
  std::printf("template <>\nstruct TrellisTable<%d, %d> {\n  static constexpr double distortion = %.6f;\n", bits, window,
              error);
  std::printf("  static constexpr signed char half[%d] = {", best.half);
  for (std::size_t s = 0; s < best.half; ++s) std::printf("%s%d", s == 0 ? "" : ", ", best.stored(s));
  std::printf("};\n};\n");
  std::fflush(stdout);
}

}  // namespace

int main() {
  std::printf(R"(// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Values of the states of Trellis, and the mean squared error of rows of 64 normal numbers relative to their squared norm if
// scales are exact. Written by tools/trellis_tables.cpp.
#pragma once

namespace kvt::inline v0 {

// State s < 2^(window-1) stands for half[s] / 32; its complement for the opposite.
template <int bits, int window>
struct TrellisTable;

)");
  write_table<1, 8>(8, 100);
  write_table<2, 8>(8, 100);
  write_table<3, 8>(8, 100);
  write_table<4, 8>(8, 100);
  write_table<1, 6>(8, 100);
  write_table<2, 6>(8, 100);
  write_table<3, 6>(8, 100);
  std::printf("}  // namespace kvt::inline v0\n");
}
