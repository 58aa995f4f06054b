// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Loops and sums over the lanes of a warp and the threads of a block.
#pragma once

#include "kvtailor/core/lanes.hpp"

namespace kvt::inline v0::detail {

// a . b, of vectors that all lanes see.
template <int dim, class Lanes>
KVT_HD float product(const Lanes& lanes, const float* a, const float* b) {
  typename Lanes::template Reg<float> part;
  lanes.each([&](int lane) {
    part[lane] = 0;
    for (int d = lane; d < dim; d += Lanes::size) part[lane] += a[d] * b[d];
  });
  return lanes.sum(part);
}

// f(i) of first .. last - 1, by all threads of a block.
template <class Block, class F>
KVT_HD void each_index(const Block& block, int first, int last, F&& f) {
  using Lanes = typename Block::Lanes;
  block.each_warp([&](const Lanes& lanes, int warp) {
    lanes.each([&](int lane) {
      for (int i = first + warp * Lanes::size + lane; i < last; i += Block::warps * Lanes::size) f(i);
    });
  });
}
// The sum of own(thread, threads) over the threads of a block, or the largest. parts [warps] are shared.
template <bool largest, class T, class Block, class Own>
KVT_HD T over_block(const Block& block, T* parts, Own&& own) {
  using Lanes = typename Block::Lanes;
  block.each_warp([](const Lanes&, int) {});  // all have read what was there
  block.each_warp([&](const Lanes& lanes, int warp) {
    typename Lanes::template Reg<T> part;
    lanes.each([&](int lane) { part[lane] = own(warp * Lanes::size + lane, Block::warps * Lanes::size); });
    const T all = largest ? lanes.max(part) : lanes.sum(part);
    lanes.once([&] { parts[warp] = all; });
  });
  T all = parts[0];
  for (int w = 1; w < Block::warps; ++w) all = !largest ? all + parts[w] : parts[w] > all ? parts[w] : all;
  return all;
}
// The sum of parts of T.
template <class T, class Block, class Own>
KVT_HD T sum_of_block(const Block& block, T* parts, Own&& own) {
  return over_block<false>(block, parts, own);
}

}  // namespace kvt::inline v0::detail
