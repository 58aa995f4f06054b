// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention to the rows that a cache of the host decodes to, in double precision: its own attend() may round queries and
// weights to bytes.
#pragma once

#include <span>

#include "kvtailor/kvtailor.hpp"
#include "reference/plain.hpp"

namespace reference {

// As KvCache::attend().
template <class Cache>
void attend(const Cache& cache, int layer, const float* queries, std::span<const int> positions,
            const kvt::AttendOptions& options, float* out) {
  const kvt::Geometry& shape = cache.geometry();
  const auto dim = static_cast<std::size_t>(shape.head_dim), group = static_cast<std::size_t>(shape.group_size());
  for (int h = 0; h < shape.num_kv_heads; ++h) {
    const auto held = cache.positions(layer, h);
    const std::vector<int> where(held.begin(), held.end());
    std::vector<float> keys(where.size() * dim), values(keys.size());
    cache.decode(layer, h, keys.data(), values.data());
    for (std::size_t i = 0; i < positions.size() * group; ++i) {
      const std::size_t token = i / group, head = static_cast<std::size_t>(h) * group + i % group;
      const std::size_t at = (token * static_cast<std::size_t>(shape.num_q_heads) + head) * dim;
      const float* const sink = options.sink_logits.empty() ? nullptr : &options.sink_logits[head];
      const auto exact = attend(queries + at, positions[token], keys, values, where, shape.head_dim,
                                {double(options.scale), double(options.soft_cap), options.window, sink});
      for (std::size_t d = 0; d < dim; ++d) out[at + d] = static_cast<float>(exact[d]);
    }
  }
}

}  // namespace reference
