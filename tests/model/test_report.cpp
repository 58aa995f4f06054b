// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm report: what it measures is what fidelity measures, budgets are met by what was allocated, what was found is not
// measured again, and the page needs nothing else. Passages and intervals beside it.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "measure.hpp"
#include "model/program.hpp"
#include "model/tiny.hpp"
#include "passages.hpp"

namespace {

using kvt_llm::Interval;
using kvt_llm::Part;
using nlohmann::json;

std::string long_text() { return environment("KVT_SOURCE_DIR") + "/docs/decisions.md"; }

std::vector<std::string> small_report(const TemporaryFolder& folder, const std::vector<std::string>& more) {
  std::vector<std::string> arguments = {"report",
                                        "--text",
                                        long_text(),
                                        "--suite",
                                        "quick",
                                        "--tokens",
                                        "192",
                                        "--continuation",
                                        "32",
                                        "--pieces",
                                        "1",
                                        "--tuning-pieces",
                                        "1",
                                        "--samples",
                                        "1",
                                        "--tasks",
                                        "niah_single",
                                        "--tuning-samples",
                                        "1",
                                        "--budgets",
                                        "0.4,0.2",
                                        "--chunk",
                                        "64",
                                        "--question-tokens",
                                        "200",
                                        "--out",
                                        folder.file("page.html"),
                                        "--json",
                                        folder.file("page.json")};
  // What is given takes the place of what is there.
  for (std::size_t i = 0; i + 1 < more.size(); i += 2) {
    const auto there = std::find(arguments.begin(), arguments.end(), more[i]);
    if (there == arguments.end()) {
      arguments.insert(arguments.end(), {more[i], more[i + 1]});
    } else {
      there[1] = more[i + 1];
    }
  }
  return arguments;
}

void check_refused(const std::vector<std::string>& more, const std::string& sentence) {
  const TemporaryFolder folder;
  const Outcome outcome = run_program(small_report(folder, more));
  INFO(outcome.errors);
  CHECK(outcome.exit_code > 0);
  CHECK(outcome.errors.find(sentence) != std::string::npos);
  CHECK(std::count(outcome.errors.begin(), outcome.errors.end(), '\n') == 1);
}

void check_interval(const Interval& have, double value, double low, double high, double within) {
  CHECK(std::fabs(have.value - value) < within);
  CHECK(std::fabs(have.low - low) < within);
  CHECK(std::fabs(have.high - high) < within);
}

}  // namespace

TEST_CASE("passages: each byte is of one part, and stays of it when the text grows") {
  const std::string text = read_all(long_text());
  const std::string tuning = kvt_llm::part_of(text, Part::tuning), evaluation = kvt_llm::part_of(text, Part::evaluation);
  CHECK(kvt_llm::part_of(text, Part::all) == text);
  CHECK(tuning.size() + evaluation.size() == text.size());
  CHECK(tuning.size() > text.size() / 10);
  CHECK(evaluation.size() > text.size() / 3);
  // But for the passage that the text ended in.
  const std::string grown = text + text.substr(0, 20000);
  CHECK(kvt_llm::part_of(grown, Part::tuning)
            .starts_with(tuning.substr(0, tuning.size() - std::min<std::size_t>(tuning.size(), 8192))));
  // Without a paragraph's end, and in characters of several bytes.
  std::string umlauts;
  for (int i = 0; i < 20000; ++i) umlauts += "\xc3\xa4";
  const auto a = kvt_llm::part_of(umlauts, Part::tuning), b = kvt_llm::part_of(umlauts, Part::evaluation);
  CHECK(a.size() + b.size() == umlauts.size());
  CHECK(a.size() % 2 == 0);
}

// Student's t from tables; Wilson and Agresti-Min by hand.
TEST_CASE("intervals") {
  check_interval(Interval::of_mean({1, 2}), 1.5, 1.5 - 12.7062 * 0.5, 1.5 + 12.7062 * 0.5, 1e-3);
  check_interval(Interval::of_mean({1, 2, 3}), 2, 2 - 4.30265 / std::sqrt(3), 2 + 4.30265 / std::sqrt(3), 1e-4);
  check_interval(Interval::of_mean({1, 2, 3, 4}), 2.5, 2.5 - 3.18245 * 0.645497, 2.5 + 3.18245 * 0.645497, 5e-3);
  check_interval(Interval::of_mean({1, 2, 3, 4, 5, 6}), 3.5, 3.5 - 2.57058 * 0.763763, 3.5 + 2.57058 * 0.763763, 1e-3);
  CHECK(std::isinf(Interval::of_mean({1}).high));
  check_interval(Interval::of_share({1, 1, 1, 1, 1, 1, 1, 1, 0, 0}), 0.8, 0.4902, 0.9433, 1e-4);
  check_interval(Interval::of_share({1, 1, 1, 1}), 1, 0.5101, 1, 1e-4);
  // Of ten, three are right in the first alone and one in the second alone: (3 - 1) / 12 -+ 1.96 / 12 sqrt(5 - 4 / 12).
  const std::vector<double> a = {1, 1, 1, 1, 1, 1, 0, 0, 0, 0}, b = {0, 0, 0, 1, 1, 1, 1, 0, 0, 0};
  check_interval(Interval::of_paired_shares(a, b), 0.2, 0.16667 - 0.35284, 0.16667 + 0.35284, 1e-4);
  const auto same = Interval::of_paired_shares(a, a);
  CHECK(same.value == 0);
  CHECK(same.low < 0);
  CHECK(same.high > 0);
}

TEST_CASE("a report: figures, budgets, the page; a second run measures nothing again") {
  const TemporaryFolder folder;
  // A codec with parameters beside those of the suite.
  const std::vector<std::string> resume = {"--resume", folder.file("found.jsonl"), "--method",
                                           "adaptive,key_diff,low_rank_turbo2:rule=bbp+rank=8"};
  const Outcome first = succeed(small_report(folder, resume));
  const json report = json::parse(read_all(folder.file("page.json")));
  const std::string page = read_all(folder.file("page.html")), found = read_all(folder.file("found.jsonl"));
  CHECK(!std::filesystem::exists(folder.file("page.html.svg")));

  int of_kind[3] = {};
  for (const json& row : report["results"]) {
    of_kind[0] += row["kind"] == "rows";
    of_kind[1] += row["kind"] == "bits";
    of_kind[2] += row["kind"] == "both";
    INFO(row.dump());
    CHECK(row["kl"][0] > 0);
    CHECK(row["answer_kl"][0] > 0);
    CHECK(page.find(row["composition"]) != std::string::npos);
    if (!row["budget"].is_null()) CHECK(row["bytes_share"] <= row["budget"]);
    if (row["kind"] == "rows") CHECK(row["bytes_share"] > 0.9 * row["budget"].get<double>());
  }
  CHECK(of_kind[0] == 6);
  CHECK(of_kind[1] == 4);
  CHECK(of_kind[2] == 6);
  CHECK(report["left_out"].empty());
  CHECK(report["peers"].size() == 2);
  CHECK(report["noise_floor"]["kl"][0] < 1e-8);
  CHECK(report["full"]["exact"][0] == 1);
  CHECK(report["layers"]["kl"].size() == 30);
  CHECK(report["chosen"].size() == 2);
  for (const json& chosen : report["chosen"]) {
    double best = HUGE_VAL;
    for (const char* const kind : {"rows", "bits", "both"}) {
      if (!chosen.contains(kind)) continue;
      const json& row = report["results"][chosen[kind].get<std::size_t>()];
      CHECK(row["kind"] == kind);
      CHECK(row["bytes_share"] <= chosen["budget"]);
      best = std::min(best, row["tuned"].get<double>());
    }
    CHECK(report["results"][chosen["recommended"].get<std::size_t>()]["tuned"] == best);
  }

  CHECK(page.starts_with("<!DOCTYPE html>"));
  CHECK(page.find("data:image/svg+xml,") != std::string::npos);
  for (const char* const elsewhere : {"src=\"http", "href=\"", "<script", "url("})
    CHECK(page.find(elsewhere) == std::string::npos);
  CHECK(first.output.find("noise floor: KL") != std::string::npos);

  const Outcome second = succeed(small_report(folder, resume));
  CHECK(second.output == first.output);
  CHECK(read_all(folder.file("found.jsonl")) == found);
  CHECK(json::parse(read_all(folder.file("page.json"))) == report);

  // The piece of text, measured by another command.
  const json fidelity =
      json::parse(succeed({"fidelity", "--text",         long_text(), "--part",  "evaluation", "--pieces", "1", "--tokens",
                           "192",      "--continuation", "32",        "--chunk", "64",         "--sink",   "4", "--recent",
                           "8",        "--cache",        "turbo2",    "--json",  "-"})
                      .output);
  for (const json& row : report["results"]) {
    if (row["composition"] == "uniform,sink_recent,turbo2") CHECK(row["kl"][0] == fidelity["results"][0]["mean_kl"]);
  }
}

// Its numbers are random: nothing can be said of them but that they are there.
TEST_CASE("a model of another architecture, with windows and one KV head, generates and is reported on") {
  const TemporaryFolder folder;
  Tiny gemma3 = small_model("gemma3", 6, 40, {"post_attention_norm", "attn_q_norm", "attn_k_norm", "post_ffw_norm"}, 49152);
  gemma3.integers["attention.sliding_window"] = 40;
  gemma3.tokenizer_of = environment("KVT_MODEL");
  gemma3.write(folder.file("gemma.gguf"));
  const std::vector<std::string> model = {"--model", folder.file("gemma.gguf"), "--engine", "llama.cpp"};

  std::ofstream(folder.file("document.txt")) << read_all(text_path()).substr(0, 1500);
  std::vector<std::string> generate = {"generate",   "--document",    folder.file("document.txt"),
                                       "--question", "What is this?", "--max-tokens",
                                       "4",          "--allocator",   "adaptive",
                                       "--selector", "key_diff",      "--codec",
                                       "turbo4",     "--retain",      "0.5"};
  generate.insert(generate.end(), model.begin(), model.end());
  succeed(generate);

  // Layers of two shapes: all of them are cut, by rows and by bytes.
  Tiny gemma4 = small_gemma4(49152);
  gemma4.tokenizer_of = gemma3.tokenizer_of;
  gemma4.write(folder.file("gemma4.gguf"));
  *std::find(generate.begin(), generate.end(), folder.file("gemma.gguf")) = folder.file("gemma4.gguf");
  const auto retain = std::find(generate.begin(), generate.end(), "--retain");
  for (const bool bytes : {false, true}) {
    *retain = bytes ? "--bytes" : "--retain";
    *(retain + 1) = bytes ? "90000" : "0.5";
    auto arguments = generate;
    arguments.insert(arguments.end(), {"--json", "-"});
    const std::string output = succeed(arguments).output;
    const json run = json::parse(output)["tailored"];
    CHECK(run["max_rows"] < 200);  // of 312
    if (bytes) CHECK(run["measured_bytes"] <= 90000);
    if (bytes) CHECK(run["measured_bytes"] > 80000);
  }

  for (const auto& [file, layers] : {std::pair("gemma.gguf", 6), std::pair("gemma4.gguf", 4)}) {
    CAPTURE(file);
    auto arguments = small_report(folder, {"--model", folder.file(file), "--engine", "llama.cpp"});
    arguments.insert(arguments.end(), {"--weights", "file"});
    succeed(arguments);
    const json report = json::parse(read_all(folder.file("page.json")));
    CHECK(report["engine"] == "llama.cpp");
    CHECK(report["layers"]["kl"].size() == layers);
    CHECK(report["chosen"][1].contains("both"));
    for (const json& row : report["results"]) CHECK(row["kl"][0].get<double>() >= 0);
    // Layers differ in their RoPE, of which that selector needs to know.
    REQUIRE(report["left_out"].size() > 0);
    CHECK(report["left_out"][0]["name"].get<std::string>().starts_with("ExpectedAttention"));
    CHECK(read_all(folder.file("page.html")).find("Left out") != std::string::npos);
  }
}

TEST_CASE("what a report cannot do is refused before any work") {
  check_refused({"--tokens", "60000"}, "60000 tokens need more");
  check_refused({"--policy", text_path()}, text_path());
  check_refused({"--method", "uniform,turbo4"}, "must be ALLOCATOR,SELECTOR,CODEC");
  check_refused({"--method", "uniform,no_such_selector,turbo4"}, "no_such_selector");
  check_refused({"--peer", "q7_3"}, "llama.cpp has no cache \"q7_3\"");
  check_refused({"--continuation", "192"}, "leaves no text before it");
  check_refused({"--tasks", "needles"}, "needles");
  check_refused({"--tuning-pieces", "0", "--tuning-samples", "0"}, "compositions are chosen by them");
}
