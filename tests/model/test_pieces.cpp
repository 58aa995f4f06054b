// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm fidelity over several pieces of a text, and over caches that are cut from one prefill: neither changes what a piece
// or a cache gives on its own.
#include <doctest/doctest.h>

#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>

#include "model/program.hpp"

namespace {

using nlohmann::json;

// The first two and the last two can be cut from one cache.
const std::vector<std::string> mixed = {
    "uniform,key_diff,fp16,0.25",      "adaptive,key_norm,fp16,2500000bytes", "uniform,snap_kv:window=16,turbo4,0.25",
    "uniform,reconstruction,fp16,0.5", "uniform,sink_recent,fp16,100rows",    "global:safeguard=0,oracle,fp16,0.25"};

Outcome fidelity(const std::vector<std::string>& caches, std::vector<std::string> more) {
  std::vector<std::string> arguments = {"fidelity", "--text",   text_path(), "--tokens",  "192",  "--chunk", "64", "--sink",
                                        "4",        "--recent", "8",         "--weights", "file", "--json",  "-"};
  for (const auto& cache : caches) arguments.insert(arguments.end(), {"--cache", cache});
  arguments.insert(arguments.end(), more.begin(), more.end());
  return succeed(arguments);
}

json results(const Outcome& outcome) { return json::parse(outcome.output)["results"]; }

}  // namespace

TEST_CASE("the mean of two pieces is the mean, their spread is in the table, and the first of them is the only one of one") {
  const std::vector<std::string> cut = {"--continuation", "64"}, chunks = {"--skip", "64", "--peer", "q8_0"};
  for (const auto& how : {cut, chunks}) {
    const std::vector<std::string> caches = {mixed[0], "turbo4"};
    auto several = how;
    several.insert(several.end(), {"--pieces", "2"});
    const Outcome outcome = fidelity(caches, several);
    CHECK(json::parse(outcome.output)["pieces"] == 2);
    const json one = results(fidelity(caches, how)), two = results(outcome);
    REQUIRE(two.size() == one.size());
    std::stringstream table(outcome.errors.substr(outcome.errors.find("cache ")));
    std::string line;
    std::getline(table, line);
    for (std::size_t k = 0; k < two.size(); ++k) {
      CAPTURE(two[k].dump());
      REQUIRE(two[k]["pieces"].size() == 2);
      REQUIRE(one[k]["pieces"].size() == 1);
      const double a = two[k]["pieces"][0], b = two[k]["pieces"][1], mean = two[k]["mean_kl"];
      CHECK(one[k]["mean_kl"] == a);
      CHECK(one[k]["pieces"][0] == a);
      CHECK(a != b);
      CHECK(mean == doctest::Approx((a + b) / 2).epsilon(1e-9));

      // name, bits, rows, KL, its error, ...; progress may come between the lines
      do REQUIRE(std::getline(table, line));
      while (line.find(two[k]["cache"].get<std::string>() + " ") == line.npos);
      std::stringstream words(line.substr(44));
      const std::vector<std::string> word{std::istream_iterator<std::string>(words), {}};
      REQUIRE(word.size() == 9);
      CHECK(std::stod(word[2]) == doctest::Approx(mean).epsilon(0.006));
      CHECK(std::stod(word[3]) == doctest::Approx(std::fabs(a - b) / 2).epsilon(0.06));
    }
  }
}

TEST_CASE("a cache that is cut from a prefill which others share gives what it gives alone") {
  const std::vector<std::string> how = {"--continuation", "64"};
  const json together = results(fidelity(mixed, how));
  REQUIRE(together.size() == mixed.size());
  for (std::size_t k = 0; k < mixed.size(); ++k) {
    json shared = together[k], alone = results(fidelity({mixed[k]}, how))[0];
    CHECK(shared["cache"] == mixed[k]);
    CHECK(shared["memory"]["total"] == shared["measured_bytes"]);
    for (json* row : {&shared, &alone}) row->erase("seconds");
    CHECK(shared == alone);
  }
}

TEST_CASE("a continuation is told best by the rows that it looks at") {
  const json all = results(fidelity({"global:safeguard=0,oracle,fp16,0.25", "uniform,oracle,fp16,0.25", mixed[0],
                                     "global,oracle,fp16,1", "uniform,key_diff,fp16,1"},
                                    {"--continuation", "64"}));
  const auto kl = [&](std::size_t k) { return all[k]["mean_kl"].get<double>(); };
  CHECK(kl(0) < kl(1));
  CHECK(2 * kl(1) < kl(2));
  CHECK(kl(3) == kl(4));  // where all is kept, nobody chooses
  for (std::size_t k = 0; k < 3; ++k) CHECK(all[k]["rows_share"].get<double>() == doctest::Approx(0.25).epsilon(0.02));
}
