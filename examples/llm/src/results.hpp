// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Results: what long work has found out so far, in a file of JSON lines from which it can go on.
#pragma once

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

namespace kvt_llm {

class Results {
 public:
  Results() = default;  // in memory alone
  // Reads what an earlier run with the same parameters left, to its last whole line, and goes on there. Throws
  // std::runtime_error with one sentence if the file is of other parameters, or something else.
  Results(const std::string& path, const nlohmann::json& parameters);

  // Null if it is not there yet.
  const nlohmann::json* find(const nlohmann::json& key) const;
  void add(const nlohmann::json& key, const nlohmann::json& value);

 private:
  std::string path_;
  std::ofstream file_;
  std::map<std::string, nlohmann::json> known_;
};

}  // namespace kvt_llm
