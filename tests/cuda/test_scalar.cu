// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The scalar parts give the host's bits: 16-bit conversions, exp_nonpositive and SoftmaxState.
#include <random>

#include "device.cuh"

namespace {

// Bits, not floats, are compared, so NaN differs from every number.
struct Converted {
  std::uint32_t half, bfloat, exponential;
  std::uint16_t to_half, to_bfloat;
};
KVT_HD Converted convert(std::uint32_t i, float x) {
  const auto bits = static_cast<std::uint16_t>(i);
  return {kvt::bits_from_float(kvt::to_float(kvt::Half{bits})), kvt::bits_from_float(kvt::to_float(kvt::BFloat16{bits})),
          kvt::bits_from_float(kvt::exp_nonpositive(x < 0 ? x : -x)), kvt::from_float<kvt::Half>(x).bits,
          kvt::from_float<kvt::BFloat16>(x).bits};
}
__global__ void convert_all(const float* x, Converted* out) {
  const auto i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = convert(i, x[i]);
}

// A softmax over parts of some logits each, every third part empty: all factors on the way, and its state.
constexpr int num_parts = 8, part_logits = 5;
struct Trace {
  float step[num_parts * part_logits], own[num_parts], other[num_parts], max, sum;
};
KVT_HD Trace merge(const float* x) {
  Trace trace{};
  kvt::SoftmaxState joined;
  for (int p = 0; p < num_parts; ++p) {
    kvt::SoftmaxState part;
    for (int i = p * part_logits; i < (p + 1) * part_logits && p % 3 != 2; ++i) {
      trace.step[i] = part.raise(x[i]);
      part.sum += kvt::exp_nonpositive(x[i] - part.max);
    }
    const auto factors = joined.merge(part);
    trace.own[p] = factors.own;
    trace.other[p] = factors.other;
  }
  trace.max = joined.max;
  trace.sum = joined.sum;
  return trace;
}
__global__ void merge_all(const float* x, Trace* out) {
  const auto i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = merge(x + i * num_parts * part_logits);
}

constexpr int threads = 256, values = 65536, softmaxes = 1024;

int check() {
  if (!device::present()) return 0;
  std::mt19937 random(5);
  std::vector<float> x(values);
  // Every exponent, both signs; then logits of a size that models have.
  for (float& v : x) v = kvt::float_from_bits(static_cast<std::uint32_t>(random()));
  const device::Array<float> device_x(x);
  const device::Array<Converted> converted(values);
  convert_all<<<values / threads, threads>>>(device_x.data(), converted.data());
  device::finish_kernel();
  const auto real = converted.values();
  int failures = 0;
  for (std::uint32_t i = 0; i < values; ++i) {
    const Converted host = convert(i, x[i]);
    const bool number = x[i] == x[i];
    const bool same = real[i].half == host.half && real[i].bfloat == host.bfloat && real[i].to_half == host.to_half &&
                      real[i].to_bfloat == host.to_bfloat && (!number || real[i].exponential == host.exponential);
    if (!same && failures++ < 5) std::printf("conversion %u of %.9g differs\n", i, static_cast<double>(x[i]));
  }

  std::normal_distribution<float> normal(0.f, 20.f);
  std::vector<float> logits(softmaxes * num_parts * part_logits);
  for (float& v : logits) v = normal(random);
  const device::Array<float> device_logits(logits);
  const device::Array<Trace> traces(softmaxes);
  merge_all<<<softmaxes / threads, threads>>>(device_logits.data(), traces.data());
  device::finish_kernel();
  const auto real_traces = traces.values();
  for (int s = 0; s < softmaxes; ++s) {
    const Trace host = merge(logits.data() + s * num_parts * part_logits);
    const Trace& real_trace = real_traces[static_cast<std::size_t>(s)];
    bool same = real_trace.max == host.max && real_trace.sum == host.sum;
    for (int i = 0; i < num_parts * part_logits; ++i) same = same && real_trace.step[i] == host.step[i];
    for (int p = 0; p < num_parts; ++p) same = same && real_trace.own[p] == host.own[p] && real_trace.other[p] == host.other[p];
    if (!same && failures++ < 5) std::printf("softmax %d: sum %.9g, host %.9g\n", s, real_trace.sum, host.sum);
  }
  return failures;
}

}  // namespace

int main() { return device::result(check()); }
