// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See shared_prefill.hpp.
#include "shared_prefill.hpp"

#include <utility>

#include "hindsight.hpp"
#include "kvtailor/policies.hpp"

namespace kvt_llm {

SharedPrefill::SharedPrefill(const Model& model, const kvt::CacheOptions& zones, const std::vector<kvt::Composition>& served,
                             std::function<void(kvt::AnyCache&)> read,
                             std::function<std::vector<float>(kvt::AnyCache&)> look_ahead)
    : read_(std::move(read)), look_ahead_(std::move(look_ahead)) {
  kvt::CacheOptions told = zones;
  for (const auto& names : served) told = told_of(model, names, told);
  whole_ = make_counted_cache(served.front(), model, told, memory_);
}

std::unique_ptr<kvt::AnyCache> SharedPrefill::cut(const kvt::Composition& names, const Budget& budget, bool oracle) {
  if (read_) {
    const double start = kvt_llm::seconds();
    std::exchange(read_, nullptr)(*whole_);
    seconds_ = kvt_llm::seconds() - start;
  }
  measured_bytes(*whole_, memory_);  // nothing else is there
  std::unique_ptr<kvt::AnyCache> fork;
  if (oracle && importance_ == nullptr) {
    check(whole_->fork(fork));
    importance_ = std::make_shared<const std::vector<float>>(look_ahead_(*fork));
    fork.reset();
  }
  check(whole_->fork(fork));
  if (oracle) {
    check(
        fork->set_policies(kvt::ParsedPolicies(names).allocator, kvt::AnySelector(KnownScores{importance_, fork->geometry()})));
  } else {
    set_policies(*fork, names);
  }
  budget.apply(*fork);
  return fork;
}

}  // namespace kvt_llm
