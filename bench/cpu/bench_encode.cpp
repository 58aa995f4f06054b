// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// append() and flush() of a chunk of prompt on one thread: rows a second, a row being the keys and values of all KV heads.
#include "common.hpp"

namespace {

constexpr int rows = 1024;

template <class Codec>
void encode(benchmark::State& state, const std::string& codec, const kvt::Geometry& shape, double bound) {
  const auto dim = static_cast<std::size_t>(shape.head_dim), heads = static_cast<std::size_t>(shape.num_kv_heads);
  const auto keys = bench::random_rows(rows, shape.num_kv_heads, shape.head_dim);
  const auto values = bench::random_rows(rows, shape.num_kv_heads, shape.head_dim);
  std::vector<int> positions(rows);
  for (int i = 0; i < rows; ++i) positions[static_cast<std::size_t>(i)] = i;
  auto cache = bench::make_cache<Codec>(codec);
  const auto run = [&] { return cache.append(0, keys.data(), values.data(), positions).ok() && cache.flush().ok(); };
  if (!cache.init(shape).ok() || !run()) return state.SkipWithError("the cache was not filled");
  std::vector<float> key(rows * dim), value(key.size());
  for (std::size_t h = 0; h < heads; ++h) {
    cache.decode(0, static_cast<int>(h), key.data(), value.data());
    double error = 0, size = 0;
    for (std::size_t i = 0; i < key.size(); ++i) {
      const std::size_t at = (i / dim * heads + h) * dim + i % dim;
      for (const double e : {static_cast<double>(key[i] - keys[at]), static_cast<double>(value[i] - values[at])})
        error += e * e;
      for (const double x : {static_cast<double>(keys[at]), static_cast<double>(values[at])}) size += x * x;
    }
    if (!(error <= bound * size)) return state.SkipWithError("the rows come back too different");
  }
  bool ok = true;
  for (auto _ : state) {
    cache.clear();
    ok = run() && ok;
    benchmark::ClobberMemory();
  }
  if (!ok) return state.SkipWithError("append() or flush() failed");
  state.counters["rows"] = benchmark::Counter(rows, benchmark::Counter::kIsIterationInvariantRate);
}

// `bound`: mean squared error relative to the rows, as the codec's header has it and a tenth more; of low ranks, less.
void add(const std::string& codec, double bound) {
  const auto add_shape = [&](auto dim, const char* letter, const kvt::Geometry& shape) {
    benchmark::RegisterBenchmark(("encode/" + std::string(letter) + "/" + codec).c_str(),
                                 encode<bench::Any<decltype(dim)::value>>, codec, shape, bound);
  };
  add_shape(std::integral_constant<int, 64>{}, "A", bench::shape_a);
  add_shape(std::integral_constant<int, 128>{}, "B", bench::shape_b);
}

const bool added = [] {
  add("fp16", 1e-6);
  add("turbo4", 1.1 * .0093);
  add("turbo3/turbo2", 1.1 * (.034 + .116) / 2);
  add("turbo2", 1.1 * .116);
  add("q8_0", 1e-4);
  add("rotated_q4_0", .01);
  add("kivi2", .16);
  add("trellis2", 1.1 * .0742);
  add("low_rank_turbo2", .7 * .116);
  add("low_rank_trellis2", .7 * .0742);
  return true;
}();

}  // namespace
