// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A module of two codecs, for test_cpu_module.cpp.
#include "kvtailor/compose.hpp"
#include "kvtailor/host/cpu_module_source.hpp"

namespace {

kvt::MadeCache make(const kvt::Composition& names, const kvt::Geometry& geometry, const kvt::CacheOptions& options,
                    std::span<const std::string>) {
  if (names.codec == "fp16") return kvt::make_cache_of<kvt::KvCodec<kvt::Dense<kvt::Half, 64>>>(names, geometry, options);
  if (names.codec == "turbo2") return kvt::make_cache_of<kvt::KvCodec<kvt::TurboQuant<2, 64>>>(names, geometry, options);
  return {nullptr, kvt::error(kvt::Errc::bad_name, "this module has fp16 and turbo2 alone"), {}};
}

}  // namespace

KVT_CPU_MODULE(make)
