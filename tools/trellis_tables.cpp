// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Writes include/kvtailor/codec/trellis_tables.hpp: what the states of Trellis stand for.
//
//   g++ -std=c++20 -O3 -march=native -Iinclude tools/trellis_tables.cpp -o trellis_tables && ./trellis_tables
//
// Parities of a state's bits are its sign and the number of its size. Sets of bits are found by climbing: one is changed, sizes
// are trained for a moment on a few rows of 64 normal numbers by Lloyd's iteration with the encoder's own search (each becomes
// the mean of the elements it stood for), and the change is kept if the error is less; where nothing helps any more, the climb
// begins anew elsewhere. The best sets are trained on many rows. Complementary states have opposite values, as rows and their
// negatives are equally likely.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
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
  static constexpr int size_bits = bits + 2, num_sizes = 1 << size_bits, num_states = Search::num_states;
  struct Parities {  // each of the bits of a state that are set here
    int sign = 0, index[size_bits] = {};
  };

  explicit Training(unsigned seed) : random_(seed) {}

  Parities random_parities() {
    Parities some{random_set(1)};
    for (int& set : some.index) set = random_set(0);
    return some;
  }
  Parities changed(Parities some) {
    const auto place = static_cast<int>(random_() % (size_bits + 1));
    int& set = place == size_bits ? some.sign : some.index[place];
    if (random_() % 3 == 0) {
      set = random_set(place == size_bits);
    } else {
      set ^= 1 << random_() % window ^ 1 << random_() % window;
    }
    return some;
  }
  // Sizes become quantiles of the normal distribution.
  void begin(const Parities& some) {
    where_.resize(num_states);
    for (int s = 0; s < num_states; ++s) {
      int k = parity(s & some.sign) * num_sizes;
      for (int i = 0; i < size_bits; ++i) k |= parity(s & some.index[i]) << i;
      where_[static_cast<std::size_t>(s)] = k;
    }
    size.resize(num_sizes);
    for (std::size_t k = 0; k < num_sizes; ++k) {
      size[k] = normal_quantile(0.5 + (static_cast<double>(k) + 0.5) / (2 * num_sizes));
    }
  }
  std::vector<float> random_rows(int rows) {
    std::vector<float> x(static_cast<std::size_t>(rows) * dim);
    for (float& element : x) element = normal_(random_);
    return x;
  }

  // Mean squared error of the table as stored; after it, the trained sizes.
  double run(const std::vector<float>& rows) {
    const auto table = values();
    double sum[num_sizes] = {}, count[num_sizes] = {}, total = 0;
    for (std::size_t at = 0; at < rows.size(); at += dim) {
      const float* const x = rows.data() + at;
      std::uint16_t state[dim];
      (*search_)(x, dim, table.data(), memory_.data(), state);
      for (int i = 0; i < dim; ++i) {
        const int k = where_[state[i]];
        sum[k % num_sizes] += static_cast<double>(k >= num_sizes ? -x[i] : x[i]);
        ++count[k % num_sizes];
        const double apart = static_cast<double>(x[i] - table[state[i]]);
        total += apart * apart;
      }
    }
    for (std::size_t k = 0; k < num_sizes; ++k) {
      if (count[k] > 0) size[k] = sum[k] / count[k];
    }
    return total / static_cast<double>(rows.size());
  }

  // Mean squared error relative to the squared norm of new rows, which are searched at all sizes and scaled exactly.
  double scaled_error(int rows) {
    const auto table = values();
    double total = 0;
    for (int row = 0; row < rows; ++row) {
      const auto x = random_rows(1);
      float unit[dim];
      double square = 0, best = 0;
      for (const float element : x) square += static_cast<double>(element * element);
      for (const float factor : Search::sizes) {
        for (std::size_t i = 0; i < dim; ++i) unit[i] = x[i] / (factor * static_cast<float>(std::sqrt(square / dim)));
        std::uint16_t state[dim];
        (*search_)(unit, dim, table.data(), memory_.data(), state);
        double cross = 0, values_square = 0;
        for (std::size_t i = 0; i < dim; ++i) {
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
  int stored(std::size_t k) const { return std::clamp(static_cast<int>(std::lrint(size[k] * Search::table_grid)), 0, 127); }

  std::vector<double> size;

 private:
  static int parity(int x) { return __builtin_parity(static_cast<unsigned>(x)); }
  int random_set(int parity_wanted) {
    for (;;) {
      const auto set = static_cast<int>(random_() % num_states);
      if (set != 0 && parity(set) == parity_wanted) return set;
    }
  }
  std::vector<float> values() const {
    std::vector<float> table(num_states);
    for (std::size_t s = 0; s < num_states; ++s) {
      const int k = where_[s];
      const float v = static_cast<float>(stored(static_cast<std::size_t>(k % num_sizes))) / Search::table_grid;
      table[s] = k >= num_sizes ? -v : v;
    }
    return table;
  }

  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  std::vector<int> where_;  // of each state: the number of its size, and num_sizes more if it is negative
  std::unique_ptr<Search> search_ = std::make_unique<Search>();
  std::vector<std::uint8_t> memory_ = std::vector<std::uint8_t>(Search::memory(dim));
};

template <int bits, int window>
void write_table(int tries) {
  using Train = Training<bits, window>;
  Train training(1);
  const auto few = training.random_rows(200), some = training.random_rows(3000);
  struct Found {
    double error = 1e9;
    typename Train::Parities parities = {};
  };
  constexpr int patience = 80;
  Found top;
  for (int tried = 0; tried < tries;) {
    Found here;
    auto next = training.random_parities();
    for (int failed = 0; failed < patience; ++tried) {
      training.begin(next);
      double error = 0;
      for (int k = 0; k < 4; ++k) error = training.run(few);
      ++failed;
      if (error < here.error) {
        here = {error, next};
        failed = 0;
      }
      next = training.changed(here.parities);
    }
    training.begin(here.parities);
    for (int k = 0; k < 6; ++k) here.error = training.run(some);
    if (here.error < top.error) top = here;
  }
  training.begin(top.parities);
  const auto many = training.random_rows(20000);
  for (int i = 0; i < 60; ++i) training.run(many);
  const double plain_error = training.run(training.random_rows(40000)), error = training.scaled_error(40000);
  std::fprintf(stderr, "%d bits, window %d: %.6f, unscaled %.6f\n", bits, window, error, plain_error);
  std::printf("template <>\nstruct TrellisTable<%d, %d> {\n  static constexpr double distortion = %.6f;\n", bits, window,
              error);
  std::printf("  static constexpr int sign = %d;\n  static constexpr int index[%d] = {", top.parities.sign, Train::size_bits);
  for (int k = 0; k < Train::size_bits; ++k) std::printf("%s%d", k == 0 ? "" : ", ", top.parities.index[k]);
  std::printf("};\n  static constexpr signed char size[%d] = {", Train::num_sizes);
  for (std::size_t k = 0; k < Train::num_sizes; ++k) std::printf("%s%d", k == 0 ? "" : ", ", training.stored(k));
  std::printf("};\n};\n");
  std::fflush(stdout);
}

}  // namespace

int main() {
  std::printf(R"(// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What the states of Trellis stand for, and the mean squared error of rows of 64 normal numbers relative to their squared norm
// if scales are exact. Written by tools/trellis_tables.cpp.
#pragma once

namespace kvt::inline v0 {

// A state stands for size[k] / 32: bit i of k is the parity of the bits of the state that are set in index[i]. It is negative if
// the parity of those in `sign` is odd. The complement of a state stands for the opposite.
template <int bits, int window>
struct TrellisTable;

)");
  constexpr int tries = 20000;
  write_table<1, 8>(tries);
  write_table<2, 8>(tries);
  write_table<3, 8>(tries);
  write_table<4, 8>(tries);
  write_table<1, 6>(tries);
  write_table<2, 6>(tries);
  write_table<3, 6>(tries);
  std::printf("}  // namespace kvt::inline v0\n");
}
