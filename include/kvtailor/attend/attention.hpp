// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Attention: the generic body that reads the stored bytes of one head, for any codec. A tile of query vectors meets the rows
// a segment at a time; logits become weights in a running softmax, and values are summed in the basis of their codec.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "kvtailor/attend/plan.hpp"
#include "kvtailor/core/simd.hpp"
#include "kvtailor/store/head_store.hpp"

namespace kvt::inline v0 {

template <class Codec>
class Attention {
 public:
  using Head = HeadStore<Codec>;
  using Near = typename Codec::near_type;
  static constexpr int head_dim = Codec::head_dim;

  // A run of rows in one zone: a block, or up to max_block_rows_limit dense rows.
  struct Bytes {
    const std::byte* from;
    int count;
  };
  struct Segment {
    bool near;
    int rows;
    Bytes keys, values;
  };
  static int num_segments(const Head& store) {
    return pieces(store.sink().rows()) + static_cast<int>(store.blocks().size()) + pieces(store.recent().rows());
  }
  static Segment segment(const Head& store, int index) {
    const int sinks = pieces(store.sink().rows()), blocks = static_cast<int>(store.blocks().size());
    if (index >= sinks && index < sinks + blocks) {
      const BlockRef& block = store.blocks()[static_cast<std::size_t>(index - sinks)];
      return {false, block.rows, {block.keys(), block.key_bytes}, {block.values(), block.value_bytes}};
    }
    const auto& zone = index < sinks ? store.sink() : store.recent();
    const int first = (index < sinks ? index : index - sinks - blocks) * max_block_rows_limit;
    const auto at = static_cast<std::ptrdiff_t>(first) * Near::row_bytes;
    const int rows = std::min(max_block_rows_limit, zone.rows() - first), bytes = rows * Near::row_bytes;
    return {true, rows, {zone.keys.data() + at, bytes}, {zone.values.data() + at, bytes}};
  }

  // Adds the tasks of one head to a plan; throws what the plan's resource throws. Room for partial results is made here.
  static void add_tasks(const Head& store, int work, int kv_head, int num_vectors, AttendPlan& plan) {
    const int segments = num_segments(store), rows = store.num_rows();
    const int tiles = (num_vectors + tile_vectors - 1) / tile_vectors;
    const int parts = tiles == 1 ? std::clamp((rows + rows_per_split - 1) / rows_per_split, 1, max_splits) : 1;
    if (parts == 1) {
      for (int tile = 0; tile < tiles; ++tile) plan.tasks_.push_back({work, kv_head, tile, 0, segments, 0, 0, 1, 0, 0, 0});
      return;
    }
    // Cut at the segment where each share of the rows is full.
    const std::size_t first = plan.tasks_.size();
    const auto full = [&](int row, int part) {
      return static_cast<long long>(row) * parts >= static_cast<long long>(rows) * (part + 1);
    };
    AttendPlan::Task task{
        work, kv_head, 0, 0, 0, 0, 0, 0, plan.num_states_, plan.num_partials_, static_cast<int>(plan.pending_.size())};
    int row = 0;
    for (int s = 0, part = 0; s < segments; ++s) {
      row += segment(store, s).rows;
      if (!full(row, part) && s + 1 < segments) continue;
      task.last_segment = s + 1;
      plan.tasks_.push_back(task);
      ++task.part;
      task.first_segment = s + 1;
      task.first_row = row;
      while (part + 1 < parts && full(row, part)) ++part;
    }
    for (std::size_t t = first; t < plan.tasks_.size(); ++t) plan.tasks_[t].num_parts = task.part;
    const auto states = static_cast<std::size_t>(task.part * num_vectors);
    plan.grow(states, states * head_dim);
    plan.pending_.push_back(task.part);
  }

  // Runs one task. Vector v of a KV head is query head v % group of token v / group.
  static void run(const Head& store, const Geometry& shape, const AttendPlan::Work& work, AttendPlan& plan,
                  const AttendPlan::Task& task) {
    const Codec& codec = store.codec();
    const AttendOptions& options = work.options;
    const int group = shape.group_size();
    const int first = task.tile * tile_vectors;
    const int m = std::min(tile_vectors, static_cast<int>(work.positions.size()) * group - first);
    const float scale = options.scale != 0 ? options.scale : 1.f / std::sqrt(static_cast<float>(head_dim));
    const auto place = [&](int j) {  // of vector j in [n, num_q_heads, head_dim]
      const int v = first + j;
      return (static_cast<std::int64_t>(v / group) * shape.num_q_heads + task.kv_head * group + v % group) * head_dim;
    };
    alignas(64) float near_query[tile_vectors * head_dim], body_query[tile_vectors * max_basis_dim<typename Codec::key_type>];
    const int key_dim = basis_dim(codec.keys), value_dim = basis_dim(codec.values);
    // Eight as registers take 64 bytes an element; beside them lie sums of groups.
    constexpr int made_bytes = (80 * max_basis_dim<typename Codec::key_type> + 319) / 64 * 64;
    alignas(64) std::byte made[QueryMemory::places * made_bytes];
    QueryMemory kept{made, made_bytes};
    Tile tile;
    const Near near{};
    const bool body = !store.blocks().empty();
    tile.m = m;
    tile.options = &options;
    for (int j = 0; j < m; ++j) {
      near.prepare(Serial{}, work.queries + place(j), scale, near_query + j * head_dim);
      if (body) codec.keys.prepare(Serial{}, work.queries + place(j), scale, body_query + j * key_dim);
      tile.position[j] = work.positions[static_cast<std::size_t>((first + j) / group)];
    }
    for (int i = 0; i < m * head_dim; ++i) tile.near_sum[i] = 0;
    for (int i = 0; i < m * value_dim; ++i) tile.body_sum[i] = 0;
    tile.value_dim = value_dim;
    const int* where = store.positions().data() + task.first_row;
    for (int i = task.first_segment; i < task.last_segment;) {
      int begin = i, rows = segment(store, i++).rows;
      while (i < task.last_segment && (rows + segment(store, i).rows) * m <= logits_at_once) rows += segment(store, i++).rows;
      const auto visible = tile.see(where, rows);
      where += rows;
#if defined(__GNUC__)
      __builtin_prefetch(where + rows - 1);  // as many rows will be looked at next
#endif
      if (visible.from >= visible.to) continue;
      int end = begin, skipped = 0;  // of the segments with visible rows, and what comes before them
      for (int at = 0; end < i && at < visible.to; ++end) {
        at += segment(store, end).rows;
        if (at <= visible.from) {
          begin = end + 1;
          skipped = at;
        }
      }
      // `then` is what the last segment is followed by.
      const auto each_visible = [&](Bytes Segment::*part, Bytes then, auto f) {
        for (int k = begin, at = skipped; k < end; ++k) {
          const Segment s = segment(store, k);
          const Bytes next = k + 1 < end ? segment(store, k + 1).*part : then;
          f(s, at, SerialReader((s.*part).from, (s.*part).count, next.from, kept));
          at += s.rows;
        }
      };
      each_visible(&Segment::keys, segment(store, begin).values, [&](const Segment& s, int at, const SerialReader& reader) {
        float* const to = tile.logits + at;
        s.near ? add_logits(reader, near, s, near_query, m, to, rows)
               : add_logits(reader, codec.keys, s, body_query, m, to, rows);
      });
      tile.to_weights(rows);
      const Bytes then = i < task.last_segment ? segment(store, i).keys : Bytes{};
      each_visible(&Segment::values, then, [&](const Segment& s, int at, const SerialReader& reader) {
        const float* const from = tile.logits + at;
        s.near ? add_values(reader, near, s, from, m, rows, tile.near_sum)
               : add_values(reader, codec.values, s, from, m, rows, tile.body_sum);
      });
    }
    if (body) {
      for (int j = 0; j < m; ++j) codec.values.finish(Serial{}, tile.body_sum + j * value_dim, tile.near_sum + j * head_dim);
    }

    const auto write = [&](int j, SoftmaxState s, const float* sum) {
      float factor = s.empty() ? 0.f : 1.f;
      if (!options.sink_logits.empty() && !s.empty()) {
        const float logit = options.sink_logits[static_cast<std::size_t>(task.kv_head * group + (first + j) % group)];
        factor = s.raise(logit);
        s.sum += exp_nonpositive(logit - s.max);
      }
      const float inverse = s.empty() ? 0.f : factor / s.sum;
      float* const out = work.out + place(j);
      for (int d = 0; d < head_dim; ++d) out[d] = sum[d] * inverse;
    };
    if (task.num_parts == 1) {
      for (int j = 0; j < m; ++j) write(j, tile.state[j], tile.near_sum + j * head_dim);
      return;
    }
    SoftmaxState* const states = plan.states_.data() + task.first_state;
    float* const partials = plan.partials_.data() + task.first_partial;
    const auto slot = static_cast<std::size_t>(task.part * m);
    std::copy_n(tile.state, m, states + slot);
    std::copy_n(tile.near_sum, m * head_dim, partials + slot * head_dim);
    std::atomic_ref<int> pending(plan.pending_[static_cast<std::size_t>(task.pending)]);
    if (pending.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    // The last part to finish joins them all, always in the same order.
    for (int j = 0; j < m; ++j) {
      SoftmaxState joined;
      float* const sum = tile.near_sum + j * head_dim;
      for (int d = 0; d < head_dim; ++d) sum[d] = 0;
      for (int p = 0; p < task.num_parts; ++p) {
        const auto at = static_cast<std::size_t>(p * m + j);
        const auto factors = joined.merge(states[at]);
        for (int d = 0; d < head_dim; ++d) {
          sum[d] = sum[d] * factors.own + partials[at * head_dim + static_cast<std::size_t>(d)] * factors.other;
        }
      }
      write(j, joined, sum);
    }
  }

 private:
  // Functions of their own: inside others their loops get fewer registers.
  template <class Keys>
  [[gnu::noinline]] static void add_logits(const SerialReader& reader, const Keys& codec, const Segment& s, const float* query,
                                           int m, float* to, int stride) {
    codec.logits(reader, s.keys.from, s.rows, query, m, to, stride);
  }
  template <class Values>
  [[gnu::noinline]] static void add_values(const SerialReader& reader, const Values& codec, const Segment& s,
                                           const float* weights, int m, int stride, float* sum) {
    codec.accumulate(reader, s.values.from, s.rows, weights, m, stride, sum);
  }

  static constexpr int logits_at_once = 2048;  // unless one segment has more; they stay in the nearest cache
  struct Range {
    int from, to;
  };

  static int pieces(int rows) { return (rows + max_block_rows_limit - 1) / max_block_rows_limit; }

  struct Tile {
    alignas(64) float near_sum[tile_vectors * head_dim];                                   // of the dense zones
    alignas(64) float body_sum[tile_vectors * max_basis_dim<typename Codec::value_type>];  // of the body, in its codec's basis
    alignas(64) float logits[tile_vectors * max_block_rows_limit];
    SoftmaxState state[tile_vectors];
    int position[tile_vectors];
    Range seen[tile_vectors];
    int m, value_dim;
    const AttendOptions* options;

    // The rows that each vector sees of those at the positions `where` [n]; returns a range that holds them all.
    Range see(const int* where, int n) {
      Range all{n, 0};
      for (int j = 0; j < m; ++j) {
        const auto not_after = [&](int p) { return static_cast<int>(std::upper_bound(where, where + n, p) - where); };
        seen[j].to = where[n - 1] <= position[j] ? n : not_after(position[j]);
        const int first = options->window == 0 ? std::numeric_limits<int>::min() : position[j] - options->window + 1;
        seen[j].from = where[0] >= first ? 0 : not_after(first - 1);
        if (seen[j].from < seen[j].to) all = {std::min(all.from, seen[j].from), std::max(all.to, seen[j].to)};
      }
      return all;
    }
    // Logits [m, n] become weights; those of rows that a vector does not see become zero.
    void to_weights(int n) {
      for (int j = 0; j < m; ++j) to_weights(j, seen[j].from, seen[j].to, n);
    }
    void to_weights(int j, int from, int to, int n) {
      float* const x = logits + j * n;
      if (from >= to) {
        for (int r = 0; r < n; ++r) x[r] = 0;
        return;
      }
      if (const float cap = options->soft_cap; cap > 0) {
        for (int r = from; r < to; ++r) x[r] = cap * std::tanh(x[r] / cap);
      }
      const bool first = state[j].empty();
      const float factor = state[j].raise(largest_of(x + from, to - from));
      if (factor != 1.f && !first) {
        for (int d = 0; d < head_dim; ++d) near_sum[j * head_dim + d] *= factor;
        for (int d = 0; d < value_dim; ++d) body_sum[j * value_dim + d] *= factor;
      }
      state[j].sum += exponentials(x + from, to - from, state[j].max);
      for (int r = 0; r < from; ++r) x[r] = 0;
      for (int r = to; r < n; ++r) x[r] = 0;
    }
  };
};

}  // namespace kvt::inline v0
