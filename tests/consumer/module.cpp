// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <kvtailor/host/cpu_module_source.hpp>

namespace {

kvt::MadeCache make(const kvt::Composition& names, const kvt::Geometry&, const kvt::CacheOptions&,
                    std::span<const std::string>) {
  return {nullptr, kvt::error(kvt::Errc::bad_name, "the consumer has no caches"), names.codec};
}

}  // namespace

KVT_CPU_MODULE(make)
