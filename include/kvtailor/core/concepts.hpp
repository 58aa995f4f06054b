// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The three policies a cache is composed of. Each is checked where it is defined and again where it is used.
#pragma once

#include <concepts>
#include <cstddef>
#include <span>

#include "kvtailor/core/evidence.hpp"
#include "kvtailor/core/lanes.hpp"
#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

// How much each row of one head matters. It never cuts. Larger = keep first; never NaN. One that needs window_queries says by
// an int member `window` how many the cache keeps for it (64 if it has none).
template <class S>
concept TokenSelector = requires(const S s, const HeadEvidence& seen, std::span<float> score) {
  { S::needs } -> std::convertible_to<EvidenceSet>;
  { s.score(seen, score) }
  noexcept->std::same_as<Status>;
};

// Two members more are looked for:
//   Status join(const LayerScores&) const noexcept   after all heads of a layer are scored, may change their scores
//   EvidenceSet active_needs() const                 what it needs as its fields are: a part of `needs`
// A selector around another has it as the member `base`.
template <class S>
concept JoinsHeads = TokenSelector<S> && requires(const S s, const LayerScores& layer) {
  { s.join(layer) }
  noexcept->std::same_as<Status>;
};

// Queries that are kept for such a selector.
template <TokenSelector S>
constexpr int window_of(const S& selector) {
  if constexpr (requires { selector.base; }) {
    return window_of(selector.base);
  } else if constexpr (requires { selector.window; }) {
    return selector.window > 1 ? selector.window : 1;
  } else {
    return 64;
  }
}

// Whether a selector, or the one it is around, scores rows that come one by one after a cut without queries, see
// HeadEvidence::chosen_before: it says so by a static member `slides`.
template <class S>
constexpr bool slides_after_cut() {
  if constexpr (requires { S::slides; }) {
    return S::slides;
  } else if constexpr (requires(const S& s) { s.base; }) {
    return slides_after_cut<decltype(S::base)>();
  } else {
    return false;
  }
}

// The selector that others are around.
template <class S>
constexpr const auto& innermost(const S& selector) {
  if constexpr (requires { selector.base; }) {
    return innermost(selector.base);
  } else {
    return selector;
  }
}

// What a policy needs as its fields are.
template <class Policy>
constexpr EvidenceSet needs_of(const Policy& policy) {
  if constexpr (requires { policy.active_needs(); }) {
    return policy.active_needs();
  } else {
    return Policy::needs;
  }
}

// Whether the fields of a policy are what they may be, and fit a model. One with fields that may not has a function check() or
// check(geometry), which caches ask before they take a policy.
template <class Policy>
Status check_policy(const Policy& policy, [[maybe_unused]] const Geometry& shape) {
  if constexpr (requires { policy.check(shape); }) {
    return policy.check(shape);
  } else if constexpr (requires { policy.check(); }) {
    return policy.check();
  } else {
    return success();
  }
}

// How many rows each head keeps: sum(keep) == min(want.total, sum(seen)) and floor[h] <= keep[h] <= seen[h].
template <class B>
concept BudgetAllocator = requires(const B b, const BudgetRequest& want, std::span<int> keep) {
  { B::needs } -> std::convertible_to<EvidenceSet>;
  { b.allocate(want, keep) }
  noexcept->std::same_as<Status>;
};

// Rows <-> bytes, and attention on the bytes. A block is 1..max_block_rows rows of one head. All block pointers are
// aligned to 64 bytes. Queries, logits, weights and accumulators are fp32; m query vectors share one block.
template <class C>
concept StorageCodec = requires(const C c, const float* in, float* out, std::byte* bytes, const std::byte* block,
                                const unsigned char* keep, Serial lanes, int n) {
  { C::head_dim } -> std::convertible_to<int>;
  { C::max_block_rows } -> std::convertible_to<int>;
  // bytes a block of n rows takes at most
  { c.max_block_bytes(n) } -> std::same_as<int>;
  // largest Euclidean norm of a row that encode() takes; append() refuses more
  { c.max_row_norm() } -> std::convertible_to<double>;
  // encode rows [n, head_dim]; returns the bytes written; may throw std::bad_alloc
  { c.encode(in, n, bytes) } -> std::same_as<int>;
  // row `n` of a block of `n` rows, out [head_dim]
  { c.decode(block, n, n, out) }
  noexcept;
  // keeps the rows whose mark is not zero, bit for bit; returns the bytes written, no more than the block has
  { c.erase(block, n, keep, bytes) }
  noexcept->std::same_as<int>;
  // the same by all lanes, on every one of them; block and bytes are memory that all see
  { c.erase(lanes, block, n, keep, bytes) }
  noexcept->std::same_as<int>;
  // one query into the codec's basis, multiplied by a scale; out [basis_dim]
  { c.prepare(lanes, in, 1.f, out) }
  noexcept;
  // out[j * stride + r] = prepared[j] . row r
  { c.logits(lanes, block, n, in, n, out, n) }
  noexcept;
  // acc[j] += sum over r of weights[j * stride + r] * row r, in the codec's basis
  { c.accumulate(lanes, block, n, in, n, n, out) }
  noexcept;
  // out += acc taken out of the basis; acc is used up
  { c.finish(lanes, out, out) }
  noexcept;
};

// Prepared queries and sums have basis_dim elements each: head_dim, unless a codec has a function basis_dim() that says more,
// and the most it can say as max_basis_dim.
template <StorageCodec C>
inline constexpr int max_basis_dim = [] {
  if constexpr (requires { C::max_basis_dim; }) {
    return C::max_basis_dim;
  } else {
    return C::head_dim;
  }
}();
template <StorageCodec C>
KVT_HD constexpr int basis_dim(const C& codec) {
  if constexpr (requires { codec.basis_dim(); }) {
    return codec.basis_dim();
  } else {
    return C::head_dim;
  }
}

// Whether the fields of a codec are what they may be. One with fields that may not has a function of this name, which caches
// ask before they take a codec.
template <StorageCodec C>
Status validate(const C& codec) {
  if constexpr (requires { codec.validate(); }) {
    return codec.validate();
  } else {
    return success();
  }
}

// A codec whose rows do not depend on one another, so that rows of several blocks can be packed into one.
template <class C>
concept RowWiseCodec = StorageCodec<C> && requires(const C c, const std::byte* from, std::byte* to, int n) {
  { c.copy_row(from, n, n, to, n, n) }
  noexcept;  // row of a block of n rows -> row of another
};

// One whose rows any lane group encodes, copies and reads: see RowCodec.
template <class C>
concept LaneRowCodec = RowWiseCodec<C> &&
    requires(const C c, SimulatedWarp lanes, const float* x, float* scratch, const std::byte* from, std::byte* to, int n) {
  { C::row_bytes } -> std::convertible_to<int>;
  { C::scratch_floats } -> std::convertible_to<int>;
  c.encode_row(lanes, x, to, n, n, scratch);
  c.copy_row(lanes, from, n, n, to, n, n);
  { c.row_scale(from, n) } -> std::same_as<float>;
};

}  // namespace kvt::inline v0
