// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// ScoreRanks: the highest scores of many, found by a block of threads.
#pragma once

#include "kvtailor/core/half.hpp"
#include "kvtailor/core/lanes.hpp"

namespace kvt::inline v0 {

// Rows of a head whose score (its place in the order, see ScoreRanks) is above `rank`, and those before `row` of equal ones.
struct HighestRows {
  std::uint32_t rank;
  int row;

  KVT_HD KVT_INLINE bool has(std::uint32_t own_rank, int own_row) const {
    return own_rank > rank || (own_rank == rank && own_row < row);
  }
};

namespace detail {

// Counts by all threads of a block, of scores in the order of their ranks.
template <int warps>
class ScoreRanks {
 public:
  // What warps counted is read while the next count is made: there are two.
  struct Shared {
    int count[2][warps];
  };
  KVT_HD explicit ScoreRanks(Shared& shared) : shared_(shared) {}

  // Unsigned numbers in the order of floats; zeros are equal.
  KVT_HD KVT_INLINE static std::uint32_t rank(float x) {
    const std::uint32_t bits = bits_from_float(x + 0.f);
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  }
  // The sum of own(thread, threads).
  template <class Block, class Own>
  KVT_HD int count(const Block& block, Own own) {
    turn_ = 1 - turn_;
    block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
      constexpr int size = Block::Lanes::size;
      typename Block::Lanes::template Reg<int> part;
      lanes.each([&](int lane) { part[lane] = own(warp * size + lane, warps * size); });
      const int all = lanes.sum(part);
      lanes.once([&] { shared_.count[turn_][warp] = all; });
    });
    int all = 0;
    for (int w = 0; w < warps; ++w) all += shared_.count[turn_][w];
    return all;
  }
  // The highest rank that at least `wanted` scores reach, bit by bit: reaching(rank, thread, threads) counts them.
  template <class Block, class Reaching>
  KVT_HD std::uint32_t threshold(const Block& block, int wanted, Reaching reaching) {
    std::uint32_t least = 0;
    for (std::uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
      if (count(block, [&](int thread, int step) { return reaching(least | bit, thread, step); }) >= wanted) least |= bit;
    }
    return least;
  }
  // The last row of n > 0 before which there are fewer than `wanted` > 0: fewer(row, thread, threads) counts those before it.
  template <class Block, class Before>
  KVT_HD int last_with_fewer(const Block& block, int n, int wanted, Before before) {
    int row = 0;
    for (int bit = 1 << 30; bit != 0; bit >>= 1) {
      if (bit < n - row && count(block, [&](int thread, int step) { return before(row + bit, thread, step); }) < wanted)
        row += bit;
    }
    return row;
  }
  // The `wanted` highest of n scores; of equal ones the first.
  template <class Block>
  KVT_HD HighestRows highest(const Block& block, const float* score, int n, int wanted) {
    HighestRows last{0xffffffffu, 0};
    if (wanted <= 0) return last;
    const auto reaching = [&](std::uint32_t least, int thread, int step) {
      int own = 0;
      for (int r = thread; r < n; r += step) own += rank(score[r]) >= least ? 1 : 0;
      return own;
    };
    last.rank = threshold(block, wanted, reaching);
    const int above = last.rank == 0xffffffffu
                          ? 0
                          : count(block, [&](int thread, int step) { return reaching(last.rank + 1, thread, step); });
    last.row = 1 + last_with_fewer(block, n, wanted - above, [&](int before, int thread, int step) {
                 int own = 0;
                 for (int r = thread; r < before; r += step) own += rank(score[r]) == last.rank ? 1 : 0;
                 return own;
               });
    return last;
  }

 private:
  Shared& shared_;
  int turn_ = 0;
};

}  // namespace detail

}  // namespace kvt::inline v0
