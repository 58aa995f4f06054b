// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Decode steps of the device cache: microseconds a layer and bytes read a second, beside the speed of a plain copy; and chunks
// of the newest 512 queries of each sequence: microseconds a layer and the products and sums of attention a second. JSON on
// standard output. Shapes are those of a layer of Llama-3.1-8B (32 query heads, 8 KV heads of 128); as many layers are attended
// in turn as it takes for their rows to be out of the caches of the device. Figures are medians, least and most of 21 passes.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "kvtailor/kvtailor.cuh"

namespace {

using namespace kvt;

constexpr int dim = 128, kv_heads = 8, q_heads = 32, passes = 21, chunk = 512;
constexpr double cold_bytes = 400e6;  // several times the largest second-level cache

void check(cudaError_t code) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(code));
  std::exit(1);
}
void check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s (%d)\n", status.message().c_str(), status.native);
  std::exit(1);
}

struct Times {
  double median, least, most;  // microseconds
};
template <class Work>
Times time(cudaStream_t stream, Work work) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<double> all;
  for (int i = -2; i < passes; ++i) {
    check(cudaEventRecord(begin, stream));
    work();
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) all.push_back(1e3 * static_cast<double>(ms));
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  std::sort(all.begin(), all.end());
  return {all[all.size() / 2], all.front(), all.back()};
}

double copy_speed(cudaStream_t stream) {  // bytes read and written a second
  constexpr std::size_t bytes = 1 << 30;
  void *from, *to;
  check(cudaMalloc(&from, bytes));
  check(cudaMalloc(&to, bytes));
  check(cudaMemset(from, 1, bytes));
  const Times t = time(stream, [&] { check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream)); });
  check(cudaFree(from));
  check(cudaFree(to));
  return 2e6 * bytes / t.median;
}

bool first_line = true;

template <class Codec>
void measure(const char* name, cudaStream_t stream, int rows, int batch, double copy) {
  using Layout = LayoutOf<typename Codec::key_type, typename Codec::value_type>;
  const double stored = static_cast<double>(rows) * batch * kv_heads * Layout::bytes / slice_rows;  // of a layer
  const int layers = static_cast<int>(std::clamp(cold_bytes / stored + 1, 2.0, 32.0));
  const Geometry geometry{layers, kv_heads, q_heads, dim};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<Half> host(static_cast<std::size_t>(chunk * kv_heads * dim));
  for (Half& x : host) x = from_float<Half>(normal(random));
  Half *values, *queries, *out;
  int* positions;
  const auto queries_size = static_cast<std::size_t>(batch) * chunk * q_heads * dim;
  check(cudaMalloc(&values, host.size() * sizeof(Half)));
  check(cudaMalloc(&queries, queries_size * sizeof(Half)));
  check(cudaMalloc(&out, queries_size * sizeof(Half)));
  check(cudaMalloc(&positions, static_cast<std::size_t>(rows + 4096) * sizeof(int)));
  check(cudaMemcpy(values, host.data(), host.size() * sizeof(Half), cudaMemcpyHostToDevice));
  for (std::size_t i = 0; i < queries_size; i += host.size()) {
    check(cudaMemcpy(queries + i, host.data(), std::min(host.size(), queries_size - i) * sizeof(Half), cudaMemcpyHostToDevice));
  }
  std::vector<int> in_order;
  for (int i = 0; i < rows + 4096; ++i) in_order.push_back(i);
  check(cudaMemcpy(positions, in_order.data(), in_order.size() * sizeof(int), cudaMemcpyHostToDevice));

  cuda::Device device(stream);
  cuda::PagePool<Codec> pool;
  check(pool.init(device, (rows / SlicePages::page_rows + 2) * layers * kv_heads * batch));
  using Cache = typename cuda::DecodePlan<Codec, Half>::Cache;
  std::vector<std::unique_ptr<Cache>> caches;
  std::vector<const Cache*> view;
  for (int s = 0; s < batch; ++s) {
    caches.push_back(std::make_unique<Cache>());
    check(caches.back()->init(device, pool, geometry, {4, 32, chunk, rows + 4096}));
    check(caches.back()->reserve(rows + passes + 2));
    for (int layer = 0; layer < layers; ++layer) {
      for (int at = 0; at < rows; at += chunk) {
        check(caches.back()->append(layer, values, values, positions + at, std::min(chunk, rows - at)));
      }
    }
    view.push_back(caches.back().get());
  }
  cuda::DecodePlan<Codec, Half> plan;
  check(plan.init(device, view, chunk));
  check(cudaStreamSynchronize(stream));
  const Times attend = time(stream, [&] {
    for (int layer = 0; layer < layers; ++layer) check(plan.attend(layer, queries, nullptr, {}, out));
  });
  std::vector<int> newest;
  for (int s = 0; s < batch; ++s) {
    for (int i = 0; i < chunk; ++i) newest.push_back(rows - chunk + i);
  }
  int* newest_on_device;
  check(cudaMalloc(&newest_on_device, newest.size() * sizeof(int)));
  check(cudaMemcpy(newest_on_device, newest.data(), newest.size() * sizeof(int), cudaMemcpyHostToDevice));
  const Times attend_chunk = time(stream, [&] {
    for (int layer = 0; layer < layers; ++layer) check(plan.attend(layer, queries, newest_on_device, chunk, {}, out));
  });
  const double operations = 4.0 * dim * q_heads * batch * (static_cast<double>(chunk) * rows - .5 * chunk * (chunk - 1));
  int next = rows;
  const Times append = time(stream, [&] {
    for (int layer = 0; layer < layers; ++layer) check(caches[0]->append(layer, values, values, positions + next, 1));
    ++next;
  });
  const auto each = [&](const Times& t) { return Times{t.median / layers, t.least / layers, t.most / layers}; };
  const Times a = each(attend), b = each(append), c = each(attend_chunk);
  std::printf(
      "%s\n  {\"codec\": \"%s\", \"rows\": %d, \"batch\": %d, \"layers\": %d, \"stored_bytes_a_layer\": %.0f,\n"
      "   \"attend_us\": [%.2f, %.2f, %.2f], \"bytes_a_second\": %.4g, \"share_of_copy\": %.3f, \"append_us\": [%.2f, %.2f, "
      "%.2f],\n   \"chunk_us\": [%.2f, %.2f, %.2f], \"chunk_operations_a_second\": %.4g}",
      first_line ? "" : ",", name, rows, batch, layers, stored, a.median, a.least, a.most, 1e6 * stored / a.median,
      1e6 * stored / a.median / copy, b.median, b.least, b.most, c.median, c.least, c.most, 1e6 * operations / c.median);
  first_line = false;
  check(cudaFree(values));
  check(cudaFree(queries));
  check(cudaFree(out));
  check(cudaFree(positions));
  check(cudaFree(newest_on_device));
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0));
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  const double copy = copy_speed(stream);
  std::printf("{\"gpu\": \"%s\", \"multiprocessors\": %d, \"copy_bytes_a_second\": %.4g, \"results\": [", properties.name,
              properties.multiProcessorCount, copy);
  struct Shape {
    int rows, batch;
  };
  for (const Shape shape : {Shape{4096, 1}, Shape{32768, 1}, Shape{32768, 8}}) {
    measure<KvCodec<Dense<Half, dim>>>("fp16", stream, shape.rows, shape.batch, copy);
    measure<KvCodec<TurboQuant<4, dim>>>("turbo4", stream, shape.rows, shape.batch, copy);
    measure<KvCodec<TurboQuant<3, dim>, TurboQuant<2, dim>>>("turbo3/turbo2", stream, shape.rows, shape.batch, copy);
    measure<KvCodec<TurboQuant<2, dim>>>("turbo2", stream, shape.rows, shape.batch, copy);
  }
  std::printf("\n]}\n");
}
