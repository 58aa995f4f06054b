// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Decode steps and chunks of queries, with tensor cores and without, against double precision; without a device, the same
// blocks of warps simulated. And, on a device alone, what kernels written by hand find.
#include <string>

#include "device.cuh"
#include "kvtailor/codec/group_int.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"
#include "overhead/decode.cu"
#include "reference/split_decode.hpp"

namespace {

using namespace kvt;

// One side of a problem, on the device.
template <class Rows>
struct DeviceSide {
  std::vector<std::unique_ptr<device::Array<std::byte>>> pools;
  std::vector<std::unique_ptr<device::Array<int>>> tables;
  device::Array<SlicePages> pages;
  device::Array<int> first_slice;
  device::Array<SeenSlices> seen;
  device::Array<float> max, sum, rows;

  template <class Side>
  DeviceSide(const std::vector<Rows>& all, const Side& side)
      : pages(on_device(all)), first_slice(side.first_slice), seen(side.seen), max(side.max), sum(side.sum), rows(side.rows) {}

  std::vector<SlicePages> on_device(const std::vector<Rows>& all) {
    std::vector<SlicePages> out;
    for (const Rows& one : all) {
      SlicePages p = one.pages;
      tables.push_back(std::make_unique<device::Array<int>>(std::vector<int>{*one.rows}));
      p.rows = tables.back()->data();
      if (*one.rows > 0) {
        pools.push_back(std::make_unique<device::Array<std::byte>>(one.pool));
        tables.push_back(std::make_unique<device::Array<int>>(one.page));
        p.pool = pools.back()->data();
        p.page = tables.back()->data();
      }
      out.push_back(p);
    }
    return out;
  }
  template <class T>
  void point(DecodeStep<T>& step) const {
    step.entry = pages.data();
    step.split.first_slice = first_slice.data();
    step.seen = seen.data();
    step.partials = {max.data(), sum.data(), rows.data()};
  }
};

template <class Codec, bool limited, int width = 8>
int check(const char* name, const reference::DecodeCase& c) {
  using Problem = reference::DecodeProblem<Codec>;
  using T = typename Problem::T;
  const Problem problem(c);
  int failures = 0;
  const auto expect = [&](const std::vector<T>& out, const char* where) {
    const double error = problem.error(out);
    if (error <= 1) return;
    ++failures;
    std::printf("%s, head_dim %d, %s: %.2f times the bound\n", name, Codec::head_dim, where, error);
  };
  if (!device::present()) {
    expect(problem.template simulate<limited, width>(), "simulated");
    return failures;
  }
  typename Problem::Side body_side = problem.body_side(width), near_side = problem.near_side(width);
  DecodeStep<T> body = problem.step(body_side), near = problem.step(near_side);
  const DeviceSide<typename Problem::Body> on_body(problem.body, body_side);
  const DeviceSide<typename Problem::Near> on_near(problem.near, near_side);
  const device::Array<T> queries(problem.queries), out(problem.queries.size());
  const device::Array<int> position(problem.position), query_start(problem.query_start);
  const device::Array<float> sink_logits(problem.sink_logits);
  on_body.point(body);
  on_near.point(near);
  body.queries = near.queries = queries.data();
  body.position = near.position = position.data();
  if (!c.own.empty()) body.query_start = near.query_start = query_start.data();
  if (c.sinks) body.sink_logits = near.sink_logits = sink_logits.data();
  cuda::Device stream(nullptr);
  const Status status = launch_decode<Codec, limited, width>(stream, body, near, out.data());
  if (!status.ok()) {
    std::printf("%s (%d)\n", status.message().c_str(), status.native);
    return failures + 1;
  }
  device::finish_kernel();
  expect(out.values(), "device");
  return failures;
}

template <int key_bits, int value_bits, int dim, bool limited, int width = 8>
int check(const reference::DecodeCase& c) {
  const std::string name = std::to_string(key_bits) + " and " + std::to_string(value_bits) + " bits";
  return check<reference::TensorCodec<key_bits, value_bits, dim>, limited, width>(name.c_str(), c);
}

// Partial results of DecodeWork and of the kernel written by hand: a block to each entry.
template <int bits>
int check_by_hand() {
  using Problem = reference::DecodeProblem<reference::TensorCodec<bits, bits, by_hand::dim>>;
  using Key = typename Problem::Key;
  using Fragments = typename FragmentsOf<Key>::Keys;
  constexpr int dim = by_hand::dim, entries = 4;
  // As many slices each, so that shares are whole entries.
  const reference::DecodeCase alike{{700, 673, 704, 680}, {1, 1, 1, 1}, 8, entries};
  const Problem problem(alike);
  typename Problem::Side side = problem.body_side(8);
  for (int e = 0; e <= entries; ++e) side.first_slice[static_cast<std::size_t>(e)] = 22 * e;
  side.seen.assign(entries, {0, {0, 0}});
  DecodeStep<Half> step = problem.step(side);
  step.split.items = entries;
  step.width = 8;
  std::vector<float> prepared(entries * 8 * dim), units(entries * 8), levels(16, 0.f);
  for (std::size_t v = 0; v < units.size(); ++v) {
    float plain[dim], *const to = prepared.data() + v * dim, most = 0;
    for (std::size_t d = 0; d < dim; ++d) plain[d] = to_float(problem.queries[v * dim + d]);
    Key{}.prepare(SimulatedWarp{}, plain, Problem::scale() * 1.44269504f, to);
    for (int d = 0; d < dim; ++d) most = std::fmax(most, std::fabs(to[d]));
    const float power = std::ldexp(1.f, std::ilogb(most));
    for (int d = 0; d < dim; ++d) to[d] /= power;
    units[v] = power * Fragments::unit;
  }
  if constexpr (bits < 16) {
    for (int i = 0; i < 16; ++i) levels[static_cast<std::size_t>(i)] = static_cast<float>(LloydMax<bits, dim>::level(i));
  }
  const DeviceSide<typename Problem::Body> on_device(problem.body, side);
  const device::Array<Half> queries(problem.queries);
  const device::Array<float> own_queries(prepared), own_units(units), own_levels(levels);
  const device::Array<float> max(units.size()), sum(units.size()), rows(prepared.size());
  on_device.point(step);
  step.queries = queries.data();
  cuda::Device stream(nullptr);
  const Status status = stream.launch(DecodeWork<Key, Key, false, 8, Half>{step}, entries);
  if (!status.ok()) {
    std::printf("%s (%d)\n", status.message().c_str(), status.native);
    return 1;
  }
  constexpr int table_bytes = bits == 16 ? 0 : by_hand::table_bytes;
  const auto kernel = by_hand::decode<bits != 16>;
  device::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, table_bytes), "shared memory");
  kernel<<<entries, 32 * by_hand::warps, table_bytes>>>({on_device.pages.data(), own_queries.data(), own_units.data(),
                                                         own_levels.data(), Fragments::unit, max.data(), sum.data(),
                                                         rows.data()});
  device::finish_kernel();
  // They add up alike; a weight that is rounded the other way is a millionth of a sum.
  int different = 0;
  const auto compare = [&](const std::vector<float>& found, const std::vector<float>& by_hand, std::size_t each, float size) {
    for (std::size_t i = 0; i < by_hand.size(); ++i) {
      different += !(std::fabs(found[i / each * 2 * each + i % each] - by_hand[i]) <= 1e-5f * size);  // slot b + e
    }
  };
  const std::vector<float> sums = sum.values();
  const float largest = *std::max_element(sums.begin(), sums.end());
  compare(on_device.max.values(), max.values(), 8, 10);
  compare(on_device.sum.values(), sums, 8, largest);
  compare(on_device.rows.values(), rows.values(), 8 * dim, largest);
  if (different > 0) std::printf("%d bits: %d numbers are not what a kernel written by hand finds\n", bits, different);
  return different > 0;
}

}  // namespace

int main() {
  const reference::DecodeCase ragged{{700, 0, 33, 1, 0, 129}, {36, 0, 4, 40, 17, 0}, 3, 5};
  const reference::DecodeCase wide{{40, 65}, {4, 4}, 12, 50};
  reference::DecodeCase windowed = ragged;
  windowed.window = 60;
  // Chunks of queries of three sequences of two KV heads; then other numbers of queries of each.
  reference::DecodeCase chunk{{700, 129, 0, 0, 0, 33}, {37, 36, 0, 0, 17, 4}, 4, 50, 0, 33, 2};
  chunk.sinks = true;
  reference::DecodeCase chunks = chunk;
  chunks.own = {33, 0, 5};
  chunks.window = 90;
  chunks.cap = 5;
  int failures = check<4, 4, 64, false>(ragged) + check<4, 4, 64, true>(windowed) + check<2, 2, 128, false>(wide) +
                 check<3, 2, 128, false>(ragged) + check<1, 5, 64, false>(ragged) + check<16, 16, 80, false>(ragged) +
                 check<6, 3, 256, false>(ragged) + check<4, 4, 128, true, 16>(chunk) + check<3, 2, 64, true, 16>(chunks) +
                 check<16, 16, 128, true, 16>(chunks) + check<2, 2, 128, true, 16>(chunk) + check<6, 6, 256, true>(chunks);
  failures +=
      check<KvCodec<Q8_0<64>, Q4_0<64>, float>, false>("q8_0/q4_0", ragged) +
      check<KvCodec<Rotated<Q4_1<40>>, Q5_0<40>>, true>("rotated_q4_1/q5_0", windowed) +
      check<KvCodec<Dense<float, 128>>, true, 16>("fp32", chunk) + check<KvCodec<Dense<BFloat16, 256>>, true>("bf16", chunks) +
      check<KvCodec<TurboQuantUnbiased<3, 64>, Rotated<Trellis<2, 64>>, float>, true>("turbo3_unbiased/trellis2", chunks);
  if (device::present()) failures += check_by_hand<4>() + check_by_hand<16>();
  return device::result(failures);
}
