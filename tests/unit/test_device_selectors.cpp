// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Token selectors on a simulated device, beside the same on the host over the same rows.
#include <doctest/doctest.h>

#include <cmath>
#include <deque>
#include <random>

#include "kvtailor/codec/low_rank_work.hpp"
#include "kvtailor/kvtailor.hpp"
#include "kvtailor/select/critical_kv.hpp"
#include "kvtailor/select/expected_attention.hpp"
#include "kvtailor/select/learned.hpp"
#include "kvtailor/select/leverage.hpp"
#include "kvtailor/select/value_norm.hpp"
#include "kvtailor/store/decode_plan.hpp"
#include "kvtailor/store/device_kv_cache.hpp"

using namespace kvt;

namespace {

constexpr int sink_rows = 5, recent_rows = 20;

// What is around a selector without a side for devices has none either.
struct HostOnly {
  static constexpr EvidenceSet needs = Evidence::positions;
  Status score(const HeadEvidence&, std::span<float>) const noexcept { return success(); }
};
static_assert(!DeviceTokenSelector<HostOnly> && !DeviceTokenSelector<ValueNorm<HostOnly>> &&
              !DeviceTokenSelector<ChunkKv<CriticalKv<HostOnly>>>);
static_assert(DeviceTokenSelector<ValueNorm<KeyNorm>> && DeviceTokenSelector<Caote<HeavyHitter>>);

// Shares rows out evenly, and shows the scores.
struct Spy {
  static constexpr EvidenceSet needs = Evidence::scores;
  std::vector<float>* scores = nullptr;
  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept {
    scores->assign(want.scores.begin(), want.scores.end());
    return Uniform{}.allocate(want, keep);
  }
};

// One sequence in both caches.
template <class Codec, class Selector>
struct Both {
  static constexpr int dim = Codec::head_dim;
  static constexpr bool queries = (EvidenceSet(Selector::needs).bits & query_evidence.bits) != 0;
  Geometry geometry;
  std::vector<float> scores[2], *shown = scores;  // of the host, of the device; a fork shows those of its parent
  SimulatedDevice device;
  PagePool<Codec, SimulatedDevice> pool;
  DeviceKvCache<Spy, Selector, Codec, SimulatedDevice> on_device;
  KvCache<Spy, Selector, Codec> host;
  std::mt19937 random;
  int next = -1;

  Both(const Geometry& shape, const Selector& selector, unsigned seed, DeviceCacheOptions device_options = {},
       CacheOptions options = {})
      : geometry(shape), host({&scores[0]}, selector), random(seed) {
    device_options.sink_rows = options.sink_rows = sink_rows;
    device_options.recent_rows = options.recent_rows = recent_rows;
    options.staggered = false;
    device_options.max_rows = 4096;
    REQUIRE(pool.init(device, 400).ok());
    const Status status = on_device.init(device, pool, geometry, device_options, {&scores[1]}, selector);
    INFO(status.message());
    REQUIRE(status.ok());
    REQUIRE(host.init(geometry, options).ok());
  }
  std::vector<float> draw(int n) {
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& v : x) v = normal(random);
    return x;
  }
  // Rows of many lengths, at positions with gaps.
  void append(int n) {
    REQUIRE(on_device.reserve(n).ok());
    std::vector<int> positions;
    for (int i = 0; i < n; ++i) positions.push_back(next += 1 + i % 2);
    for (int layer = 0; layer < geometry.num_layers; ++layer) {
      std::vector<float> keys = draw(n * geometry.num_kv_heads * dim), values = draw(n * geometry.num_kv_heads * dim);
      for (std::size_t i = 0; i < keys.size(); ++i) {
        const auto channel = i % static_cast<std::size_t>(dim), row = i / static_cast<std::size_t>(dim);
        keys[i] += static_cast<float>(channel % 7) * .4f;
        values[i] *= 1 + static_cast<float>(row % 5);
      }
      REQUIRE(host.append(layer, keys.data(), values.data(), positions).ok());
      REQUIRE(on_device.append(layer, keys.data(), values.data(), positions.data(), n).ok());
    }
  }
  // n queries at every other position, the last at that of the last row.
  void observe(int n, const AttendOptions& attend = {}) {
    std::vector<int> positions;
    for (int i = 0; i < n; ++i) positions.push_back(next - 2 * (n - 1 - i));
    for (int layer = 0; layer < geometry.num_layers; ++layer) {
      std::vector<Half> halves;
      for (const float x : draw(n * geometry.num_q_heads * dim)) halves.push_back(from_float<Half>(x + .3f));
      std::vector<float> floats;
      for (const Half x : halves) floats.push_back(to_float(x));
      const Status status = host.observe(layer, floats.data(), positions, attend);
      INFO(status.message());
      REQUIRE(status.ok());
      REQUIRE(on_device.observe(layer, halves.data(), positions.data(), n, attend).ok());
    }
  }
  // The host takes the rows of the device, where two scales or codes may be as near; what it has observed is gone.
  void same_rows() { REQUIRE(on_device.download(host).ok()); }
  // The same rows stay; returns the largest difference of two scores, relative to the larger.
  double compress(Retain retain) {
    shown[0].clear();
    shown[1].clear();
    const Status wanted = host.compress(retain), got = on_device.compress(retain);
    INFO(wanted.message());
    REQUIRE(wanted.ok());
    INFO(got.message());
    REQUIRE(got.ok());
    REQUIRE(shown[0].size() == shown[1].size());
    REQUIRE(!shown[0].empty());
    double worst = 0;
    for (std::size_t i = 0; i < shown[0].size(); ++i) {
      const auto a = static_cast<double>(shown[0][i]), b = static_cast<double>(shown[1][i]);
      const double error = a == b ? 0 : std::fabs(a - b) / std::max(std::fabs(a), std::fabs(b));
      if (!(error <= worst)) worst = error;
    }
    KvCache<Uniform, SinkRecent, Codec> copy;
    REQUIRE(copy.init(geometry, {.sink_rows = sink_rows, .recent_rows = recent_rows, .staggered = false}).ok());
    REQUIRE(on_device.download(copy).ok());
    for (int h = 0; h < geometry.num_heads(); ++h) {
      const int layer = h / geometry.num_kv_heads, head = h % geometry.num_kv_heads;
      REQUIRE(std::ranges::equal(host.positions(layer, head), copy.positions(layer, head)));
    }
    return worst;
  }
};

// Rows come and are dropped again and again. Returns the largest difference of scores.
template <class Codec, class Selector>
double difference(const Geometry& geometry, const Selector& selector, const DeviceCacheOptions& device_options = {},
                  const CacheOptions& options = {}) {
  Both<Codec, Selector> both(geometry, selector, static_cast<unsigned>(geometry.head_dim + geometry.num_q_heads),
                             device_options, options);
  double worst = 0;
  const auto cut = [&](Retain retain) {
    both.same_rows();
    if (both.queries) both.observe(19);
    worst = std::max(worst, both.compress(retain));
  };
  for (const int n : {311, 46}) both.append(n);
  cut(Retain::ratio(.6));
  for (const int n : {1, 170, 3}) both.append(n);
  cut(Retain::rows(150));
  return worst;
}

using Fp16 = KvCodec<Dense<Half, 64>>;
using Turned = KvCodec<TurboQuant<4, 64>, TurboQuant<3, 64>>;
using Groups = KvCodec<Rotated<Q4_1<96>>, Q8_0<96>>;
using Unbiased = KvCodec<Q8_0<40>, TurboQuantUnbiased<3, 40>>;
using Blocks = KvCodec<KiviKeys<4, 64>, Rotated<Shifted<LloydMax<3, 64, NormCorrection::least_squares, LogScale>>>>;
using LowRanks = KvCodec<Rotated<LowRank<LloydMax<3, 64, NormCorrection::least_squares, LogScale>>>>;

// f.operator()<Codec>(geometry) of codecs of all kinds: where rows lie as fragments, one by one, in blocks.
template <class F>
double over_codecs(F&& f) {
  return std::max({f.template operator()<Fp16>(Geometry{2, 1, 2, 64}), f.template operator()<Turned>(Geometry{1, 2, 2, 64}),
                   f.template operator()<Unbiased>(Geometry{1, 1, 3, 40}),
                   f.template operator()<Blocks>(Geometry{1, 2, 4, 64})});
}
// What a model may be, for the host and for a device that is simulated.
template <class Options>
void set_model(const Geometry& geometry, std::vector<float>& weights, std::vector<OutputProjection>& projections,
               std::vector<Rope>& ropes, Options& options) {
  constexpr int width = 75;
  static constexpr float factors[] = {1, 1, 2, 4, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1, 8};
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const auto size = static_cast<std::size_t>(width * geometry.num_q_heads * geometry.head_dim);
  if (weights.empty()) {
    weights.resize(size * static_cast<std::size_t>(geometry.num_layers));
    for (float& x : weights) x = normal(random);
    for (int l = 0; l < geometry.num_layers; ++l) {
      projections.push_back({weights.data() + static_cast<std::size_t>(l) * size, width});
      ropes.push_back(
          {32, 1e4f + 1e4f * static_cast<float>(l), .5f, l % 2 == 0 ? Rope::Pairs::halves : Rope::Pairs::adjacent, factors});
    }
  }
  options.output_projections = projections;
  options.ropes = ropes;
}
// What queries gave to rows, however these come and go.
template <class Codec, class Selector>
double difference_of_given(const Geometry& geometry, const Selector& selector, const AttendOptions& attend = {}) {
  using Pair = Both<Codec, Selector>;
  Pair both(geometry, selector, 7), child(geometry, selector, 8);
  CHECK(both.on_device.compress(Retain::ratio(.5)).code == Errc::bad_budget);  // no rows
  both.append(190);
  CHECK(both.on_device.compress(Retain::ratio(.5)).code == Errc::no_evidence);
  both.observe(90);
  REQUIRE(both.on_device.forget().ok());
  both.host.forget();
  CHECK(both.on_device.compress(Retain::ratio(.5)).code == Errc::no_evidence);
  both.observe(90);
  both.append(90);
  both.observe(9, attend);
  both.append(33);  // nobody looked at these
  double worst = both.compress(Retain::ratio(.7));
  both.append(140);
  both.observe(130, attend);  // more than are looked at together
  REQUIRE(both.host.fork(child.host).ok());
  REQUIRE(both.on_device.fork(child.on_device).ok());
  child.next = both.next;
  child.shown = both.scores;
  const int end = both.next - 50;
  REQUIRE(both.host.truncate(end).ok());
  REQUIRE(both.on_device.truncate(end).ok());
  both.next = end;
  both.append(3);
  worst = std::max(worst, both.compress(Retain::rows(120)));
  child.append(5);
  child.observe(3);
  worst = std::max(worst, child.compress(Retain::rows(150)));
  worst = std::max(worst, both.compress(Retain::rows(110)));  // what rows were given stays with them
  REQUIRE(both.on_device.upload(child.host).ok());
  CHECK(both.on_device.compress(Retain::rows(100)).code == Errc::no_evidence);
  return worst;
}
// selector_of(geometry)
template <class SelectorOf>
double differences_of(const SelectorOf& selector_of) {
  return over_codecs([&]<class Codec>(const Geometry& geometry) {
    std::vector<float> weights;
    std::vector<OutputProjection> projections;
    std::vector<Rope> ropes;
    CacheOptions options;
    DeviceCacheOptions device_options;
    set_model(geometry, weights, projections, ropes, options);
    set_model(geometry, weights, projections, ropes, device_options);
    return difference<Codec>(geometry, selector_of(geometry), device_options, options);
  });
}
template <class Selector>
double differences(const Selector& selector) {
  return differences_of([&](const Geometry&) { return selector; });
}

}  // namespace

TEST_CASE("values weigh scores on a device as on the host") {
  // Sums of 40 to 96 products in another order are right to 2^-24 times a few; logits of a few, and their weights, likewise.
  CHECK(differences(ValueNorm<KeyNorm>{{}, .5f}) <= 1e-6);
  CHECK(differences(ValueNorm<SnapKv>{{}, 1e-3f}) <= 5e-6);
  CHECK(differences(LavaScore{.window = 9}) <= 5e-6);
  CHECK(difference<LowRanks>({1, 1, 2, 64}, LavaScore{.window = 9}) <= 5e-6);
  // Elements of groups are right to 2^-11 in the logits of a device.
  CHECK(difference<Groups>({1, 1, 2, 96}, ValueNorm<SnapKv>{}) <= 1e-3);
}
TEST_CASE("what the output loses without a row, on a device as on the host") {
  CHECK(differences(Caote<SnapKv>{}) <= 5e-6);
  CHECK(differences(Caote<LastQuery>{}) <= 5e-6);
  CHECK(difference<Groups>({1, 1, 2, 96}, Caote<SnapKv>{}) <= 1e-3);
}
TEST_CASE("rows stand out against those that follow on a device as on the host") {
  CHECK(differences(LagKv{.lag = 31, .num_sinks = 3}) == 0);
  CHECK(differences(LagKv{.lag = 64, .cross = true}) <= 1e-6);
  CHECK(difference<LowRanks>({1, 1, 2, 64}, LagKv{.lag = 50, .cross = true}) <= 1e-6);
  CHECK(difference<Groups>({1, 1, 2, 96}, LagKv{}) == 0);
}
TEST_CASE("values go through the output projection on a device as on the host") {
  // The host makes squares of pairs of channels first.
  CHECK(differences(ValueNorm<KeyNorm, Through::output>{{}, .5f}) <= 5e-6);
  CHECK(differences(CriticalKv<SnapKv>{}) <= 5e-6);
  CHECK(differences(CriticalKv<SinkRecent>{.first_stage = .9}) <= 5e-6);
}
TEST_CASE("keys that others do not make up stay on a device as on the host") {
  CHECK(differences(Leverage{}) <= 1e-4);
  CHECK(differences(Leverage{.sketch = 200, .seed = 3}) <= 1e-4);
}
TEST_CASE("learned scores are those of the host on a device") {
  const auto scorer_of = [](const Geometry& geometry, int hidden) {
    TokenScorer<float> scorer(geometry.num_heads(), geometry.head_dim, hidden);
    std::mt19937 random(3);
    for (float& x : scorer.numbers()) x = .2f * std::normal_distribution<float>()(random);
    for (int h = 0; h < geometry.num_heads(); ++h) {
      const auto scale = scorer.of(h).subspan(static_cast<std::size_t>(scorer.layout().scale()));
      for (int f = 0; f < scorer.layout().features(); ++f) scale[static_cast<std::size_t>(f)] = 1;
      // So that errors are not compared with scores near zero.
      scorer.of(h)[static_cast<std::size_t>(scorer.layout().bias() + hidden)] = 100;
    }
    return scorer;
  };
  for (const int hidden : {3, 40}) {
    std::deque<TokenScorer<float>> scorers;
    CHECK(differences_of([&](const Geometry& geometry) {
            return Learned(scorers.emplace_back(scorer_of(geometry, hidden)), geometry.num_kv_heads);
          }) <= 2e-6);
  }
}
TEST_CASE("queries to come are expected on a device as on the host") {
  // Moments of few queries are right to 2^-24 times a few; logits of about ten are, and weights by their exponentials.
  CHECK(differences(ExpectedAttention{}) <= 2e-5);
  CHECK(differences(ExpectedAttention{.future = 40, .num_sinks = 9, .epsilon = .02f, .covariance = false}) <= 2e-5);
  CHECK(differences(ExpectedAttention{.value_norm = false}) <= 2e-5);
  CHECK(differences(ValueNorm<ExpectedAttention>{}) <= 2e-5);
}
TEST_CASE("rows have what queries gave them on a device as on the host") {
  const AttendOptions limited{.window = 61, .soft_cap = 4};
  CHECK(difference_of_given<Fp16>({2, 1, 2, 64}, HeavyHitter{}, limited) <= 5e-6);
  CHECK(difference_of_given<Fp16>({1, 1, 2, 64}, Reconstruction{}) <= 5e-6);
  // Elements of groups are right to 2^-11 in the logits of a device, and the host meets codes with queries of 16 bits.
  CHECK(difference_of_given<Groups>({1, 1, 2, 96}, HeavyHitter{HeavyHitter::Over::all}, limited) <= 1e-3);
  CHECK(difference_of_given<Blocks>({1, 1, 2, 64}, Caote<HeavyHitter>{}) <= 2e-4);
  CHECK(difference_of_given<Blocks>({1, 1, 2, 64}, Reconstruction{}, limited) <= 2e-4);
}

namespace {

// Whatever allocation fails of fork() and compress(), all is as it was.
template <class Selector>
void check_memory(const Selector& selector) {
  const Geometry geometry{1, 1, 2, 64};
  std::vector<float> weights;
  std::vector<OutputProjection> projections;
  std::vector<Rope> ropes;
  CacheOptions options;
  DeviceCacheOptions device_options;
  set_model(geometry, weights, projections, ropes, options);
  set_model(geometry, weights, projections, ropes, device_options);
  Both<Fp16, Selector> both(geometry, selector, 9, device_options, options);
  both.append(190);
  if (both.queries) both.observe(9);
  DeviceKvCache<Spy, Selector, Fp16, SimulatedDevice> child;
  const long long bytes = both.device.allocated_bytes;
  const auto check = [&](auto&& call) {
    int failed = 0;
    for (Status status = error(Errc::device, ""); !status.ok(); ++failed) {
      both.device.fail_at = both.device.allocations + failed + 1;
      status = call();
      if (status.ok()) break;
      CHECK(status.code == Errc::out_of_memory);
      CHECK(both.device.allocated_bytes == bytes);
    }
    both.device.fail_at = 0;
    CHECK(failed >= 3);
  };
  check([&] { return both.on_device.fork(child); });
  CHECK(child.memory().total() == both.on_device.memory().total());
  const long long forked = both.device.allocated_bytes;
  for (int fail = 1; fail <= 3; ++fail) {
    both.device.fail_at = both.device.allocations + fail;
    CHECK(both.on_device.compress(Retain::ratio(.5)).code == Errc::out_of_memory);
    CHECK(both.device.allocated_bytes == forked);
  }
  both.device.fail_at = 0;
  CHECK(both.compress(Retain::ratio(.5)) <= 2e-5);
}

}  // namespace

TEST_CASE("memory that runs out changes nothing, whatever a selector wants to know") {
  check_memory(ExpectedAttention{});
  check_memory(HeavyHitter{});
  check_memory(Leverage{});
  check_memory(CriticalKv<LastQuery>{});
}
TEST_CASE("a device asks for what selectors need of the model") {
  const Geometry geometry{2, 1, 2, 64};
  SimulatedDevice device;
  PagePool<Fp16, SimulatedDevice> pool;
  REQUIRE(pool.init(device, 4).ok());
  const auto init = [&]<class Selector>(const Selector& selector, const DeviceCacheOptions& options) {
    DeviceKvCache<Uniform, Selector, Fp16, SimulatedDevice> cache;
    return cache.init(device, pool, geometry, options, {}, selector).code;
  };
  const Rope rope{64}, odd{7};
  const float weight = 1;
  const OutputProjection output[] = {{&weight, 1}, {&weight, 1}}, none[] = {{}, {}};
  DeviceCacheOptions options;
  CHECK(init(Leverage{}, options) == Errc::no_evidence);
  CHECK(init(ExpectedAttention{}, options) == Errc::no_evidence);
  CHECK(init(CriticalKv<KeyNorm>{}, options) == Errc::no_evidence);
  CHECK(init(ValueNorm<KeyNorm, Through::output>{}, options) == Errc::no_evidence);
  CHECK(init(ValueNorm<KeyNorm>{}, options) == Errc::ok);
  CHECK(init(Leverage{.sketch = 257}, options) == Errc::bad_value);
  options.ropes = {&odd, 1};
  CHECK(init(Leverage{}, options) == Errc::bad_shape);
  options.ropes = {&rope, 1};
  CHECK(init(Leverage{}, options) == Errc::ok);
  CHECK(init(ExpectedAttention{}, options) == Errc::ok);
  options.output_projections = {output, 1};
  CHECK(init(CriticalKv<KeyNorm>{}, options) == Errc::bad_shape);
  options.output_projections = none;
  CHECK(init(CriticalKv<KeyNorm>{}, options) == Errc::bad_shape);
  options.output_projections = output;
  CHECK(init(CriticalKv<KeyNorm>{}, options) == Errc::ok);
  const TokenScorer<float> scorer(2, 64, 3), other(2, 40, 3);
  CHECK(init(Learned(scorer, 1), options) == Errc::ok);
  CHECK(init(Learned(other, 1), options) == Errc::bad_shape);
  CHECK(init(Learned{}, options) == Errc::bad_policy);
}
