// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The body of every kernel runs on the simulated device: each Work there is in include/, as tests/cuda/kernels.cu instantiates
// it, for each codec and for each head dim. What ran is what the device says, not what a test names.
#include <cxxabi.h>
#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <regex>
#include <set>
#include <string>
#include <typeinfo>

namespace {

std::set<std::string> ran, listed;
template <class Work>
std::string name_of() {
  char* const name = abi::__cxa_demangle(typeid(Work).name(), nullptr, nullptr, nullptr);
  std::string out(name);
  std::free(name);
  return out;
}
template <class Work>
void list_kernel() {
  listed.insert(name_of<Work>());
}

}  // namespace

#define KVT_ON_SIMULATED_LAUNCH(Work) ran.insert(name_of<Work>())

#include "cuda/kernels.cu"
#include "kvtailor/kvtailor.hpp"
#include "reference/attend_cache.hpp"
#include "reference/split_decode.hpp"

namespace {

// DecodeWork<Rotated<LloydMax<4, 64, ..>>, .., true, 8, Half>: "Decode, true, 8", "LloydMax4 LloydMax4" and 64.
struct Instance {
  std::string kind, codecs;
  int dim = 0;

  explicit Instance(const std::string& name) {
    std::smatch found;
    if (std::regex_search(name, found, std::regex("(\\w+)Work"))) kind = found[1];
    const std::string selectors =
        "Caote|ChunkKv|CriticalKv|ExpectedAttention|HeavyHitter|KeyDiff|LagKv|LastQuery|LavaScore|Leverage|Reconstruction|"
        "SinkRecent|SnapKv|ValueNorm";
    if (std::regex_search(name, found, std::regex(", (true, \\d+)|, (?:[\\w:]*::)?(" + selectors + ")\\b"))) {
      kind += ", " + found[1].str() + found[2].str();
    }
    const std::regex codec("(LloydMax|Trellis|GroupInt|PerChannelInt|TurboQuantUnbiased|Dense)<(?:[\\w:]*::)?(\\w+), (\\d+)");
    for (std::sregex_iterator i(name.begin(), name.end(), codec), end; i != end; ++i) {
      codecs += (codecs.empty() ? "" : " ") + (*i)[1].str() + (*i)[2].str();
      dim = std::stoi((*i)[3]);
    }
  }
};

// Rows come, are dropped, come again and are forked; the host's cache has the same all along.
template <class Codec, class Selector = KeyDiff, class Budget = Uniform>
void run() {
  CAPTURE(name_of<Codec>());
  constexpr int dim = Codec::head_dim;
  constexpr int heads = 2, group = 2, width = heads * group * dim;
  const Geometry geometry{1, heads, heads * group, dim};
  SimulatedDevice device;
  PagePool<Codec, SimulatedDevice> pool;
  DeviceKvCache<Budget, Selector, Codec, SimulatedDevice> cache, child;
  KvCache<Budget, Selector, Codec> host;
  REQUIRE(pool.init(device, 200).ok());
  REQUIRE(cache.init(device, pool, geometry, {5, 20, 300, 4096}).ok());
  REQUIRE(child.init(device, pool, geometry, {5, 20, 300, 4096}).ok());
  REQUIRE(host.init(geometry, {.sink_rows = 5, .recent_rows = 20, .staggered = false}).ok());
  std::mt19937 random(dim);
  std::normal_distribution<float> normal;
  const auto append = [&](int n) {
    std::vector<Half> keys(static_cast<std::size_t>(n * heads * dim)), values(keys.size());
    for (Half& x : keys) x = from_float<Half>(normal(random));
    for (Half& x : values) x = from_float<Half>(normal(random));
    std::vector<int> positions(static_cast<std::size_t>(n));
    for (int i = 0; i < n; ++i) positions[static_cast<std::size_t>(i)] = host.end_position(0) + i;
    REQUIRE(cache.reserve(n).ok());
    REQUIRE(cache.append(0, keys.data(), values.data(), positions.data(), n).ok());
    REQUIRE(host.append(0, keys.data(), values.data(), positions).ok());
  };
  const auto compare = [&](const DeviceCache<Codec, SimulatedDevice>& on_device) {
    KvCache<Budget, Selector, Codec> stored;
    REQUIRE(stored.init(geometry, {.sink_rows = 5, .recent_rows = 20, .staggered = false}).ok());
    REQUIRE(on_device.download(stored).ok());
    // Where two codes or two scales are as near, rounding decides, and the device's row is as good as the host's.
    int rows = 0, others = 0;
    for (int h = 0; h < heads; ++h) {
      REQUIRE(std::ranges::equal(host.positions(0, h), stored.positions(0, h)));
      const auto size = static_cast<std::size_t>(host.num_rows(0, h) * dim);
      std::vector<float> keys[2], values[2];
      for (int i = 0; i < 2; ++i) {
        keys[i].resize(size);
        values[i].resize(size);
        (i == 0 ? host : stored).decode(0, h, keys[i].data(), values[i].data());
      }
      for (const auto* both : {keys, values}) {
        for (std::size_t at = 0; at < size; at += dim, ++rows) {
          double square = 0, error = 0;
          for (std::size_t i = at; i < at + dim; ++i) {
            square += both[0][i] * both[0][i];
            error += (both[0][i] - both[1][i]) * (both[0][i] - both[1][i]);
          }
          others += error > 1e-6 * square;
        }
      }
    }
    CHECK(others * 200 <= rows);
    constexpr int queries = 7;  // of two heads each: sixteen vectors at a time
    std::vector<float> vectors(queries * width), expected(vectors.size());
    for (float& x : vectors) x = to_float(from_float<Half>(normal(random)));
    std::vector<Half> halves, out(vectors.size());
    for (const float x : vectors) halves.push_back(from_float<Half>(x));
    DecodePlan<Codec, SimulatedDevice, Half> plan;
    const DeviceCache<Codec, SimulatedDevice>* const all[] = {&on_device};
    REQUIRE(plan.init(device, all, queries).ok());
    std::vector<int> positions(queries);
    for (int i = 0; i < queries; ++i) positions[static_cast<std::size_t>(i)] = host.end_position(0) - queries + i;
    const auto check = [&](int n, const AttendOptions& options, const int* position) {
      const auto last = std::span(positions).last(static_cast<std::size_t>(n));
      std::fill(out.begin(), out.end(), Half{0x7e00});
      reference::attend(stored, 0, vectors.data(), last, options, expected.data());
      REQUIRE(plan.attend(0, halves.data(), position, n, options, out.data()).ok());
      // Weights and the output are fp16: twice the largest error seen.
      for (std::size_t i = 0; i < static_cast<std::size_t>(n * width); ++i) {
        CHECK(std::fabs(to_float(out[i]) - expected[i]) <= 4e-4f + std::fabs(expected[i]) / 2048);
      }
    };
    check(1, {}, nullptr);
    check(1, {.window = 150}, &positions.back());
    check(queries, {}, positions.data());
  };
  for (const int n : {170, 1, 140}) append(n);
  compare(cache);
  std::vector<Half> seen(10 * width);
  for (Half& x : seen) x = from_float<Half>(normal(random));
  std::vector<float> floats;
  for (const Half x : seen) floats.push_back(to_float(x));
  std::vector<int> where(10);
  for (int i = 0; i < 10; ++i) where[static_cast<std::size_t>(i)] = host.end_position(0) - 10 + i;
  REQUIRE(host.observe(0, floats.data(), where).ok());
  REQUIRE(cache.observe(0, seen.data(), where.data(), 10).ok());
  REQUIRE(host.compress(Retain::ratio(.8)).ok());
  REQUIRE(cache.compress(Retain::ratio(.8)).ok());
  compare(cache);
  const int end = host.end_position(0) - 7;
  REQUIRE(host.truncate(end).ok());
  REQUIRE(cache.truncate(end).ok());
  append(40);
  REQUIRE(cache.refresh().ok());
  REQUIRE(cache.fork(child).ok());
  compare(cache);
  compare(child);
  if constexpr (!EvidenceSet(Selector::needs).has(Evidence::window_queries)) {  // those are used up
    REQUIRE(cache.compress(Retain::bytes(cache.memory().total())).ok());
  }
}
// What a selector does beside that: rows and queries come, are cut, forked and truncated.
template <class Codec>
void run_selectors() {
  constexpr int dim = Codec::head_dim, n = 170, queries = 10, width = 2 * dim;
  std::mt19937 random(dim);
  std::normal_distribution<float> normal;
  const auto draw = [&](int rows) {
    std::vector<Half> x(static_cast<std::size_t>(rows * width));
    for (Half& v : x) v = from_float<Half>(normal(random));
    return x;
  };
  const std::vector<float> weights(static_cast<std::size_t>(5 * width), 1.f);
  const OutputProjection projection{weights.data(), 5};
  const Rope rope{dim};
  DeviceCacheOptions options{5, 20, 300, 4096};
  options.ropes = {&rope, 1};
  options.output_projections = {&projection, 1};
  each_selector([&]<class Selector>() {
    SimulatedDevice device;
    PagePool<Codec, SimulatedDevice> pool;
    DeviceKvCache<Uniform, Selector, Codec, SimulatedDevice> cache, child;
    REQUIRE(pool.init(device, 40).ok());
    REQUIRE(cache.init(device, pool, {1, 1, 2, dim}, options).ok());
    const std::vector<Half> keys = draw(n), values = draw(n), seen = draw(queries);
    std::vector<int> positions(n);
    for (int i = 0; i < n; ++i) positions[static_cast<std::size_t>(i)] = i;
    REQUIRE(cache.reserve(n).ok());
    REQUIRE(cache.append(0, keys.data(), values.data(), positions.data(), n).ok());
    REQUIRE(cache.observe(0, seen.data(), positions.data() + n - queries, queries).ok());
    REQUIRE(cache.fork(child).ok());
    REQUIRE(cache.compress(Retain::ratio(.8)).ok());
    REQUIRE(child.truncate(n).ok());  // the last query has to stay
    REQUIRE(child.compress(Retain::rows(90)).ok());
    CHECK(child.most_rows(0, 0) == 90);
    CHECK(cache.most_rows(0, 0) == 136);
  });
}
template <int key_bits, int value_bits, int dim, class Selector = KeyDiff>
void run() {
  run<KvCodec<typename CodecOf<key_bits, dim>::type, typename CodecOf<value_bits, dim>::type>, Selector>();
}
// Attention alone, on rows that come from the host.
template <class Codec>
void run_from_host() {
  using Problem = reference::DecodeProblem<Codec>;
  const Problem problem({{70}, {33}, 2, 3});
  CHECK(problem.error(problem.template simulate<false>()) <= 1);
  CHECK(problem.error(problem.template simulate<true>()) <= 1);
  if constexpr (widest_decode<typename Codec::key_type, typename Codec::value_type> == 16) {
    CHECK(problem.error(problem.template simulate<true, 16>()) <= 1);
  }
}

// Blocks of low rank, as the host has them.
template <class Residual>
void run_low_rank() {
  constexpr int n = 128, dim = Residual::head_dim;
  const Rotated<LowRank<Residual>> codec;
  std::mt19937 random(dim);
  std::normal_distribution<float> normal;
  float right[dim];
  for (float& x : right) x = 9 * normal(random);
  std::vector<Half> rows;
  std::vector<float> floats;
  for (int i = 0; i < n; ++i) {
    const float left = normal(random);
    for (int d = 0; d < dim; ++d) {
      rows.push_back(from_float<Half>(left * right[d] + normal(random)));
      floats.push_back(to_float(rows.back()));
    }
  }
  SimulatedDevice device;
  std::vector<float> scratch(rows.size());
  std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(n))), expected(block.size());
  int bytes = 0;
  REQUIRE(
      encode_blocks<n>(device, codec, rows.data(), 1, n, scratch.data(), block.data(), codec.max_block_bytes(n), &bytes).ok());
  CHECK(bytes == codec.encode(floats.data(), n, expected.data()));
  CHECK(codec.rank(block.data()) == 1);
  CHECK(codec.rank(expected.data()) == 1);
}

}  // namespace

TEST_CASE("caches of every codec and every head dim") {
  run<1, 1, 64>();
  run<2, 2, 128>();
  run<3, 3, 256>();
  run<4, 4, 80>();
  run<5, 5, 96>();
  run<6, 6, 112>();
  run<3, 2, 192>();
  run<4, 3, 64>();
  run<3, 3, 64>();  // sixteen vectors at a time: heads of at most 128
  run<3, 2, 96>();
  run<16, 16, 128>();
  run<2, 2, 64, SinkRecent>();
  run<2, 2, 128, SinkRecent>();
  run<2, 2, 256, SinkRecent>();
  run<2, 2, 64, ChunkKv<KeyDiff>>();
  run<2, 2, 128, ChunkKv<KeyDiff>>();
  run<2, 2, 256, ChunkKv<KeyDiff>>();
  run<1, 1, 64, SnapKv>();
  run<2, 2, 128, SnapKv>();
  run<3, 3, 256, SnapKv>();
  run<4, 4, 64, SnapKv>();
  run<5, 5, 64, SnapKv>();
  run<6, 6, 64, SnapKv>();
  run<16, 16, 128, SnapKv>();
  run<KvCodec<Dense<float, 256>>>();
  run<KvCodec<Dense<float, 256>>, SnapKv>();
  run<KvCodec<Dense<BFloat16, 64>>>();
  run<KvCodec<Q8_0<128>, Q4_0<128>>>();
  run<KvCodec<Q8_0<128>, Q4_0<128>>, SnapKv>();
  run<KvCodec<Rotated<Q4_1<64>>, Q5_0<64>>>();
  run<KvCodec<TurboQuant<4, 40>>>();
  run<KvCodec<TurboQuantUnbiased<3, 256>>>();
  run<KvCodec<Rotated<Trellis<2, 128>>>, KeyDiff, Adaptive>();
  run<KvCodec<Rotated<Trellis<2, 128>>>, SnapKv>();
  run<KvCodec<TurboQuantUnbiased<3, 256>>, SnapKv>();
  run<KvCodec<Rotated<LowRank<Trellis<2, 128>>>, Rotated<LowRank<Short<2, 128>>>>>();
  run<KvCodec<Rotated<LowRank<Trellis<2, 128>>>, Rotated<LowRank<Short<2, 128>>>>, SnapKv>();
  run<KvCodec<Rotated<LowRank<Short<3, 64>>>, Rotated<Shifted<Trellis<2, 64, 6>>>>>();
  run<KvCodec<KiviKeys<2, 64>, KiviValues<2, 64>>>();
  run<KvCodec<KiviKeys<2, 64>, KiviValues<2, 64>>, SnapKv>();
  run<KvCodec<Chosen<256>>>();
  run<KvCodec<Chosen<256>>, SnapKv>();
  run_from_host<KvCodec<Rotated<Trellis<3, 128>>, TurboQuant<4, 128>>>();
  run_from_host<KvCodec<Rotated<Trellis<2, 64>>, Rotated<Trellis<1, 64>>>>();
  run_from_host<KvCodec<Rotated<Trellis<4, 256>>, Rotated<Trellis<3, 256>>>>();
  run_from_host<KvCodec<Q5_0<128>>>();
  run_from_host<KvCodec<Q4_1<128>, Rotated<Trellis<3, 128>>>>();
  run_from_host<KvCodec<TurboQuant<6, 128>, KiviValues<2, 128>>>();
  run_from_host<KvCodec<Q8_0<256>, Q4_1<256>>>();
}

TEST_CASE("every selector where rows lie as fragments, one by one and in blocks") {
  run_selectors<SelectedFragments>();
  run_selectors<SelectedRows>();
  run_selectors<SelectedBlocks>();
}

TEST_CASE("blocks of low rank") {
  run_low_rank<LloydMax<2, 64>>();
  run_low_rank<Trellis<2, 128>>();
  run_low_rank<Trellis<4, 256>>();
}

TEST_CASE("the body of every kernel has run, for every codec and for every head dim") {
  const void* unused[1];
  use_kernels(unused);
  std::map<std::string, std::set<std::string>> codecs;
  std::map<std::string, std::set<int>> dims;
  std::set<std::string> kinds;
  for (const std::string& name : ran) {
    const Instance one(name);
    codecs[one.kind].insert(one.codecs);
    dims[one.kind].insert(one.dim);
    kinds.insert(one.kind.substr(0, one.kind.find(',')));
  }
  std::size_t same = 0;
  for (const std::string& name : listed) {
    const Instance one(name);
    CAPTURE(name);
    CHECK(codecs[one.kind].contains(one.codecs));
    CHECK(dims[one.kind].contains(one.dim));
    same += ran.contains(name);
    if (!ran.contains(name))
      std::printf("not run as it is: %sWork, %s bits, head_dim %d\n", one.kind.c_str(), one.codecs.c_str(), one.dim);
  }
  std::printf("%zu of %zu kernels ran as they are, the others with another head dim or other codecs\n", same, listed.size());
  CHECK(same > 0);

  const auto include = std::filesystem::path(__FILE__).parent_path() / "../../include";
  std::size_t works = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(include)) {
    if (entry.path().extension() != ".hpp") continue;
    std::ifstream file(entry.path());
    for (std::string line; std::getline(file, line);) {
      std::smatch found;
      if (!std::regex_search(line, found, std::regex("^struct (\\w+)Work\\b"))) continue;
      CAPTURE(line);
      CHECK(kinds.contains(found[1].str()));
      ++works;
    }
  }
  CHECK(works > 0);
}
