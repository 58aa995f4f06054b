// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <kvtailor/host/cpu_module.hpp>

int main() {
  kvt::CpuModule module;
  const kvt::Status status = module.open("consumer_modules");
  if (!status.ok()) std::fprintf(stderr, "%s\n", module.message().c_str());
  return status.ok() && module.make_cache({"uniform", "sink_recent", "turbo2"}, {}).message == "turbo2" ? 0 : 1;
}
