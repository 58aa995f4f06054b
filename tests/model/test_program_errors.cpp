// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Bad input of kvt-llm: a failing exit status and one sentence that names what was given.
#include <doctest/doctest.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "model/program.hpp"

namespace {

// `sentence` is a part of the message that must be there.
void check_refused(const std::vector<std::string>& arguments, const std::string& sentence) {
  const Outcome outcome = run_program(arguments);
  INFO("arguments: " << arguments.front() << " ... " << arguments.back());
  INFO(outcome.errors);
  CHECK(outcome.exit_code > 0);
  // Progress may come before it when only the work itself shows that the input cannot do.
  const std::string prefix = "kvt-llm: error: ";
  const auto at = outcome.errors.find(prefix);
  REQUIRE(at != std::string::npos);
  const std::string message = outcome.errors.substr(at + prefix.size());
  CHECK(message.find(sentence) != std::string::npos);
  CHECK(std::count(message.begin(), message.end(), '\n') == 1);
}

std::vector<std::string> ask(std::vector<std::string> more) {
  std::vector<std::string> arguments = {"generate", "--document", text_path(), "--question", "What is this?"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

}  // namespace

TEST_CASE("a model that is not there") {
  check_refused(ask({"--model", "no-such.gguf"}), "there is no file no-such.gguf; --model and KVT_MODEL take a GGUF file");
}

TEST_CASE("a document that is not there") {
  check_refused({"generate", "--document", "no-such.txt", "--question", "What?"}, "no-such.txt");
}

TEST_CASE("a model file that was cut off, in its weights or in its head") {
  const TemporaryFolder folder;
  const std::string model = environment("KVT_MODEL");
  const std::string cut = folder.file("cut.gguf");
  const auto size = std::filesystem::file_size(model);
  for (const auto length : {size - 1, size / 2, std::uintmax_t{100000}, std::uintmax_t{3}, std::uintmax_t{0}}) {
    CAPTURE(length);
    std::filesystem::copy_file(model, cut, std::filesystem::copy_options::overwrite_existing);
    std::filesystem::resize_file(cut, length);
    check_refused(ask({"--model", cut}), "cut.gguf; it has to be a whole GGUF file");
  }
}

TEST_CASE("a file that is no model") { check_refused(ask({"--model", text_path()}), "LICENSE"); }

TEST_CASE("a document longer than the model's context") {
  const TemporaryFolder folder;
  const std::string text = read_all(text_path());
  {
    std::ofstream file(folder.file("long.txt"));
    for (int i = 0; i < 5; ++i) file << text;
  }
  check_refused({"generate", "--document", folder.file("long.txt"), "--question", "What is this?"}, "8192");
}

TEST_CASE("names that are not known, with those that are") {
  check_refused(ask({"--allocator", "generous", "--retain", "0.5"}), "uniform");
  check_refused(ask({"--selector", "snap_k", "--retain", "0.5"}), "snap_kv");
  check_refused(ask({"--selector", "snap_kv:windows=3", "--retain", "0.5"}), "window");
  check_refused(ask({"--codec", "turbo9"}), "turbo4");
  check_refused(ask({"--codec", "turbo4/"}), "turbo4");
}

TEST_CASE("budgets that keep nothing, or more than there is") {
  check_refused(ask({"--retain", "0"}), "0");
  check_refused(ask({"--retain", "-1"}), "-1");
  check_refused(ask({"--retain", "1.5"}), "1.5");
  check_refused(ask({"--retain", "nan"}), "nan");
  check_refused(ask({"--rows", "0"}), "0");
  check_refused(ask({"--bytes", "0"}), "0");
  check_refused(ask({"--bytes", "100"}), "100");
}

TEST_CASE("options that contradict each other or do nothing") {
  check_refused(ask({"--retain", "0.5", "--rows", "100"}), "--rows");
  check_refused(ask({"--compress", "chunk"}), "--compress");
  check_refused(ask({"--decode-every", "4"}), "--decode-every");
  check_refused(ask({"--selector", "key_diff"}), "--selector needs");
  check_refused(ask({"--allocator", "adaptive"}), "--allocator needs");
  check_refused(ask({"--seed", "3"}), "--seed needs");
  check_refused(ask({"--depth", "0.2"}), "--depth needs");
}

TEST_CASE("numbers that are none, or out of range") {
  check_refused(ask({"--temperature", "nan"}), "nan");
  check_refused(ask({"--temperature", "-1"}), "-1");
  check_refused(ask({"--plant", "A fact.", "--depth", "nan"}), "nan");
  check_refused(ask({"--bytes", "1e30"}), "1e30");
  check_refused(ask({"--max-tokens", "0"}), "0");
  check_refused(ask({"--threads", "0"}), "0");
  check_refused(ask({"--sink", "-1", "--max-tokens", "1"}), "sink_rows is -1");
  check_refused(ask({"--block", "513", "--max-tokens", "1"}), "block_rows is 513");
  check_refused({"parity", "--text", text_path(), "--tokens", "99999999"}, "99999999");
  check_refused({"parity", "--text", text_path(), "--offset", "99999999"}, "99999999");
}

TEST_CASE("texts that are empty or no UTF-8") {
  const TemporaryFolder folder;
  { std::ofstream file(folder.file("empty.txt")); }
  check_refused({"generate", "--document", folder.file("empty.txt"), "--question", "What?"}, "empty.txt is empty");
  check_refused({"generate", "--document", text_path(), "--question", ""}, "--question is empty");
  {
    std::ofstream file(folder.file("bytes.txt"), std::ios::binary);
    for (int i = 0; i < 3; ++i) file << "caf\xe9 \xff\xfe \xc3( \xf8\x88\x80\x80 text\n";
  }
  const Outcome outcome = run_program(
      {"generate", "--document", folder.file("bytes.txt"), "--question", "What?", "--max-tokens", "2", "--json", "-"});
  INFO(outcome.errors);
  CHECK(outcome.exit_code == 0);  // bytes are tokens too
}

TEST_CASE("compositions of fidelity that cannot be read") {
  const auto refused = [](const std::string& cache, const std::string& sentence) {
    check_refused({"fidelity", "--text", text_path(), "--cache", cache}, sentence);
  };
  refused("uniform,sink_recent,turbo4", "ALLOCATOR,SELECTOR,CODEC,RETAIN");
  for (const char* retain : {"", "0", "nan", "0.5x", "1.5", "-1rows", "2.5rows", "0bytes", "1e30bytes", "rows"}) {
    refused(std::string("uniform,key_diff,turbo4,") + (*retain != '\0' ? retain : " "), "the retention");
  }
  refused("turbo9", "turbo4");
  refused("low_rank_turbo2:rank=33", "rank");
  refused("low_rank_turbo2:rule=best", "rule");
  refused("low_rank_turbo2:per_bit=0.5", "per_bit");
  refused("low_rank_turbo2:bits=7", "bits");
  refused("low_rank_turbo2:loop=half", "loop");
  refused("turbo2:rank=4", "rank");
}

TEST_CASE("lengths of fidelity that do not fit, before the long run") {
  const auto refused = [](std::vector<std::string> more, const std::string& sentence) {
    more.insert(more.begin(), {"fidelity", "--text", text_path(), "--cache", "uniform,key_diff,fp16,0.1"});
    check_refused(more, sentence);
  };
  refused({"--tokens", "1024", "--pieces", "3"}, "3073 are needed");
  refused({"--pieces", "0"}, "--pieces");
  refused({"--tokens", "256", "--skip", "256"}, "--skip 256 leaves no token of 256");
  refused({"--tokens", "256", "--continuation", "256"}, "--continuation 256 leaves no text before it");
  refused({"--tokens", "256", "--continuation", "128", "--recent", "16"}, "leaves 12 rows of 128");
}

TEST_CASE("the oracle where nothing comes later") {
  check_refused({"fidelity", "--text", text_path(), "--cache", "uniform,oracle,fp16,0.5"}, "give --continuation");
  check_refused(ask({"--selector", "oracle", "--retain", "0.5"}), "unknown token selector \"oracle\"");
  const TemporaryFolder folder;
  check_refused({"profile", "--text", text_path(), "--selector", "oracle", "--out", folder.file("curve.safetensors")},
                "unknown token selector \"oracle\"");
}

TEST_CASE("sensitivities that do not fit choose no codecs, and those that do choose") {
  using nlohmann::json;
  const TemporaryFolder folder;
  const std::string path = folder.file("sensitivities.json");
  const auto write = [&](const json& file) { std::ofstream(path) << file.dump(); };
  const auto refused = [&](const std::string& bits, const std::string& sentence) {
    check_refused({"fidelity", "--text", text_path(), "--cache", "mixed:" + path + "@" + bits}, sentence);
  };
  refused("2.5", "cannot read the sensitivities");
  { std::ofstream(path) << "no JSON"; }
  refused("2.5", "cannot be read");
  // Half of the places lose much at 2 bits.
  json file = {{"format", "kvtailor codec sensitivities"},
               {"version", 1},
               {"geometry", {{"num_layers", 30}, {"num_kv_heads", 3}, {"num_q_heads", 9}, {"head_dim", 64}}},
               {"codecs", {"turbo2", "turbo4"}}};
  for (int place = 0; place < 180; ++place) file["places"].push_back({{2.25, place % 2 == 0 ? 1e-2 : 1e-6}, {4.25, 1e-7}});
  const json good = file;
  for (const char* bits : {"", "0", "-1", "nan", "33", "2.5x"}) {
    write(good);
    refused(bits, "mixed:FILE@BITS");
  }
  refused("2.2", "cannot be met");
  file["version"] = 2;
  write(file);
  refused("2.5", "version 1");
  file = good;
  file["geometry"]["head_dim"] = 128;
  write(file);
  refused("2.5", "this one has");
  file = good;
  file["places"].erase(0);
  write(file);
  refused("2.5", "179 places");
  file = good;
  file["places"][7].erase(0);
  write(file);
  refused("2.5", "does not list every codec");
  file = good;
  file["places"][7][0] = {nullptr, 0};
  write(file);
  refused("2.5", "cannot be read");
  file = good;
  file["codecs"][1] = "turbo9";
  write(file);
  refused("4", "turbo9");

  write(good);
  const Outcome outcome = run_program({"fidelity", "--text", text_path(), "--tokens", "260", "--recent", "0", "--flush",
                                       "--json", "-", "--cache", "mixed:" + path + "@3.25", "--cache", "turbo4/turbo2"});
  INFO(outcome.errors);
  REQUIRE(outcome.exit_code == 0);
  const json results = json::parse(outcome.output)["results"];
  for (const char* number : {"mean_kl", "bits_per_element"}) CHECK(results[0][number] == results[1][number]);
}

TEST_CASE("peers and plots of fidelity that cannot be, before the long run") {
  const TemporaryFolder folder;
  const auto refused = [](std::vector<std::string> more, const std::string& sentence) {
    more.insert(more.begin(), {"fidelity", "--text", text_path()});
    check_refused(more, sentence);
  };
  refused({}, "a --cache or a --peer");
  for (const char* name : {"q9_0", "q4_0/", "/q4_0", "q4_0/q8_0/q4_0", "q4_0+rotated", " "}) {
    refused({"--peer", name}, "known: f16, q8_0");
  }
  refused({"--peer", "f16+unrotated"}, "rotates nothing");
  refused({"--peer", "f16", "--plot", folder.file("no-such-folder/plot.svg")}, "no-such-folder/plot.svg");
  refused({"--peer", "f16", "--plot", folder.file("plot.pdf")}, ".svg or .png");

  const std::string path = environment("PATH");
  setenv("PATH", folder.file("").c_str(), 1);
  refused({"--peer", "f16", "--plot", folder.file("plot.svg")}, "needs gnuplot");
  setenv("PATH", path.c_str(), 1);
  CHECK_FALSE(std::filesystem::exists(folder.file("plot.svg")));
}
