// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Caches of a device whose rows lie in blocks, beside those of the host: of codecs that encode the same bytes on both.
#include <doctest/doctest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "kvtailor/codec/low_rank_work.hpp"
#include "kvtailor/core/device.hpp"
#include "kvtailor/kvtailor.hpp"
#include "kvtailor/store/decode_plan.hpp"
#include "kvtailor/store/device_kv_cache.hpp"
#include "reference/plain.hpp"

using namespace kvt;

namespace {

constexpr int sink_rows = 3, recent_rows = 20, layers = 2, kv_heads = 2, q_heads = 6;

template <class Codec>
Geometry shape() {
  return {layers, kv_heads, q_heads, Codec::head_dim};
}

// The same rows appended to a cache of the host and to one of a device.
template <class Codec>
struct Twin {
  using Host = KvCache<Uniform, KeyDiff, Codec>;
  static constexpr int dim = Codec::head_dim;

  SimulatedDevice device;
  PagePool<Codec, SimulatedDevice> pool;
  DeviceCache<Codec, SimulatedDevice> cache;
  Host host;
  std::vector<Codec> codecs;
  std::mt19937 random{5};
  int next = -1;

  explicit Twin(std::vector<Codec> head_codecs = {}) : codecs(std::move(head_codecs)) {
    REQUIRE(pool.init(device, 600).ok());
    REQUIRE(cache.init(device, pool, shape<Codec>(), {sink_rows, recent_rows, 600, 4096}, {}, codecs).ok());
    init(host);
  }
  void init(Host& other) const {
    REQUIRE(other.init(shape<Codec>(), {.sink_rows = sink_rows, .recent_rows = recent_rows, .staggered = false}, codecs).ok());
  }

  void append(int n) {
    std::normal_distribution<float> normal;
    std::vector<float> keys(static_cast<std::size_t>(n * kv_heads * dim)), values(keys.size());
    for (int layer = 0; layer < layers; ++layer) {
      std::vector<int> positions;
      for (int i = 0; i < n; ++i) positions.push_back(next + 1 + 2 * i);
      for (std::size_t i = 0; i < keys.size(); ++i) {
        keys[i] = normal(random) + static_cast<float>(i % static_cast<std::size_t>(dim) % 7) * .5f;
        values[i] = normal(random) + static_cast<float>(i % 5) * .3f;
      }
      REQUIRE(host.append(layer, keys.data(), values.data(), positions).ok());
      if (layer == 0) REQUIRE(cache.reserve(n).ok());
      REQUIRE(cache.append(layer, keys.data(), values.data(), positions.data(), n).ok());
    }
    next += 2 * n;
  }
  // What the host drops is dropped on the device.
  void compress(double ratio) {
    std::vector<std::vector<int>> before;
    int most = 0;
    for (int h = 0; h < layers * kv_heads; ++h) {
      const auto at = host.positions(h / kv_heads, h % kv_heads);
      before.emplace_back(at.begin(), at.end());
      most = std::max(most, static_cast<int>(at.size()));
    }
    REQUIRE(host.compress(Retain::ratio(ratio)).ok());
    std::vector<unsigned char> marks(static_cast<std::size_t>(layers * kv_heads * most), 0);
    for (int h = 0; h < layers * kv_heads; ++h) {
      const auto left = host.positions(h / kv_heads, h % kv_heads);
      for (std::size_t r = 0; r < before[static_cast<std::size_t>(h)].size(); ++r) {
        const int position = before[static_cast<std::size_t>(h)][r];
        marks[static_cast<std::size_t>(h * most) + r] = std::binary_search(left.begin(), left.end(), position) ? 1 : 0;
      }
    }
    REQUIRE(cache.cut(marks.data(), most).ok());
  }
  // The device has what the host has, block by block.
  void check(const DeviceCache<Codec, SimulatedDevice>& other) const {
    Host copy;
    init(copy);
    REQUIRE(other.download(copy).ok());
    for (int layer = 0; layer < layers; ++layer) {
      for (int h = 0; h < kv_heads; ++h) {
        const auto &a = host.store(layer, h), &b = copy.store(layer, h);
        REQUIRE(std::ranges::equal(a.positions(), b.positions()));
        REQUIRE(a.blocks().size() == b.blocks().size());
        for (std::size_t i = 0; i < a.blocks().size(); ++i) {
          const BlockRef &own = a.blocks()[i], &other_block = b.blocks()[i];
          REQUIRE(own.rows == other_block.rows);
          REQUIRE(own.key_bytes == other_block.key_bytes);
          REQUIRE(own.value_bytes == other_block.value_bytes);
          CHECK(std::memcmp(own.keys(), other_block.keys(), static_cast<std::size_t>(own.key_bytes)) == 0);
          CHECK(std::memcmp(own.values(), other_block.values(), static_cast<std::size_t>(own.value_bytes)) == 0);
        }
        const auto rows = static_cast<std::size_t>(a.num_rows() * dim);
        std::vector<float> keys[2], values[2];
        for (int i = 0; i < 2; ++i) {
          keys[i].resize(rows);
          values[i].resize(rows);
          (i == 0 ? a : b).decode(keys[i].data(), values[i].data());
        }
        CHECK(keys[0] == keys[1]);
        CHECK(values[0] == values[1]);
      }
    }
  }
  void check() const { check(cache); }
  // Attention is that of the rows, in double precision.
  void check_attention(const DeviceCache<Codec, SimulatedDevice>& other) {
    constexpr int n = 2, group = q_heads / kv_heads;
    DecodePlan<Codec, SimulatedDevice, float> plan;
    const DeviceCache<Codec, SimulatedDevice>* const all[] = {&other};
    REQUIRE(plan.init(device, all, n).ok());
    std::normal_distribution<float> normal;
    std::vector<float> queries(static_cast<std::size_t>(n * q_heads * dim)), out(queries.size());
    for (float& x : queries) x = normal(random);
    const int positions[n] = {next - 300, next};
    for (int layer = 0; layer < layers; ++layer) {
      for (const int window : {0, 333}) {
        AttendOptions options;
        options.window = window;
        std::fill(out.begin(), out.end(), NAN);
        REQUIRE(plan.attend(layer, queries.data(), positions, n, options, out.data()).ok());
        for (int h = 0; h < kv_heads; ++h) {
          const auto& store = host.store(layer, h);
          std::vector<float> keys(static_cast<std::size_t>(store.num_rows() * dim)), values(keys.size());
          store.decode(keys.data(), values.data());
          const std::vector<int> at(store.positions().begin(), store.positions().end());
          for (int v = 0; v < n * group; ++v) {
            const auto first = static_cast<std::size_t>((v / group * q_heads + h * group + v % group) * dim);
            reference::Attend o;
            o.window = window;
            const auto exact = reference::attend(queries.data() + first, positions[v / group], keys, values, at, dim, o);
            double wrong = 0, whole = 0;
            for (std::size_t d = 0; d < dim; ++d) {
              wrong += std::pow(static_cast<double>(out[first + d]) - exact[d], 2);
              whole += exact[d] * exact[d];
            }
            CHECK(std::sqrt(wrong) <= 1e-3 * std::sqrt(whole));  // dense rows meet queries of fp16
          }
        }
      }
    }
  }
};

template <class Codec>
void check_life(std::vector<Codec> codecs = {}) {
  Twin<Codec> twin(std::move(codecs));
  using Cache = DeviceCache<Codec, SimulatedDevice>;
  twin.append(1);
  twin.append(500);
  twin.append(7);
  twin.check();
  twin.append(140);
  twin.check();
  twin.check_attention(twin.cache);
  twin.compress(.4);
  twin.check();
  REQUIRE(twin.cache.refresh().ok());
  const long long after_cut = twin.cache.memory().payload_bytes;
  twin.append(300);
  twin.append(5);
  twin.check();
  CHECK(twin.cache.memory().payload_bytes > after_cut);
  twin.check_attention(twin.cache);
  Cache child;
  REQUIRE(twin.cache.fork(child).ok());
  twin.compress(.6);
  twin.append(200);
  for (const int back : {100, 700}) {
    REQUIRE(twin.host.truncate(twin.next - back).ok());
    REQUIRE(twin.cache.truncate(twin.next - back).ok());
    twin.check();
  }
  REQUIRE(twin.cache.refresh().ok());
  twin.check_attention(twin.cache);
  twin.append(300);
  twin.check();
  // The copy is as it was: it goes to the host, and from there to another cache of the device.
  REQUIRE(child.download(twin.host).ok());
  twin.check(child);
  Cache other;
  if (!twin.codecs.empty()) {  // whose heads would be read by the first of all codecs
    REQUIRE(other.init(twin.device, twin.pool, shape<Codec>(), {sink_rows, recent_rows, 600, 4096}).ok());
    CHECK(other.upload(twin.host).code == Errc::bad_value);
  }
  REQUIRE(other.init(twin.device, twin.pool, shape<Codec>(), {sink_rows, recent_rows, 600, 4096}, {}, twin.codecs).ok());
  REQUIRE(other.upload(twin.host).ok());
  twin.check(other);
  twin.check_attention(other);
}

}  // namespace

TEST_CASE("blocks of a device are those of the host through appends, cuts, truncations and copies") {
  check_life<KvCodec<KiviKeys<2, 64>, Rotated<Shifted<Q4_0<64>>>>>();
}

namespace {

// The same rows stay as on the host, where scores are the same but for rounding: those whose scores are next to the last one
// that stays may change places.
template <class Codec, class Budget, class Selector>
void check_policy(double ratio, std::vector<Codec> codecs = {}) {
  constexpr int dim = Codec::head_dim;
  SimulatedDevice device;
  PagePool<Codec, SimulatedDevice> pool;
  DeviceKvCache<Budget, Selector, Codec, SimulatedDevice> cache;
  KvCache<Budget, Selector, Codec> host;
  REQUIRE(pool.init(device, 300).ok());
  REQUIRE(cache.init(device, pool, shape<Codec>(), {sink_rows, recent_rows, 600, 4096}, {}, {}, {}, codecs).ok());
  REQUIRE(host.init(shape<Codec>(), {.sink_rows = sink_rows, .recent_rows = recent_rows, .staggered = false}, codecs).ok());
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  int next = 0;
  REQUIRE(cache.reserve(600).ok());
  for (const int n : {300, 200, 41}) {
    std::vector<int> positions;
    for (int i = 0; i < n; ++i) positions.push_back(next++);
    for (int layer = 0; layer < layers; ++layer) {
      std::vector<float> keys(static_cast<std::size_t>(n * kv_heads * dim)), values(keys.size()),
          queries(static_cast<std::size_t>(n * q_heads * dim));
      for (auto* x : {&keys, &values, &queries}) {
        for (float& v : *x) v = normal(random);
      }
      REQUIRE(host.append(layer, keys.data(), values.data(), positions).ok());
      REQUIRE(cache.append(layer, keys.data(), values.data(), positions.data(), n).ok());
      REQUIRE(host.observe(layer, queries.data(), positions).ok());
      REQUIRE(cache.observe(layer, queries.data(), positions.data(), n).ok());
    }
  }
  const long long before = cache.memory().total();
  REQUIRE(host.compress(Retain::ratio(ratio)).ok());
  REQUIRE(cache.compress(Retain::ratio(ratio)).ok());
  CHECK(cache.memory().total() < before);
  KvCache<Budget, Selector, Codec> copy;
  REQUIRE(copy.init(shape<Codec>(), {.sink_rows = sink_rows, .recent_rows = recent_rows, .staggered = false}, codecs).ok());
  REQUIRE(cache.download(copy).ok());
  int all = 0, other = 0;
  for (int layer = 0; layer < layers; ++layer) {
    for (int h = 0; h < kv_heads; ++h) {
      const auto a = host.positions(layer, h), b = copy.positions(layer, h);
      std::vector<int> same;
      std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(same));
      all += static_cast<int>(a.size());
      other += static_cast<int>(a.size() - same.size());
    }
  }
  CHECK(all > 0);
  CHECK(other <= all / 100);
  if (EvidenceSet(Selector::needs).has(Evidence::window_queries)) return;  // they are used up
  // Bytes are not exceeded, and there is no room for many rows more.
  constexpr long long page = PagePool<Codec, SimulatedDevice>::page_bytes;
  const long long wanted = cache.memory().total() - (300 - pool.free_pages()) / 4 * page;
  CHECK(cache.compress(Retain::bytes(wanted)).ok());
  CHECK(cache.memory().total() <= wanted);
  CHECK(cache.memory().total() >= wanted - 2 * layers * kv_heads * page);  // heads end within pages, and groups are bounded
  CHECK(cache.compress(Retain::bytes(1)).code == Errc::bad_budget);
}

}  // namespace

TEST_CASE("compression of blocks keeps the rows on a device that it keeps on the host") {
  using Mean = KvCodec<Rotated<Shifted<Q4_0<64>>>>;
  check_policy<Mean, Uniform, SinkRecent>(.5);
  check_policy<Mean, Adaptive, KeyDiff>(.4);
  check_policy<Mean, Adaptive, SnapKv>(.4);
  using Any = OneOf<KiviKeys<4, 64>, TurboQuantUnbiased<3, 64>, Rotated<Shifted<Q4_0<64>>>>;
  std::vector<KvCodec<Any>> codecs(layers * kv_heads);
  for (std::size_t h = 0; h < codecs.size(); ++h) codecs[h].keys.index = static_cast<int>(h % 3);
  check_policy<KvCodec<Any>, Uniform, KeyDiff>(.6, codecs);
  check_policy<KvCodec<Any>, Uniform, SnapKv>(.6, codecs);
}

TEST_CASE("blocks of low rank are encoded on a device and come back as good as the host's") {
  using Codec = KvCodec<Rotated<LowRank<LloydMax<2, 64, NormCorrection::least_squares, LogScale>>>>;
  Twin<Codec> twin;
  twin.append(500);
  twin.append(3);
  Twin<Codec>::Host copy;
  twin.init(copy);
  REQUIRE(twin.cache.download(copy).ok());
  for (int layer = 0; layer < layers; ++layer) {
    for (int h = 0; h < kv_heads; ++h) {
      const auto &a = twin.host.store(layer, h), &b = copy.store(layer, h);
      REQUIRE(std::ranges::equal(a.positions(), b.positions()));
      REQUIRE(a.blocks().size() == b.blocks().size());
      const auto rows = static_cast<std::size_t>(a.num_rows() * 64);
      std::vector<float> keys[2], values[2];
      double between = 0, whole = 0;
      for (int i = 0; i < 2; ++i) {
        keys[i].resize(rows);
        values[i].resize(rows);
        (i == 0 ? a : b).decode(keys[i].data(), values[i].data());
      }
      for (std::size_t i = 0; i < rows; ++i) {
        between += std::pow(static_cast<double>(keys[0][i] - keys[1][i]), 2);
        whole += std::pow(static_cast<double>(keys[0][i]), 2);
      }
      CHECK(between < .1 * whole);  // two bits each; that factors are rounded otherwise changes some codes
    }
  }
  REQUIRE(twin.cache.download(twin.host).ok());
  twin.check_attention(twin.cache);
  // The first block has lost rows, and the rest of it is what it was.
  twin.compress(.5);
  REQUIRE(twin.cache.refresh().ok());
  REQUIRE(twin.cache.download(copy).ok());
  const BlockRef &own = twin.host.store(0, 0).blocks()[0], &other = copy.store(0, 0).blocks()[0];
  REQUIRE(own.rows < 128);
  REQUIRE(own.rows == other.rows);
  REQUIRE(own.key_bytes == other.key_bytes);
  CHECK(std::memcmp(own.keys(), other.keys(), static_cast<std::size_t>(own.key_bytes)) == 0);
  REQUIRE(twin.cache.download(twin.host).ok());
  twin.check_attention(twin.cache);
}

TEST_CASE("what a stream of blocks has no room for is refused") {
  using Codec = KvCodec<Rotated<LowRank<LloydMax<2, 64, NormCorrection::least_squares, LogScale>>>>;
  SimulatedDevice device;
  PagePool<Codec, SimulatedDevice> pool;
  REQUIRE(pool.init(device, 19).ok());
  DeviceCache<Codec, SimulatedDevice> cache;
  Codec codec;
  codec.keys.rule = RankRule::bbp;
  codec.keys.factor_bits = 16;
  CHECK(cache.init(device, pool, shape<Codec>(), {}, codec).code == Errc::bad_value);
  Codec wide;
  wide.values.max_rank = 33;
  CHECK(cache.init(device, pool, shape<Codec>(), {}, wide).code == Errc::bad_value);
  const std::vector<Codec> few(3);
  CHECK(cache.init(device, pool, shape<Codec>(), {}, {}, few).code == Errc::bad_shape);
  REQUIRE(cache.init(device, pool, shape<Codec>(), {sink_rows, recent_rows, 600, 1000}).ok());
  CHECK(cache.reserve(600).code == Errc::out_of_memory);  // four heads of four blocks
  CHECK(pool.free_pages() == 19);
  KvCache<Uniform, SinkRecent, Codec> host;
  REQUIRE(host.init(shape<Codec>(), {sink_rows, recent_rows, 256, nullptr}).ok());
  std::vector<float> rows(300 * kv_heads * 64, .5f);
  std::vector<int> positions(300);
  std::iota(positions.begin(), positions.end(), 0);
  for (int layer = 0; layer < layers; ++layer) {
    REQUIRE(host.append(layer, rows.data(), rows.data(), positions).ok());
  }
  REQUIRE(host.flush().ok());
  CHECK(cache.upload(host).code == Errc::bad_shape);
}

TEST_CASE("heads have codecs of their own on a device") {
  using Any = OneOf<KiviKeys<4, 64>, Q8_0<64>, Rotated<Shifted<Q4_1<64>>>>;
  std::vector<KvCodec<Any>> codecs(layers * kv_heads);
  for (std::size_t h = 0; h < codecs.size(); ++h) {
    codecs[h].keys.index = static_cast<int>(h % 3);
    codecs[h].values.index = static_cast<int>((h + 1) % 3);
  }
  check_life(codecs);
}
