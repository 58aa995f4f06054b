// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Rows that a layer shares out by scores on a device: the counts of the host's allocator, however many scores are equal.
#include <doctest/doctest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "kvtailor/budget/adaptive.hpp"
#include "kvtailor/budget/request.hpp"
#include "kvtailor/store/head_share.hpp"

using namespace kvt;

namespace {

std::vector<int> share_on_device(const Adaptive& budget, const BudgetRequest& want, const std::vector<int>& dense,
                                 const std::vector<int>& encoded, const std::vector<float>& scores, long long stride) {
  SimulatedDevice device;
  std::vector<int> keep(want.seen.size()), near = dense, body = encoded;
  std::vector<std::int64_t> left(static_cast<std::size_t>(want.num_layers));
  REQUIRE(budget.share_out(want, keep, left).ok());
  std::vector<HighestRows> safe(keep.size());
  const DeviceHeads heads{nullptr, nullptr, near.data(), body.data(), 0, 0};
  REQUIRE(device.launch(SafeRowsWork{heads, keep.data(), scores.data(), stride, safe.data()}, int(keep.size())).ok());
  REQUIRE(device
              .launch(ShareRowsWork{heads, want.num_kv_heads, safe.data(), left.data(), scores.data(), stride, keep.data()},
                      want.num_layers)
              .ok());
  return keep;
}

}  // namespace

TEST_CASE("counts are those of the host for any scores, many of them equal") {
  constexpr int layers = 3, kv_heads = 4, heads = layers * kv_heads, stride = 400;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 300; ++round) {
    CAPTURE(round);
    std::vector<int> dense(heads), encoded(heads), seen(heads), floor(heads), expected(heads);
    std::vector<float> scores(heads * stride, std::nanf("")), packed;
    for (std::size_t h = 0; h < heads; ++h) {
      dense[h] = static_cast<int>(random() % (round % 4 == 3 ? 3 : 100));
      encoded[h] = round % 7 == 6 && h % 3 == 0 ? 0 : static_cast<int>(random() % 300);
      seen[h] = dense[h] + encoded[h];
      floor[h] = std::min(seen[h], static_cast<int>(random() % 20));
      for (int r = 0; r < seen[h]; ++r) {
        const float x = normal(random);
        float& score = scores[h * stride + static_cast<std::size_t>(r)];
        score = round % 5 == 0   ? x
                : round % 5 == 1 ? std::round(x)
                : round % 5 == 2 ? (x < 0 ? -0.f : 0.f)
                : round % 5 == 3 ? std::round(4 * x) * (h % 2 == 0 ? 1 : .25f)
                                 : x * 1e-42f;
        if (r < floor[h]) score = INFINITY;  // as those that are never dropped
        packed.push_back(score);
      }
    }
    const int all = std::accumulate(seen.begin(), seen.end(), 0), least = std::accumulate(floor.begin(), floor.end(), 0);
    const int total = round % 11 == 0   ? least
                      : round % 11 == 1 ? all
                                        : least + static_cast<int>(random() % unsigned(all - least + 1));
    const BudgetRequest want{total, layers, kv_heads, seen, floor, packed};
    const Adaptive budget{round % 6 == 0 ? 0. : round % 6 == 1 ? 1. : .2};
    REQUIRE(allocate_rows(budget, want, expected).ok());
    CHECK(share_on_device(budget, want, dense, encoded, scores, stride) == expected);
  }
}
