// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A token selector and a budget allocator of one's own: any type with the right two members is a policy.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kvtailor/kvtailor.hpp"

// Rows with short keys matter more (Devoto et al., arXiv 2406.11430).
struct ShortKeys {
  static constexpr kvt::EvidenceSet needs = kvt::Evidence::keys;  // all that the cache shows it

  kvt::Status score(const kvt::HeadEvidence& seen, std::span<float> score) const noexcept {
    for (std::size_t row = 0; row < score.size(); ++row) {
      const float* const key = seen.keys.data() + row * static_cast<std::size_t>(seen.head_dim);
      float square = 0;
      for (int d = 0; d < seen.head_dim; ++d) square += key[d] * key[d];
      score[row] = -square;  // larger is kept first; never NaN
    }
    return kvt::success();
  }
};
static_assert(kvt::TokenSelector<ShortKeys>);

// Later layers give rows to earlier ones: layer l of n weighs `slope` times less than layer l - 1.
struct Falling {
  static constexpr kvt::EvidenceSet needs = {};
  double slope = 0.7;

  kvt::Status allocate(const kvt::BudgetRequest& want, std::span<int> keep) const noexcept try {
    std::vector<double> weight(keep.size());
    for (std::size_t h = 0; h < weight.size(); ++h) weight[h] = std::pow(slope, static_cast<int>(h) / want.num_kv_heads);
    kvt::apportion(want, weight, keep);  // meets the total and every head's bounds
    return kvt::success();
  } catch (const std::bad_alloc&) {
    return kvt::error(kvt::Errc::out_of_memory, "out of memory while sharing out a budget");
  }
};
static_assert(kvt::BudgetAllocator<Falling>);

int main() {
  constexpr int layers = 4, head_dim = 64, num_tokens = 600;
  kvt::KvCache<Falling, ShortKeys, kvt::KvCodec<kvt::TurboQuant<4, head_dim>>> cache;
  kvt::Status status = cache.init({.num_layers = layers, .num_kv_heads = 2, .num_q_heads = 8, .head_dim = head_dim});
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> rows(num_tokens * 2 * head_dim);
  std::vector<int> positions(num_tokens);
  for (int i = 0; i < num_tokens; ++i) positions[static_cast<std::size_t>(i)] = i;
  for (int layer = 0; layer < layers && status.ok(); ++layer) {
    for (float& x : rows) x = normal(random);
    status = cache.append(layer, rows.data(), rows.data(), positions);
  }
  if (status.ok()) status = cache.compress(kvt::Retain::rows(200));
  if (!status.ok()) {
    std::printf("%s\n", status.message().c_str());
    return 1;
  }
  std::printf("rows kept, layer by layer:");
  for (int layer = 0; layer < layers; ++layer) std::printf(" %d+%d", cache.num_rows(layer, 0), cache.num_rows(layer, 1));
  std::printf("\n");
}
