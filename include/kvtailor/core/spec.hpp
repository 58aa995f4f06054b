// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Spec: a policy's name with its parameters, "name:key=value,key=value" or, around another policy, "name:key=value(name:...)".
#pragma once

#include <charconv>
#include <string>
#include <string_view>

namespace kvt::inline v0::detail {

// Read one parameter at a time.
class Spec {
 public:
  explicit Spec(std::string_view text) {
    const auto open = text.find('(');
    if (open != text.npos) {
      wraps = true;
      // The last parenthesis is this one's; what comes after it, or is not there, makes the name one that nobody knows.
      if (!text.ends_with(')')) {
        name = text;
        return;
      }
      inner = text.substr(open + 1, text.size() - open - 2);
      text = text.substr(0, open);
    }
    name = text.substr(0, text.find(':'));
    if (name.size() < text.size()) rest_ = text.substr(name.size() + 1);
  }
  // False at the end.
  bool next(std::string_view& key, std::string_view& value) {
    if (rest_.empty()) return false;
    const auto item = rest_.substr(0, rest_.find(','));
    rest_ = item.size() < rest_.size() ? rest_.substr(item.size() + 1) : std::string_view();
    key = item.substr(0, item.find('='));
    value = key.size() < item.size() ? item.substr(key.size() + 1) : std::string_view();
    return true;
  }
  std::string_view name, inner;
  bool wraps = false;

 private:
  std::string_view rest_;
};

template <class T>
bool read_number(std::string_view text, T low, T high, T& out) {
  T x{};
  const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), x);
  if (failure != std::errc() || end != text.data() + text.size() || !(x >= low && x <= high)) return false;
  out = x;
  return true;
}

// One of two words.
inline bool read_choice(std::string_view text, std::string_view no, std::string_view yes, bool& out) {
  if (text != no && text != yes) return false;
  out = text == yes;
  return true;
}

inline std::string bad_parameter(std::string_view policy, std::string_view key, std::string_view value,
                                 std::string_view known) {
  return std::string(policy) + " has no parameter " + std::string(key) + "=" + std::string(value) + "; it takes " +
         std::string(known);
}

// Reads all parameters by read(key, value), which says whether it knows them. An empty message is success.
template <class Read>
std::string read_parameters(Spec& spec, std::string_view known, Read&& read) {
  std::string_view key, value;
  while (spec.next(key, value)) {
    if (!read(key, value)) return bad_parameter(spec.name, key, value, known);
  }
  return {};
}

}  // namespace kvt::inline v0::detail
