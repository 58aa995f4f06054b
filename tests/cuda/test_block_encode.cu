// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Blocks that a device encodes, and what it leaves of them: beside those of a simulated device, the same bytes.
#include <random>

#include "device.cuh"
#include "kvtailor/codec/block_encode.hpp"
#include "kvtailor/codec/low_rank_work.hpp"

namespace {

using namespace kvt;

template <int bits, int dim>
using Short = LloydMax<bits, dim, NormCorrection::least_squares, LogScale>;

// Block i of n rows each to out + i * stride; what is left without rows to left + i * stride.
template <class Codec>
struct EncodeAndErase {
  using Encoder = BlockEncoder<Codec, 128>;
  using Shared = typename Encoder::Shared;
  using Memory = typename Encoder::Memory;
  static constexpr int warps = Encoder::warps, blocks = 1, dynamic_bytes = static_cast<int>(sizeof(Memory));

  Codec codec;
  float* rows;  // [blocks, n, head_dim]
  int n;
  const unsigned char* keep;  // [blocks, n]
  std::byte *out, *left;
  int stride;
  int* bytes;  // [blocks, 2]

  template <class Block>
  KVT_HD void operator()(const Block& block, int index, Shared& shared, std::byte* dynamic) const {
    std::byte *const to = out + index * stride, *const rest = left + index * stride;
    float* const own = rows + index * n * Codec::head_dim;
    const int size = Encoder::encode(block, codec, own, n, to, shared, *reinterpret_cast<Memory*>(dynamic));
    block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
      if (warp != 0) return;
      const int kept = codec.erase(lanes, to, n, keep + index * n, rest);
      lanes.once([&] {
        bytes[2 * index] = size;
        bytes[2 * index + 1] = kept;
      });
    });
  }
};

template <class Codec>
int check_blocks(const char* name, const Codec& codec = {}) {
  constexpr int dim = Codec::head_dim, blocks = 5;
  int failures = 0;
  for (const int n : {1, 33, 128}) {
    std::mt19937 random(static_cast<unsigned>(n));
    std::normal_distribution<float> normal;
    std::vector<float> rows;
    std::vector<unsigned char> keep;
    for (int block = 0; block < blocks; ++block) {  // of rank 0, 1, ..., with a mean; the last one zeros
      std::vector<float> right(static_cast<std::size_t>((block + 1) * dim));
      for (float& x : right) x = 9 * normal(random);
      for (int row = 0; row < n; ++row) {
        std::vector<float> left(static_cast<std::size_t>(block + 1), 1.f);
        for (int i = 1; i <= block; ++i) left[static_cast<std::size_t>(i)] = normal(random) / static_cast<float>(i);
        for (int d = 0; d < dim; ++d) {
          float x = normal(random);
          for (int i = 0; i <= block; ++i)
            x += left[static_cast<std::size_t>(i)] * right[static_cast<std::size_t>(i * dim + d)];
          rows.push_back(block == blocks - 1 ? 0.f : x);
        }
        keep.push_back(static_cast<unsigned char>(block == 1 || (block != 2 && random() % 3 != 0)));
      }
    }
    const int stride = (codec.max_block_bytes(n) + 63) / 64 * 64;
    const auto expect = [&](bool ok, const char* what, std::size_t at) {
      if (!ok && failures++ < 5) std::printf("%s, head_dim %d, %d rows: %s %zu\n", name, dim, n, what, at);
    };
    std::vector<std::byte> simulated(static_cast<std::size_t>(blocks * stride), std::byte{0xff}), simulated_left = simulated;
    std::vector<int> sizes(2 * blocks);
    auto used = rows;
    SimulatedDevice simulation;
    expect(simulation
               .launch(EncodeAndErase<Codec>{codec, used.data(), n, keep.data(), simulated.data(), simulated_left.data(),
                                             stride, sizes.data()},
                       blocks)
               .ok(),
           "simulated", 0);
    if (!device::present()) continue;
    const device::Array<float> given(rows);
    const device::Array<unsigned char> marks(keep);
    const device::Array<std::byte> out(simulated.size()), left(simulated.size());
    const device::Array<int> bytes(sizes.size());
    cuda::Device real;
    expect(
        real.launch(EncodeAndErase<Codec>{codec, given.data(), n, marks.data(), out.data(), left.data(), stride, bytes.data()},
                    blocks)
            .ok(),
        "launched", 0);
    device::finish_kernel();
    const auto have = out.values(), have_left = left.values();
    const auto have_sizes = bytes.values();
    for (std::size_t i = 0; i < sizes.size(); ++i) expect(have_sizes[i] == sizes[i], "size", i);
    for (std::size_t i = 0; i < have.size(); ++i) expect(have[i] == simulated[i], "byte", i);
    for (std::size_t i = 0; i < have.size(); ++i) expect(have_left[i] == simulated_left[i], "byte left", i);
  }
  return failures;
}

}  // namespace

int main() {
  int failures = check_blocks<Rotated<Shifted<Trellis<2, 64>>>>("mean and trellis");
  failures += check_blocks<KiviKeys<3, 40>>("levels for each channel");
  OneOf<KiviKeys<2, 128>, Shifted<Short<2, 128>>, Rotated<LowRank<Short<2, 128>>>, TurboQuant<3, 128>> codec;
  for (const int index : {0, 1, 2, 3}) {
    codec.index = index;
    failures += check_blocks("one of four", codec);
  }
  return device::result(failures);
}
