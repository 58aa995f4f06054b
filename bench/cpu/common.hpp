// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What the benchmarks share: shapes, codecs by name, random rows, and what built the program.
#pragma once

#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>

#include "kvtailor/compose.hpp"
#include "kvtailor/kvtailor.hpp"

namespace bench {

template <class Codec>
using Cache = kvt::KvCache<kvt::Uniform, kvt::SinkRecent, Codec>;
template <int dim>
using Fp16 = kvt::KvCodec<kvt::Dense<kvt::Half, dim>>;
// Every codec that has a name.
template <int dim>
using Any = kvt::KvCodec<kvt::detail::AnyCodec<dim>, kvt::detail::AnyCodec<dim>, kvt::Half>;

template <class Codec>
Cache<Codec> make_cache(const std::string& name) {
  Codec codec;
  if constexpr (std::is_same_v<Codec, Any<Codec::head_dim>>) {
    kvt::detail::KvChoice choice;
    if (const auto wrong = kvt::detail::parse_codecs(name, choice); !wrong.empty()) {
      std::fprintf(stderr, "%s\n", wrong.c_str());
      std::abort();
    }
    choice.keys.apply(codec.keys);
    choice.values.apply(codec.values);
  }
  return Cache<Codec>({}, {}, codec);
}

inline constexpr kvt::Geometry shape_a{1, 3, 9, 64};    // SmolLM2-135M
inline constexpr kvt::Geometry shape_b{1, 8, 32, 128};  // Llama-3.1-8B

inline std::vector<float> random_floats(std::size_t n) {
  static std::mt19937 random(std::random_device{}());
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(random);
  return x;
}

// Rows [n, heads, dim] like those of a model: half of their energy lies in eight directions that all rows of a head share.
inline std::vector<float> random_rows(int n, int heads, int dim) {
  constexpr int rank = 8;
  const auto wide = static_cast<std::size_t>(heads * dim);
  auto rows = random_floats(static_cast<std::size_t>(n) * wide);
  const auto directions = random_floats(rank * wide);
  const float noise = std::sqrt(0.5f), shared = std::sqrt(0.5f / rank);
  for (int row = 0; row < n; ++row) {
    for (int h = 0; h < heads; ++h) {
      float* const to = rows.data() + static_cast<std::size_t>(row) * wide + static_cast<std::size_t>(h * dim);
      const auto weight = random_floats(rank);
      for (int d = 0; d < dim; ++d) {
        to[d] *= noise;
        for (std::size_t i = 0; i < rank; ++i) {
          to[d] += shared * weight[i] * directions[i * wide + static_cast<std::size_t>(h * dim + d)];
        }
      }
    }
  }
  return rows;
}

// Fills a cache of one layer with rows [n, heads, dim], encoded.
template <class Filled>
kvt::Status fill(Filled& cache, const kvt::Geometry& shape, const std::vector<float>& keys, const std::vector<float>& values) {
  KVT_TRY(cache.init(shape));
  const auto wide = static_cast<std::size_t>(shape.num_kv_heads * shape.head_dim);
  constexpr int step = 1024;
  for (int first = 0, rows = static_cast<int>(keys.size() / wide); first < rows; first += step) {
    std::vector<int> positions(static_cast<std::size_t>(std::min(step, rows - first)));
    std::iota(positions.begin(), positions.end(), first);
    const auto at = static_cast<std::size_t>(first) * wide;
    KVT_TRY(cache.append(0, keys.data() + at, values.data() + at, positions));
  }
  return cache.flush();
}
// The same with fresh random rows.
template <class Codec>
kvt::Status fill(Cache<Codec>& cache, const kvt::Geometry& shape, int rows) {
  const auto keys = random_rows(rows, shape.num_kv_heads, shape.head_dim);
  return fill(cache, shape, keys, random_rows(rows, shape.num_kv_heads, shape.head_dim));
}

// What attention may be wrong by, as a share of its answer: rounding to fp32, or queries and weights to 16 bits or to bytes; a
// lost row makes 1 / sqrt(rows).
inline double error_bound(bool dense) {
#if defined(KVT_HOST_AVX2)
  constexpr double of_codes = 0.03;
#else
  constexpr double of_codes = 1e-3;
#endif
  return dense ? 1e-5 : of_codes;
}

// As Google Benchmark sees it: sysconf() gives 256 MiB where there are 32.
inline long long last_level_cache_bytes() {
  long long most = 0;
  for (const auto& cache : benchmark::CPUInfo::Get().caches) most = std::max<long long>(most, cache.size);
  return most > 0 ? most : 64ll << 20;
}

inline const bool context_added = [] {
  benchmark::AddCustomContext("compiler", KVT_BENCH_COMPILER);
  benchmark::AddCustomContext("flags", KVT_BENCH_FLAGS);
  return true;
}();

}  // namespace bench
