// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What a cache refuses: checked once, where data enters.
#pragma once

#include <cmath>
#include <limits>
#include <span>

#include "kvtailor/core/evidence.hpp"
#include "kvtailor/core/geometry.hpp"
#include "kvtailor/core/half.hpp"

namespace kvt::inline v0 {

// Elements of queries, times the scale, and of rows that are not fp16. Far above any model's; products of the two stay finite
// in fp32, whatever the head dim.
inline constexpr float max_query_element = 1e16f;
inline constexpr float max_row_element = 1e18f;

namespace detail {

inline Status check_positions(std::span<const int> positions, int end) {
  for (const int position : positions) {
    if (position < end || position == std::numeric_limits<int>::max()) {
      return error(Errc::bad_position, "position {} goes back; it must be at least {} and below 2147483647", position, end);
    }
    end = position + 1;
  }
  return success();
}

struct RowSentences {
  const char *element, *norm;
};

// rows [n, head_dim]
template <int head_dim, class T>
Status check_rows(const T* rows, std::size_t n, float max_element, double max_norm, const RowSentences& sentences) {
  if (rows == nullptr) return error(Errc::bad_shape, "the pointer to the rows is null");
  for (std::size_t row = 0; row < n; ++row, rows += head_dim) {
    // In double: the square of a large element leaves fp32.
    double square = 0;
    for (int d = 0; d < head_dim; ++d) {
      const float x = to_float(rows[d]);
      if (!(x <= max_element && x >= -max_element)) {
        return error(Errc::bad_value, sentences.element, static_cast<double>(x), static_cast<double>(max_element));
      }
      square += static_cast<double>(x) * static_cast<double>(x);
    }
    if (!(square <= max_norm * max_norm)) return error(Errc::bad_value, sentences.norm, std::sqrt(square), max_norm);
  }
  return success();
}

inline Status check_attend(const Geometry& shape, const float* queries, std::span<const int> positions,
                           const AttendOptions& attend) {
  if (queries == nullptr && !positions.empty()) return error(Errc::bad_shape, "the pointer to the queries is null");
  if (!std::isfinite(attend.scale)) {
    return error(Errc::bad_value, "scale is {}; it must be finite", static_cast<double>(attend.scale));
  }
  if (attend.window < 0) return error(Errc::bad_value, "window is {}; it must be zero (none) or more", attend.window);
  if (!(attend.soft_cap >= 0) || !std::isfinite(attend.soft_cap)) {
    return error(Errc::bad_value, "soft_cap is {}; it must be zero (none) or more", static_cast<double>(attend.soft_cap));
  }
  if (!attend.sink_logits.empty() && static_cast<int>(attend.sink_logits.size()) != shape.num_q_heads) {
    return error(Errc::bad_shape, "there are {} sink logits; num_q_heads is {}", static_cast<double>(attend.sink_logits.size()),
                 shape.num_q_heads);
  }
  for (const float logit : attend.sink_logits) {
    if (!std::isfinite(logit)) {
      return error(Errc::bad_value, "a sink logit is {}; it must be finite", static_cast<double>(logit));
    }
  }
  const float most = std::fabs(attend.scale) > 1 ? max_query_element / std::fabs(attend.scale) : max_query_element;
  const std::size_t count =
      positions.size() * static_cast<std::size_t>(shape.num_q_heads) * static_cast<std::size_t>(shape.head_dim);
  // Without a branch first, so that the loop is vectorised.
  int bad = 0;
  for (std::size_t i = 0; i < count; ++i) bad |= std::fabs(queries[i]) <= most ? 0 : 1;
  for (std::size_t i = 0; i < count && bad != 0; ++i) {
    if (!(std::fabs(queries[i]) <= most)) {
      return error(Errc::bad_value, "a query has the element {}; it must be finite and at most {} in size",
                   static_cast<double>(queries[i]), static_cast<double>(most));
    }
  }
  for (const int position : positions) {
    if (position < 0) return error(Errc::bad_position, "a query is at position {}; it must be zero or more", position);
  }
  return success();
}

// What the options tell of the model, and that it is what policies need.
template <class Options>
Status check_model(const Geometry& shape, const Options& options, EvidenceSet needs) {
  const auto layers = static_cast<std::size_t>(shape.num_layers);
  if (options.ropes.size() > 1 && options.ropes.size() != layers) {
    return error(Errc::bad_shape, "there are {} ropes; it must be one, or one for each of {} layers",
                 static_cast<double>(options.ropes.size()), shape.num_layers);
  }
  for (const Rope& rope : options.ropes) KVT_TRY(rope.validate(shape.head_dim));
  if (!options.output_projections.empty() && options.output_projections.size() != layers) {
    return error(Errc::bad_shape, "there are {} output projections; it must be one for each of {} layers",
                 static_cast<double>(options.output_projections.size()), shape.num_layers);
  }
  for (const OutputProjection& output : options.output_projections) {
    if (output.weights == nullptr || output.width < 1) {
      return error(Errc::bad_shape, "an output projection has the width {}, or no weights", output.width);
    }
  }
  if ((needs.has(Evidence::rope) || needs.has(Evidence::query_moments)) && options.ropes.empty()) {
    return error(Errc::no_evidence, "a policy turns queries or keys back: give the model's RoPE, ropes of the cache's options");
  }
  if (needs.has(Evidence::output_projection) && options.output_projections.empty()) {
    return error(Errc::no_evidence,
                 "a policy looks through the output projection: give output_projections of the cache's options");
  }
  return success();
}

}  // namespace detail

}  // namespace kvt::inline v0
