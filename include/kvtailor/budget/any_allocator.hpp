// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// AnyAllocator: a budget allocator chosen at run time, by its name.
#pragma once

#include <memory>

#include "kvtailor/budget/adaptive.hpp"
#include "kvtailor/budget/curve.hpp"
#include "kvtailor/budget/global.hpp"
#include "kvtailor/budget/lava.hpp"
#include "kvtailor/budget/learned.hpp"
#include "kvtailor/budget/pyramid.hpp"
#include "kvtailor/budget/squeeze_attention.hpp"
#include "kvtailor/budget/streaming_heads.hpp"
#include "kvtailor/budget/uniform.hpp"
#include "kvtailor/core/spec.hpp"
#include "kvtailor/io/policy_file.hpp"

namespace kvt::inline v0 {

// A policy that is never changed is shared by copies.
class AnyAllocator {
 public:
  static constexpr EvidenceSet needs = Evidence::scores | Evidence::layer_similarity;

  AnyAllocator() = default;
  template <class Policy>
  requires BudgetAllocator<Policy> &&(!std::same_as<Policy, AnyAllocator>)explicit AnyAllocator(Policy policy)
      : policy_(std::make_shared<Holder<Policy>>(std::move(policy))) {}

  EvidenceSet active_needs() const noexcept { return policy_ ? policy_->needs() : EvidenceSet(); }
  Status check(const Geometry& shape) const noexcept { return policy_ ? policy_->check(shape) : none(); }
  Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept {
    return policy_ ? policy_->allocate(want, keep) : none();
  }
  // The selector whose scores it was made for, by its full name; empty if any will do.
  std::string_view made_for() const noexcept { return policy_ ? policy_->made_for() : std::string_view(); }

 private:
  struct Interface {
    virtual ~Interface() = default;
    virtual EvidenceSet needs() const noexcept = 0;
    virtual Status check(const Geometry& shape) const noexcept = 0;
    virtual Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept = 0;
    virtual std::string_view made_for() const noexcept = 0;
  };
  template <class Policy>
  struct Holder final : Interface {
    explicit Holder(Policy given) : policy(std::move(given)) {}
    EvidenceSet needs() const noexcept override { return needs_of(policy); }
    Status check(const Geometry& shape) const noexcept override { return check_policy(policy, shape); }
    Status allocate(const BudgetRequest& want, std::span<int> keep) const noexcept override {
      return policy.allocate(want, keep);
    }
    std::string_view made_for() const noexcept override {
      if constexpr (requires { policy.selector; }) return policy.selector;
      return {};
    }
    Policy policy;
  };
  static Status none() noexcept { return error(Errc::bad_policy, "no budget allocator was chosen"); }

  std::shared_ptr<const Interface> policy_;
};

static_assert(BudgetAllocator<AnyAllocator>);

inline constexpr const char* known_allocators =
    "uniform, pyramid[:beta=20], adaptive[:safeguard=0.2], global[:safeguard=0.2], lava[:even=0.5], "
    "squeeze_attention[:share=0.35], streaming_heads:file=GATES[,rows=384], curve:file=TABLE, learned:file=POLICY";

namespace detail {

inline std::string parse_allocator(std::string_view text, AnyAllocator& out) {
  Spec spec(text);
  std::string wrong, path;
  const auto made = [&]<class Policy>(std::string_view known, Policy policy, auto&& read) {
    wrong = read_parameters(spec, known, [&](auto key, auto value) { return read(policy, key, value); });
    if (wrong.empty()) out = AnyAllocator(std::move(policy));
  };
  const auto none = [](const auto&, auto, auto) { return false; };
  const auto safeguard = [](auto& p, auto key, auto value) {
    return key == "safeguard" && read_number(value, 0.0, 1.0, p.safeguard);
  };
  if (spec.wraps) {
    wrong = "a budget allocator is not around another, as \"" + std::string(text) + "\" is; known are " + known_allocators;
  } else if (spec.name == "uniform") {
    made("none", Uniform{}, none);
  } else if (spec.name == "pyramid") {
    made("beta=1..1000", Pyramid{},
         [](Pyramid& p, auto key, auto value) { return key == "beta" && read_number(value, 1.0, 1000.0, p.beta); });
  } else if (spec.name == "adaptive") {
    made("safeguard=0..1", Adaptive{}, safeguard);
  } else if (spec.name == "global") {
    made("safeguard=0..1", Global{}, safeguard);
  } else if (spec.name == "lava") {
    made("even=0..1", Lava{},
         [](Lava& p, auto key, auto value) { return key == "even" && read_number(value, 0.0, 1.0, p.even); });
  } else if (spec.name == "squeeze_attention") {
    made("share=0..1", SqueezeAttention{},
         [](SqueezeAttention& p, auto key, auto value) { return key == "share" && read_number(value, 0.0, 1.0, p.share); });
  } else if (spec.name == "learned") {
    LearnedPolicy policy;
    wrong = learned_from_file(spec, policy);
    if (wrong.empty()) out = AnyAllocator(LearnedShares{std::move(policy.shares), policy.num_kv_heads});
  } else if (spec.name == "streaming_heads" || spec.name == "curve") {
    const bool streams = spec.name == "streaming_heads";
    StreamingHeads heads;
    wrong = read_parameters(spec, streams ? "file=PATH, rows=0..1048576" : "file=PATH", [&](auto key, auto value) {
      if (key == "file") path = value;
      return key == "file" || (streams && key == "rows" && read_number(value, 0, 1 << 20, heads.rows));
    });
    Table table;
    Curve curve;
    if (wrong.empty()) {
      wrong = from_file(spec.name, path, [&] { return streams ? read_table(path, table) : read_curve(path, curve); });
    }
    if (!wrong.empty()) return wrong;
    heads.gates = std::move(table.numbers);
    out = streams ? AnyAllocator(std::move(heads)) : AnyAllocator(std::move(curve));
  } else {
    wrong = "unknown budget allocator \"" + std::string(spec.name) + "\"; known are " + known_allocators;
  }
  return wrong;
}

}  // namespace detail

}  // namespace kvt::inline v0
