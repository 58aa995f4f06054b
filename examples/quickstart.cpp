// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A layer of a model that does not exist: composes a cache, fills it, cuts it, attends, and says what it holds.
#include <cstdio>
#include <random>
#include <vector>

#include "kvtailor/kvtailor.hpp"

int main() {
  constexpr int head_dim = 64, num_tokens = 1000;
  const kvt::Geometry geometry{.num_layers = 1, .num_kv_heads = 3, .num_q_heads = 9, .head_dim = head_dim};
  kvt::KvCache<kvt::Adaptive, kvt::KeyDiff, kvt::KvCodec<kvt::TurboQuant<3, head_dim>, kvt::TurboQuant<2, head_dim>>> cache;
  if (const auto status = cache.init(geometry); !status.ok()) {
    std::printf("%s\n", status.message().c_str());
    return 1;
  }

  const kvt::Rope rope{.rotary_dim = head_dim};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> keys(3 * head_dim), values(keys.size()), queries(9 * head_dim), out(queries.size());
  for (int position = 0; position < num_tokens; ++position) {
    for (auto* rows : {&keys, &values, &queries}) {
      for (float& x : *rows) x = normal(random);
    }
    for (int head = 0; head < 3; ++head) rope.apply(keys.data() + head * head_dim, position);
    for (int head = 0; head < 9; ++head) rope.apply(queries.data() + head * head_dim, position);
    auto status = cache.append(0, keys.data(), values.data(), std::span(&position, 1));
    if (status.ok()) status = cache.attend(0, queries.data(), std::span(&position, 1), {}, out.data());
    if (!status.ok()) {
      std::printf("%s\n", status.message().c_str());
      return 1;
    }
  }
  if (const auto status = cache.compress(kvt::Retain::ratio(0.25)); !status.ok()) {
    std::printf("%s\n", status.message().c_str());
    return 1;
  }
  const auto memory = cache.memory();
  std::printf("%lld of %lld bytes, %.2f bits an element, rows kept:", memory.total(), memory.dense_fp16_bytes,
              cache.bits_per_element());
  for (int head = 0; head < 3; ++head) std::printf(" %d", cache.num_rows(0, head));
  std::printf("\n");
}
