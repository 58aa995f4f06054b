// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Errors of the program as values: one sentence that names what was given and what would be accepted.
#pragma once

#include <sstream>
#include <string>
#include <utility>
#include <variant>

#include "kvtailor/core/status.hpp"

namespace kvt::llm {

struct Error {
  std::string message;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
Error failure(const Parts&... parts) {
  return {concat(parts...)};
}

template <class T = std::monostate>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}
  Result(Error error) : state_(std::move(error)) {}

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }
  T& operator*() { return std::get<0>(state_); }
  T* operator->() { return &std::get<0>(state_); }
  const Error& error() const { return std::get<1>(state_); }

 private:
  std::variant<T, Error> state_;
};

using Done = Result<>;
inline Done done() { return std::monostate{}; }

// A failure of the library, as a failure of the program.
inline Done from(const Status& status) {
  if (status.ok()) return done();
  return failure(status.message());
}

}  // namespace kvt::llm

// Leaves the enclosing function with the error of a Result expression unless it has a value.
#define KVT_LLM_TRY(expression)                                          \
  do {                                                                   \
    if (auto kvt_result = (expression); !kvt_result.ok()) return kvt_result.error(); \
  } while (false)
