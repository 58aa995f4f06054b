// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See shared_prefill.hpp.
#include "shared_prefill.hpp"

#include <utility>

namespace kvt_llm {

SharedPrefill::SharedPrefill(const Model& model, const kvt::CacheOptions& zones, const std::vector<kvt::Composition>& served,
                             std::function<void(kvt::AnyCache&)> read)
    : read_(std::move(read)) {
  kvt::CacheOptions told = zones;
  for (const auto& names : served) told = told_of(model, names, told);
  whole_ = make_counted_cache(served.front(), model, told, memory_);
}

std::unique_ptr<kvt::AnyCache> SharedPrefill::cut(const kvt::Composition& names, const Budget& budget) {
  if (read_) {
    const double start = kvt_llm::seconds();
    std::exchange(read_, nullptr)(*whole_);
    seconds_ = kvt_llm::seconds() - start;
  }
  measured_bytes(*whole_, memory_);  // nothing else is there
  std::unique_ptr<kvt::AnyCache> fork;
  check(whole_->fork(fork));
  set_policies(*fork, names);
  budget.apply(*fork);
  return fork;
}

}  // namespace kvt_llm
