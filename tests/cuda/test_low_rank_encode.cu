// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Blocks of low rank that a device encodes, beside those of a simulated device: the same bytes.
#include <random>

#include "device.cuh"
#include "kvtailor/codec/low_rank_work.hpp"

namespace {

using namespace kvt;

template <class Residual>
int check_blocks(const char* name) {
  using Codec = Rotated<LowRank<Residual>>;
  constexpr int dim = Codec::head_dim, blocks = 9;
  int failures = 0;
  for (const int n : {1, 37, 128}) {
    std::mt19937 random(static_cast<unsigned>(n));
    std::normal_distribution<float> normal;
    std::vector<Half> rows;
    for (int block = 0; block < blocks; ++block) {  // of rank 0, 1, ..., and one that holds no numbers
      std::vector<float> right(static_cast<std::size_t>(blocks * dim));
      for (float& x : right) x = 9 * normal(random);
      for (int row = 0; row < n; ++row) {
        std::vector<float> x(dim);
        for (float& v : x) v = normal(random);
        for (int i = 0; i < block; ++i) {
          const float left = normal(random) / static_cast<float>(i + 1);
          for (int d = 0; d < dim; ++d) x[static_cast<std::size_t>(d)] += left * right[static_cast<std::size_t>(i * dim + d)];
        }
        if (block == blocks - 1 && row == n / 2) x[3] = NAN;
        for (const float v : x) rows.push_back(from_float<Half>(v));
      }
    }
    const Codec codec;
    const int stride = codec.max_block_bytes(n);
    const auto expect = [&](bool ok, const char* what, std::size_t at) {
      if (!ok && failures++ < 5) std::printf("%s, head_dim %d, %d rows: %s %zu\n", name, dim, n, what, at);
    };
    std::vector<float> scratch(rows.size());
    std::vector<std::byte> simulated(static_cast<std::size_t>(blocks * stride), std::byte{0xff});
    std::vector<int> sizes(blocks);
    SimulatedDevice simulation;
    const Status status =
        encode_blocks<128>(simulation, codec, rows.data(), blocks, n, scratch.data(), simulated.data(), stride, sizes.data());
    expect(status.ok(), "simulated", 0);
    if (!device::present()) continue;
    const device::Array<Half> given(rows);
    const device::Array<float> plain(rows.size());
    const device::Array<std::byte> out(simulated.size());
    const device::Array<int> bytes(sizes.size());
    cuda::Device real;
    expect(encode_blocks<128>(real, codec, given.data(), blocks, n, plain.data(), out.data(), stride, bytes.data()).ok(),
           "launched", 0);
    device::finish_kernel();
    const auto have = out.values();
    const auto have_sizes = bytes.values();
    for (std::size_t i = 0; i < have_sizes.size(); ++i) expect(have_sizes[i] == sizes[i], "size of block", i);
    for (std::size_t i = 0; i < have.size(); ++i) expect(have[i] == simulated[i], "byte", i);
  }
  return failures;
}

}  // namespace

int main() {
  return device::result(check_blocks<LloydMax<2, 64>>("scalar residual") + check_blocks<LloydMax<4, 256>>("scalar residual") +
                        check_blocks<Trellis<2, 128>>("trellis residual") + check_blocks<Trellis<3, 80>>("trellis residual"));
}
