// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What a module for CpuModule is made of: one source with
//
//   #include "kvtailor/compose.hpp"
//   #include "kvtailor/host/cpu_module_source.hpp"
//   KVT_CPU_MODULE(kvt::make_cache)
//
// kvt_add_cpu_modules() writes it and compiles it for each instruction set. Instead of kvt::make_cache, which compiles every
// codec, a function of its parameters may make caches of named types; see make_cache_of().
#pragma once

#include <new>

#include "kvtailor/host/cpu_module.hpp"
#include "kvtailor/policies.hpp"

namespace kvt::inline v0::detail {

using CacheMaker = MadeCache(const Composition&, const Geometry&, const CacheOptions&, std::span<const std::string>);

template <CacheMaker* make>
MadeCache make_in_module(const Composition& names, const Geometry& geometry, const CacheOptions& options,
                         std::span<const std::string> head_codecs) noexcept try {
  return make(names, geometry, options, head_codecs);
} catch (const std::bad_alloc&) {
  return {nullptr, error(Errc::out_of_memory, "out of memory while making a cache"), {}};
}

inline Status set_policies_in_module(AnyCache& cache, const Composition& names, std::string& message) noexcept try {
  const ParsedPolicies policies(names);
  message = policies.message;
  if (!message.empty()) return error(Errc::bad_name, "unknown name or parameter of a policy");
  return cache.set_policies(policies.allocator, policies.selector);
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while choosing policies");
}

}  // namespace kvt::inline v0::detail

#define KVT_CPU_MODULE(make)                                                                                              \
  extern "C" __attribute__((visibility("default"))) const kvt::detail::CpuModuleTable* kvt_cpu_module();                  \
  extern "C" const kvt::detail::CpuModuleTable* kvt_cpu_module() {                                                        \
    static constexpr kvt::detail::CpuModuleTable table = {kvt::detail::cpu_module_tag, kvt::detail::make_in_module<make>, \
                                                          kvt::detail::set_policies_in_module};                           \
    return &table;                                                                                                        \
  }
