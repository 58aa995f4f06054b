// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The shape of a model's attention, and what a cache may be told: how a layer attends, how much to keep, in which zones.
#pragma once

#include <memory_resource>
#include <span>

#include "kvtailor/core/rope.hpp"
#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

// Head dims the library is built and tested for; 512 on the host alone.
inline constexpr int supported_head_dims[] = {40, 64, 80, 96, 112, 128, 192, 256, 512};

constexpr bool is_supported_head_dim(int head_dim) {
  for (int d : supported_head_dims) {
    if (d == head_dim) return true;
  }
  return false;
}

// Of one layer; see Geometry.
struct LayerShape {
  int num_kv_heads = 0, num_q_heads = 0, head_dim = 0;
  friend constexpr bool operator==(const LayerShape&, const LayerShape&) = default;
};

struct Geometry {
  int num_layers = 0;
  int num_kv_heads = 0;
  int num_q_heads = 0;  // a multiple of num_kv_heads; query head h reads KV head h / group_size()
  int head_dim = 0;

  constexpr int group_size() const { return num_q_heads / num_kv_heads; }
  constexpr int num_heads() const { return num_layers * num_kv_heads; }
  constexpr LayerShape layer() const { return {num_kv_heads, num_q_heads, head_dim}; }
  friend constexpr bool operator==(const Geometry&, const Geometry&) = default;

  constexpr Status validate() const {
    if (num_layers < 1 || num_layers > 4096) {
      return error(Errc::bad_shape, "num_layers is {}; it must be between 1 and 4096", num_layers);
    }
    if (num_kv_heads < 1 || num_kv_heads > 4096) {
      return error(Errc::bad_shape, "num_kv_heads is {}; it must be between 1 and 4096", num_kv_heads);
    }
    if (num_q_heads < num_kv_heads || num_q_heads > 65536 || num_q_heads % num_kv_heads != 0) {
      return error(Errc::bad_shape, "num_q_heads is {}; it must be a multiple of num_kv_heads, which is {}", num_q_heads,
                   num_kv_heads);
    }
    if (!is_supported_head_dim(head_dim)) {
      return error(Errc::bad_shape, "head_dim is {}; it must be 40, 64, 80, 96, 112, 128, 192, 256 or 512", head_dim);
    }
    return success();
  }
};

// How one layer attends. The same options serve attend() and the queries given to observe().
struct AttendOptions {
  float scale = 0;                          // factor of q.k; 0 means 1/sqrt(head_dim)
  int window = 0;                           // sliding window: a query at p sees positions in (p - window, p]; 0 means all
  float soft_cap = 0;                       // logits become soft_cap * tanh(logit / soft_cap); 0 means none
  std::span<const float> sink_logits = {};  // [num_q_heads] learned logits that take weight but add no value, or empty
};

// How much of a cache to keep. A budget counts every row that is kept: sinks, body and recent rows alike.
struct Retain {
  enum class Unit { rows, ratio, bytes };
  Unit unit;
  double amount;

  // n rows a KV head on average, 1 <= n <= rows there are.
  static constexpr Retain rows(long long n) { return {Unit::rows, static_cast<double>(n)}; }
  // the share r of all rows there are, 0 < r <= 1.
  static constexpr Retain ratio(double r) { return {Unit::ratio, r}; }
  // at most n bytes for the whole cache as memory().total() measures them afterwards.
  static constexpr Retain bytes(long long n) { return {Unit::bytes, static_cast<double>(n)}; }
};

// The matrix that takes the heads of a layer back to the hidden state: weights [width, num_q_heads * head_dim], as
// o_proj.weight.
struct OutputProjection {
  const float* weights = nullptr;
  int width = 0;  // of the hidden state
};

// The arrays must outlive the cache.
struct CacheOptions {
  int sink_rows = 4;     // first rows of the text: dense, never dropped
  int recent_rows = 32;  // newest rows: dense, never dropped. A block or, staggered, one and a half more may be dense
  int block_rows = 128;  // rows encoded together, 1 .. 512
  std::pmr::memory_resource* memory = nullptr;  // null: the default resource; must outlive the cache
  // What only some policies need to know of the model; see their heads.
  std::span<const Rope> ropes = {};                           // one for all layers, or one a layer
  std::span<const OutputProjection> output_projections = {};  // one a layer
  // Full blocks wait for their head's turn, half a block at most, so that no token has to wait for those of all heads. Without,
  // they are encoded at once, as a device does.
  bool staggered = true;
};

// Bytes a cache holds from its memory resource right now; total() is exactly what it asked for and has not given back.
struct Memory {
  long long payload_bytes = 0;     // codes, scales and dense rows in use
  long long index_bytes = 0;       // positions and block tables in use
  long long evidence_bytes = 0;    // what is kept for policies: queries, moments, attention
  long long slack_bytes = 0;       // allocated and not in use (growth room, padding)
  long long dense_fp16_bytes = 0;  // what all rows ever appended (and not truncated) would take as plain fp16

  constexpr long long total() const { return payload_bytes + index_bytes + evidence_bytes + slack_bytes; }
};

}  // namespace kvt::inline v0
