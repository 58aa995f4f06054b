// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// One codec on one block of threads: warps share the encoding of rows, then each attends with queries of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>

#include "device.cuh"

namespace device {

constexpr int num_warps = 4, num_rows = 37, warp_queries = 3, num_queries = num_warps * warp_queries;

struct Task {
  const float *rows, *queries, *weights;  // [num_rows, dim], [num_queries, dim], [num_queries, num_rows]
  std::byte* block;
  float *logits, *out;  // [num_queries, num_rows], [num_queries, dim]
};

template <class Codec>
concept EncodesRows = requires(const Codec codec, std::byte* block, float* row) {
  codec.encode_row(kvt::SimulatedWarp{}, row, block, 1, 0, row);
};

template <class Codec>
constexpr int scratch_floats = 0;
template <EncodesRows Codec>
constexpr int scratch_floats<Codec> = Codec::scratch_floats;

// Memory that the lanes of a warp share, to encode, then to attend.
template <class Codec>
struct Shared {
  static constexpr int size = warp_queries * kvt::max_basis_dim<Codec>;
  float memory[std::max(2 * size, scratch_floats<Codec>)];
};

template <class Codec, class Lanes>
KVT_HD void encode(const Lanes& lanes, const Task& task, int warp, Shared<Codec>& shared) {
  for (int row = warp; row < num_rows; row += num_warps) {
    Codec{}.encode_row(lanes, task.rows + row * Codec::head_dim, task.block, num_rows, row, shared.memory);
  }
}

template <class Codec, class Lanes>
KVT_HD void attend(const Lanes& lanes, const Task& task, int warp, Shared<Codec>& shared) {
  constexpr int dim = Codec::head_dim;
  const Codec codec;
  const int first = warp * warp_queries, basis = kvt::basis_dim(codec);
  float *const prepared = shared.memory, *const sums = prepared + Shared<Codec>::size;
  for (int j = 0; j < warp_queries; ++j) {
    codec.prepare(lanes, task.queries + (first + j) * dim, 0.5f, prepared + j * basis);
  }
  lanes.each([&](int lane) {
    for (int d = lane; d < warp_queries * basis; d += Lanes::size) sums[d] = 0;
    for (int d = lane; d < warp_queries * dim; d += Lanes::size) task.out[first * dim + d] = 0;
  });
  codec.logits(lanes, task.block, num_rows, prepared, warp_queries, task.logits + first * num_rows, num_rows);
  codec.accumulate(lanes, task.block, num_rows, task.weights + first * num_rows, warp_queries, num_rows, sums);
  for (int j = 0; j < warp_queries; ++j) codec.finish(lanes, sums + j * basis, task.out + (first + j) * dim);
}

// One block on a multiprocessor is enough: ptxas otherwise spills to make room for more.
template <class Codec>
__global__ void __launch_bounds__(32 * num_warps, 1) run(Task task) {
  __shared__ Shared<Codec> shared[num_warps];
  const int warp = static_cast<int>(threadIdx.x / 32);
  if constexpr (EncodesRows<Codec>) {
    encode<Codec>(kvt::Warp{}, task, warp, shared[warp]);
    __syncthreads();
  }
  attend<Codec>(kvt::Warp{}, task, warp, shared[warp]);
}

struct Results {
  std::vector<std::byte> block;
  std::vector<float> logits, out;
};

// The same work on the host, on a block that is encoded already if `encoded`.
template <class Codec, class Lanes>
Results run_on_host(const Lanes& lanes, Task task, Results results, bool encoded) {
  static Shared<Codec> shared;
  task.block = results.block.data();
  task.logits = results.logits.data();
  task.out = results.out.data();
  if constexpr (EncodesRows<Codec>) {
    for (int warp = 0; warp < num_warps && !encoded; ++warp) encode<Codec>(lanes, task, warp, shared);
  }
  for (int warp = 0; warp < num_warps; ++warp) attend<Codec>(lanes, task, warp, shared);
  return results;
}

template <class Codec>
int check_codec(const char* name) {
  constexpr int dim = Codec::head_dim;
  std::mt19937 random(dim);
  std::normal_distribution<float> normal;
  const auto floats = [&](int n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& v : x) v = normal(random);
    return x;
  };
  auto rows = floats(num_rows * dim);
  const auto queries = floats(num_queries * dim), weights = floats(num_queries * num_rows);
  for (int d = 0; d < dim; ++d) rows[d] = 0;           // a row of zeros
  for (int d = 0; d < dim; ++d) rows[dim + d] *= 1e3;  // and a large one
  const Results empty{std::vector<std::byte>(static_cast<std::size_t>(Codec{}.max_block_bytes(num_rows))),
                      std::vector<float>(num_queries * num_rows, NAN), std::vector<float>(num_queries * dim, NAN)};
  Results start = empty;
  if constexpr (!EncodesRows<Codec>) Codec{}.encode(rows.data(), num_rows, start.block.data());
  Task task{rows.data(), queries.data(), weights.data(), nullptr, nullptr, nullptr};
  const Results simulated = run_on_host<Codec>(kvt::SimulatedWarp{}, task, start, false);
  Results serial = start;
  serial.block = simulated.block;
  serial = run_on_host<Codec>(kvt::Serial{}, task, serial, true);

  int failures = 0;
  const auto expect = [&](bool ok, const char* what, std::size_t at, double left, double right) {
    if (!ok && failures++ < 5) std::printf("%s, head_dim %d: %s %zu: %.9g and %.9g\n", name, dim, what, at, left, right);
  };
  // Sums of dim products (or num_rows) and a rotation of less than 64 steps, in another order.
  const auto size = [&](const float* x, int n, int stride = 1) {
    double square = 0;
    for (int i = 0; i < n; ++i) square += static_cast<double>(x[i * stride]) * static_cast<double>(x[i * stride]);
    return std::sqrt(square);
  };
  const double unit = std::ldexp(1.0, -23);
  std::vector<float> decoded(num_rows * dim);
  for (int r = 0; r < num_rows; ++r) Codec{}.decode(simulated.block.data(), num_rows, r, decoded.data() + r * dim);
  const double all = size(decoded.data(), num_rows * dim);
  for (int j = 0; j < num_queries; ++j) {
    const double query = 0.5 * size(queries.data() + j * dim, dim);
    for (int r = 0; r < num_rows; ++r) {
      const auto at = static_cast<std::size_t>(j * num_rows + r);
      const double bound = (dim + 64) * unit * query * size(decoded.data() + r * dim, dim);
      const double difference = std::fabs(static_cast<double>(simulated.logits[at]) - static_cast<double>(serial.logits[at]));
      expect(difference <= bound, "logit of simulated warp and one lane", at, simulated.logits[at], serial.logits[at]);
    }
    const double bound = (num_rows + 64) * unit * size(weights.data() + j * num_rows, num_rows) * all;
    for (int d = 0; d < dim; ++d) {
      const auto at = static_cast<std::size_t>(j * dim + d);
      const double difference = std::fabs(static_cast<double>(simulated.out[at]) - static_cast<double>(serial.out[at]));
      expect(difference <= bound, "output of simulated warp and one lane", at, simulated.out[at], serial.out[at]);
    }
  }
  if (!present()) return failures;

  const Array<float> device_rows(rows), device_queries(queries), device_weights(weights);
  const Array<std::byte> block(start.block);
  const Array<float> logits(start.logits.size()), out(start.out.size());
  run<Codec><<<1, 32 * num_warps>>>(
      {device_rows.data(), device_queries.data(), device_weights.data(), block.data(), logits.data(), out.data()});
  finish_kernel();
  const Results real{block.values(), logits.values(), out.values()};
  for (std::size_t i = 0; i < real.block.size(); ++i) {
    expect(real.block[i] == simulated.block[i], "byte", i, static_cast<double>(real.block[i]),
           static_cast<double>(simulated.block[i]));
  }
  // NaN equals nothing.
  for (std::size_t i = 0; i < real.logits.size(); ++i) {
    expect(real.logits[i] == simulated.logits[i], "logit", i, real.logits[i], simulated.logits[i]);
  }
  for (std::size_t i = 0; i < real.out.size(); ++i) {
    expect(real.out[i] == simulated.out[i], "output", i, real.out[i], simulated.out[i]);
  }
  return failures;
}

// Every supported head dim.
template <template <int> class Codec>
int check_dims(const char* name) {
  return check_codec<Codec<40>>(name) + check_codec<Codec<64>>(name) + check_codec<Codec<80>>(name) +
         check_codec<Codec<96>>(name) + check_codec<Codec<112>>(name) + check_codec<Codec<128>>(name) +
         check_codec<Codec<192>>(name) + check_codec<Codec<256>>(name);
}

}  // namespace device
