// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm profile: a curve is made of texts and used, a run that was stopped goes on to the same curve, and what makes no sense
// is refused before any work.
#include <doctest/doctest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "kvtailor/io/policy_file.hpp"
#include "model/program.hpp"

namespace {

using nlohmann::json;

std::vector<std::string> profile(std::vector<std::string> more) {
  std::vector<std::string> arguments = {"profile", "--tokens", "120", "--sink", "4", "--recent", "8", "--json", "-"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

void check_refused(const std::vector<std::string>& more, const std::string& sentence) {
  const Outcome outcome = run_program(profile(more));
  INFO(outcome.errors);
  CHECK(outcome.exit_code > 0);
  CHECK(outcome.errors.starts_with("kvt-llm: error: "));  // before any work
  CHECK(outcome.errors.find(sentence) != std::string::npos);
  CHECK(std::count(outcome.errors.begin(), outcome.errors.end(), '\n') == 1);
}

}  // namespace

TEST_CASE("a curve loses less of what it was made of than equal shares do, and a cache is cut by it") {
  const TemporaryFolder folder;
  const std::string file = folder.file("curve.safetensors"), snap = folder.file("snap.safetensors");
  const Outcome outcome = succeed(profile({"--text", text_path(), "--samples", "2", "--selector", "key_diff", "--out", file,
                                           "--selector", "snap_kv:window=16", "--out", snap}));
  const json results = json::parse(outcome.output)["results"];
  REQUIRE(results.size() == 2);
  for (const json& result : results) {
    for (const json& lost : result["lost"]) CHECK(lost["curve"] < lost["equal_shares"]);
  }
  kvt::Curve curve;
  REQUIRE(kvt::read_curve(snap, curve).ok());
  CHECK(curve.num_layers == 30);
  CHECK(curve.num_kv_heads == 3);
  CHECK(curve.selector == "snap_kv:window=16,kernel=5,pool=avg");

  const auto cut = [&](const std::string& selector) {
    return run_program({"retrieve", "--text", text_path(), "--tokens", "150", "--tasks", "niah_single", "--samples", "1",
                        "--json", "-", "--method", "curve:file=" + file + "," + selector + ",fp16", "--retain", "0.3"});
  };
  const Outcome used = cut("key_diff");
  REQUIRE(used.exit_code == 0);
  const double rows = json::parse(used.output)["results"][1]["tasks"][0]["rows_share"];
  CHECK(rows == doctest::Approx(0.3).epsilon(0.02));
  const Outcome other = cut("key_norm");
  CHECK(other.exit_code > 0);
  CHECK(other.errors.find("was made for the token selector key_diff; this one is key_norm") != std::string::npos);
}

TEST_CASE("a profile that is made in two runs is that of one") {
  const TemporaryFolder folder;
  const auto run = [&](const std::string& samples, const std::string& out, std::vector<std::string> more) {
    more.insert(more.end(), {"--text", text_path(), "--tasks", "niah_single", "--samples", samples, "--selector", "key_diff",
                             "--out", folder.file(out)});
    return run_program(profile(more));
  };
  const std::string state = folder.file("state");
  REQUIRE(run("2", "whole.safetensors", {}).exit_code == 0);
  REQUIRE(run("2", "kept.safetensors", {"--resume", state}).exit_code == 0);
  // What is all there is read and not made again.
  REQUIRE(run("2", "again.safetensors", {"--resume", state}).exit_code == 0);
  CHECK(read_all(folder.file("kept.safetensors")) == read_all(folder.file("whole.safetensors")));
  CHECK(read_all(folder.file("again.safetensors")) == read_all(folder.file("whole.safetensors")));
  const Outcome other = run("1", "other.safetensors", {"--resume", state});
  CHECK(other.exit_code > 0);
  CHECK(other.errors.find("is of another profile") != std::string::npos);
}

TEST_CASE("a mix of repetition and questions is pooled, and the bare table is that of the curve") {
  const TemporaryFolder folder;
  const std::string curve = folder.file("curve.safetensors"), table = folder.file("table.npy");
  const Outcome outcome =
      succeed(profile({"--text", text_path(), "--tasks", "repetition,niah_single", "--wording", "badge", "--samples", "2",
                       "--selector", "key_diff", "--out", curve, "--selector", "key_diff", "--out", table}));
  CHECK(json::parse(outcome.output)["importance"] == "repetition, niah_single");
  kvt::Curve learned, bare;
  REQUIRE(kvt::read_curve(curve, learned).ok());
  REQUIRE(kvt::read_curve(table, bare).ok());
  CHECK(learned.dropped == bare.dropped);
  CHECK(learned.selector == "key_diff");
  CHECK(bare.selector.empty());
}

TEST_CASE("questions are read line by line, and what is wrong with one is named") {
  const TemporaryFolder folder;
  const std::string good = folder.file("good.jsonl"), bad = folder.file("bad.jsonl"), out = folder.file("curve.safetensors");
  const json question = {
      {"context", "The key of the cellar hangs behind the clock. The clock is in the hall, beside the stairs."},
      {"question", "Where does the key hang?"},
      {"answer", "Behind the clock."}};
  std::ofstream(good) << question.dump() << "\n\n" << question.dump() << "\n";
  std::ofstream(bad) << question.dump() << "\n"
                     << R"({"context": "c", "question": "q"})"
                     << "\n";
  succeed(profile({"--questions", good, "--selector", "key_diff", "--out", out}));
  check_refused({"--questions", bad, "--selector", "key_diff", "--out", out}, "line 2: an object with the texts");
  check_refused({"--questions", good, "--text", text_path(), "--selector", "key_diff", "--out", out}, "has texts of its own");
  check_refused({"--questions", folder.file("none"), "--selector", "key_diff", "--out", out}, "cannot read the questions");
}

TEST_CASE("what cannot be learned from is refused") {
  const TemporaryFolder folder;
  const std::string out = folder.file("curve.safetensors"), empty = folder.file("empty"), brief = folder.file("brief");
  std::ofstream(empty).flush();
  std::ofstream(brief) << "A few words.";
  check_refused({"--selector", "key_diff", "--out", out}, "give --text or --questions");
  check_refused({"--text", empty, "--selector", "key_diff", "--out", out}, "is empty or cannot be read");
  check_refused({"--text", brief, "--selector", "key_diff", "--out", out}, "--tokens 120 are wanted of it");
  check_refused({"--text", text_path(), "--selector", "nonsense", "--out", out}, "unknown token selector");
  check_refused({"--text", text_path(), "--selector", "key_diff", "--selector", "snap_kv", "--out", out}, "its own --out");
  check_refused({"--text", text_path(), "--tasks", "nonsense", "--selector", "key_diff", "--out", out}, "there is no task");
  check_refused({"--text", text_path(), "--tasks", "vt", "--wording", "badge", "--selector", "key_diff", "--out", out},
                "there is no task \"vt\" in the wording badge");
  const Outcome short_text = run_program(
      {"profile", "--text", text_path(), "--tokens", "120", "--recent", "400", "--selector", "key_diff", "--out", out});
  CHECK(short_text.exit_code > 0);
  CHECK(short_text.errors.find("sink or recent rows") != std::string::npos);
}

TEST_CASE("rows and bits for budgets in bytes: the profile is read back, and caches keep within what they are given") {
  const TemporaryFolder folder;
  const std::string file = folder.file("bytes.safetensors");
  const Outcome outcome = succeed(profile({"--bytes",
                                           "--text",
                                           text_path(),
                                           "--tasks",
                                           "continuation,repetition",
                                           "--samples",
                                           "2",
                                           "--continuation",
                                           "16",
                                           "--weighed",
                                           "1",
                                           "--check",
                                           "3",
                                           "--selector",
                                           "key_diff",
                                           "--out",
                                           file,
                                           "--codec",
                                           "fp16",
                                           "--codec",
                                           "turbo4",
                                           "--codec",
                                           "turbo2",
                                           "--codec",
                                           "low_rank_turbo2:rank=4/turbo1"}));
  const json found = json::parse(outcome.output);
  CHECK(found["checked"].size() == 3);
  double before = 0;
  for (const json& result : found["results"]) {
    CHECK(result["lost"] >= before);  // budgets fall
    before = result["lost"];
  }
  kvt::ByteBudget profile_read;
  REQUIRE(kvt::read_byte_budget(file, profile_read).ok());
  CHECK(profile_read.num_layers == 30);
  CHECK(profile_read.codecs.size() == 4);
  CHECK(profile_read.selector == "key_diff");
  CHECK(profile_read.zone_rows == 12);

  // 120 tokens of dense fp16 are 2.6 MiB.
  const auto cut = [&](const std::string& budget) {
    return run_program({"fidelity", "--text", text_path(), "--offset", "3000", "--tokens", "136", "--continuation", "16",
                        "--sink", "4", "--recent", "8", "--json", "-", "--cache", "bytes:" + file + "," + budget});
  };
  const Outcome used = cut("500000bytes");
  INFO(used.errors);
  REQUIRE(used.exit_code == 0);
  const json row = json::parse(used.output)["results"][0];
  CHECK(row["rows_share"] < 1);
  CHECK(row["bits_per_element"] < 16);
  // What the continuation adds is dense.
  CHECK(row["measured_bytes"].get<double>() < 500000 + 16 * 90 * (260 + 64));
  const Outcome little = cut("20000bytes");
  CHECK(little.exit_code > 0);
  CHECK(little.errors.find("that the cheapest options cost") != std::string::npos);
  CHECK(cut("0.5").errors.find("a budget in bytes is wanted") != std::string::npos);
  check_refused({"--bytes", "--text", text_path(), "--tasks", "repetition", "--selector", "key_diff", "--out", file},
                "needs another than repetition");
  check_refused({"--bytes", "--text", text_path(), "--selector", "key_diff", "--out", file, "--codec", "fp16"},
                "turbo2, which is not among");
}
