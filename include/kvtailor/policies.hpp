// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Policies by name: those that choose rows. compose.hpp adds the codec, and makes a cache.
#pragma once

#include <string>

#include "kvtailor/any_cache.hpp"
#include "kvtailor/budget/any_allocator.hpp"
#include "kvtailor/select/any_selector.hpp"

namespace kvt::inline v0 {

// The two policies that choose rows, of a composition's names; a message if there is something wrong with them.
struct ParsedPolicies {
  AnyAllocator allocator;
  AnySelector selector;
  std::string message;

  explicit ParsedPolicies(const Composition& names) : message(detail::parse_allocator(names.allocator, allocator)) {
    if (message.empty()) message = detail::parse_selector(names.selector, selector);
    const std::string_view wanted = allocator.made_for();
    if (message.empty() && !wanted.empty() && full_name(names.selector) != wanted) {
      message = names.allocator + " was made for the token selector " + std::string(wanted) + "; this one is " +
                full_name(names.selector);
    }
  }
  EvidenceSet needs() const { return message.empty() ? allocator.active_needs() | selector.active_needs() : EvidenceSet(); }
};

// What the policies of a composition need; nothing for one that cannot be made.
inline EvidenceSet needs_of(const Composition& names) { return ParsedPolicies(names).needs(); }

}  // namespace kvt::inline v0
