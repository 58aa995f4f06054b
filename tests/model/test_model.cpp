// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A real model: the dense cache says what llama.cpp says, a tailored one still finds a fact in a long document.
// Runs the program KVT_LLM_BIN with the model KVT_MODEL, as a user would.
#include <doctest/doctest.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <nlohmann/json.hpp>

#include "model/program.hpp"

using nlohmann::json;

namespace {

json run_json(std::vector<std::string> arguments) {
  arguments.insert(arguments.end(), {"--json", "-"});
  const Outcome outcome = run_program(arguments);
  INFO(outcome.errors);
  REQUIRE(outcome.exit_code == 0);
  return json::parse(outcome.output);
}

// Asks for a word hidden in the middle of LICENSE, as tools/demo does.
std::vector<std::string> ask_for_word(std::vector<std::string> policies) {
  std::vector<std::string> arguments = {"generate",
                                        "--document",
                                        text_path(),
                                        "--max-tokens",
                                        "24",
                                        "--plant",
                                        "The special magic word for the harbour is saffron.",
                                        "--question",
                                        "What is the special magic word for the harbour mentioned in the text?"};
  arguments.insert(arguments.end(), policies.begin(), policies.end());
  return arguments;
}

bool answers(const json& run) {
  std::string answer = run["answer"];
  std::transform(answer.begin(), answer.end(), answer.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return answer.find("saffron") != std::string::npos;
}

}  // namespace

// 17 whole chunks: below 64 queries llama.cpp attends by another path, which rounds more; see docs/decisions.md.
TEST_CASE("the dense fp16 cache computes what llama.cpp computes, on F32 weights") {
  const json result = run_json({"parity", "--text", text_path(), "--tokens", "2176"});
  CHECK(result["mean_kl"].get<double>() < 1e-5);
  CHECK(result["same_top"].get<double>() >= 0.999);
}

TEST_CASE("a quarter of the rows, at 3 and 2 bits, still holds the answer") {
  const json result = run_json(ask_for_word(
      {"--allocator", "adaptive", "--selector", "snap_kv", "--codec", "turbo3/turbo2", "--retain", "0.25", "--compare"}));
  const json& full = result["full"];
  const json& tailored = result["tailored"];
  INFO("full: " << full["answer"] << ", tailored: " << tailored["answer"]);
  CHECK(answers(full));
  CHECK(answers(tailored));

  const double rows = result["document_tokens"].get<double>() + result["question_tokens"].get<double>();
  CHECK(full["mean_rows"].get<double>() == rows);
  CHECK(std::abs(tailored["mean_rows"].get<double>() - 0.25 * rows) <= 1);
  // What was allocated for it, not what it should take.
  const auto bytes = [](const json& run) { return run["measured_bytes"].get<double>(); };
  CHECK(bytes(tailored) == tailored["memory"]["total"].get<double>());
  CHECK(bytes(tailored) < 0.25 * bytes(full));
}

TEST_CASE("a budget in bytes is an upper limit of what is allocated") {
  const json result =
      run_json(ask_for_word({"--allocator", "adaptive", "--selector", "snap_kv", "--codec", "turbo4", "--bytes", "8000000"}));
  CHECK(result["tailored"]["measured_bytes"].get<double>() <= 8e6);
}

// At 3 and 2 bits this selection answers or not by chance: with fp16 and turbo4 it does.
TEST_CASE("a quarter of the rows, chosen with wider pooling, holds the answer") {
  const json result =
      run_json({"generate", "--document", text_path(), "--max-tokens", "24", "--plant",
                "The special magic word for the harbour is saffron.", "--question",
                "What is the special magic word for the harbour mentioned in the text?", "--allocator", "adaptive",
                "--selector", "snap_kv:window=32,kernel=13,pool=max", "--codec", "turbo4", "--retain", "0.25"});
  CHECK(result["tailored"]["answer"].get<std::string>().find("affron") != std::string::npos);
}

TEST_CASE("the answer does not depend on the number of threads") {
  const auto answer = [](const char* threads) {
    return run_json(ask_for_word({"--codec", "turbo4", "--rows", "500", "--threads", threads}))["tailored"]["answer"];
  };
  CHECK(answer("1") == answer("2"));
}
