// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See results.hpp.
#include "results.hpp"

#include <filesystem>
#include <iterator>
#include <stdexcept>

namespace kvt_llm {

using nlohmann::json;

namespace {

// Bytes that are no UTF-8, as file names may have, cannot be written as they are.
std::string line_of(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace) + "\n"; }

void check_parameters(const std::string& path, const json& have, const json& want) {
  if (!have.is_object() || have.value("format", json()) != want.at("format")) {
    throw std::runtime_error(path + " does not hold results of this command; give --resume a file of its own");
  }
  for (const auto& [name, value] : want.items()) {
    const json old = have.value(name, json());
    if (old != value) {
      throw std::runtime_error("the results in " + path + " were made with another " + name + " (" + old.dump() + ", now " +
                               value.dump() + "); give --resume another file");
    }
  }
}

}  // namespace

Results::Results(const std::string& path, const json& parameters) : path_(path) {
  const std::string first = line_of(parameters);
  std::string text;
  if (std::filesystem::exists(path)) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot read " + path);
    text.assign(std::istreambuf_iterator<char>(stream), {});
  }
  std::size_t whole = 0;  // bytes
  for (std::size_t end; (end = text.find('\n', whole)) != text.npos; whole = end + 1) {
    const json line = json::parse(text.begin() + static_cast<std::ptrdiff_t>(whole),
                                  text.begin() + static_cast<std::ptrdiff_t>(end), nullptr, false);
    if (whole == 0) {
      // What is written is compared as it is read back.
      check_parameters(path, line, json::parse(first));
    } else if (line.is_object() && line.contains("key") && line.contains("value")) {
      known_[line_of(line["key"])] = line["value"];
    } else {
      throw std::runtime_error(path +
                               " has a line that is no result: " + text.substr(whole, std::min(end - whole, std::size_t{40})));
    }
  }
  // A run that was killed may leave half a line. Anything else without an end of line is not ours to cut.
  if (whole == 0 && !first.starts_with(text)) check_parameters(path, {}, parameters);
  if (whole < text.size()) std::filesystem::resize_file(path, whole);
  file_.open(path, std::ios::binary | std::ios::app);
  if (whole == 0) file_ << first;
  if (!file_.flush()) throw std::runtime_error("cannot write " + path);
}

const json* Results::find(const json& key) const {
  const auto found = known_.find(line_of(key));
  return found != known_.end() ? &found->second : nullptr;
}

void Results::add(const json& key, const json& value) {
  known_[line_of(key)] = value;
  if (path_.empty()) return;
  file_ << line_of({{"key", key}, {"value", value}});
  if (!file_.flush()) throw std::runtime_error("cannot write " + path_);
}

}  // namespace kvt_llm
