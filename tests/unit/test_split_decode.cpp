// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "reference/split_decode.hpp"

using namespace kvt;
using reference::DecodeCase;

TEST_CASE("every slice of every entry belongs to one block, and no two results share a slot") {
  std::mt19937 random(1);
  for (int repeat = 0; repeat < 300; ++repeat) {
    const int entries = 1 + static_cast<int>(random() % 9), blocks = 1 + static_cast<int>(random() % 40);
    std::vector<int> first(1, 0);
    for (int e = 0; e < entries; ++e) {
      first.push_back(first.back() + (random() % 3 == 0 ? 0 : static_cast<int>(random() % (repeat % 2 == 0 ? 4 : 90))));
    }
    const SplitDecode split{nullptr, first.data(), entries, blocks};
    std::vector<int> taken(static_cast<std::size_t>(first.back()), 0), slot(static_cast<std::size_t>(split.slots()), 0);
    int least = first.back(), most = 0;
    for (int b = 0; b < blocks; ++b) {
      int own = 0;
      for (int e = 0; e < entries; ++e) {
        const auto share = split.share(b, e);
        if (share.empty()) continue;
        ++slot[static_cast<std::size_t>(b + e)];
        own += share.to - share.from;
        for (int s = share.from; s < share.to; ++s) {
          const int at = first[static_cast<std::size_t>(e)] + s;
          ++taken[static_cast<std::size_t>(at)];
          CHECK(split.block_of(at) == b);
          CHECK(split.entry_of(at) == e);
        }
      }
      least = std::min(least, own);
      most = std::max(most, own);
    }
    for (const int n : taken) CHECK(n == 1);
    for (const int n : slot) CHECK(n <= 1);
    CHECK(most - least <= 1);
  }
}

TEST_CASE("a decode step over ragged heads") {
  // Encoded rows, dense rows; no rows at all in one entry and in another only dense ones.
  const DecodeCase ragged{{700, 0, 33, 1, 0, 129}, {36, 0, 4, 40, 17, 0}, 3, 5};
  CHECK(reference::decode_error<4, 4, 64>(ragged) <= 1);
  CHECK(reference::decode_error<3, 2, 128>(ragged) <= 1);
  CHECK(reference::decode_error<16, 16, 64>(ragged) <= 1);
  CHECK(reference::decode_error<4, 4, 64, true>({{700, 0, 33, 1, 0, 129}, {36, 0, 4, 40, 17, 0}, 3, 5, 60}) <= 1);
  // More query heads than a fragment has columns, more blocks than slices.
  CHECK(reference::decode_error<2, 2, 64>({{40, 65}, {4, 4}, 12, 50}) <= 1);
  CHECK(reference::decode_error<2, 2, 64>({{3000}, {1}, 1, 7}) <= 1);
}
