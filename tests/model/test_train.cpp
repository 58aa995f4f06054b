// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm train: a policy is learned and used, a training that was stopped goes on to the same policy, and what makes no sense
// is refused before any work.
#include <doctest/doctest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "kvtailor/io/policy_file.hpp"
#include "model/program.hpp"

namespace {

using nlohmann::json;

std::vector<std::string> train(std::vector<std::string> more) {
  std::vector<std::string> arguments = {"train", "--sink",  "4",           "--recent", "8", "--samples", "3", "--held-out",
                                        "3",     "--batch", "2",           "--every",  "2", "--hidden",  "4", "--continuation",
                                        "24",    "--tasks", "niah_single", "--json",   "-"};
  if (std::find(more.begin(), more.end(), "--tokens") == more.end()) more.insert(more.end(), {"--tokens", "150"});
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

void check_refused(const std::vector<std::string>& more, const std::string& sentence) {
  const Outcome outcome = run_program(train(more));
  INFO(outcome.errors);
  CHECK(outcome.exit_code > 0);
  CHECK(outcome.errors.starts_with("kvt-llm: error: "));  // before any work
  CHECK(outcome.errors.find(sentence) != std::string::npos);
  CHECK(std::count(outcome.errors.begin(), outcome.errors.end(), '\n') == 1);
}

}  // namespace

TEST_CASE("a policy is learned and used, alone and beside others, and the same training gives the same one") {
  const TemporaryFolder folder;
  const std::string file = folder.file("policy.safetensors"), state = folder.file("state.safetensors");
  const Outcome outcome = succeed(train({"--text", text_path(), "--out", file, "--steps", "4"}));
  const json log = json::parse(outcome.output)["log"];
  REQUIRE(!log.empty());
  for (const json& line : log) CHECK(line["kl"] > 0);
  kvt::LearnedPolicy policy;
  REQUIRE(kvt::read_learned(file, policy).ok());
  CHECK(policy.num_layers == 30);
  CHECK(policy.num_kv_heads == 3);

  // Two steps, and two more.
  const std::string again = folder.file("again.safetensors");
  const std::vector<std::string> part = {"--text", text_path(), "--out", again, "--resume", state};
  auto first = part, second = part;
  first.insert(first.end(), {"--steps", "4", "--stop-after", "2"});
  second.insert(second.end(), {"--steps", "4"});
  succeed(train(first));
  CHECK(read_all(again) != read_all(file));
  succeed(train(second));
  CHECK(read_all(again) == read_all(file));
  auto other = part;
  other.insert(other.end(), {"--steps", "4", "--seed", "2"});
  const Outcome refused = run_program(train(other));
  CHECK(refused.exit_code > 0);
  CHECK(refused.errors.find("is of another training") != std::string::npos);

  const std::string name = "learned:file=" + file;
  for (const std::string& method : {name + "," + name, "uniform," + name, name + ",snap_kv:window=8", "global," + name}) {
    CAPTURE(method);
    const Outcome used = succeed({"retrieve", "--text", text_path(), "--tokens", "150", "--tasks", "niah_single", "--samples",
                                  "1", "--json", "-", "--method", method + ",fp16", "--retain", "0.3"});
    const double rows = json::parse(used.output)["results"][1]["tasks"][0]["rows_share"];
    CHECK(rows == doctest::Approx(0.3).epsilon(0.02));
  }
}

TEST_CASE("what cannot be learned from is refused before any work") {
  const TemporaryFolder folder;
  const std::string out = folder.file("policy.safetensors"), empty = folder.file("empty.txt"), few = folder.file("few.txt"),
                    long_text = folder.file("long.txt");
  std::ofstream(empty).flush();
  std::ofstream(few) << "A text of few words.";
  check_refused({"--text", empty, "--out", out}, "empty");
  check_refused({"--text", few, "--out", out}, "are wanted of it");
  check_refused({"--text", folder.file("none.txt"), "--out", out}, "none.txt");
  check_refused({"--text", text_path(), "--out", out, "--wordings", "nonsense"}, "there is no wording \"nonsense\"");
  check_refused({"--text", text_path(), "--out", out, "--least", "0.5"}, "--least");
  std::ofstream(long_text) << read_all(text_path()) << read_all(text_path()) << read_all(text_path());
  check_refused({"--text", long_text, "--out", out, "--tokens", "5000"}, "does not fit its context");
  check_refused({"--text", text_path(), "--out", out, "--cold", "nan"}, "--cold");
  check_refused({"--text", text_path(), "--out", folder.file("no/folder/policy.safetensors")}, "no/folder");
  CHECK(!std::filesystem::exists(out));
}
