// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// compress() to a quarter of 32,768 dense rows of one layer, for each token selector, beside one dense attention pass of 32
// queries over the same rows; one thread. Evidence is there before the clock runs. heavy_hitter and reconstruction, which live
// on weights of attention itself, are left out. row_bytes is what all rows take.
#include "common.hpp"

namespace {

constexpr int rows = 32768, dim = 128, num_queries = 64;
constexpr double row_bytes = 2.0 * 2 * rows * bench::shape_b.num_kv_heads * dim;
using Codec = bench::Fp16<dim>;
using Cache = kvt::KvCache<kvt::Uniform, kvt::AnySelector, Codec>;

struct Rows {
  std::vector<float> keys, values, queries, output;
  std::vector<int> positions;
  kvt::Rope rope{.rotary_dim = dim, .base = 500000, .pairs = kvt::Rope::Pairs::halves};
  kvt::OutputProjection projection;

  Rows() : positions(rows) {
    const auto& shape = bench::shape_b;
    keys = bench::random_rows(rows, shape.num_kv_heads, dim);
    values = bench::random_rows(rows, shape.num_kv_heads, dim);
    queries = bench::random_floats(static_cast<std::size_t>(num_queries * shape.num_q_heads * dim));
    output = bench::random_floats(static_cast<std::size_t>(shape.num_q_heads * dim) * 4096);
    projection = {output.data(), 4096};
    for (int i = 0; i < rows; ++i) positions[static_cast<std::size_t>(i)] = i;
  }
};
const Rows& shared_rows() {
  static const Rows made;
  return made;
}

kvt::Status fill(Cache& cache) {
  const Rows& r = shared_rows();
  KVT_TRY(cache.init(bench::shape_b, {.ropes = {&r.rope, 1}, .output_projections = {&r.projection, 1}}));
  KVT_TRY(cache.append(0, r.keys.data(), r.values.data(), r.positions));
  KVT_TRY(cache.flush());
  return cache.observe(0, r.queries.data(), std::span(r.positions).last(num_queries));
}

void select_by(benchmark::State& state, const kvt::AnySelector& selector) {
  Cache cache({}, selector), copy;
  if (!fill(cache).ok()) return state.SkipWithError("the cache was not filled");
  bool ok = true;
  for (auto _ : state) {
    state.PauseTiming();
    ok = cache.fork(copy).ok() && ok;
    state.ResumeTiming();
    ok = copy.compress(kvt::Retain::ratio(0.25)).ok() && ok;
  }
  state.counters["row_bytes"] = row_bytes;
  if (!ok || copy.num_rows(0, 0) != rows / 4) return state.SkipWithError("the cut failed");
}

void select(benchmark::State& state, const std::string& name) {
  kvt::AnySelector selector;
  if (!kvt::detail::parse_selector(name, selector).empty()) return state.SkipWithError("no such selector");
  select_by(state, selector);
}
// Of the size that kvt-llm train makes, with any numbers.
kvt::OwnedLearned learned_selector() {
  const auto& shape = bench::shape_b;
  auto scorer = std::make_shared<kvt::TokenScorer<float>>(shape.num_kv_heads, dim, 16);
  scorer->numbers() = bench::random_floats(scorer->numbers().size());
  return {std::move(scorer), shape.num_kv_heads};
}

void attend(benchmark::State& state) {
  Cache cache({}, kvt::AnySelector(kvt::SinkRecent{}));
  const Rows& r = shared_rows();
  const auto& shape = bench::shape_b;
  constexpr int n = 32;
  if (!cache.init(shape).ok() || !cache.append(0, r.keys.data(), r.values.data(), r.positions).ok() || !cache.flush().ok()) {
    return state.SkipWithError("the cache was not filled");
  }
  std::vector<float> out(static_cast<std::size_t>(n * shape.num_q_heads * dim));
  bool ok = true;
  for (auto _ : state) {
    ok = cache.attend(0, r.queries.data(), std::span(r.positions).last(n), {}, out.data()).ok() && ok;
    benchmark::ClobberMemory();
  }
  state.counters["row_bytes"] = row_bytes;
  if (!ok) return state.SkipWithError("attention failed");
}

const bool added = [] {
  const auto add = [](const char* name, auto&&... more) {
    benchmark::RegisterBenchmark(name, more...)->Unit(benchmark::kMillisecond);
  };
  add("select/B/dense attention of 32 queries", attend);
  for (const char* const name :
       {"random", "sink_recent", "key_norm", "key_diff", "snap_kv", "tova", "last_query", "expected_attention",
        "expected_attention:covariance=off", "lag_kv", "leverage", "lava", "value_norm(snap_kv)",
        "value_norm:through=output(snap_kv)", "value_norm:through=output(last_query)", "critical_kv(snap_kv)", "caote(snap_kv)",
        "chunk_kv(snap_kv)"}) {
    const std::string text = std::string("select/B/") + name;
    benchmark::RegisterBenchmark(text.c_str(), select, std::string(name))->Unit(benchmark::kMillisecond);
  }
  add("select/B/learned", select_by, kvt::AnySelector(learned_selector()));
  return true;
}();

}  // namespace
