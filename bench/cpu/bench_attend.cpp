// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Decode attention, one query token on one thread: time for each cached row of a layer (keys and values of all KV heads),
// and stored bytes a second. Caches take turns until they leave the last-level cache.
#include <cmath>
#include <map>

#include "common.hpp"
#include "reference/plain.hpp"

namespace {

template <class Codec>
struct Caches {
  std::vector<std::unique_ptr<bench::Cache<Codec>>> turn;
  std::vector<float> queries, out;
  const char* broken = nullptr;
  double error = 0;  // of the answer, as a share of its size

  Caches(const std::string& codec, const kvt::Geometry& shape, int rows) {
    turn.push_back(std::make_unique<bench::Cache<Codec>>(bench::make_cache<Codec>(codec)));
    if (!bench::fill(*turn[0], shape, rows).ok()) {
      broken = "the cache was not filled";
      return;
    }
    const long long wanted = 2 * bench::last_level_cache_bytes(), one = turn[0]->memory().payload_bytes;
    for (long long bytes = one; bytes < wanted; bytes += one) {
      turn.push_back(std::make_unique<bench::Cache<Codec>>());
      if (!turn[0]->fork(*turn.back()).ok()) broken = "the cache was not copied";
    }
    queries = bench::random_floats(static_cast<std::size_t>(shape.num_q_heads * shape.head_dim));
    out.assign(queries.size(), NAN);
    const bool dense = codec == "fp16" || codec == "bf16" || codec == "fp32" || codec == "dense";
    check(shape, rows, bench::error_bound(dense));
  }

  void attend(std::size_t i, int position) {
    if (!turn[i]->attend(0, queries.data(), std::span(&position, 1), {}, out.data()).ok()) broken = "attend() failed";
  }

  void check(const kvt::Geometry& shape, int rows, double bound) {
    attend(turn.size() - 1, rows - 1);
    const auto dim = static_cast<std::size_t>(shape.head_dim);
    double wrong = 0, whole = 0;
    std::vector<float> keys(static_cast<std::size_t>(rows) * dim), values(keys.size());
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      turn[0]->decode(0, h, keys.data(), values.data());
      const auto where = turn[0]->positions(0, h);
      const std::vector<int> positions(where.begin(), where.end());
      for (int g = 0; g < shape.group_size(); ++g) {
        const auto at = static_cast<std::size_t>(h * shape.group_size() + g) * dim;
        const auto exact = reference::attend(queries.data() + at, rows - 1, keys, values, positions, shape.head_dim, {});
        for (std::size_t d = 0; d < dim; ++d) {
          wrong += std::pow(static_cast<double>(out[at + d]) - exact[d], 2);
          whole += exact[d] * exact[d];
        }
      }
    }
    error = std::sqrt(wrong / whole);
    if (!(error <= bound)) broken = "the answer is wrong";
  }
};

template <class Codec>
void attend(benchmark::State& state, const std::string& codec, const kvt::Geometry& shape, int rows) {
  // Made once for all repetitions.
  static std::map<std::pair<std::string, int>, std::unique_ptr<Caches<Codec>>> all;
  auto& made = all[{codec, rows}];
  if (made == nullptr) made = std::make_unique<Caches<Codec>>(codec, shape, rows);
  Caches<Codec>& caches = *made;
  if (caches.broken != nullptr) return state.SkipWithError(caches.broken);
  std::size_t next = 0;
  for (auto _ : state) {
    caches.attend(next, rows - 1);
    benchmark::DoNotOptimize(caches.out.data());
    benchmark::ClobberMemory();
    next = (next + 1) % caches.turn.size();
  }
  if (caches.broken != nullptr) return state.SkipWithError(caches.broken);
  using benchmark::Counter;
  const auto bytes = static_cast<double>(caches.turn[0]->memory().payload_bytes);
  state.counters["time_per_row"] = Counter(rows, Counter::kIsIterationInvariantRate | Counter::kInvert);
  state.counters["time_per_row_and_query_head"] =
      Counter(static_cast<double>(rows) * shape.num_q_heads, Counter::kIsIterationInvariantRate | Counter::kInvert);
  state.counters["bytes_per_row"] = bytes / rows;
  state.counters["error"] = caches.error;
  state.counters["stored_bytes"] = Counter(bytes, Counter::kIsIterationInvariantRate);
  state.counters["caches"] = static_cast<double>(caches.turn.size());
}

template <template <int> class Codec>
void add(const std::string& codec, int rows) {
  const auto add_shape = [&](auto dim, const char* letter, const kvt::Geometry& shape) {
    benchmark::RegisterBenchmark(("attend/" + std::string(letter) + "/" + std::to_string(rows) + "/" + codec).c_str(),
                                 attend<Codec<decltype(dim)::value>>, codec, shape, rows);
  };
  add_shape(std::integral_constant<int, 64>{}, "A", bench::shape_a);
  add_shape(std::integral_constant<int, 128>{}, "B", bench::shape_b);
}

const bool added = [] {
  // What all are compared with: it knows its codec when it is compiled.
  for (const int rows : {8192, 32768}) add<bench::Fp16>("dense", rows);
  for (const auto name : kvt::detail::codec_names) add<bench::Any>(std::string(name), 8192);
  for (const char* const pair : {"turbo3/turbo2", "kivi2", "kivi4"}) add<bench::Any>(pair, 8192);
  for (const char* const codec : {"turbo4", "turbo3/turbo2", "turbo2", "q8_0", "rotated_q4_0", "kivi2", "trellis2",
                                  "low_rank_turbo2", "low_rank_trellis2"}) {
    add<bench::Any>(codec, 32768);
  }
  return true;
}();

}  // namespace
