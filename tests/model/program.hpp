// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Runs kvt-llm as a user would and keeps what it prints.
#pragma once

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

struct Outcome {
  int exit_code = -1;  // -1: ended by a signal
  std::string output;
  std::string errors;
};

// A folder that is gone with the object.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "kvtailor-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline std::string environment(const char* name) {
  const char* const value = std::getenv(name);
  REQUIRE_MESSAGE((value != nullptr && *value != '\0'), name << " must be set");
  return value;
}

// A long real document.
inline std::string text_path() { return environment("KVT_SOURCE_DIR") + "/LICENSE"; }

inline std::string read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline std::string quoted(const std::string& argument) {
  std::string out = "'";
  for (const char c : argument) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

inline Outcome run_program(const std::vector<std::string>& arguments) {
  const TemporaryFolder folder;
  std::string command = quoted(environment("KVT_LLM_BIN"));
  for (const std::string& argument : arguments) command += " " + quoted(argument);
  command += " > " + quoted(folder.file("out")) + " 2> " + quoted(folder.file("err")) + " < /dev/null";
  const int status = std::system(command.c_str());
  Outcome outcome{-1, read_all(folder.file("out")), read_all(folder.file("err"))};
  // A shell reports a signal of its child as 128 + its number.
  if (WIFEXITED(status) && WEXITSTATUS(status) < 128) outcome.exit_code = WEXITSTATUS(status);
  return outcome;
}

inline Outcome succeed(const std::vector<std::string>& arguments) {
  Outcome outcome = run_program(arguments);
  INFO(outcome.errors);
  REQUIRE(outcome.exit_code == 0);
  return outcome;
}
