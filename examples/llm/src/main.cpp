// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm: a real model on a tailored KV cache. generate answers a question about a document; fidelity measures what a
// composition loses, retrieve what is still found, report both on a page; profile and train learn policies; parity and bench
// compare with llama.cpp itself.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "command.hpp"
#include "model.hpp"

namespace {

// libgomp reads OMP_WAIT_POLICY before main, so the program starts anew with it. Threads that spin while they wait take the
// cores from whatever else a shared machine runs.
void wait_passively(char** arguments) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  setenv("OMP_WAIT_POLICY", "passive", 1);
  execv("/proc/self/exe", arguments);  // returns only if it fails; threads spin then
}

}  // namespace

int main(int argc, char** argv) try {
  wait_passively(argv);
  kvt_llm::init_engine();
  CLI::App app("A real model on a tailored KV cache.\n\n" + kvt_llm::known_policies());
  app.require_subcommand(1);
  app.add_option_function<std::string>("--cpu", kvt_llm::choose_kernels, "host kernels of caches: " + kvt_llm::known_kernels());
  kvt_llm::add_generate(app);
  kvt_llm::add_fidelity(app);
  kvt_llm::add_parity(app);
  kvt_llm::add_bench(app);
  kvt_llm::add_sensitivity(app);
  kvt_llm::add_retrieve(app);
  kvt_llm::add_profile(app);
  kvt_llm::add_train(app);
  kvt_llm::add_report(app, argc, argv);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help
    throw std::runtime_error(e.what());
  }
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "kvt-llm: error: %s\n", e.what());
  return 1;
}
