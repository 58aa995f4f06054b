// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Rows that go from the cache of the host to that of a device and back, bit for bit.
#include <doctest/doctest.h>

#include <random>

#include "kvtailor/kvtailor.hpp"
#include "kvtailor/store/decode_plan.hpp"
#include "kvtailor/store/device_kv_cache.hpp"
#include "reference/slice_rows.hpp"

using namespace kvt;

namespace {

constexpr int sink_rows = 5, recent_rows = 20, max_append = 300;

struct CountingDevice : SimulatedDevice {
  int copies = 0;
  Status copy_to(void* to, const void* from, std::size_t bytes) {
    ++copies;
    return SimulatedDevice::copy_to(to, from, bytes);
  }
};

template <class Codec>
using Host = KvCache<Uniform, KeyDiff, Codec>;
template <class Codec>
using Cache = DeviceKvCache<Uniform, KeyDiff, Codec, CountingDevice>;
template <class Codec>
using Pool = PagePool<Codec, CountingDevice>;

template <class Codec>
Geometry shape() {
  return {2, 2, 6, Codec::head_dim};
}
template <class Codec>
void init(Host<Codec>& host, int block_rows = 128) {
  REQUIRE(host.init(shape<Codec>(), {sink_rows, recent_rows, block_rows, nullptr}).ok());
}
template <class Codec>
void init(Cache<Codec>& cache, CountingDevice& device, Pool<Codec>& pool) {
  REQUIRE(cache.init(device, pool, shape<Codec>(), {sink_rows, recent_rows, max_append, 4096}).ok());
}

// Rows to append, the same for any cache: positions go on from `next`, with gaps.
template <class Codec>
struct Rows {
  std::vector<float> keys, values;
  std::vector<int> positions;

  Rows(int n, int next, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    keys.resize(static_cast<std::size_t>(n * 2 * Codec::head_dim));
    values.resize(keys.size());
    for (float& x : keys) x = normal(random);
    for (float& x : values) x = normal(random);
    for (int i = 0; i < n; ++i) positions.push_back(next += 1 + i % 2);
  }
  int last() const { return positions.back(); }
  void append(Host<Codec>& host) const {
    for (int layer = 0; layer < 2; ++layer) {
      REQUIRE(host.append(layer, (layer == 0 ? keys : values).data(), values.data(), positions).ok());
    }
  }
  void append(Cache<Codec>& cache) const {
    const auto n = static_cast<int>(positions.size());
    REQUIRE(cache.reserve(n).ok());
    for (int layer = 0; layer < 2; ++layer) {
      REQUIRE(cache.append(layer, (layer == 0 ? keys : values).data(), values.data(), positions.data(), n).ok());
    }
  }
};

// What attention gives, to its bits: both layers, a query of each layer's first and last rows.
std::vector<float> queries_of(int dim) {
  std::mt19937 random(77);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(6 * dim));
  for (float& q : x) q = normal(random);
  return x;
}
template <class Codec>
std::vector<float> attend(const Host<Codec>& host) {
  const std::vector<float> queries = queries_of(Codec::head_dim);
  std::vector<float> out(2 * queries.size(), NAN);
  const int position = 1 << 20;
  for (std::size_t layer = 0; layer < 2; ++layer) {
    REQUIRE(
        host.attend(static_cast<int>(layer), queries.data(), std::span(&position, 1), {}, out.data() + layer * queries.size())
            .ok());
  }
  return out;
}
template <class Codec>
std::vector<float> attend(DecodePlan<Codec, CountingDevice, float>& plan) {
  const std::vector<float> queries = queries_of(Codec::head_dim);
  std::vector<float> out(2 * queries.size(), NAN);
  for (std::size_t layer = 0; layer < 2; ++layer) {
    REQUIRE(plan.attend(static_cast<int>(layer), queries.data(), nullptr, {}, out.data() + layer * queries.size()).ok());
  }
  return out;
}

// All heads have the same rows on both sides, in the same zones.
template <class Codec>
void check_same(const Host<Codec>& host, const Cache<Codec>& cache) {
  constexpr int dim = Codec::head_dim;
  using Body = typename Pool<Codec>::Layout;
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  using Plain = typename Codec::near_type;
  using Near = DenseLayoutOf<Plain>;
  for (int layer = 0; layer < 2; ++layer) {
    for (int h = 0; h < 2; ++h) {
      const auto& store = host.store(layer, h);
      const SlicePages &near = cache.near(layer)[h], &body = cache.body(layer)[h];
      const int sinks = store.sink().rows(), encoded = store.body_rows(), dense = sinks + store.recent().rows();
      REQUIRE(*near.rows == dense);
      REQUIRE(*body.rows == encoded);
      CHECK(cache.most_rows(layer, h) >= dense + encoded);
      int different = 0;
      const auto positions = store.positions();
      for (int r = 0; r < dense; ++r) {
        const int slice = r / slice_rows, row = r % slice_rows;
        const std::byte* const at = near.at(slice, Near::bytes);
        const auto& zone = r < sinks ? store.sink() : store.recent();
        for (int d = 0; d < dim; ++d) {
          constexpr int size = sizeof(typename Plain::Element);
          const int from = ((r < sinks ? r : r - sinks) * dim + d) * size;
          different += std::memcmp(at + Near::template dense_at<true>(row, d), zone.keys.data() + from, size) != 0;
          different += std::memcmp(at + Near::template dense_at<false>(row, d), zone.values.data() + from, size) != 0;
        }
        different +=
            near.positions(slice, Near::bytes)[row] != positions[static_cast<std::size_t>(r < sinks ? r : r + encoded)];
      }
      int r = 0;
      for (const BlockRef& block : store.blocks()) {
        for (int i = 0; i < block.rows; ++i, ++r) {
          const int slice = r / slice_rows, row = r % slice_rows;
          const std::byte* const at = body.at(slice, Body::bytes);
          if constexpr (Body::fragments) {
            for (int d = 0; d < dim; ++d) {
              different +=
                  Body::template element<true>(at, row, d) != reference::host_element(Key{}, block.keys(), block.rows, i, d);
              different += Body::template element<false>(at, row, d) !=
                           reference::host_element(Value{}, block.values(), block.rows, i, d);
            }
            std::byte key[Key::row_bytes], value[Value::row_bytes];
            Key{}.copy_row(block.keys(), block.rows, i, key, 1, 0);
            Value{}.copy_row(block.values(), block.rows, i, value, 1, 0);
            for (int k = 0; k < Body::Keys::scale_bytes; ++k) {
              different += at[Body::template scale_at<true>(row, k)] != key[FragmentsOf<Key>::scale_at(k)];
            }
            for (int k = 0; k < Body::Values::scale_bytes; ++k) {
              different += at[Body::template scale_at<false>(row, k)] != value[FragmentsOf<Value>::scale_at(k)];
            }
          } else {
            std::byte own[2][Key::row_bytes + Value::row_bytes];
            Key{}.copy_row(at + row * Key::row_bytes, 1, 0, own[0], 1, 0);
            Value{}.copy_row(at + Body::values_at + row * Value::row_bytes, 1, 0, own[0] + Key::row_bytes, 1, 0);
            Key{}.copy_row(block.keys(), block.rows, i, own[1], 1, 0);
            Value{}.copy_row(block.values(), block.rows, i, own[1] + Key::row_bytes, 1, 0);
            different += std::memcmp(own[0], own[1], sizeof own[0]) != 0;
          }
          different += body.positions(slice, Body::bytes)[row] != positions[static_cast<std::size_t>(sinks + r)];
        }
      }
      CHECK(different == 0);
    }
  }
}
template <class Codec>
void check_same(const Host<Codec>& a, const Host<Codec>& b) {
  CHECK(attend(a) == attend(b));
  CHECK(a.memory().dense_fp16_bytes == b.memory().dense_fp16_bytes);
  CHECK(a.memory().payload_bytes == b.memory().payload_bytes);
  for (int layer = 0; layer < 2; ++layer) CHECK(a.end_position(layer) == b.end_position(layer));
}

// From the host, at several times of a cache's life, and back; then all go on with the same rows.
template <class Codec>
void check_from_host(int block_rows) {
  CAPTURE(block_rows);
  CountingDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 60).ok());
  Cache<Codec> cache;
  init(cache, device, pool);
  Host<Codec> host, back;
  init(host, block_rows);
  init(back, block_rows);
  int last = -1;
  unsigned seed = 1;
  const auto grow = [&](int n) {
    const Rows<Codec> rows(n, last, seed++);
    last = rows.last();
    rows.append(host);
    return rows;
  };
  const auto there_and_back = [&] {
    REQUIRE(cache.upload(host).ok());
    check_same(host, cache);
    REQUIRE(cache.download(back).ok());
    check_same(host, back);
    CHECK(back.memory().total() <= host.memory().total());
  };
  there_and_back();  // nothing at all
  grow(3);
  there_and_back();
  for (const int n : {290, 150, 70}) grow(n);
  there_and_back();
  REQUIRE(host.compress(Retain::ratio(.6)).ok());  // the last block is short
  there_and_back();
  for (const int n : {280, 3}) grow(n);  // and is no more the last
  there_and_back();
  REQUIRE(cache.upload(back).ok());
  REQUIRE(cache.download(back).ok());
  check_same(host, back);
  // What is appended on the device is what the host would have; blocks of the host that are short stay where they were.
  for (const int n : {200, 140, 1}) grow(n).append(cache);
  REQUIRE(cache.download(back).ok());
  check_same(back, cache);
  for (int layer = 0; layer < 2; ++layer) {
    CHECK(host.end_position(layer) == back.end_position(layer));
    const auto of_host = host.store(layer, 1).blocks(), own = back.store(layer, 1).blocks();
    if (block_rows != 128) continue;  // the device encodes as many
    REQUIRE(of_host.size() == own.size());
    for (std::size_t i = 0; i < own.size(); ++i) CHECK(of_host[i].rows == own[i].rows);
  }
  CHECK(host.memory().dense_fp16_bytes == back.memory().dense_fp16_bytes);
  REQUIRE(host.truncate(last - 300).ok());
  there_and_back();
  REQUIRE(host.truncate(3).ok());
  there_and_back();
  host.clear();
  there_and_back();
  REQUIRE(cache.refresh().ok());
  CHECK(pool.free_pages() == 60);
}

}  // namespace

TEST_CASE("rows of the host are on a device what they were, and come back in the same blocks") {
  check_from_host<KvCodec<TurboQuant<4, 64>, TurboQuant<3, 64>>>(128);
  check_from_host<KvCodec<TurboQuant<4, 64>, TurboQuant<3, 64>>>(32);
  check_from_host<KvCodec<TurboQuant<4, 64>, TurboQuant<3, 64>>>(100);
  check_from_host<KvCodec<TurboQuant<1, 80>, TurboQuant<6, 80>>>(128);
  check_from_host<KvCodec<TurboQuant<5, 128>, TurboQuant<2, 128>>>(128);
  check_from_host<KvCodec<Dense<Half, 64>>>(128);
  check_from_host<KvCodec<Q8_0<128>, Q4_1<128>>>(100);
  check_from_host<KvCodec<Rotated<Q5_0<80>>, KiviValues<2, 80>>>(100);
  check_from_host<KvCodec<Rotated<Trellis<2, 64>>, Rotated<Trellis<3, 64>>>>(100);
  check_from_host<KvCodec<Rotated<Trellis<1, 256>>, TurboQuant<4, 256>>>(128);
  check_from_host<KvCodec<Dense<float, 256>, Dense<BFloat16, 256>>>(128);
  check_from_host<KvCodec<TurboQuantUnbiased<3, 40>, Rotated<Q5_0<40>>>>(32);
  check_from_host<KvCodec<TurboQuant<5, 40>, KiviValues<2, 40>, BFloat16>>(128);
}

namespace {

// Out of a device, whose pages another sequence takes, and in again, into other pages.
template <class Codec>
void check_swap() {
  CountingDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 70).ok());
  Cache<Codec> cache, stays, other;
  init(cache, device, pool);
  init(other, device, pool);
  init(stays, device, pool);
  int last = -1;
  unsigned seed = 100;
  const auto grow = [&](int n) {
    const Rows<Codec> rows(n, last, seed++);
    last = rows.last();
    rows.append(cache);
    rows.append(stays);
  };
  DecodePlan<Codec, CountingDevice, float> plan, plan_of_stays;
  const DeviceCache<Codec, CountingDevice>*const one[] = {&cache}, *const two[] = {&stays};
  REQUIRE(plan.init(device, one).ok());
  REQUIRE(plan_of_stays.init(device, two).ok());
  const auto swap = [&] {
    Host<Codec> host, again;
    init(host);
    init(again);
    REQUIRE(cache.download(host).ok());
    check_same(host, cache);
    const auto before = attend(plan);
    CHECK(before == attend(plan_of_stays));
    REQUIRE(cache.truncate(0).ok());
    REQUIRE(cache.refresh().ok());
    Rows<Codec>(200, -1, 9).append(other);  // pages are written over
    Rows<Codec>(200, 1000, 9).append(other);
    REQUIRE(cache.upload(host).ok());
    check_same(host, cache);
    CHECK(attend(plan) == before);
    REQUIRE(cache.download(again).ok());
    check_same(host, again);
    REQUIRE(other.truncate(0).ok());
    REQUIRE(other.refresh().ok());
  };
  grow(2);
  swap();
  for (const int n : {290, 7, 180}) grow(n);
  swap();
  for (Cache<Codec>* each : {&cache, &stays}) REQUIRE(each->compress(Retain::ratio(.7)).ok());
  swap();
  for (const int n : {100, 100}) grow(n);
  swap();
  for (Cache<Codec>* each : {&cache, &stays}) REQUIRE(each->truncate(last - 250).ok());
  last -= 251;
  swap();
  for (int i = 0; i < 9; ++i) grow(33);
  CHECK(attend(plan) == attend(plan_of_stays));
  for (Cache<Codec>* each : {&cache, &stays}) {
    REQUIRE(each->compress(Retain::rows(90)).ok());
    REQUIRE(each->refresh().ok());
  }
  CHECK(attend(plan) == attend(plan_of_stays));
  CHECK(cache.memory().total() == stays.memory().total());
}

}  // namespace

TEST_CASE("a sequence that is swapped out and in again goes on as one that stayed") {
  check_swap<KvCodec<TurboQuant<3, 64>, TurboQuant<2, 64>>>();
  check_swap<KvCodec<TurboQuant<6, 96>, TurboQuant<4, 96>>>();
  check_swap<KvCodec<Dense<Half, 80>>>();
  check_swap<KvCodec<Q4_1<64>, Rotated<Trellis<2, 64>>>>();
  check_swap<KvCodec<Q5_0<96>, Q4_0<96>>>();
  check_swap<KvCodec<Dense<BFloat16, 40>>>();
}

TEST_CASE("pages that are neighbours are one copy, whatever heads they are of") {
  using Codec = KvCodec<TurboQuant<4, 64>>;
  CountingDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 60).ok());
  Cache<Codec> cache;
  init(cache, device, pool);
  Host<Codec> host;
  init(host);
  int last = -1;
  for (const int n : {300, 300, 200}) {
    const Rows<Codec> rows(n, last, 3);
    last = rows.last();
    rows.append(host);
  }
  device.copies = 0;
  REQUIRE(cache.upload(host).ok());
  CHECK(60 - pool.free_pages() == 4 * 4);
  CHECK(device.copies == 3 + 4);  // the table, all pages, and counts; dense rows of four heads
  check_same(host, cache);
}

TEST_CASE("after a page that is not full there are pages for what is encoded next") {
  using Codec = KvCodec<TurboQuant<4, 64>>;
  CountingDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 60).ok());
  Cache<Codec> cache;
  init(cache, device, pool);
  Host<Codec> host;
  init(host);
  const Rows<Codec> before(sink_rows + 100 + recent_rows, -1, 1), more(130, before.last(), 2), one(1, more.last(), 3);
  before.append(host);
  REQUIRE(host.flush().ok());
  REQUIRE(cache.upload(host).ok());
  CHECK(60 - pool.free_pages() == 4);
  for (const auto* rows : {&more, &one}) rows->append(cache);
  CHECK(*cache.body(1)[1].rows == 228);
  CHECK(60 - pool.free_pages() == 4 * 2);
}

TEST_CASE("the caches may have other policies, and queries stay behind") {
  using Codec = KvCodec<TurboQuant<4, 64>>;
  CountingDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 60).ok());
  Cache<Codec> cache;
  init(cache, device, pool);
  KvCache<Adaptive, SnapKv, Codec> host;
  REQUIRE(host.init(shape<Codec>(), {.sink_rows = sink_rows, .recent_rows = recent_rows, .staggered = false}).ok());
  const Rows<Codec> rows(290, -1, 8);
  for (int layer = 0; layer < 2; ++layer) {
    REQUIRE(host.append(layer, rows.keys.data(), rows.values.data(), rows.positions).ok());
    const std::vector<float> queries(290 * 6 * 64, .1f);
    REQUIRE(host.observe(layer, queries.data(), rows.positions).ok());
  }
  REQUIRE(cache.upload(host).ok());
  CHECK(host.memory().evidence_bytes > 0);
  REQUIRE(cache.download(host).ok());
  CHECK(host.memory().evidence_bytes == 0);
  CHECK(host.num_rows(1, 1) == 290);
  CHECK(host.memory().dense_fp16_bytes == cache.memory().dense_fp16_bytes);
}

TEST_CASE("what does not fit says so and changes nothing") {
  using Codec = KvCodec<TurboQuant<4, 64>>;
  CountingDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 18).ok());
  Cache<Codec> cache, none;
  init(cache, device, pool);
  Host<Codec> host, large, old;
  init(host);
  init(large);
  init(old);
  CHECK(none.upload(host).code == Errc::bad_shape);
  CHECK(none.download(host).code == Errc::bad_shape);
  const Rows<Codec> first(280, -1, 1), second(290, first.last(), 2), third(20, second.last(), 3);
  for (const auto* rows : {&first, &second, &third}) {
    rows->append(cache);
    rows->append(host);
  }
  REQUIRE(cache.refresh().ok());
  REQUIRE(cache.download(old).ok());
  const long long bytes = cache.memory().total();
  const int free = pool.free_pages();
  const auto unchanged = [&] {
    check_same(old, cache);
    CHECK(cache.memory().total() == bytes);
    CHECK(pool.free_pages() == free);
  };
  const auto refused = [&](const auto& other, Errc code, double value, double accepted) {
    const Status status = cache.upload(other);
    INFO(status.message());
    CHECK(status.code == code);
    CHECK(status.value == value);
    CHECK(status.accepted == accepted);
    unchanged();
  };
  Host<Codec> shaped;
  refused(shaped, Errc::bad_shape, 0, 0);
  REQUIRE(shaped.init({2, 2, 4, 64}, {.sink_rows = sink_rows, .recent_rows = recent_rows, .staggered = false}).ok());
  refused(shaped, Errc::bad_shape, 0, 0);
  CHECK(cache.download(shaped).code == Errc::bad_shape);
  REQUIRE(shaped.init(shape<Codec>(), {.sink_rows = sink_rows + 1, .recent_rows = recent_rows, .staggered = false}).ok());
  refused(shaped, Errc::bad_shape, sink_rows + 1, sink_rows);
  CHECK(cache.download(shaped).code == Errc::bad_shape);
  REQUIRE(shaped.init(shape<Codec>(), {.sink_rows = sink_rows, .recent_rows = recent_rows - 1, .staggered = false}).ok());
  refused(shaped, Errc::bad_shape, recent_rows - 1, recent_rows);
  CHECK(cache.download(shaped).code == Errc::bad_shape);

  const Rows<Codec> many(sink_rows + recent_rows + 127 + max_append, -1, 5);  // as many dense rows as there is room for
  many.append(large);
  REQUIRE(cache.upload(large).ok());
  check_same(large, cache);
  REQUIRE(cache.upload(old).ok());
  Rows<Codec>(1, many.last(), 6).append(large);  // encodes whole blocks
  const Rows<Codec> more(500, many.last() + 10, 7);
  more.append(large);
  refused(large, Errc::bad_shape, 569, 452);
  REQUIRE(large.flush().ok());
  refused(large, Errc::out_of_memory, 4 * (8 - 4), 2);  // 928 encoded rows of four heads, which have 512 here

  Cache<Codec> small;
  REQUIRE(small.init(device, pool, shape<Codec>(), {sink_rows, recent_rows, max_append, 200}).ok());
  CHECK(small.upload(host).code == Errc::bad_shape);
  CHECK(small.memory().dense_fp16_bytes == 0);
}
