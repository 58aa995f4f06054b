// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// From what a user asks to keep to what an allocator is asked for, and the check of its answer.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>

#include "kvtailor/core/evidence.hpp"

namespace kvt::inline v0 {

// The rows of all heads that `retain` allows; all of them for a budget in bytes, which depends on who keeps them.
// floor_rows: sink and recent rows that are never dropped. total_bytes: what the cache holds now.
inline Status resolve_rows(Retain retain, int num_heads, std::int64_t rows, std::int64_t floor_rows, long long total_bytes,
                           std::int64_t& total) {
  const double heads = num_heads;
  const auto all = static_cast<double>(rows);
  if (rows == 0) return error(Errc::bad_budget, "there are {} rows; nothing can be compressed", 0);
  switch (retain.unit) {
    case Retain::Unit::rows:
      if (!(retain.amount >= 1)) {
        return error(Errc::bad_budget, "a budget of {} rows a head; it must be at least 1", retain.amount);
      }
      if (retain.amount * heads > all) {
        return error(Errc::bad_budget, "a budget of {} rows a head is above the {} there are", retain.amount, all / heads);
      }
      total = static_cast<std::int64_t>(retain.amount * heads);
      break;
    case Retain::Unit::ratio:
      if (!(retain.amount > 0 && retain.amount <= 1)) {
        return error(Errc::bad_budget, "a budget of {} of the rows; it must be above 0 and at most 1", retain.amount);
      }
      total = std::llround(retain.amount * all);
      break;
    case Retain::Unit::bytes:
      if (!(retain.amount >= 1)) return error(Errc::bad_budget, "a budget of {} bytes; it must be at least 1", retain.amount);
      if (retain.amount > static_cast<double>(total_bytes)) {
        return error(Errc::bad_budget, "a budget of {} bytes is above the {} there are", retain.amount,
                     static_cast<double>(total_bytes));
      }
      total = rows;
      break;
  }
  if (total < floor_rows) {
    return error(Errc::bad_budget, "a budget of {} rows in all is below the {} sink and recent rows that are never dropped",
                 static_cast<double>(total), static_cast<double>(floor_rows));
  }
  return success();
}

// keep [heads] meets the total and every head's bounds.
inline Status check_allocation(const BudgetRequest& want, std::span<const int> keep) {
  std::int64_t sum = 0;
  for (std::size_t h = 0; h < keep.size(); ++h) {
    if (keep[h] < want.floor[h]) {
      return error(Errc::bad_policy, "the budget allocator gave a head {} rows; {} are protected", keep[h], want.floor[h]);
    }
    if (keep[h] > want.seen[h]) {
      return error(Errc::bad_policy, "the budget allocator gave a head {} rows; at most {} can be kept", keep[h], want.seen[h]);
    }
    sum += keep[h];
  }
  if (sum != want.total) {
    return error(Errc::bad_policy, "the budget allocator gave {} rows in all; {} were asked for", static_cast<double>(sum),
                 static_cast<double>(want.total));
  }
  return success();
}

// What the allocator answers, checked.
template <class Budget>
Status allocate_rows(const Budget& budget, const BudgetRequest& want, std::span<int> keep) {
  KVT_TRY(budget.allocate(want, keep));
  return check_allocation(want, keep);
}

// Asks for the largest number of rows whose keep [heads] takes at most `bytes`: want.total. bytes_of(keep) is what a cache
// takes then; more rows do not take less.
template <class Budget, class BytesOf>
Status fit_bytes(const Budget& budget, double bytes, std::int64_t rows, std::int64_t floor_rows, BudgetRequest& want,
                 std::span<int> keep, BytesOf&& bytes_of) {
  want.total = floor_rows;
  KVT_TRY(allocate_rows(budget, want, keep));
  if (const double least = static_cast<double>(bytes_of(keep)); least > bytes) {
    return error(Errc::bad_budget, "a budget of {} bytes is below the {} that sink rows, recent rows and tables take", bytes,
                 least);
  }
  std::int64_t fits = floor_rows, over = rows + 1;
  while (over - fits > 1) {
    want.total = fits + (over - fits) / 2;
    KVT_TRY(allocate_rows(budget, want, keep));
    (static_cast<double>(bytes_of(keep)) <= bytes ? fits : over) = want.total;
  }
  want.total = fits;
  return success();
}

}  // namespace kvt::inline v0
