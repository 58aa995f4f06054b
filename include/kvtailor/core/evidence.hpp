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
  positions = 1 << 0,       // place of each row in the text
  keys = 1 << 1,            // stored keys, post-RoPE
  values = 1 << 2,          // stored values
  window_queries = 1 << 3,  // the last queries before the cut; the engine calls observe()
  scores = 1 << 4,          // allocators only: the selector's scores of all heads
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

// What the cache finds by itself, and all that an engine which also calls observe() provides.
inline constexpr EvidenceSet cache_evidence = Evidence::positions | Evidence::keys | Evidence::values | Evidence::scores;
inline constexpr EvidenceSet full_evidence = cache_evidence | Evidence::window_queries;

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
  std::span<float> scratch;               // at least 4 * (rows + head_dim) floats to use freely

  int num_rows() const { return static_cast<int>(positions.size()); }
};

// How many rows may stay, and what is known of each head. Heads are numbered layer * num_kv_heads + kv_head.
struct BudgetRequest {
  std::int64_t total = 0;  // rows to keep over all heads
  int num_layers = 0;
  int num_kv_heads = 0;
  std::span<const int> seen;      // [heads] rows there are
  std::span<const int> floor;     // [heads] rows that stay whatever happens; floor <= seen
  std::span<const float> scores;  // [sum of seen] scores of all heads, one head after another; protected rows +inf
};

}  // namespace kvt::inline v0
