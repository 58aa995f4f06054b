// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Evidence: what policies look at. A policy names what it needs, the cache collects that and nothing else.
#pragma once

#include <cstdint>
#include <span>

#include "kvtailor/core/geometry.hpp"

namespace kvt::inline v0 {

enum class Evidence : std::uint32_t {
  positions = 1 << 0,          // place of each row in the text
  keys = 1 << 1,               // stored keys, post-RoPE
  values = 1 << 2,             // stored values
  window_queries = 1 << 3,     // the last queries before the cut; the engine calls observe()
  scores = 1 << 4,             // allocators only: the selector's scores of all heads
  query_moments = 1 << 5,      // mean and covariance of queries before RoPE; observe(), and CacheOptions::ropes
  attention = 1 << 6,          // what queries gave each row; observe()
  rope = 1 << 7,               // how keys were turned; CacheOptions::ropes
  output_projection = 1 << 8,  // CacheOptions::output_projections
  reconstruction = 1 << 10,    // the attention is that of queries that repeat the context: see Reconstruction
  layer_similarity = 1 << 9,   // allocators only: how little attention changes the hidden state; observe_hidden()
};

struct EvidenceSet {
  std::uint32_t bits = 0;

  constexpr EvidenceSet() = default;
  constexpr EvidenceSet(Evidence one) : bits(static_cast<std::uint32_t>(one)) {}
  // Implicit, since nvcc writes a default template argument of this type as {31}.
  constexpr EvidenceSet(std::uint32_t all) : bits(all) {}
  constexpr bool has(Evidence one) const { return (bits & static_cast<std::uint32_t>(one)) != 0; }
  constexpr bool empty() const { return bits == 0; }
  constexpr EvidenceSet without(EvidenceSet other) const {
    other.bits = bits & ~other.bits;
    return other;
  }
  friend constexpr EvidenceSet operator|(EvidenceSet a, EvidenceSet b) {
    a.bits |= b.bits;
    return a;
  }
  friend constexpr bool operator==(EvidenceSet, EvidenceSet) = default;
};

constexpr EvidenceSet operator|(Evidence a, Evidence b) { return EvidenceSet(a) | EvidenceSet(b); }

// Evidence that queries are collected for.
inline constexpr EvidenceSet query_evidence = Evidence::window_queries | Evidence::query_moments | Evidence::attention;

// What the cache finds by itself or is told by its options, and all that an engine which also calls observe() and
// observe_hidden() provides.
inline constexpr EvidenceSet cache_evidence =
    Evidence::positions | Evidence::keys | Evidence::values | Evidence::scores | Evidence::rope | Evidence::output_projection;
inline constexpr EvidenceSet full_evidence =
    cache_evidence | query_evidence | Evidence::reconstruction | Evidence::layer_similarity;

// The softmax weights that observed queries gave one row.
struct RowAttention {
  float sum = 0;      // over queries; mean over the group's query heads
  float largest = 0;  // of any query and query head
  int queries = 0;    // that could see the row
};

// Of all queries observed since the last cut but those of sink rows, turned back to what they were before RoPE.
struct QueryMoments {
  long long count = 0;
  const float* mean = nullptr;        // [group_size, head_dim]
  const float* covariance = nullptr;  // [group_size, head_dim, head_dim]
};

// One head's rows, oldest first, with what the selector asked for; the rest is empty.
struct HeadEvidence {
  int layer = 0;
  int kv_head = 0;
  int head_dim = 0;
  int group_size = 0;
  std::span<const int> positions;         // [rows], increasing
  std::span<const float> keys;            // [rows, head_dim]
  std::span<const float> values;          // [rows, head_dim]
  const float* window_queries = nullptr;  // query w of the group's head g starts at w * window_stride + g * head_dim
  std::int64_t window_stride = 0;
  std::span<const int> window_positions;  // [window], increasing
  AttendOptions attend;                   // the options that came with the queries
  QueryMoments moments;
  std::span<const RowAttention> attention;  // [rows]
  const Rope* rope = nullptr;
  // Of the group's first query head; the next is head_dim elements on. Row o of the projection starts at o * output_stride.
  OutputProjection output;
  std::int64_t output_stride = 0;
  int end_position = 0;      // one past the last position of the layer
  double share = 1;          // of all rows that the cut is asked to keep
  int chosen_before = 0;     // while rows come one by one: those before this position were chosen by an earlier cut
  std::span<float> scratch;  // at least 4 * (rows + head_dim) floats to use freely

  int num_rows() const { return static_cast<int>(positions.size()); }
};

// The heads of one layer, after each was scored, for a selector that lets them decide together. Heads hold rows of their own:
// what they have in common are positions.
struct LayerScores {
  std::span<const std::span<const int>> positions;  // [num_kv_heads], [rows]
  std::span<const std::span<float>> scores;         // likewise
};

// How many rows may stay, and what is known of each head. Heads are numbered layer * num_kv_heads + kv_head.
struct BudgetRequest {
  std::int64_t total = 0;  // rows to keep over all heads
  int num_layers = 0;
  int num_kv_heads = 0;
  std::span<const int> seen;                 // [heads] rows there are
  std::span<const int> floor;                // [heads] rows that stay whatever happens; floor <= seen
  std::span<const float> scores;             // [sum of seen] scores of all heads, one head after another; protected rows +inf
  std::span<const float> similarity = {};    // [layers] mean cosine of hidden states before and after attention
  std::span<const long long> appended = {};  // [layers] rows ever, dropped ones too; empty: not known
};

}  // namespace kvt::inline v0
