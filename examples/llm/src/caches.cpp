// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See caches.hpp.
#include "caches.hpp"

#include <stdexcept>

#include "kvtailor/compose.hpp"

namespace kvt_llm {

std::unique_ptr<kvt::AnyCache> make_cache(const kvt::Composition& names, const kvt::Geometry& geometry,
                                          const kvt::CacheOptions& options) {
  auto made = kvt::make_cache(names, geometry, options);
  if (!made.status.ok()) throw std::runtime_error(made.message);
  return std::move(made.cache);
}

std::string known_policies() { return kvt::known_policies(); }

void check(const kvt::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

double mean_rows(const kvt::AnyCache& cache) {
  const auto& shape = cache.geometry();
  double rows = 0;
  for (int l = 0; l < shape.num_layers; ++l) {
    for (int h = 0; h < shape.num_kv_heads; ++h) rows += cache.num_rows(l, h);
  }
  return rows / shape.num_heads();
}

}  // namespace kvt_llm
