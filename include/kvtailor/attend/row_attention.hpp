// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// row_attention: what queries give each row of a head, beside attention itself. The weights of a row are only known once all
// rows were met, so the logits are made once more, on the stored bytes, as attention makes them.
#pragma once

#include <vector>

#include "kvtailor/attend/attention.hpp"
#include "kvtailor/core/evidence.hpp"

namespace kvt::inline v0 {

// queries [n, num_q_heads, head_dim] at positions [n]; adds to rows [num_rows]. O(n * group_size * rows * head_dim), and
// 16 * rows floats. Throws std::bad_alloc, before anything is added.
template <class Codec>
void add_row_attention(const HeadStore<Codec>& store, const Geometry& shape, int kv_head, const float* queries,
                       std::span<const int> positions, const AttendOptions& options, std::span<RowAttention> rows) {
  using Source = Attention<Codec>;
  using Near = typename Codec::near_type;
  constexpr int head_dim = Codec::head_dim;
  const Codec& codec = store.codec();
  const int group = shape.group_size(), n = store.num_rows(), key_dim = basis_dim(codec.keys);
  const int num_vectors = static_cast<int>(positions.size()) * group;
  const float scale = options.scale != 0 ? options.scale : 1.f / std::sqrt(static_cast<float>(head_dim));
  const std::span<const int> where = store.positions();
  std::vector<float> logits(static_cast<std::size_t>(tile_vectors) * static_cast<std::size_t>(n));
  alignas(64) float near_query[tile_vectors * head_dim], body_query[tile_vectors * max_basis_dim<typename Codec::key_type>];
  constexpr int made_bytes = (80 * max_basis_dim<typename Codec::key_type> + 319) / 64 * 64;  // as in Attention::run()
  alignas(64) std::byte made[QueryMemory::places * made_bytes];

  for (int first = 0; first < num_vectors; first += tile_vectors) {
    const int m = std::min(tile_vectors, num_vectors - first);
    for (int j = 0; j < m; ++j) {
      const int v = first + j;
      const float* const query =
          queries + (static_cast<std::int64_t>(v / group) * shape.num_q_heads + kv_head * group + v % group) * head_dim;
      Near{}.prepare(Serial{}, query, scale, near_query + j * head_dim);
      codec.keys.prepare(Serial{}, query, scale, body_query + j * key_dim);
    }
    QueryMemory kept{made, made_bytes};
    for (int i = 0, at = 0; i < Source::num_segments(store); ++i) {
      const auto s = Source::segment(store, i);
      const SerialReader reader(s.keys.from, s.keys.count, nullptr, kept);
      float* const to = logits.data() + at;
      s.near ? Near{}.logits(reader, s.keys.from, s.rows, near_query, m, to, n)
             : codec.keys.logits(reader, s.keys.from, s.rows, body_query, m, to, n);
      at += s.rows;
    }
    for (int j = 0; j < m; ++j) {
      const int v = first + j, position = positions[static_cast<std::size_t>(v / group)];
      const auto to = std::upper_bound(where.begin(), where.end(), position);
      const auto from = options.window > 0 ? std::upper_bound(where.begin(), to, position - options.window) : where.begin();
      const std::span<float> own(logits.data() + static_cast<std::ptrdiff_t>(j) * n + (from - where.begin()),
                                 static_cast<std::size_t>(to - from));
      if (own.empty()) continue;
      if (const float cap = options.soft_cap; cap > 0) {
        for (float& x : own) x = cap * std::tanh(x / cap);
      }
      float top = largest_of(own.data(), static_cast<int>(own.size()));
      double sum = 0;
      if (!options.sink_logits.empty()) {
        const float logit = options.sink_logits[static_cast<std::size_t>(kv_head * group + v % group)];
        top = std::max(top, logit);
        sum = static_cast<double>(exp_nonpositive(logit - top));
      }
      sum += static_cast<double>(exponentials(own.data(), static_cast<int>(own.size()), top));
      const float share = static_cast<float>(1 / sum), mean = share / static_cast<float>(group);
      RowAttention* const seen = rows.data() + (from - where.begin());
      for (std::size_t r = 0; r < own.size(); ++r) {
        seen[r].sum += own[r] * mean;
        seen[r].largest = std::max(seen[r].largest, own[r] * share);
        seen[r].queries += v % group == 0 ? 1 : 0;
      }
    }
  }
}

}  // namespace kvt::inline v0
