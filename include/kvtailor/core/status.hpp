// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Status: the one error channel of the library. A value of static text and two numbers, so that it needs no memory,
// can be returned from a device and still names what was given and what would be accepted.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

#include "kvtailor/core/config.hpp"

namespace kvt::inline v0 {

enum class Errc : int {
  ok = 0,
  bad_shape,     // a dimension, a count or a null pointer
  bad_value,     // a NaN, an infinity or a number out of range
  bad_position,  // a position that goes back or is out of range
  bad_budget,    // a budget of zero, above what is there or below what is protected
  bad_name,      // an unknown policy, codec or parameter
  bad_policy,    // a policy broke its contract (a NaN score, counts that do not add up)
  no_evidence,   // a policy needs what the cache was not told
  out_of_memory,
  device,       // `native` holds the device's own code
  unsupported,  // a model, or what its engine does, that no cache can serve
  stopped,      // by an engine's own wish
};

struct [[nodiscard]] Status {
  Errc code = Errc::ok;
  int native = 0;
  const char* text = "";  // static; the first two {} stand for `value` and `accepted`
  double value = 0;
  double accepted = 0;

  KVT_HD constexpr bool ok() const { return code == Errc::ok; }

  // One sentence, for people.
  std::string message() const {
    std::string out;
    const double numbers[2] = {value, accepted};
    int next = 0;
    for (const char* p = text; *p != '\0'; ++p) {
      if (p[0] == '{' && p[1] == '}' && next < 2) {
        const double x = numbers[next++];
        char buffer[32];
        const bool whole = std::isfinite(x) && x == std::floor(x) && std::fabs(x) < 1e15;
        std::snprintf(buffer, sizeof buffer, whole ? "%.0f" : "%.6g", x);
        out += buffer;
        ++p;
      } else {
        out += *p;
      }
    }
    return out;
  }
};

KVT_HD constexpr Status success() { return {}; }

KVT_HD constexpr Status error(Errc code, const char* text, double value = 0, double accepted = 0) {
  return {code, 0, text, value, accepted};
}

}  // namespace kvt::inline v0

// Leaves the enclosing function with the status of an expression, which may have commas, unless that is success.
#define KVT_TRY(...)                                                                         \
  do {                                                                                       \
    if (const ::kvt::Status kvt_status = (__VA_ARGS__); !kvt_status.ok()) return kvt_status; \
  } while (false)
