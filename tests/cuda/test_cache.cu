// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A batch of sequences in device caches, one of them compressed, copied, and swapped out and in, a chunk of queries and then
// step by step, as captured graphs, and one compressed again, beside the same on a simulated device.
#include <cmath>
#include <memory>
#include <random>

#include "device.cuh"
#include "kvtailor/cuda/kv_cache.cuh"

namespace {

using namespace kvt;

constexpr int sequences = 3, chunk = 9, replays = 140;  // replays: so many that rows are encoded

// Memory of the host for a simulated device, and of the device for a real one.
template <class T>
T* place(SimulatedDevice&, const std::vector<T>& x, std::vector<std::shared_ptr<void>>& owners) {
  auto copy = std::make_shared<std::vector<T>>(x);
  owners.push_back(copy);
  return copy->data();
}
template <class T>
T* place(cuda::Device&, const std::vector<T>& x, std::vector<std::shared_ptr<void>>& owners) {
  auto copy = std::make_shared<device::Array<T>>(x);
  owners.push_back(copy);
  return copy->data();
}
bool captured(SimulatedDevice&) { return false; }
bool captured(cuda::Device& device) {
  cudaStreamCaptureStatus status;
  device::check(cudaStreamIsCapturing(device.stream(), &status), "state of the stream");
  return status != cudaStreamCaptureStatusNone;
}
// Runs `step` so many times; on a real device as a graph, captured once.
template <class Step>
bool repeat(SimulatedDevice&, int times, Step step) {
  for (int i = 0; i < times; ++i) {
    if (!step().ok()) return false;
  }
  return true;
}
template <class Step>
bool repeat(cuda::Device& device, int times, Step step) {
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  device::check(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal), "capture");
  const Status status = step();
  device::check(cudaStreamEndCapture(device.stream(), &graph), "end of the capture");
  if (!status.ok()) return false;
  device::check(cudaGraphInstantiate(&ready, graph, 0), "graph");
  for (int i = 0; i < times; ++i) device::check(cudaGraphLaunch(ready, device.stream()), "launch of the graph");
  device::check(cudaStreamSynchronize(device.stream()), "graph");
  cudaGraphExecDestroy(ready);
  cudaGraphDestroy(graph);
  return true;
}

template <class Codec, class Device, class Selector>
std::vector<float> run(Device& device, const Selector& selector) {
  constexpr int dim = Codec::head_dim;
  const Geometry geometry{1, 2, 6, dim};
  std::mt19937 random(dim);
  std::normal_distribution<float> normal;
  const auto halves = [&](int n) {
    std::vector<Half> x;
    for (int i = 0; i < n; ++i) x.push_back(from_float<Half>(normal(random)));
    return x;
  };
  std::vector<std::shared_ptr<void>> owners;
  const auto expect = [](const Status& status) {
    if (status.ok()) return;
    std::printf("%s (%d)\n", status.message().c_str(), status.native);
    std::exit(1);
  };
  PagePool<Codec, Device> pool;
  expect(pool.init(device, 40));
  using Cache = DeviceKvCache<Uniform, Selector, Codec, Device>;
  std::vector<std::unique_ptr<Cache>> caches;
  std::vector<const DeviceCache<Codec, Device>*> batch;
  for (int s = 0; s < 2; ++s) {
    caches.push_back(std::make_unique<Cache>());
    expect(caches.back()->init(device, pool, geometry, {4, 32, 400, 2048}, {}, selector));
    const int n = s == 0 ? 390 : 7;
    std::vector<int> positions;
    for (int i = 0; i < n; ++i) positions.push_back(i);
    constexpr int seen = 5;  // queries
    expect(caches.back()->reserve(n));
    expect(caches.back()->append(0, place(device, halves(n * 2 * dim), owners), place(device, halves(n * 2 * dim), owners),
                                 place(device, positions, owners), n));
    expect(caches.back()->observe(0, place(device, halves(seen * 6 * dim), owners),
                                  place(device, std::vector<int>(positions.end() - seen, positions.end()), owners), seen));
    if (s == 0) {
      const long long bytes = caches.back()->memory().total() - PagePool<Codec, Device>::page_bytes;
      const int free = pool.free_pages();
      expect(caches.back()->compress(Retain::bytes(bytes)));
      if (caches.back()->memory().total() > bytes || pool.free_pages() <= free) {
        expect(error(Errc::bad_budget, "a compression to {} bytes left {}", static_cast<double>(bytes),
                     static_cast<double>(caches.back()->memory().total())));
      }
    }
  }
  caches.push_back(std::make_unique<Cache>());
  expect(caches[0]->fork(*caches[2]));
  for (auto& cache : caches) {
    expect(cache->reserve(chunk + replays));
    batch.push_back(cache.get());
  }
  DecodePlan<Codec, Device, Half> plan;
  expect(plan.init(device, batch, chunk));
  std::vector<Half> result;
  const auto keep = [&](const Half* out, int n) {
    const std::size_t before = result.size(), more = static_cast<std::size_t>(sequences * n * 6 * dim);
    result.resize(before + more);
    expect(device.copy_from(result.data() + before, out, more * sizeof(Half)));
  };
  {
    const Half* const keys = place(device, halves(chunk * 2 * dim), owners);
    const Half* const values = place(device, halves(chunk * 2 * dim), owners);
    const Half* const queries = place(device, halves(sequences * chunk * 6 * dim), owners);
    Half* const out = place(device, std::vector<Half>(static_cast<std::size_t>(sequences * chunk * 6 * dim)), owners);
    std::vector<int> positions;
    for (int i = 0; i < sequences * chunk; ++i) positions.push_back(400 + i % chunk);
    const int* const at = place(device, positions, owners);
    const bool done = repeat(device, 1, [&] {
      for (auto& cache : caches) {
        const Status status = cache->append(0, keys, values, at, chunk);
        if (!status.ok()) return status;
      }
      return plan.attend(0, queries, at, chunk, {.window = 300, .soft_cap = 20}, out);
    });
    if (!done) return {};
    keep(out, chunk);
  }
  const Half* const row = place(device, halves(2 * 2 * dim), owners);  // a key, then a value, again and again
  const int* const position = place(device, std::vector<int>{1000}, owners);
  const Half* const queries = place(device, halves(sequences * 6 * dim), owners);
  Half* const out = place(device, std::vector<Half>(static_cast<std::size_t>(sequences * 6 * dim)), owners);
  const auto outputs = [&] {
    std::vector<Half> now(static_cast<std::size_t>(sequences * 6 * dim));
    expect(device.copy_from(now.data(), out, now.size() * sizeof(Half)));
    return now;
  };
  expect(plan.attend(0, queries, nullptr, {}, out));
  const std::vector<Half> before = outputs();
  KvCache<Uniform, SinkRecent, Codec> host;
  expect(host.init(geometry));
  expect(caches[2]->download(host));
  expect(caches[2]->truncate(0));
  expect(caches[2]->refresh());
  expect(caches[1]->reserve(600));  // in its pages
  expect(caches[2]->upload(host));
  expect(caches[2]->reserve(replays));
  expect(plan.attend(0, queries, nullptr, {}, out));
  const std::vector<Half> after = outputs();
  if (std::memcmp(before.data(), after.data(), before.size() * sizeof(Half)) != 0) {
    expect(error(Errc::bad_value, "a sequence that was swapped out and in attends otherwise"));
  }
  const bool done = repeat(device, replays, [&] {
    for (auto& cache : caches) {
      // What may not be captured says so, and changes nothing.
      if (captured(device) && cache->compress(Retain::ratio(.5)).native != cudaErrorStreamCaptureUnsupported) {
        return error(Errc::device, "a compression was captured");
      }
      KVT_TRY(cache->append(0, row, row + 2 * dim, position, 1));
      KVT_TRY(cache->observe(0, queries, position, 1));
    }
    return plan.attend(0, queries, nullptr, {}, out);
  });
  if (!done) return {};
  keep(out, 1);
  expect(caches[0]->truncate(2000));
  expect(caches[0]->compress(Retain::ratio(.6)));
  expect(plan.attend(0, queries, nullptr, {}, out));
  keep(out, 1);
  std::vector<float> floats;
  for (const Half x : result) floats.push_back(to_float(x));
  return floats;
}

// Memory as an engine may have it.
class EngineMemory : public std::pmr::memory_resource {
 public:
  std::size_t bytes = 0;

 private:
  void* do_allocate(std::size_t size, std::size_t) override {
    void* memory = nullptr;
    if (cudaMalloc(&memory, size) != cudaSuccess) throw std::bad_alloc();
    bytes += size;
    return memory;
  }
  void do_deallocate(void* memory, std::size_t size, std::size_t) override {
    cudaFree(memory);
    bytes -= size;
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

template <class Codec, class Selector>
int check(const char* name, const Selector& selector) {
  SimulatedDevice simulated;
  const std::vector<float> expected = run<Codec>(simulated, selector);
  if (expected.empty() || !device::present()) return expected.empty();
  cudaStream_t stream;
  device::check(cudaStreamCreate(&stream), "stream");
  EngineMemory memory;
  cuda::Device real(stream, &memory);
  const std::vector<float> got = run<Codec>(real, selector);
  device::check(cudaStreamDestroy(stream), "stream");
  int failures = (got.size() != expected.size()) + (memory.bytes != 0);
  for (std::size_t i = 0; i < got.size() && failures < 5; ++i) {
    // Sums of tensor cores round otherwise than simulated ones, and outputs are fp16.
    if (std::fabs(got[i] - expected[i]) <= 2e-3f * (1 + std::fabs(expected[i]))) continue;
    ++failures;
    std::printf("%s, output %zu: %g on the device, %g simulated\n", name, i, got[i], expected[i]);
  }
  return failures;
}

}  // namespace

int main() {
  using Turbo = KvCodec<TurboQuant<3, 128>, TurboQuant<2, 128>>;
  return device::result(
      check<KvCodec<TurboQuant<4, 64>>>("turbo4, 64, sink_recent", SinkRecent{}) +
      check<KvCodec<TurboQuant<4, 64>>>("turbo4, 64, snap_kv", SnapKv{}) +
      check<Turbo>("turbo3/turbo2, 128, snap_kv", SnapKv{.window = 40}) +
      check<Turbo>("turbo3/turbo2, 128, key_diff", KeyDiff{}) +
      check<KvCodec<Dense<Half, 64>>>("fp16, 64, snap_kv", SnapKv{.window = 3}) +
      check<KvCodec<Q8_0<128>, Q4_0<128>>>("q8_0/q4_0, 128, snap_kv", SnapKv{.window = 40}) +
      check<KvCodec<Dense<float, 40>>>("fp32, 40, key_diff", KeyDiff{}) +
      check<KvCodec<KiviKeys<2, 64>, Rotated<Shifted<Trellis<1, 64>>>>>("kivi2/mean_trellis1, 64, snap_kv", SnapKv{}) +
      check<KvCodec<TurboQuantUnbiased<3, 64>, Rotated<Q5_0<64>>>>("turbo3_unbiased, 64, snap_kv", SnapKv{}));
}
