// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A prompt and then decoding with the cache on a device: one sequence, 3-bit keys and 2-bit values, compressed after the prompt
// to the half of its rows that the last queries look at, checked against the host's cache.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kvtailor/kvtailor.cuh"

namespace {

using Codec = kvt::KvCodec<kvt::TurboQuant<3, 128>, kvt::TurboQuant<2, 128>>;

constexpr kvt::Geometry geometry{.num_layers = 1, .num_kv_heads = 2, .num_q_heads = 8, .head_dim = 128};
constexpr int prompt = 1000, steps = 8, window = 64;

kvt::Status run() {
  cudaStream_t stream = nullptr;  // the engine's
  kvt::cuda::Device device(stream);
  kvt::cuda::PagePool<Codec> pool;  // shared by all sequences: 64 pages of 128 rows of a head
  kvt::cuda::KvCache<kvt::Adaptive, kvt::SnapKv, Codec> cache;
  using Plan = kvt::cuda::DecodePlan<Codec, float>;
  Plan plan;
  KVT_TRY(pool.init(device, 64));
  KVT_TRY(cache.init(device, pool, geometry, {.max_append = prompt}));
  const Plan::Cache* const batch[] = {&cache};
  KVT_TRY(plan.init(device, batch, prompt));
  kvt::KvCache<kvt::Adaptive, kvt::SnapKv, Codec> host;
  KVT_TRY(host.init(geometry));

  constexpr int row = geometry.num_kv_heads * geometry.head_dim, query = geometry.num_q_heads * geometry.head_dim;
  kvt::DeviceArray<float, kvt::cuda::Device> keys, values, queries, out;
  kvt::DeviceArray<int, kvt::cuda::Device> positions;
  KVT_TRY(keys.allocate(device, prompt * row));
  KVT_TRY(values.allocate(device, prompt * row));
  KVT_TRY(queries.allocate(device, prompt * query));
  KVT_TRY(out.allocate(device, prompt * query));
  KVT_TRY(positions.allocate(device, prompt));

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto draw = [&](int n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& v : x) v = normal(random);
    return x;
  };
  KVT_TRY(cache.reserve(prompt));
  int next = 0;
  for (int step = 0; step <= steps; ++step) {
    const int n = step == 0 ? prompt : 1;
    const std::vector<float> k = draw(n * row), v = draw(n * row), q = draw(n * query);
    std::vector<int> where;
    for (int i = 0; i < n; ++i) where.push_back(next++);
    KVT_TRY(device.copy_to(keys.data(), k.data(), k.size() * sizeof(float)));
    KVT_TRY(device.copy_to(values.data(), v.data(), v.size() * sizeof(float)));
    KVT_TRY(device.copy_to(queries.data(), q.data(), q.size() * sizeof(float)));
    KVT_TRY(device.copy_to(positions.data(), where.data(), where.size() * sizeof(int)));
    KVT_TRY(cache.append(0, keys.data(), values.data(), positions.data(), n));
    KVT_TRY(host.append(0, k.data(), v.data(), where));

    KVT_TRY(plan.attend(0, queries.data(), positions.data(), n, {}, out.data()));
    std::vector<float> got(q.size()), expected(q.size());
    KVT_TRY(device.copy_from(got.data(), out.data(), got.size() * sizeof(float)));
    KVT_TRY(host.attend(0, q.data(), where, {}, expected.data()));
    float worst = 0;
    for (std::size_t i = 0; i < q.size(); ++i) {
      const float difference = std::fabs(got[i] - expected[i]);
      if (!(difference <= worst)) worst = difference;
    }
    std::printf("up to position %d: differs from the host by at most %.1e\n", where.back(), static_cast<double>(worst));
    if (!(worst <= 3e-3f)) return kvt::error(kvt::Errc::bad_value, "device and host differ by {}", static_cast<double>(worst));
    if (step == 0) {
      KVT_TRY(cache.observe(0, queries.data() + (prompt - window) * query, positions.data() + prompt - window, window));
      KVT_TRY(host.observe(0, q.data() + (prompt - window) * query, std::span(where).last(window)));
      KVT_TRY(cache.compress(kvt::Retain::ratio(0.5)));
      KVT_TRY(host.compress(kvt::Retain::ratio(0.5)));
      KVT_TRY(cache.reserve(steps));  // pages for all that follows: append() and attend() allocate nothing
    }
  }
  const kvt::Memory memory = cache.memory();
  std::printf("%d rows in %lld bytes of pages and dense rows\n", cache.most_rows(0, 0), memory.payload_bytes);
  return kvt::success();
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("skipped: no CUDA device");
    return 77;
  }
  const kvt::Status status = run();
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s (%d)\n", status.message().c_str(), status.native);
  return 1;
}
