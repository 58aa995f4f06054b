// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// TurboQuant on a real model is as far from the full cache as an independent study in numpy found it, and low ranks with coded
// residuals are as near as they have been: SmolLM2, technical prose, F32 weights, chunks of 128 encoded before later ones see
// them, the first 4 rows dense, tokens 128 .. 1023 scored.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "model/program.hpp"

namespace {

struct Line {
  double kl = 0, bits = 0;
};

// Mean KL and bits over four excerpts, evenly spaced; one alone is off by a tenth to a quarter.
std::vector<Line> fidelity(const std::string& text, const std::vector<std::string>& codecs) {
  const int excerpts = 4;
  std::vector<Line> sum(codecs.size());
  for (int i = 0; i < excerpts; ++i) {
    std::vector<std::string> arguments = {"fidelity", "--text",   text,      "--offset", std::to_string(20000 + 200000 * i),
                                          "--tokens", "1024",     "--chunk", "128",      "--sink",
                                          "4",        "--recent", "0",       "--flush",  "--json",
                                          "-"};
    for (const auto& codec : codecs) arguments.insert(arguments.end(), {"--cache", codec});
    const Outcome outcome = run_program(arguments);
    INFO(outcome.errors);
    REQUIRE(outcome.exit_code == 0);
    const auto results = nlohmann::json::parse(outcome.output)["results"];
    for (std::size_t k = 0; k < codecs.size(); ++k) {
      sum[k].kl += results.at(k)["mean_kl"].get<double>() / excerpts;
      sum[k].bits += results.at(k)["bits_per_element"].get<double>() / excerpts;
    }
  }
  return sum;
}

std::string handbook() {
  const std::string text = environment("KVT_SOURCE_DIR") + "/.deps/handbook.txt";
  if (std::filesystem::exists(text)) return text;
  std::printf("skipped: there is no %s, see tools/bootstrap\n", text.c_str());
  std::exit(77);
}

}  // namespace

TEST_CASE("TurboQuant at 4, 3 and 2 bits is within a quarter of the study's KL") {
  const std::vector<double> want = {.0055, .0217, .0999};
  const auto have = fidelity(handbook(), {"turbo4", "turbo3", "turbo2"});
  for (std::size_t k = 0; k < want.size(); ++k) {
    MESSAGE("bits " << 4 - k << ": mean KL " << have[k].kl << ", study " << want[k]);
    CHECK(std::fabs(have[k].kl / want[k] - 1) <= 0.25);
  }
}

TEST_CASE("low ranks with coded residuals are as near the full cache as they were, and no larger") {
  struct Want {
    const char* codec;
    double bits, kl;
  };
  const std::vector<Want> wanted = {{"low_rank_turbo2", 2.70, .035},
                                    {"low_rank_trellis2/trellis2", 2.55, .031},
                                    {"low_rank_trellis3/low_rank_trellis2", 3.05, .0105}};
  std::vector<std::string> codecs;
  for (const Want& want : wanted) codecs.push_back(want.codec);
  const auto have = fidelity(handbook(), codecs);
  for (std::size_t k = 0; k < wanted.size(); ++k) {
    MESSAGE(codecs[k] << ": " << have[k].bits << " bits, mean KL " << have[k].kl);
    CHECK(have[k].bits <= wanted[k].bits);
    CHECK(have[k].kl <= wanted[k].kl);
  }
}
