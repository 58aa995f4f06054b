// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The cache of devices on a simulated one, against the cache of the host.
#include <doctest/doctest.h>

#include <cmath>
#include <memory>
#include <random>

#include "kvtailor/kvtailor.hpp"
#include "kvtailor/store/decode_plan.hpp"
#include "kvtailor/store/device_kv_cache.hpp"
#include "reference/attend_cache.hpp"
#include "reference/policies.hpp"

using namespace kvt;

namespace {

template <class Codec>
using Cache = DeviceCache<Codec, SimulatedDevice>;
template <class Codec>
using Pool = PagePool<Codec, SimulatedDevice>;

constexpr int sink_rows = 5, recent_rows = 20;

// Codecs that a warp encodes as one lane does, bit for bit: they add nothing up.
template <class Codec>
inline constexpr bool exact_rows = false;
template <class T, int dim>
inline constexpr bool exact_rows<Dense<T, dim>> = true;
template <int bits, int dim, IntRange range>
inline constexpr bool exact_rows<GroupInt<bits, dim, range>> = true;
template <class Codec>
inline constexpr bool exact_rows<Rotated<Codec>> = exact_rows<Codec>;

// One sequence in both caches.
template <class Codec, class Budget = Uniform, class Selector = KeyDiff>
struct Twin {
  static constexpr int dim = Codec::head_dim;
  Geometry geometry;
  DeviceKvCache<Budget, Selector, Codec, SimulatedDevice> device_cache;
  KvCache<Budget, Selector, Codec> host_cache;
  std::vector<int> next;  // position of each layer
  bool whole_blocks = true;

  Twin(SimulatedDevice& device, Pool<Codec>& pool, const Geometry& g, const Budget& budget = {}, const Selector& selector = {})
      : geometry(g), host_cache(budget, selector), next(static_cast<std::size_t>(g.num_layers)) {
    REQUIRE(device_cache.init(device, pool, g, {sink_rows, recent_rows, 300, 4096}, budget, selector).ok());
    REQUIRE(host_cache.init(g, {.sink_rows = sink_rows, .recent_rows = recent_rows, .staggered = false}).ok());
  }
  void append(int n, std::mt19937& random) {
    std::normal_distribution<float> normal;
    REQUIRE(device_cache.reserve(n).ok());
    for (int layer = 0; layer < geometry.num_layers; ++layer) {
      std::vector<float> keys(static_cast<std::size_t>(n * geometry.num_kv_heads * dim)), values(keys.size());
      for (float& x : keys) x = normal(random);
      for (float& x : values) x = normal(random);
      std::vector<int> positions;
      for (int i = 0; i < n; ++i) positions.push_back(next[static_cast<std::size_t>(layer)] += 1 + i % 2);
      const Status status = host_cache.append(layer, keys.data(), values.data(), positions);
      INFO(status.message());
      REQUIRE(status.ok());
      REQUIRE(device_cache.append(layer, keys.data(), values.data(), positions.data(), n).ok());
    }
  }
  // n queries at every other position, the last at that of the last row.
  template <class T = float>
  void observe(int n, std::mt19937& random, const AttendOptions& options = {}) {
    std::normal_distribution<float> normal;
    for (int layer = 0; layer < geometry.num_layers; ++layer) {
      std::vector<T> queries;
      for (int i = 0; i < n * geometry.num_q_heads * dim; ++i) queries.push_back(from_float<T>(normal(random)));
      std::vector<float> floats;
      for (const T x : queries) floats.push_back(to_float(x));
      std::vector<int> positions;
      for (int i = 0; i < n; ++i) positions.push_back(next[static_cast<std::size_t>(layer)] - 2 * (n - 1 - i));
      const Status status = host_cache.observe(layer, floats.data(), positions, options);
      INFO(status.message());
      REQUIRE(status.ok());
      REQUIRE(device_cache.observe(layer, queries.data(), positions.data(), n, options).ok());
    }
  }
  // Keeps that share of the rows on both.
  void compress(double ratio) {
    const auto heads = static_cast<std::size_t>(geometry.num_heads());
    std::vector<std::vector<int>> before(heads);
    const auto each = [&](auto visit) {
      for (std::size_t h = 0; h < heads; ++h) {
        const auto kv_heads = static_cast<std::size_t>(geometry.num_kv_heads);
        const auto positions = host_cache.positions(static_cast<int>(h / kv_heads), static_cast<int>(h % kv_heads));
        visit(h, positions);
      }
    };
    each([&](std::size_t h, std::span<const int> p) { before[h].assign(p.begin(), p.end()); });
    REQUIRE(host_cache.compress(Retain::ratio(ratio)).ok());
    constexpr std::size_t stride = 5000;
    std::vector<unsigned char> keep(heads * stride, 0xff);
    each([&](std::size_t h, std::span<const int> p) {
      for (std::size_t r = 0; r < before[h].size(); ++r)
        keep[h * stride + r] = std::binary_search(p.begin(), p.end(), before[h][r]);
    });
    REQUIRE(device_cache.cut(keep.data(), stride).ok());
    whole_blocks = false;
  }
  // Each by its own scores.
  void compress_alone(Retain retain) {
    REQUIRE(host_cache.compress(retain).ok());
    REQUIRE(device_cache.compress(retain).ok());
    whole_blocks = false;
  }
  void truncate(int rows) {  // by so many positions
    for (int& p : next) p = std::max(-1, p - rows);
    REQUIRE(host_cache.truncate(next[0] + 1).ok());
    REQUIRE(device_cache.truncate(next[0] + 1).ok());
    whole_blocks = false;
  }
  void compare_all() const {
    for (int layer = 0; layer < geometry.num_layers; ++layer) {
      for (int head = 0; head < geometry.num_kv_heads; ++head) compare(layer, head);
    }
  }
  // Rows of a head, as the device has them, are those of the host: how many in each zone, where, and what they are. Where sums
  // of squares are added in another order, a scale may be another fp16 number, and a code at a tie its neighbour.
  void compare(int layer, int head) const {
    using Body = typename Pool<Codec>::Layout;
    using Near = DenseLayoutOf<typename Cache<Codec>::Plain>;
    const SlicePages& near = device_cache.near(layer)[head];
    const SlicePages& body = device_cache.body(layer)[head];
    const int rows = host_cache.num_rows(layer, head), encoded = *body.rows;
    REQUIRE(*near.rows + encoded == rows);
    if (whole_blocks) CHECK(encoded % 128 == 0);
    CHECK(rows <= device_cache.most_rows(layer, head));
    std::vector<float> keys(static_cast<std::size_t>(rows * dim)), values(keys.size());
    host_cache.decode(layer, head, keys.data(), values.data());
    const auto positions = host_cache.positions(layer, head);
    int different = 0;
    for (int r = 0; r < rows; ++r) {
      const bool in_body = r >= sink_rows && r < sink_rows + encoded;
      const int at = in_body ? r - sink_rows : r < sink_rows ? r : r - encoded, slice = at / slice_rows, row = at % slice_rows;
      if (!in_body) {
        CHECK(near.positions(slice, Near::bytes)[row] == positions[static_cast<std::size_t>(r)]);
        for (int d = 0; d < dim; ++d) {
          const auto element = [&](bool key) {
            typename Cache<Codec>::Plain::Element x;
            const int at_element = key ? Near::template dense_at<true>(row, d) : Near::template dense_at<false>(row, d);
            std::memcpy(&x, near.at(slice, Near::bytes) + at_element, sizeof x);
            return to_float(x);
          };
          different += element(true) != keys[static_cast<std::size_t>(r * dim + d)];
          different += element(false) != values[static_cast<std::size_t>(r * dim + d)];
        }
        continue;
      }
      CHECK(body.positions(slice, Body::bytes)[row] == positions[static_cast<std::size_t>(r)]);
      const std::byte* const from = body.at(slice, Body::bytes);
      const auto check = [&](auto codec, bool key, const std::vector<float>& exact) {
        using One = decltype(codec);
        float decoded[dim];
        if constexpr (!Body::fragments) {
          One{}.decode(from + (key ? 0 : Body::values_at) + row * One::row_bytes, 1, 0, decoded);
        } else {
          const auto code = [&](int d) {
            return key ? Body::template element<true>(from, row, d) : Body::template element<false>(from, row, d);
          };
          if constexpr (std::is_same_v<One, typename Cache<Codec>::Plain>) {
            for (int d = 0; d < dim; ++d) decoded[d] = to_float(Half{static_cast<std::uint16_t>(code(d))});
          } else {
            const auto byte = [&](int k) {
              const int place = key ? Body::template scale_at<true>(row, k) : Body::template scale_at<false>(row, k);
              return std::to_integer<unsigned char>(from[place]);
            };
            for (int d = 0; d < dim; ++d) decoded[d] = FragmentsOf<One>::value(code, byte, d) * FragmentsOf<One>::scale(byte);
            if constexpr (!One::plain) One::Rotate::inverse(Serial{}, decoded);
          }
        }
        double square = 0, size = 0;
        for (int d = 0; d < dim; ++d) {
          const double e = static_cast<double>(exact[static_cast<std::size_t>(r * dim + d)]);
          square += std::pow(static_cast<double>(decoded[d]) - e, 2);
          size += e * e;
        }
        different += !(std::sqrt(square / size) <= (exact_rows<One> ? 0 : 1e-3));
      };
      check(typename Codec::key_type{}, true, keys);
      check(typename Codec::value_type{}, false, values);
    }
    const bool exact = exact_rows<typename Codec::key_type> && exact_rows<typename Codec::value_type>;
    CHECK(different <= (exact ? 0 : 1 + rows / 500));
  }
};

}  // namespace

TEST_CASE("rows on a device are those on the host, however they come") {
  using Codec = KvCodec<TurboQuant<4, 64>, TurboQuant<3, 64>>;
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 100).ok());
  Twin<Codec> twin(device, pool, {2, 2, 6, 64});
  std::mt19937 random(3);
  for (const int n : {1, 3, 2, 150, 1, 1, 300, 20, 7, 128, 33, 290}) {
    twin.append(n, random);
    twin.compare_all();
  }
  CHECK(pool.free_pages() == 100 - 4 * 7);  // 936 rows; room was taken for what a layer may have encoded
}

TEST_CASE("cuts and truncations drop the same rows as on the host, and leave codes alone") {
  using Codec = KvCodec<TurboQuant<4, 64>, TurboQuant<3, 64>>;
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 100).ok());
  Twin<Codec> twin(device, pool, {2, 2, 6, 64});
  std::mt19937 random(5);
  const auto step = [&](auto work) {
    work();
    twin.compare_all();
  };
  step([&] { twin.append(300, random); });
  step([&] { twin.append(300, random); });
  step([&] { twin.compress(.5); });
  const int taken = 100 - pool.free_pages();
  REQUIRE(twin.device_cache.refresh().ok());
  CHECK(100 - pool.free_pages() < taken);
  CHECK(100 - pool.free_pages() >= 4 * 2);  // 300 rows of four heads on average
  step([&] { twin.append(1, random); });
  step([&] { twin.append(200, random); });
  step([&] { twin.truncate(7); });
  step([&] { twin.append(3, random); });
  step([&] { twin.truncate(180); });  // into what is encoded
  step([&] { twin.append(40, random); });
  step([&] { twin.compress(.7); });
  step([&] { twin.append(290, random); });
  step([&] { twin.append(33, random); });
  step([&] { twin.truncate(100000); });
  step([&] { twin.append(10, random); });
  REQUIRE(twin.device_cache.refresh().ok());
  CHECK(pool.free_pages() == 100);
}

namespace {

template <class Codec, class Budget, class Selector>
void check_compression(unsigned seed) {
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 100).ok());
  Twin<Codec, Budget, Selector> twin(device, pool, {2, 2, 6, Codec::head_dim});
  std::mt19937 random(seed);
  const auto compress = [&](Retain retain) {
    const long long bytes = twin.device_cache.memory().total();
    twin.compress_alone(retain);
    twin.compare_all();
    CHECK(twin.device_cache.memory().total() < bytes);
    CHECK(device.allocated_bytes == twin.device_cache.memory().total() + 100 * Pool<Codec>::page_bytes -
                                        (100 - pool.free_pages()) * Pool<Codec>::page_bytes);
  };
  for (const int n : {290, 300, 1}) twin.append(n, random);
  compress(Retain::ratio(.6));
  for (const int n : {7, 200}) twin.append(n, random);
  compress(Retain::rows(120));
  twin.append(3, random);
  twin.compare_all();
}

}  // namespace

TEST_CASE("compression keeps the rows on a device that it keeps on the host") {
  check_compression<KvCodec<TurboQuant<4, 64>, TurboQuant<3, 64>>, Uniform, KeyDiff>(6);
  check_compression<KvCodec<TurboQuant<3, 80>, TurboQuant<2, 80>>, Adaptive, KeyDiff>(7);
  check_compression<KvCodec<TurboQuant<2, 64>, TurboQuant<1, 64>>, Uniform, SinkRecent>(8);
  check_compression<KvCodec<Rotated<Q4_0<40>>, Q8_0<40>>, Adaptive, KeyDiff>(9);
  check_compression<KvCodec<Dense<BFloat16, 64>>, Uniform, KeyDiff>(10);
  check_compression<KvCodec<TurboQuantUnbiased<4, 64>, TurboQuant<3, 64>>, Uniform, KeyDiff>(11);
  check_compression<KvCodec<TurboQuant<2, 64>, TurboQuant<1, 64>>, Global, Random>(12);
  check_compression<KvCodec<Dense<BFloat16, 64>>, Pyramid, KeyNorm>(13);
  check_compression<KvCodec<TurboQuant<2, 64>, TurboQuant<1, 64>>, Adaptive, ChunkKv<KeyNorm>>(14);
}

namespace {

// `slack`: pages that a budget may leave unused.
template <class Budget>
void check_bytes(bool truncated, int slack) {
  using Codec = KvCodec<TurboQuant<4, 64>, TurboQuant<3, 64>>;
  constexpr long long page = Pool<Codec>::page_bytes;
  for (const double share : {1., .93, .8, .55, .3, 0.}) {
    CAPTURE(share);
    SimulatedDevice device;
    Pool<Codec> pool;
    REQUIRE(pool.init(device, 100).ok());
    Twin<Codec, Budget> twin(device, pool, {3, 2, 6, 64});
    auto& cache = twin.device_cache;
    std::mt19937 random(10);
    for (const int n : {290, 300, 1, 200}) twin.append(n, random);
    if (truncated) {  // fewer than the newest rows that stay are dense then
      twin.truncate(500);
      CHECK(*cache.near(0)[0].rows < sink_rows + recent_rows);
    }
    const auto rows = [&] {
      int sum = 0;
      for (int h = 0; h < 6; ++h) sum += *cache.near(0)[h].rows + *cache.body(0)[h].rows;
      return sum;
    };
    const int had = rows();
    const long long before = cache.memory().total();
    const Status too_few = cache.compress(Retain::bytes(1000));
    REQUIRE(too_few.code == Errc::bad_budget);
    const auto least = static_cast<long long>(too_few.accepted);
    CHECK(cache.compress(Retain::bytes(least - 1)).accepted == too_few.accepted);
    CHECK(cache.compress(Retain::bytes(before + 1)).code == Errc::bad_budget);
    CHECK(cache.compress(Retain::bytes(0)).code == Errc::bad_budget);
    CHECK(rows() == had);
    CHECK(cache.memory().total() == before);
    const long long most = least + static_cast<long long>(share * static_cast<double>(before - least));
    REQUIRE(cache.compress(Retain::bytes(most)).ok());
    const long long after = cache.memory().total();
    CHECK(after <= most);
    CHECK(device.allocated_bytes == after + pool.free_pages() * page);
    if (rows() < had) CHECK(after > most - slack * page);
    if (share == 0.) CHECK(after == least);
  }
}

}  // namespace

TEST_CASE("memory after a compression to bytes is at most those, and as much as pages allow") {
  check_bytes<Uniform>(false, 1);
  check_bytes<Uniform>(true, 1);
  check_bytes<Adaptive>(false, 3);  // one more row may go to several heads
}

namespace {

// Shares rows out evenly, and shows the scores.
struct Spy {
  static constexpr EvidenceSet needs = Evidence::scores;
  std::vector<float>* scores = nullptr;
  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept {
    scores->assign(want.scores.begin(), want.scores.end());
    return Uniform{}.allocate(want, keep);
  }
};

// The largest error of scores on a device, relative to double precision on the rows as the codec decodes them.
template <class Codec, class T>
double score_error(const Geometry& geometry, const SnapKv& selector, int queries, const AttendOptions& options) {
  constexpr int dim = Codec::head_dim;
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 100).ok());
  std::vector<float> scores;
  DeviceKvCache<Spy, SnapKv, Codec, SimulatedDevice> cache;
  REQUIRE(cache.init(device, pool, geometry, {sink_rows, recent_rows, 300, 4096}, Spy{&scores}, selector).ok());
  std::mt19937 random(static_cast<unsigned>(dim + geometry.num_q_heads + queries));
  std::normal_distribution<float> normal;
  const auto draw = [&](int n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& v : x) v = normal(random);
    return x;
  };
  // Of one layer: two appends, and queries among the rows of the second.
  REQUIRE(geometry.num_layers == 1);
  std::vector<float> keys;  // [rows, num_kv_heads, dim], fp16
  std::vector<int> positions;
  for (const int n : {290, 217}) {
    std::vector<float> k = draw(n * geometry.num_kv_heads * dim);
    for (float& x : k) x = to_float(from_float<Half>(x));
    const std::size_t first = positions.size();
    for (int i = 0; i < n; ++i) positions.push_back(positions.empty() ? 0 : positions.back() + 1 + i % 3);
    REQUIRE(cache.reserve(n).ok());
    REQUIRE(cache.append(0, k.data(), k.data(), positions.data() + first, n).ok());
    keys.insert(keys.end(), k.begin(), k.end());
  }
  std::vector<int> where;
  for (int i = 0; i < queries; ++i) where.push_back(positions.back() - 3 * (queries - i));
  std::vector<T> q;
  for (const float x : draw(queries * geometry.num_q_heads * dim)) q.push_back(from_float<T>(x));
  REQUIRE(cache.observe(0, q.data(), where.data(), queries, options).ok());

  // Keys as the device has them: one block is dense as it came, two by the codec, a row at a time.
  const int rows = static_cast<int>(positions.size()), encoded = *cache.body(0)[0].rows, group = geometry.group_size();
  const typename Codec::key_type codec{};
  std::vector<std::byte> block(static_cast<std::size_t>(codec.max_block_bytes(1)));
  REQUIRE(encoded == 256);
  REQUIRE(cache.compress(Retain::ratio(.7)).ok());
  double worst = 0;
  for (int h = 0; h < geometry.num_kv_heads; ++h) {
    reference::SnapKvInput in;
    for (int r = 0; r < rows; ++r) {
      float key[dim];
      std::copy_n(keys.data() + (r * geometry.num_kv_heads + h) * dim, dim, key);
      if (r >= sink_rows && r < sink_rows + encoded) {
        float scratch[Codec::key_type::scratch_floats];
        codec.encode_row(SimulatedWarp{}, key, block.data(), 1, 0, scratch);
        codec.decode(block.data(), 1, 0, key);
      }
      in.keys.insert(in.keys.end(), key, key + dim);
    }
    const int last = std::min(queries, selector.window);
    for (int w = queries - last; w < queries; ++w) {
      for (int d = 0; d < group * dim; ++d)
        in.queries.push_back(to_float(q[static_cast<std::size_t>((w * geometry.num_q_heads + h * group) * dim + d)]));
      in.window_positions.push_back(where[static_cast<std::size_t>(w)]);
    }
    in.positions = positions;
    in.dim = dim;
    in.group = group;
    in.kernel = selector.kernel;
    in.maximum = selector.pool == SnapKv::Pool::maximum;
    in.scale = static_cast<double>(options.scale);
    in.soft_cap = static_cast<double>(options.soft_cap);
    in.sliding = options.window;
    const std::vector<double> expected = reference::snap_kv(in);
    for (int r = 0; r < rows; ++r) {
      const auto got = static_cast<double>(scores[static_cast<std::size_t>(h * rows + r)]);
      const double want = expected[static_cast<std::size_t>(r)];
      if (r < sink_rows || r >= rows - recent_rows) {
        CHECK(got == INFINITY);
      } else if (want == INFINITY) {
        CHECK(got == 2);
      } else {
        const double error = want == 0 ? got : std::fabs(got - want) / want;
        if (!(error <= worst)) worst = error;
      }
    }
  }
  return worst;
}

}  // namespace

namespace {

// Compression by queries, again and again, and what cuts, truncations and forks do to them.
template <class Codec, class Budget, class T>
void check_queries(const Geometry& geometry, const SnapKv& selector, const AttendOptions& options, unsigned seed) {
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 100).ok());
  using Both = Twin<Codec, Budget, SnapKv>;
  Both twin(device, pool, geometry, {}, selector), child(device, pool, geometry, {}, selector);
  std::mt19937 random(seed);
  const auto check = [&](Both& both) {
    both.compress_alone(Retain::ratio(.6));
    both.compare_all();
    CHECK(both.device_cache.compress(Retain::ratio(.9)).code == Errc::no_evidence);  // queries are used up
    both.compare_all();
  };
  twin.append(290, random);
  twin.template observe<T>(3, random, options);
  twin.append(200, random);
  twin.template observe<T>(50, random);
  twin.append(40, random);  // after the queries
  twin.template observe<T>(5, random, options);
  twin.append(3, random);
  check(twin);
  for (const int n : {140, 1, 1, 1, 30}) {  // the ring goes round
    twin.append(n, random);
    twin.template observe<T>(std::min(n / 2 + 1, 9), random, options);
  }
  twin.truncate(13);  // at a query
  REQUIRE(twin.host_cache.fork(child.host_cache).ok());
  REQUIRE(twin.device_cache.fork(child.device_cache).ok());
  child.next = twin.next;
  child.whole_blocks = false;
  check(twin);
  child.append(20, random);
  child.template observe<T>(2, random, options);
  check(child);
  twin.append(10, random);
  twin.template observe<T>(4, random, options);
  twin.truncate(5000);
  CHECK(twin.device_cache.compress(Retain::ratio(1)).code == Errc::bad_budget);  // no rows
  twin.append(60, random);
  CHECK(twin.device_cache.compress(Retain::ratio(.8)).code == Errc::no_evidence);  // no queries
  twin.compress_alone(Retain::ratio(1));                                           // needs none
  twin.compare_all();
}

}  // namespace

TEST_CASE("compression by queries keeps the rows on a device that it keeps on the host") {
  using Coded = KvCodec<TurboQuant<3, 64>, TurboQuant<2, 64>>;
  check_queries<Coded, Uniform, Half>({2, 2, 6, 64}, {}, {}, 20);
  check_queries<Coded, Adaptive, float>({2, 2, 2, 64}, {.window = 12, .kernel = 7}, {.scale = .2f}, 21);
  check_queries<KvCodec<TurboQuant<4, 80>>, Adaptive, BFloat16>({1, 2, 8, 80}, {.window = 33}, {.window = 250, .soft_cap = 6},
                                                                22);
  const SnapKv maximum{.window = 20, .pool = SnapKv::Pool::maximum};
  check_queries<KvCodec<TurboQuant<5, 64>>, Uniform, Half>({2, 1, 4, 64}, maximum, {}, 23);
  check_queries<KvCodec<Dense<Half, 64>>, Adaptive, BFloat16>({2, 2, 6, 64}, {.window = 40}, {}, 24);
  check_queries<KvCodec<Q8_0<64>, Rotated<Q4_1<64>>>, Uniform, Half>({2, 2, 6, 64}, {}, {}, 25);
  check_queries<KvCodec<Rotated<Trellis<3, 64>>>, Uniform, Half>({2, 2, 6, 64}, {}, {}, 27);
  check_queries<KvCodec<Dense<float, 40>>, Adaptive, float>({2, 2, 6, 40}, {.window = 40}, {.window = 250, .soft_cap = 6}, 26);
}

TEST_CASE("Tova's heads decide together on a device as on the host, and keep other rows after a cut that is not even") {
  using Codec = KvCodec<TurboQuant<2, 64>, TurboQuant<1, 64>>;
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 60).ok());
  Twin<Codec, Adaptive, Tova> twin(device, pool, {2, 2, 6, 64});
  std::mt19937 random(28);
  for (const int n : {290, 30}) {
    twin.append(n, random);
    twin.observe<Half>(3, random);
    twin.compress_alone(Retain::ratio(.6));
    twin.compare_all();
  }
}

TEST_CASE("after a prompt's cut the window of LastQuery slides on a device as on the host") {
  using Codec = KvCodec<TurboQuant<2, 64>, TurboQuant<1, 64>>;
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 60).ok());
  using Both = Twin<Codec, Adaptive, LastQuery>;
  Both twin(device, pool, {2, 2, 6, 64}), child(device, pool, {2, 2, 6, 64});
  std::mt19937 random(29);
  const auto compress = [](Both& both, int rows) {
    both.compress_alone(Retain::rows(rows));
    both.compare_all();
  };
  twin.append(290, random);
  twin.observe<Half>(3, random);
  compress(twin, 170);
  for (int i = 0; i < 30; ++i) {
    twin.append(1, random);
    compress(twin, 100);  // without queries
  }
  twin.append(1, random);
  REQUIRE(twin.host_cache.fork(child.host_cache).ok());
  REQUIRE(twin.device_cache.fork(child.device_cache).ok());
  child.next = twin.next;
  child.whole_blocks = false;
  child.truncate(40);  // into what the first cut chose
  child.append(1, random);
  compress(child, 80);
  twin.append(30, random);
  CHECK(twin.device_cache.compress(Retain::rows(80)).code == Errc::no_evidence);  // a chunk of a prompt
  twin.observe<Half>(3, random);
  compress(twin, 80);
  REQUIRE(twin.device_cache.download(child.host_cache).ok());
  REQUIRE(twin.device_cache.upload(child.host_cache).ok());
  CHECK(twin.device_cache.compress(Retain::rows(70)).code == Errc::no_evidence);  // it came without earlier cuts
}

TEST_CASE("SnapKv's scores on a device are those of the plain loops") {
  using Fp16 = KvCodec<Dense<Half, 64>>;
  const SnapKv narrow{.window = 9, .kernel = 3, .pool = SnapKv::Pool::maximum};
  const AttendOptions limited{.window = 201, .soft_cap = 4};
  // An error of a logit is that of the weight. Logits of a few are right to 2^-24 of a few, and errors of many queries average.
  CHECK(score_error<Fp16, float>({1, 2, 6, 64}, {}, 64, {}) <= 5e-7);
  CHECK(score_error<Fp16, BFloat16>({1, 1, 4, 64}, {.window = 40, .kernel = 1}, 70, limited) <= 5e-7);
  CHECK(score_error<KvCodec<TurboQuant<4, 80>, TurboQuant<1, 80>>, Half>({1, 2, 6, 80}, {}, 33, {}) <= 5e-7);
  CHECK(score_error<KvCodec<TurboQuant<3, 64>, TurboQuant<2, 64>>, Half>({1, 2, 6, 64}, {}, 33, limited) <= 5e-7);
  CHECK(score_error<KvCodec<TurboQuant<6, 256>, TurboQuant<2, 256>>, Half>({1, 1, 2, 256}, {}, 33, {}) <= 5e-7);
  CHECK(score_error<KvCodec<Rotated<Trellis<2, 128>>, Q4_0<128>>, Half>({1, 2, 6, 128}, {}, 33, {}) <= 5e-7);
  CHECK(score_error<KvCodec<TurboQuant<4, 40>>, float>({1, 2, 6, 40}, {.window = 40}, 70, limited) <= 5e-7);
  CHECK(score_error<KvCodec<TurboQuantUnbiased<3, 192>, Q8_0<192>>, Half>({1, 1, 2, 192}, {}, 33, {}) <= 5e-7);
  // Logits up to 15, and seven queries of one head.
  CHECK(score_error<Fp16, Half>({1, 2, 2, 64}, narrow, 7, {.scale = .3f}) <= 5e-6);
  // Levels of two bits are right to 2.5e-4, elements of groups to 2^-11, and 192 logits average.
  CHECK(score_error<KvCodec<Q5_0<128>, Q4_0<128>>, Half>({1, 2, 6, 128}, {}, 33, {}) <= 5e-5);
  CHECK(score_error<KvCodec<TurboQuant<2, 128>>, Half>({1, 2, 6, 128}, {}, 64, {}) <= 5e-5);
}

TEST_CASE("a fork goes its own way") {
  using Codec = KvCodec<TurboQuant<3, 64>, TurboQuant<5, 64>>;
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 60).ok());
  const Geometry geometry{2, 2, 6, 64};
  Twin<Codec> parent(device, pool, geometry), child(device, pool, geometry);
  std::mt19937 random(12);
  for (const int n : {290, 150}) parent.append(n, random);
  parent.compress(.8);
  REQUIRE(parent.device_cache.refresh().ok());
  for (int round = 0; round < 2; ++round) {  // into one that is empty, then into one that has rows
    REQUIRE(parent.host_cache.fork(child.host_cache).ok());
    REQUIRE(parent.device_cache.fork(child.device_cache).ok());
    child.next = parent.next;
    child.whole_blocks = false;
    child.compare_all();
    for (int i = 0; i < 6; ++i) child.append(33, random);  // few at a time, so that pages it was not given would be missed
    child.compare_all();
    parent.append(3, random);
    child.compress(.5);
    parent.truncate(10);
    child.compare_all();
    parent.compare_all();
  }
  const long long bytes = child.device_cache.memory().total();
  const int free = pool.free_pages();
  CHECK(child.device_cache.fork(child.device_cache).code == Errc::bad_shape);
  parent.append(300, random);
  REQUIRE(parent.device_cache.reserve(128 * (pool.free_pages() / 4)).ok());
  CHECK(parent.device_cache.fork(child.device_cache).code == Errc::out_of_memory);
  for (long long fail = 1; fail <= 4; ++fail) {
    REQUIRE(parent.device_cache.refresh().ok());
    device.fail_at = device.allocations + fail;
    CHECK(parent.device_cache.fork(child.device_cache).code == Errc::out_of_memory);
  }
  device.fail_at = 0;
  CHECK(child.device_cache.memory().total() == bytes);
  child.compare_all();
  CHECK(pool.free_pages() < free);
}

TEST_CASE("marks are those of the host for any scores, many of them equal") {
  constexpr int heads = 5, stride = 700;
  SimulatedDevice device;
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 60; ++round) {
    std::vector<float> scores(heads * stride);
    std::vector<int> dense(heads), encoded(heads), keep(heads);
    std::vector<unsigned char> marks(scores.size(), 0xff), expected(stride);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const float x = normal(random);
      scores[i] = round % 3 == 0 ? x : round % 3 == 1 ? std::round(x) : x < 0 ? -0.f : i % 7 == 0 ? INFINITY : 0.f;
    }
    for (std::size_t h = 0; h < heads; ++h) {
      dense[h] = static_cast<int>(random() % 100);
      encoded[h] = static_cast<int>(random() % 601);
      const int n = dense[h] + encoded[h];
      keep[h] = h == 0 ? 0 : h == 1 ? n : static_cast<int>(random() % static_cast<unsigned>(n + 1));
    }
    const DeviceHeads all{nullptr, nullptr, dense.data(), encoded.data(), 0, 0};
    REQUIRE(device.launch(MarkWork{all, keep.data(), scores.data(), marks.data(), stride}, heads).ok());
    for (std::size_t h = 0; h < heads; ++h) {
      const auto n = static_cast<std::size_t>(dense[h] + encoded[h]);
      expected.resize(n);
      cut({scores.data() + h * stride, n}, keep[h], expected);
      const auto first = marks.begin() + static_cast<std::ptrdiff_t>(h * stride);
      CHECK(std::equal(expected.begin(), expected.end(), first));
      CHECK(std::all_of(first + static_cast<std::ptrdiff_t>(n), first + stride, [](unsigned char m) { return m == 0xff; }));
    }
  }
}

TEST_CASE("a batch of sequences attends as each does on the host") {
  using Codec = KvCodec<TurboQuant<3, 64>, TurboQuant<2, 64>>;
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 200).ok());
  const Geometry geometry{2, 2, 6, 64};
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<std::unique_ptr<Twin<Codec>>> twins;
  std::vector<const Cache<Codec>*> caches;
  for (const int rows : {700, 3, 260}) {
    twins.push_back(std::make_unique<Twin<Codec>>(device, pool, geometry));
    for (int left = rows; left > 0; left -= 130) twins.back()->append(std::min(left, 130), random);
    caches.push_back(&twins.back()->device_cache);
  }
  DecodePlan<Codec, SimulatedDevice, float> plan;
  REQUIRE(plan.init(device, caches).ok());
  const long long allocations = device.allocations;
  const float sinks[] = {0, 3, -2, 5, 1, 2};
  for (const AttendOptions& options :
       {AttendOptions{}, AttendOptions{.scale = .2f, .window = 100, .soft_cap = 5}, AttendOptions{.sink_logits = sinks}}) {
    for (int layer = 0; layer < 2; ++layer) {
      const int width = 6 * 64;
      std::vector<float> queries(static_cast<std::size_t>(3 * width)), out(queries.size(), NAN), expected(queries.size());
      for (float& x : queries) x = normal(random);
      std::vector<int> positions;
      for (std::size_t s = 0; s < twins.size(); ++s) {
        positions.push_back(twins[s]->host_cache.end_position(layer) - 1);
        REQUIRE(twins[s]
                    ->host_cache
                    .attend(layer, queries.data() + s * width, std::span(&positions.back(), 1), options,
                            expected.data() + s * width)
                    .ok());
      }
      REQUIRE(plan.attend(layer, queries.data(), positions.data(), options, out.data()).ok());
      // Rounding to fp16 as in test_decode_warp.cpp, with the whole weight on one row; levels of two bits, right to 5e-4; and
      // 16-bit queries and weights on the host.
      for (std::size_t i = 0; i < out.size(); ++i) CHECK(std::fabs(out[i] - expected[i]) <= 3e-3);
      if (options.window == 0 && options.soft_cap == 0) {
        std::vector<float> again(out.size());
        REQUIRE(plan.attend(layer, queries.data(), nullptr, options, again.data()).ok());
        CHECK(again == out);
      }
    }
  }
  CHECK(device.allocations == allocations);
}

namespace {

// The largest error of an output relative to the size of a value, and double precision on the rows that the device has.
template <class Codec>
double attention_error(SimulatedDevice& device, const Twin<Codec>& twin, std::mt19937& random) {
  constexpr int dim = Codec::head_dim, n = 5;
  const Geometry& geometry = twin.geometry;
  const auto width = static_cast<std::size_t>(geometry.num_q_heads * dim);
  KvCache<Uniform, KeyDiff, Codec> rows;
  REQUIRE(rows.init(geometry, {.sink_rows = sink_rows, .recent_rows = recent_rows, .staggered = false}).ok());
  REQUIRE(twin.device_cache.download(rows).ok());
  DecodePlan<Codec, SimulatedDevice, float> plan;
  const Cache<Codec>* const all[] = {&twin.device_cache};
  REQUIRE(plan.init(device, all, n).ok());
  std::normal_distribution<float> normal;
  std::vector<float> queries(n * width), out(queries.size(), NAN);
  for (float& x : queries) x = normal(random);
  std::vector<int> positions;
  for (int i = 0; i < n; ++i) positions.push_back(twin.next[0] - 40 * (n - 1 - i));
  double worst = 0;
  for (const AttendOptions& options : {AttendOptions{}, AttendOptions{.window = 111, .soft_cap = 3}}) {
    REQUIRE(plan.attend(0, queries.data(), positions.data(), n, options, out.data()).ok());
    for (int h = 0; h < geometry.num_q_heads; ++h) {
      const int head = h / geometry.group_size();
      const auto at = rows.positions(0, head);
      std::vector<float> keys(at.size() * dim), values(keys.size());
      rows.decode(0, head, keys.data(), values.data());
      for (std::size_t i = 0; i < n; ++i) {
        const float* const query = queries.data() + i * width + h * dim;
        std::vector<double> exact(dim, 0.0);
        double total = 0, square = 0;
        for (std::size_t r = 0; r < at.size(); ++r) {
          if (at[r] > positions[i] || (options.window > 0 && at[r] <= positions[i] - options.window)) continue;
          double s = 0;
          for (std::size_t d = 0; d < dim; ++d) s += static_cast<double>(query[d]) * static_cast<double>(keys[r * dim + d]);
          s /= std::sqrt(static_cast<double>(dim));
          if (options.soft_cap > 0) s = 3 * std::tanh(s / 3);
          total += std::exp(s);
          for (std::size_t d = 0; d < dim; ++d) {
            const auto v = static_cast<double>(values[r * dim + d]);
            exact[d] += std::exp(s) * v;
            square += std::exp(s) * v * v / dim;
          }
        }
        for (std::size_t d = 0; d < dim; ++d) {
          const auto got = static_cast<double>(out[i * width + static_cast<std::size_t>(h) * dim + d]);
          const double error = std::fabs(got - exact[d] / total) / std::sqrt(square / total);
          if (!(error <= worst)) worst = error;
        }
      }
    }
  }
  return worst;
}

// Rows come, go and are attended to, near ones in fp32 too.
template <class Codec>
void check_rows(unsigned seed) {
  CAPTURE(seed);
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 100).ok());
  Twin<Codec> twin(device, pool, {1, 2, 6, Codec::head_dim}), child(device, pool, {1, 2, 6, Codec::head_dim});
  std::mt19937 random(seed);
  const auto check = [&](Twin<Codec>& one) {
    one.compare_all();
    // In fp32, or by tensor cores: queries, weights and elements of groups rounded to fp16.
    constexpr bool fragments = LayoutOf<typename Codec::key_type, typename Codec::value_type>::fragments;
    CHECK(attention_error(device, one, random) <= (fragments ? 1.8e-3 : 1e-6));
  };
  for (const int n : {7, 290, 1}) {
    twin.append(n, random);
    check(twin);
  }
  twin.compress(.7);
  check(twin);
  twin.append(131, random);
  twin.truncate(45);
  twin.append(30, random);
  check(twin);
  REQUIRE(twin.host_cache.fork(child.host_cache).ok());
  REQUIRE(twin.device_cache.fork(child.device_cache).ok());
  child.next = twin.next;
  child.whole_blocks = false;
  child.append(150, random);
  child.compress(.3);
  check(child);
  twin.compare_all();
}

}  // namespace

TEST_CASE("rows of every codec that decodes them one by one, wherever they go, and attention to them") {
  check_rows<KvCodec<Dense<float, 40>>>(30);
  check_rows<KvCodec<Dense<float, 256>>>(31);
  check_rows<KvCodec<Dense<BFloat16, 96>>>(32);
  check_rows<KvCodec<Dense<Half, 40>>>(33);
  check_rows<KvCodec<Q8_0<64>, Q4_0<64>, float>>(34);
  check_rows<KvCodec<Q4_1<40>, Q5_0<40>>>(35);
  check_rows<KvCodec<Rotated<Q4_0<128>>, KiviValues<2, 128>, BFloat16>>(36);
  check_rows<KvCodec<TurboQuant<1, 40>, TurboQuant<5, 40>>>(37);
  check_rows<KvCodec<TurboQuantUnbiased<3, 64>, TurboQuant<4, 64>, float>>(38);
  check_rows<KvCodec<TurboQuantUnbiased<1, 40, Sketch::gaussian>, TurboQuantUnbiased<2, 40>>>(39);
  check_rows<KvCodec<Rotated<Trellis<2, 64>>, Rotated<Trellis<3, 64>>, BFloat16>>(41);
  check_rows<KvCodec<Q5_0<96>, Rotated<Trellis<1, 96>>>>(42);
  check_rows<KvCodec<TurboQuant<2, 80, NormCorrection::least_squares, LogScale>, Rotated<Q8_0<80>>, float>>(40);
}

TEST_CASE("chunks of queries attend to the rows of the host, after cuts too") {
  using Codec = KvCodec<TurboQuant<3, 64>, TurboQuant<4, 64>>;
  constexpr float sinks[] = {0, 3, -2, 5, 1, 2, -1, 4, 0, 1, 3, -3, 2, 0, 1, 5, -2, 1};
  for (const int group : {1, 3, 4, 8, 9}) {
    SimulatedDevice device;
    Pool<Codec> pool;
    REQUIRE(pool.init(device, 200).ok());
    const Geometry geometry{1, 2, 2 * group, 64};
    std::mt19937 random(static_cast<unsigned>(group));
    std::normal_distribution<float> normal;
    std::vector<std::unique_ptr<Twin<Codec>>> twins;
    std::vector<const Cache<Codec>*> caches;
    for (const int rows : {413, 3, 0, 200}) {
      twins.push_back(std::make_unique<Twin<Codec>>(device, pool, geometry));
      for (int left = rows; left > 0; left -= 190) twins.back()->append(std::min(left, 190), random);
      caches.push_back(&twins.back()->device_cache);
    }
    DecodePlan<Codec, SimulatedDevice, float> plan;
    REQUIRE(plan.init(device, caches, 33).ok());
    const auto width = static_cast<std::size_t>(geometry.num_q_heads * 64);
    for (const int n : {33, 1, 9, 2, 8, 7}) {
      CAPTURE(group);
      CAPTURE(n);
      if (n == 9) twins[0]->compress(.6);
      if (n == 2) twins[0]->truncate(40);
      for (std::size_t s = 0; s < twins.size(); ++s) {
        if (s != 2) twins[s]->append(n, random);  // one sequence stays empty
      }
      AttendOptions options;
      if (n % 2 == 1) options.window = n == 7 ? 20 : 150;
      if (n == 8 || n == 9) options.soft_cap = 4;
      if (n == 2 || n == 7) options.sink_logits = std::span(sinks).first(static_cast<std::size_t>(2 * group));
      const auto count = static_cast<std::size_t>(n);
      std::vector<float> queries(twins.size() * count * width), out(queries.size(), NAN), expected(queries.size());
      for (float& x : queries) x = normal(random);
      std::vector<int> positions, start{0};
      for (std::size_t s = 0; s < twins.size(); ++s) {
        const auto all = twins[s]->host_cache.positions(0, 0);
        std::vector<int> own(count, 5);
        if (s != 2) own.assign(all.end() - n, all.end());
        reference::attend(twins[s]->host_cache, 0, queries.data() + positions.size() * width, own, options,
                          expected.data() + positions.size() * width);
        positions.insert(positions.end(), own.begin(), own.end());
      }
      const long long allocations = device.allocations, launches = device.launches;
      REQUIRE(plan.attend(0, queries.data(), positions.data(), n, options, out.data()).ok());
      CHECK(device.allocations == allocations);
      CHECK(device.launches == launches + 4);
      // Rounding to fp16 as in test_decode_warp.cpp, with the whole weight on one row.
      float worst = 0;
      for (std::size_t i = 0; i < out.size(); ++i) {
        const float difference = std::fabs(out[i] - expected[i]);
        if (!(difference <= worst)) worst = difference;
      }
      CHECK(worst <= 1.8e-3f);
      // The same queries, counted for each sequence: some of the first and the last, none of the second, all of the third.
      const std::vector<int> own{n - n / 3, 0, n, n / 2};
      std::vector<float> fewer, of_fewer;
      std::vector<int> at;
      for (std::size_t s = 0; s < twins.size(); ++s) {
        const std::size_t first = s * count, last = first + static_cast<std::size_t>(own[s]);
        fewer.insert(fewer.end(), queries.data() + first * width, queries.data() + last * width);
        of_fewer.insert(of_fewer.end(), out.data() + first * width, out.data() + last * width);
        at.insert(at.end(), positions.data() + first, positions.data() + last);
        start.push_back(static_cast<int>(at.size()));
      }
      std::vector<float> again(of_fewer.size() + 1, NAN);
      REQUIRE(plan.attend(0, fewer.data(), at.data(), n, options, again.data(), start.data()).ok());
      CHECK(std::isnan(again.back()));
      worst = 0;
      for (std::size_t i = 0; i < of_fewer.size(); ++i) {  // states joined in another order
        const float difference = std::fabs(again[i] - of_fewer[i]);
        if (!(difference <= worst)) worst = difference;
      }
      CHECK(worst <= 1e-6f);
    }
  }
}

TEST_CASE("a compression that fails changes nothing") {
  using Codec = KvCodec<TurboQuant<4, 64>>;
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 40).ok());
  DeviceKvCache<Uniform, KeyDiff, Codec, SimulatedDevice> unused;
  CHECK(unused.compress(Retain::ratio(.5)).code == Errc::bad_shape);
  Twin<Codec> twin(device, pool, {1, 2, 2, 64});
  CHECK(twin.device_cache.compress(Retain::ratio(.5)).code == Errc::bad_budget);  // no rows
  std::mt19937 random(11);
  for (int i = 0; i < 2; ++i) twin.append(250, random);
  const long long bytes = twin.device_cache.memory().total(), allocated = device.allocated_bytes;
  for (const Retain retain : {Retain::ratio(0), Retain::ratio(NAN), Retain::ratio(1.1), Retain::rows(0), Retain::rows(501),
                              Retain::rows(sink_rows + recent_rows - 1), Retain::bytes(100)}) {
    CHECK(twin.device_cache.compress(retain).code == Errc::bad_budget);
  }
  for (long long fail = 1; fail <= 3; ++fail) {
    device.fail_at = device.allocations + fail;
    CHECK(twin.device_cache.compress(Retain::ratio(.5)).code == Errc::out_of_memory);
  }
  device.fail_at = 0;
  CHECK(device.allocated_bytes == allocated);
  CHECK(twin.device_cache.memory().total() == bytes);
  twin.compare_all();
}

TEST_CASE("queries that are missing or make no sense, and memory for them that runs out, change nothing") {
  using Codec = KvCodec<TurboQuant<4, 64>>;
  using Observer = DeviceKvCache<Uniform, SnapKv, Codec, SimulatedDevice>;
  SimulatedDevice device;
  Pool<Codec> pool;
  REQUIRE(pool.init(device, 60).ok());
  const long long of_pool = device.allocated_bytes;
  const Geometry geometry{2, 2, 6, 64};
  std::mt19937 random(14);
  {
    Observer cache;
    std::vector<float> queries(3 * 6 * 64, 1.f);
    const int positions[] = {1, 2, 4};
    CHECK(cache.observe(0, queries.data(), positions, 3).code == Errc::bad_shape);  // not prepared
    CHECK(cache.fork(cache).code == Errc::bad_shape);
    for (const SnapKv& wrong : {SnapKv{.window = 0}, SnapKv{.kernel = 4}, SnapKv{.kernel = -1}, SnapKv{.window = 65537}}) {
      CHECK(cache.init(device, pool, geometry, {}, {}, wrong).code == Errc::bad_value);
    }
    CHECK(cache.init(device, pool, {1, 0, 2, 64}).code == Errc::bad_shape);
    DeviceKvCache<Uniform, SinkRecent, Codec, SimulatedDevice> other;
    CHECK(other.init(device, pool, geometry, {}, {}, {.num_sinks = -1}).code == Errc::bad_value);
    for (long long fail = 1; fail <= 7; ++fail) {
      device.fail_at = device.allocations + fail;
      CHECK(cache.init(device, pool, geometry).code == Errc::out_of_memory);
      CHECK(device.allocated_bytes == of_pool);
    }
    device.fail_at = 0;

    // A selector that needs none keeps none.
    REQUIRE(other.init(device, pool, geometry).ok());
    const long long launches = device.launches;
    REQUIRE(other.observe(0, queries.data(), positions, 3).ok());
    CHECK(device.launches == launches);
    CHECK(other.memory().evidence_bytes == 0);
  }
  CHECK(device.allocated_bytes == of_pool);

  Twin<Codec, Uniform, SnapKv> twin(device, pool, geometry), child(device, pool, geometry);
  for (const int n : {290, 200}) twin.append(n, random);
  Observer& cache = twin.device_cache;
  CHECK(cache.memory().evidence_bytes == 2 * 2 * (64 * (3 * 64 * 4 + 4) + 20));
  CHECK(device.allocated_bytes == of_pool + cache.memory().total() + child.device_cache.memory().total() -
                                      (60 - pool.free_pages()) * Pool<Codec>::page_bytes);
  std::vector<float> queries(3 * 6 * 64, 1.f);
  const int last = twin.next[0], positions[] = {last - 3, last - 1, last};
  REQUIRE(cache.observe(0, queries.data(), positions, 3).ok());
  CHECK(cache.compress(Retain::ratio(.5)).message() ==
        "the token selector has seen 0 queries of layer 1; call observe() before compress()");
  twin.compare_all();
  const long long allocations = device.allocations;
  CHECK(cache.observe(2, queries.data(), positions, 3).code == Errc::bad_shape);
  CHECK(cache.observe<float>(1, nullptr, positions, 3).code == Errc::bad_shape);
  CHECK(cache.observe(1, queries.data(), nullptr, 3).code == Errc::bad_shape);
  CHECK(cache.observe(1, queries.data(), positions, -1).code == Errc::bad_shape);
  CHECK(cache.observe(1, queries.data(), positions, 3, {.scale = NAN}).code == Errc::bad_value);
  CHECK(cache.observe(1, queries.data(), positions, 3, {.window = -1}).code == Errc::bad_value);
  CHECK(cache.observe<float>(1, nullptr, nullptr, 0).ok());
  CHECK(cache.compress(Retain::ratio(.5)).code == Errc::no_evidence);  // still none
  REQUIRE(cache.observe(1, queries.data(), positions, 3).ok());
  for (int layer = 0; layer < 2; ++layer) REQUIRE(twin.host_cache.observe(layer, queries.data(), positions).ok());
  CHECK(device.allocations == allocations + 3);  // of the compression that said no

  const long long bytes = device.allocated_bytes;
  for (long long fail = 1; fail <= 4; ++fail) {
    device.fail_at = device.allocations + fail;
    CHECK(cache.compress(Retain::ratio(.5)).code == Errc::out_of_memory);
  }
  child.append(30, random);
  child.observe(2, random);
  for (long long fail = 1; fail <= 7; ++fail) {
    device.fail_at = device.allocations + fail;
    CHECK(cache.fork(child.device_cache).code == Errc::out_of_memory);
  }
  device.fail_at = 0;
  CHECK(device.allocated_bytes == bytes);
  twin.compare_all();
  child.compare_all();
  for (auto* one : {&twin, &child}) {  // the queries are still there
    one->compress_alone(Retain::ratio(.95));
    one->compare_all();
  }
}

TEST_CASE("memory that runs out, and calls that make no sense, change nothing") {
  using Codec = KvCodec<TurboQuant<4, 64>>;
  SimulatedDevice device;
  Pool<Codec> pool;
  CHECK(pool.init(device, 0).code == Errc::bad_shape);
  REQUIRE(pool.init(device, 5).ok());
  const long long of_pool = device.allocated_bytes;
  const Geometry geometry{1, 2, 2, 64};
  {
    Cache<Codec> cache;
    for (long long fail = 1; fail <= 4; ++fail) {
      device.fail_at = device.allocations + fail;
      CHECK(cache.init(device, pool, geometry).code == Errc::out_of_memory);
      CHECK(device.allocated_bytes == of_pool);
    }
    device.fail_at = 0;
    CHECK(cache.init(device, pool, {1, 2, 2, 128}).code == Errc::bad_shape);
    CHECK(cache.init(device, pool, geometry, {-1}).code == Errc::bad_shape);
    CHECK(cache.init(device, pool, geometry, {4, 32, 0}).code == Errc::bad_shape);
    REQUIRE(cache.init(device, pool, geometry, {4, 32, 100, 1000}).ok());
    CHECK(device.allocated_bytes == of_pool + cache.memory().total());

    std::vector<float> rows(2 * 64 * 100, 1.f);
    std::vector<int> positions(100);
    for (int i = 0; i < 100; ++i) positions[static_cast<std::size_t>(i)] = i;
    CHECK(cache.append(0, rows.data(), rows.data(), positions.data(), 1).code == Errc::out_of_memory);  // nothing reserved
    CHECK(cache.reserve(1001).code == Errc::bad_shape);
    CHECK(cache.reserve(4 + 32 + 3 * 128).code == Errc::out_of_memory);  // three pages of two heads, and there are five
    CHECK(pool.free_pages() == 5);
    REQUIRE(cache.reserve(4 + 32 + 2 * 128).ok());
    CHECK(pool.free_pages() == 1);
    CHECK(cache.append(1, rows.data(), rows.data(), positions.data(), 1).code == Errc::bad_shape);
    CHECK(cache.append(0, rows.data(), rows.data(), positions.data(), 101).code == Errc::bad_shape);
    CHECK(cache.append<float>(0, nullptr, rows.data(), positions.data(), 1).code == Errc::bad_shape);
    const std::vector<unsigned char> keep(2 * 400, 1);
    CHECK(cache.cut(nullptr, 400).code == Errc::bad_shape);
    REQUIRE(cache.append(0, rows.data(), rows.data(), positions.data(), 100).ok());
    CHECK(cache.cut(keep.data(), 99).code == Errc::bad_shape);
    CHECK(cache.most_rows(0, 1) == 100);

    const Cache<Codec>* const caches[] = {&cache};
    DecodePlan<Codec, SimulatedDevice, float> plan;
    std::vector<float> out(2 * 64);
    CHECK(plan.attend(0, rows.data(), nullptr, {}, out.data()).code == Errc::bad_shape);  // not prepared
    CHECK(plan.init(device, {}).code == Errc::bad_shape);
    for (long long fail = 1; fail <= 11; ++fail) {
      device.fail_at = device.allocations + fail;
      CHECK(plan.init(device, caches).code == Errc::out_of_memory);
    }
    device.fail_at = 0;
    CHECK(plan.init(device, caches, 0).code == Errc::bad_shape);
    CHECK(plan.init(device, caches, (1 << 16) + 1).code == Errc::bad_shape);
    CHECK(plan.init(device, std::vector<const Cache<Codec>*>(8192, &cache), 1 << 16).code == Errc::bad_shape);
    REQUIRE(plan.init(device, caches, 3).ok());
    const int chunk[] = {97, 98, 99};
    std::vector<float> out_of_chunk(3 * 2 * 64);
    for (const int n : {-1, 0, 4}) {
      CHECK(plan.attend(0, rows.data(), chunk, n, {}, out_of_chunk.data()).code == Errc::bad_shape);
    }
    CHECK(plan.attend(0, rows.data(), nullptr, 2, {}, out_of_chunk.data()).code == Errc::bad_shape);
    CHECK(plan.attend(0, nullptr, chunk, 2, {}, out_of_chunk.data()).code == Errc::bad_shape);
    CHECK(plan.attend(0, rows.data(), chunk, 2, {}, nullptr).code == Errc::bad_shape);
    CHECK(plan.attend(-1, rows.data(), chunk, 2, {}, out_of_chunk.data()).code == Errc::bad_shape);
    REQUIRE(plan.attend(0, rows.data(), chunk, 3, {}, out_of_chunk.data()).ok());
    for (const float x : out_of_chunk) CHECK(x == doctest::Approx(1).epsilon(1e-3));
    CHECK(plan.attend(1, rows.data(), nullptr, {}, out.data()).code == Errc::bad_shape);
    CHECK(plan.attend(0, rows.data(), nullptr, {.window = 3}, out.data()).code == Errc::bad_shape);
    CHECK(plan.attend(0, rows.data(), nullptr, {.soft_cap = NAN}, out.data()).code == Errc::bad_value);
    CHECK(plan.attend(0, rows.data(), nullptr, {.sink_logits = std::span(rows.data(), 3)}, out.data()).code == Errc::bad_shape);
    REQUIRE(plan.attend(0, rows.data(), nullptr, {}, out.data()).ok());
    for (const float x : out) CHECK(x == doctest::Approx(1).epsilon(1e-3));
  }
  CHECK(device.allocated_bytes == of_pool);
  CHECK(pool.free_pages() == 5);
}
