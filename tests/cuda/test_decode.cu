// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Decode steps with tensor cores, against double precision; without a device, the same blocks of warps simulated.
#include "device.cuh"
#include "kvtailor/cuda/device.cuh"
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
  device::Array<float> max, sum, rows;

  template <class Side>
  DeviceSide(const std::vector<Rows>& all, const Side& side)
      : pages(on_device(all)), first_slice(side.first_slice), max(side.max), sum(side.sum), rows(side.rows) {}

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
  void point(DecodeStep<Half>& step) const {
    step.split.entry = pages.data();
    step.split.first_slice = first_slice.data();
    step.partials = {max.data(), sum.data(), rows.data()};
  }
};

template <int key_bits, int value_bits, int dim, bool limited>
int check(const reference::DecodeCase& c) {
  using Problem = reference::DecodeProblem<key_bits, value_bits, dim>;
  const Problem problem(c);
  int failures = 0;
  const auto expect = [&](const std::vector<Half>& out, const char* where) {
    const double error = problem.error(out);
    if (error <= 1) return;
    ++failures;
    std::printf("%d and %d bits, head_dim %d, %s: %.2f times the bound\n", key_bits, value_bits, dim, where, error);
  };
  if (!device::present()) {
    expect(problem.template simulate<limited>(), "simulated");
    return failures;
  }
  typename Problem::Side body_side(problem.body, c.blocks), near_side(problem.near, c.blocks);
  DecodeStep<Half> body = problem.step(body_side), near = problem.step(near_side);
  const DeviceSide<typename Problem::Body> on_body(problem.body, body_side);
  const DeviceSide<typename Problem::Near> on_near(problem.near, near_side);
  const device::Array<Half> queries(problem.queries), out(problem.queries.size());
  const device::Array<int> position(problem.position);
  on_body.point(body);
  on_near.point(near);
  body.queries = near.queries = queries.data();
  body.position = near.position = position.data();
  cuda::Device stream(nullptr);
  const Status status = launch_decode<typename Problem::Key, typename Problem::Value, limited>(stream, body, near, out.data());
  if (!status.ok()) {
    std::printf("%s (%d)\n", status.message().c_str(), status.native);
    return failures + 1;
  }
  device::finish_kernel();
  expect(out.values(), "device");
  return failures;
}

}  // namespace

int main() {
  const reference::DecodeCase ragged{{700, 0, 33, 1, 0, 129}, {36, 0, 4, 40, 17, 0}, 3, 5};
  const reference::DecodeCase wide{{40, 65}, {4, 4}, 12, 50};
  reference::DecodeCase windowed = ragged;
  windowed.window = 60;
  int failures = check<4, 4, 64, false>(ragged) + check<4, 4, 64, true>(windowed) + check<2, 2, 128, false>(wide) +
                 check<3, 2, 128, false>(ragged) + check<1, 5, 64, false>(ragged) + check<16, 16, 80, false>(ragged) +
                 check<6, 3, 256, false>(ragged);
  return device::result(failures);
}
