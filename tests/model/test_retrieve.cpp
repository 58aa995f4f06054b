// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm retrieve: what the table says is what the JSON says, the same seed asks the same, results go on where they were left,
// and a cache of which all is kept answers as the full one does.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "model/program.hpp"

namespace {

using nlohmann::json;

std::vector<std::string> retrieve(const std::string& tasks, std::vector<std::string> more) {
  std::vector<std::string> arguments = {"retrieve",  "--text", text_path(), "--tokens", "200",    "--tasks", tasks,
                                        "--samples", "2",      "--seed",    "3",        "--json", "-"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

json results(const Outcome& outcome) { return json::parse(outcome.output)["results"]; }

void check_refused(std::vector<std::string> more, const std::string& sentence) {
  more.insert(more.begin(), {"retrieve", "--text", text_path()});
  const Outcome outcome = run_program(more);
  INFO(outcome.errors);
  CHECK(outcome.exit_code > 0);
  CHECK(outcome.errors.starts_with("kvt-llm: error: "));  // before any work
  CHECK(outcome.errors.find(sentence) != std::string::npos);
  CHECK(std::count(outcome.errors.begin(), outcome.errors.end(), '\n') == 1);
}

// The words of the table's line that begins so.
std::vector<std::string> line_of(const std::string& table, const std::string& start) {
  std::stringstream lines(table);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with(start)) continue;
    std::stringstream words(line);
    return {std::istream_iterator<std::string>(words), {}};
  }
  FAIL("there is no line " << start << " in\n" << table);
  return {};
}

const std::string snap = "uniform,snap_kv:window=16,fp16", differ = "adaptive,key_diff,turbo4";

}  // namespace

TEST_CASE("the full cache finds a needle, and so does one that keeps all; the table and the JSON agree") {
  const Outcome outcome = succeed(retrieve("niah_single", {"--method", snap, "--retain", "1,0.3"}));
  const json all = results(outcome);
  REQUIRE(all.size() == 3);
  CHECK(all[0]["method"] == "full");
  const json& full = all[0]["tasks"][0];
  CHECK(full["solved"] == true);
  CHECK(full["exact_match"] == 1);
  CHECK(full["partial"] == 1);
  CHECK(full["samples"] == 2);
  CHECK(all[1]["tasks"] == all[0]["tasks"]);
  const json& cut = all[2];
  CHECK(cut["retain"] == "0.3");
  CHECK(std::fabs(cut["mean"]["rows_share"].get<double>() - 0.3) < 0.01);
  CHECK(cut["mean"]["measured_bytes"] < 0.4 * full["measured_bytes"].get<double>());
  CHECK(cut["mean"]["log_prob"] < all[0]["mean"]["log_prob"]);
  CHECK(cut["mean"]["exact_match"] == cut["tasks"][0]["exact_match"]);

  // method, retain, rows, MiB, the task, "|", mean, its error, partial, log p
  const auto words = line_of(outcome.errors, snap + "        0.3");
  REQUIRE(words.size() == 10);
  const auto shown = [&](std::size_t word, double value, double half_digit) {
    CHECK(std::fabs(std::stod(words[word]) - value) <= half_digit * 1.001);
  };
  const auto mean = [&](const char* field) { return cut["mean"][field].get<double>(); };
  shown(2, 100 * mean("rows_share"), 0.05);
  shown(3, mean("measured_bytes") / 1048576, 0.0005);
  shown(4, 100 * cut["tasks"][0]["exact_match"].get<double>(), 0.05);
  shown(6, 100 * mean("exact_match"), 0.05);
  shown(7, 100 * mean("exact_match_error"), 0.05);
  shown(8, 100 * mean("partial"), 0.05);
  shown(9, mean("log_prob"), 0.0005);
}

TEST_CASE("the same is hidden and found in another wording") {
  const json all = results(succeed(retrieve("niah_single", {"--wording", "badge"})));
  CHECK(all[0]["tasks"][0]["exact_match"] == 1);
  CHECK(all[0]["tasks"][0]["log_prob"] != results(succeed(retrieve("niah_single", {})))[0]["tasks"][0]["log_prob"]);
}

TEST_CASE("results go on where they were left, and are those of one run") {
  const TemporaryFolder folder;
  const std::string file = folder.file("results.jsonl");
  const std::vector<std::string> both = {"--method", snap, "--method", differ, "--retain", "0.4"};
  auto resumed = both;
  resumed.insert(resumed.end(), {"--resume", file});
  const json fresh = results(succeed(retrieve("niah_multiquery", both)));
  const json first = results(succeed(retrieve("niah_multiquery", {"--method", snap, "--retain", "0.4", "--resume", file})));
  CHECK(first == json{fresh[0], fresh[1]});
  // Killed while it wrote the last line.
  std::filesystem::resize_file(file, std::filesystem::file_size(file) - 20);
  CHECK(results(succeed(retrieve("niah_multiquery", resumed))) == fresh);
  const std::string whole = read_all(file);
  CHECK(std::count(whole.begin(), whole.end(), '\n') == 1 + 2 * 3);

  // Nothing is computed twice: what the file says is believed.
  std::string changed = whole;
  const auto value = changed.find("\"value\":[");
  REQUIRE(value != std::string::npos);
  changed.replace(value + 9, 3, changed.substr(value + 9, 3) == "1.0" ? "0.0" : "1.0");
  std::ofstream(file, std::ios::binary) << changed;
  CHECK(results(succeed(retrieve("niah_multiquery", resumed))) != fresh);

  const auto refused = [&](std::vector<std::string> more, const std::string& sentence) {
    more.insert(more.end(), {"--tasks", "niah_multiquery", "--method", snap, "--retain", "0.4", "--resume", file});
    check_refused(more, sentence);
  };
  refused({"--tokens", "200", "--seed", "4"}, "another seed (3, now 4)");
  refused({"--tokens", "210", "--seed", "3"}, "another tokens (200, now 210)");
  refused({"--tokens", "200", "--seed", "3", "--question-aware"}, "another question_aware");
  std::ofstream(file, std::ios::app) << "no result\n";
  refused({"--tokens", "200", "--seed", "3"}, "no result");
  const std::string notes = folder.file("notes.txt");
  std::ofstream(notes) << "no end of line";
  check_refused({"--resume", notes}, "does not hold results");
  CHECK(read_all(notes) == "no end of line");
}

TEST_CASE("rows that the answer will be looked for in are all it takes") {
  const std::string oracle = "global:safeguard=0,oracle,fp16";
  const json all = results(
      succeed(retrieve("niah_single", {"--method", oracle, "--method", "uniform,oracle,fp16", "--method",
                                       "global,reconstruction,fp16", "--retain", "0.1", "--sink", "4", "--recent", "8"})));
  REQUIRE(all.size() == 4);
  CHECK(all[1]["mean"]["rows_share"].get<double>() == doctest::Approx(0.1).epsilon(0.05));
  CHECK(all[1]["mean"]["exact_match"] == 1);
  CHECK(all[2]["mean"]["exact_match"] == 1);
  CHECK(all[1]["mean"]["log_prob"] > all[2]["mean"]["log_prob"]);
  CHECK(all[2]["mean"]["log_prob"] > all[3]["mean"]["log_prob"]);
}

TEST_CASE("what cannot be asked is refused before it costs minutes") {
  const auto refused = [](std::vector<std::string> more, const std::string& sentence) {
    more.insert(more.end(), {"--method", snap});
    check_refused(more, sentence);
  };
  refused({"--retain", "0.5", "--tasks", "niah_single,niah_double"},
          "no task \"niah_double\" in the wording magic; known: niah_single, ");
  refused({"--retain", "0.5", "--tasks", "passkey", "--wording", "badge"}, "no task \"passkey\" in the wording badge");
  refused({"--retain", "0.5", "--wording", "riddle"}, "riddle");
  refused({"--retain", "0.5", "--tasks", "vt,vt"}, "vt is given twice");
  refused({"--retain", "0.5", "--samples", "0"}, "--samples");
  refused({"--retain", "0.5", "--depths", "0,1.5"}, "1.5");
  refused({"--retain", "0.5", "--tokens", "9000"}, "the model's context is 8192");
  refused({"--retain", "0.5", "--tokens", "5000"}, "nowhere whole sentences");
  refused({"--retain", "0.5", "--tokens", "50", "--tasks", "niah_multikey"}, "too little text around");
  refused({"--retain", "1.5"}, "the retention \"1.5\"");
  refused({"--retain", "0.01"}, "must be between 36");
  refused({"--retain", "9000rows"}, "the retention leaves 9000 rows");
  refused({}, "--method and --retain need each other");
  refused({"--retain", "0.5", "--method", "uniform,snap_k,fp16"}, "snap_kv");
  refused({"--retain", "0.5", "--method", "snap_kv,fp16"}, "ALLOCATOR,SELECTOR,CODEC");
  refused({"--retain", "0.5", "--plot", "plot.pdf"}, ".svg or .png");
  refused({"--retain", "0.5", "--method", "uniform,oracle,fp16", "--question-aware"}, "has read the question anyway");
  refused({"--retain", "0.5", "--method", "curve:file=curve.npy,oracle,fp16"}, "a curve is of a token selector");
  refused({"--retain", "0.5", "--method", "uniform,oracle:window=8,fp16"}, "the oracle has no parameters");
  refused({"--retain", "0.5", "--method", "uniform,chunk_kv(oracle),fp16"}, "unknown token selector \"oracle\"");
}
