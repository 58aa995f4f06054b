// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// TurboQuant on a real model is as far from the full cache as an independent study in numpy found it: SmolLM2, technical
// prose, F32 weights, chunks of 128 encoded before later ones see them, the first 4 rows dense, tokens 128 .. 1023 scored.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "model/program.hpp"

namespace {

// Mean KL over four excerpts, evenly spaced; one alone is off by a tenth to a quarter.
std::vector<double> mean_kl(const std::string& text, const std::vector<std::string>& codecs) {
  const int excerpts = 4;
  std::vector<double> sum(codecs.size(), 0.0);
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
    for (std::size_t k = 0; k < codecs.size(); ++k) sum[k] += results.at(k)["mean_kl"].get<double>() / excerpts;
  }
  return sum;
}

}  // namespace

TEST_CASE("TurboQuant at 4, 3 and 2 bits is within a quarter of the study's KL") {
  const std::string text = environment("KVT_SOURCE_DIR") + "/.deps/handbook.txt";
  if (!std::filesystem::exists(text)) {
    std::printf("skipped: there is no %s, see tools/bootstrap\n", text.c_str());
    std::exit(77);
  }
  const std::vector<double> want = {.0055, .0217, .0999};
  const auto have = mean_kl(text, {"turbo4", "turbo3", "turbo2"});
  for (std::size_t k = 0; k < want.size(); ++k) {
    MESSAGE("bits " << 4 - k << ": mean KL " << have[k] << ", study " << want[k]);
    CHECK(std::fabs(have[k] / want[k] - 1) <= 0.25);
  }
}
