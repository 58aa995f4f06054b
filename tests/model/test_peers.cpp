// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// llama.cpp's own caches beside ours in one run of fidelity, and the plot of both.
#include <doctest/doctest.h>

#include <map>
#include <nlohmann/json.hpp>

#include "model/program.hpp"

TEST_CASE("peers are measured as compositions are, and drawn beside them") {
  const TemporaryFolder folder;
  const std::string plot = folder.file("kl, it's.svg");
  std::vector<std::string> arguments = {"fidelity", "--text", text_path(), "--tokens", "256",    "--chunk", "128",
                                        "--cache",  "turbo4", "--json",    "-",        "--plot", plot};
  for (const char* peer : {"f16", "q8_0", "q8_0/q4_0", "q4_0", "q4_0+unrotated"}) {
    arguments.insert(arguments.end(), {"--peer", peer});
  }
  const Outcome outcome = run_program(arguments);
  INFO(outcome.errors);
  REQUIRE(outcome.exit_code == 0);
  std::map<std::string, nlohmann::json> of;
  const auto result = nlohmann::json::parse(outcome.output);
  for (const auto& row : result["results"]) of[row["cache"].get<std::string>()] = row;
  REQUIRE(of.size() == 6);
  const auto kl = [&](const char* name) {
    CAPTURE(name);
    CAPTURE(of[name]["mean_kl"].get<double>());
    CHECK(of[name]["peer"].get<bool>());
    return of[name]["mean_kl"].get<double>();
  };

  CHECK_FALSE(of["turbo4"]["peer"].get<bool>());
  // Rounding alone separates llama.cpp's fp16 rows from our fp32 rows, so what its other types lose is theirs.
  CHECK(kl("f16") < 1e-5);
  CHECK(kl("f16") < kl("q8_0"));
  CHECK(kl("q8_0") < kl("q8_0/q4_0"));
  CHECK(kl("q8_0/q4_0") < kl("q4_0"));
  CHECK(kl("q4_0") < kl("q4_0+unrotated"));

  CHECK_FALSE(of["f16"]["rotated_keys"].get<bool>());
  CHECK_FALSE(of["q4_0+unrotated"]["rotated_keys"].get<bool>());
  CHECK_FALSE(of["q4_0+unrotated"]["rotated_values"].get<bool>());
  CHECK(of["q4_0"]["rotated_keys"].get<bool>());
  CHECK(of["q4_0"]["rotated_values"].get<bool>());

  // The buffers are for 256 rows, so they hold the bits of the types and nothing else.
  const double bits_of_bytes = 16 / of["f16"]["measured_bytes"].get<double>();
  CHECK(of["q4_0"]["bits_per_element"].get<double>() == 4.5);
  CHECK(of["q4_0"]["measured_bytes"].get<double>() * bits_of_bytes == doctest::Approx(4.5));
  CHECK(of["q8_0/q4_0"]["bits_per_element"].get<double>() == 6.5);
  CHECK(of["q8_0/q4_0"]["measured_bytes"].get<double>() * bits_of_bytes == doctest::Approx(6.5));

  const std::string drawing = read_all(plot);
  for (const auto& [name, row] : of) CHECK_MESSAGE(drawing.find(name) != std::string::npos, name);
}
