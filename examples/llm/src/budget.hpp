// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// When and how far a program compresses a cache that keeps growing.
#pragma once

#include <optional>

#include "kvtailor/any_cache.hpp"
#include "result.hpp"

namespace kvt::llm {

struct RowCounts {
  double mean = 0;
  int min = 0;
  int max = 0;
};
RowCounts count_rows(const AnyCache& cache);  // over all heads of all layers

// A budget that holds while rows are added. A ratio is a share of all rows appended so far, so that a cache that is
// compressed again and again still keeps that share; rows and bytes are upper limits.
struct Budget {
  std::optional<Retain> retain;  // none: keep everything

  // Compresses if the cache holds more. Early on, when a share would be less than the `protected_rows` of a head
  // (sink and recent rows), those are kept; with `protected_rows` 0 such a budget is an error.
  Done enforce(AnyCache& cache, int protected_rows) const;
};

}  // namespace kvt::llm
