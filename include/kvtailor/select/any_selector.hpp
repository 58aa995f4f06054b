// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// AnySelector: a token selector chosen at run time, by its name.
#pragma once

#include <algorithm>
#include <charconv>
#include <memory>

#include "kvtailor/core/spec.hpp"
#include "kvtailor/io/policy_file.hpp"
#include "kvtailor/select/caote.hpp"
#include "kvtailor/select/chunk_kv.hpp"
#include "kvtailor/select/critical_kv.hpp"
#include "kvtailor/select/expected_attention.hpp"
#include "kvtailor/select/heavy_hitter.hpp"
#include "kvtailor/select/key_diff.hpp"
#include "kvtailor/select/key_norm.hpp"
#include "kvtailor/select/lag_kv.hpp"
#include "kvtailor/select/last_query.hpp"
#include "kvtailor/select/lava_score.hpp"
#include "kvtailor/select/learned.hpp"
#include "kvtailor/select/leverage.hpp"
#include "kvtailor/select/random.hpp"
#include "kvtailor/select/reconstruction.hpp"
#include "kvtailor/select/sink_recent.hpp"
#include "kvtailor/select/snap_kv.hpp"
#include "kvtailor/select/tova.hpp"
#include "kvtailor/select/value_norm.hpp"

namespace kvt::inline v0 {

// A policy that is never changed is shared by copies.
class AnySelector {
 public:
  static constexpr EvidenceSet needs = Evidence::positions | Evidence::keys | Evidence::values | query_evidence |
                                       Evidence::rope | Evidence::output_projection | Evidence::reconstruction;
  int window = 1;  // queries the cache keeps for it

  AnySelector() = default;
  template <class Policy>
  requires TokenSelector<Policy> &&(!std::same_as<Policy, AnySelector>)explicit AnySelector(Policy policy)
      : window(window_of(policy)), policy_(std::make_shared<Holder<Policy>>(std::move(policy))) {}

  EvidenceSet active_needs() const noexcept { return policy_ ? policy_->needs() : EvidenceSet(); }
  bool joins_heads() const noexcept { return policy_ && policy_->joins_heads(); }
  bool gives_attention() const noexcept { return policy_ && policy_->gives_attention(); }
  Status check(const Geometry& shape) const noexcept { return policy_ ? policy_->check(shape) : none(); }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept {
    return policy_ ? policy_->score(seen, score) : none();
  }
  Status attention(const HeadEvidence& seen, std::span<float> out) const noexcept {
    return policy_ ? policy_->attention(seen, out) : none();
  }
  int first_kept(const HeadEvidence& seen) const noexcept { return policy_ ? policy_->first_kept(seen) : 0; }
  Status join(const LayerScores& layer) const noexcept { return policy_ ? policy_->join(layer) : none(); }

 private:
  struct Interface {
    virtual ~Interface() = default;
    virtual EvidenceSet needs() const noexcept = 0;
    virtual bool joins_heads() const noexcept = 0;
    virtual bool gives_attention() const noexcept = 0;
    virtual Status check(const Geometry& shape) const noexcept = 0;
    virtual Status score(const HeadEvidence& seen, std::span<float> score) const noexcept = 0;
    virtual Status attention(const HeadEvidence& seen, std::span<float> out) const noexcept = 0;
    virtual int first_kept(const HeadEvidence& seen) const noexcept = 0;
    virtual Status join(const LayerScores& layer) const noexcept = 0;
  };
  template <class Policy>
  struct Holder final : Interface {
    explicit Holder(Policy given) : policy(std::move(given)) {}
    EvidenceSet needs() const noexcept override { return needs_of(policy); }
    bool joins_heads() const noexcept override { return JoinsHeads<Policy>; }
    bool gives_attention() const noexcept override { return AttentionSelector<Policy>; }
    Status check(const Geometry& shape) const noexcept override { return check_policy(policy, shape); }
    Status score(const HeadEvidence& seen, std::span<float> score) const noexcept override { return policy.score(seen, score); }
    Status attention([[maybe_unused]] const HeadEvidence& seen, [[maybe_unused]] std::span<float> out) const noexcept override {
      if constexpr (AttentionSelector<Policy>) return policy.attention(seen, out);
      return error(Errc::bad_policy, "this token selector does not go by attention");
    }
    int first_kept([[maybe_unused]] const HeadEvidence& seen) const noexcept override {
      if constexpr (AttentionSelector<Policy>) return policy.first_kept(seen);
      return seen.num_rows();
    }
    Status join([[maybe_unused]] const LayerScores& layer) const noexcept override {
      if constexpr (JoinsHeads<Policy>) return policy.join(layer);
      return success();
    }
    Policy policy;
  };
  static Status none() noexcept { return error(Errc::bad_policy, "no token selector was chosen"); }

  std::shared_ptr<const Interface> policy_;
};

static_assert(JoinsHeads<AnySelector>);

namespace detail {

// One whose heads do not decide together, as selectors around it want it.
template <bool by_attention>
struct LoneSelector {
  static constexpr EvidenceSet needs = AnySelector::needs;
  AnySelector base;

  EvidenceSet active_needs() const noexcept { return base.active_needs(); }
  Status check(const Geometry& shape) const noexcept { return base.check(shape); }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept { return base.score(seen, score); }
  Status attention(const HeadEvidence& seen, std::span<float> out) const noexcept requires by_attention {
    return base.attention(seen, out);
  }
  int first_kept(const HeadEvidence& seen) const noexcept requires by_attention { return base.first_kept(seen); }
};

}  // namespace detail

inline constexpr const char* known_selectors =
    "random[:seed=0], sink_recent[:num_sinks=4], key_norm, key_diff, snap_kv[:window=64,kernel=5,pool=avg], tova, last_query, "
    "heavy_hitter[:over=visible], expected_attention[:future=512,num_sinks=4,epsilon=0,covariance=on,value_norm=on], "
    "lag_kv[:lag=128,num_sinks=4,cross=off], leverage[:sketch=48,seed=0], lava[:window=32,kernel=7], reconstruction, "
    "learned:file=POLICY; around "
    "another: value_norm[:epsilon=0,through=nothing](..), critical_kv[:epsilon=1e-4,first_stage=0.5](..), caote(..), "
    "chunk_kv[:length=20](..)";

namespace detail {

inline std::string parse_selector(std::string_view text, AnySelector& out);

inline constexpr int most_wrappers = 16;  // a text of any length must not use up the stack

// A selector around another.
inline std::string parse_wrapper(Spec& spec, AnySelector& out) {
  std::string wrong;
  AnySelector base;
  const bool chunks = spec.name == "chunk_kv", caote = spec.name == "caote", critical = spec.name == "critical_kv";
  if (spec.name.find('(') != spec.name.npos) {
    return "the token selector \"" + std::string(spec.name) +
           "\" does not end with its parenthesis; around another are value_norm(..), critical_kv(..), caote(..) and "
           "chunk_kv(..)";
  }
  if (!chunks && !caote && !critical && spec.name != "value_norm") {
    return "the token selector \"" + std::string(spec.name) +
           "\" is not around another; value_norm, critical_kv, caote and "
           "chunk_kv are";
  }
  if (std::count(spec.inner.begin(), spec.inner.end(), '(') >= most_wrappers) {
    return "the token selector \"" + std::string(spec.name) + "\" is around too many others; at most " +
           std::to_string(most_wrappers) + " can be around one another";
  }
  wrong = parse_selector(spec.inner, base);
  if (!wrong.empty()) return wrong;
  if (!chunks && base.joins_heads()) {
    return std::string(spec.name) + " scores each head alone, and cannot be around " + std::string(spec.inner) +
           ", whose heads decide together";
  }
  const auto made = [&]<class Policy>(std::string_view known, Policy policy, auto&& read) {
    wrong = read_parameters(spec, known, [&](auto key, auto value) { return read(policy, key, value); });
    if (wrong.empty()) out = AnySelector(std::move(policy));
  };
  if (chunks) {
    made("length=1..1048576", ChunkKv<AnySelector>{base},
         [](auto& p, auto key, auto value) { return key == "length" && read_number(value, 1, 1 << 20, p.length); });
  } else if (caote) {
    if (!base.gives_attention()) {
      return "caote goes by attention, which " + std::string(spec.inner) +
             " does not give; snap_kv, last_query, heavy_hitter and reconstruction do";
    }
    made("none", Caote<LoneSelector<true>>{{base}}, [](const auto&, auto, auto) { return false; });
  } else if (critical) {
    made("epsilon=0..1000, first_stage=0..1", CriticalKv<LoneSelector<false>>{{base}}, [](auto& p, auto key, auto value) {
      return (key == "epsilon" && read_number(value, 0.f, 1000.f, p.epsilon)) ||
             (key == "first_stage" && read_number(value, 0.0, 1.0, p.first_stage));
    });
  } else {
    bool output = false;
    float epsilon = 0;
    wrong = read_parameters(spec, "epsilon=0..1000, through=nothing or output", [&](auto key, auto value) {
      return (key == "epsilon" && read_number(value, 0.f, 1000.f, epsilon)) ||
             (key == "through" && read_choice(value, "nothing", "output", output));
    });
    const auto around = [&]<bool by_attention>() {
      using Base = LoneSelector<by_attention>;
      out = output ? AnySelector(ValueNorm<Base, Through::output>{{base}, epsilon})
                   : AnySelector(ValueNorm<Base>{{base}, epsilon});
    };
    if (wrong.empty()) base.gives_attention() ? around.template operator()<true>() : around.template operator()<false>();
  }
  return wrong;
}

// An empty message is success.
inline std::string parse_selector(std::string_view text, AnySelector& out) {
  Spec spec(text);
  if (spec.wraps) return parse_wrapper(spec, out);
  std::string wrong;
  const auto made = [&]<class Policy>(std::string_view known, Policy policy, auto&& read) {
    wrong = read_parameters(spec, known, [&](auto key, auto value) { return read(policy, key, value); });
    if (wrong.empty()) out = AnySelector(std::move(policy));
  };
  const auto none = [](const auto&, auto, auto) { return false; };
  const auto window = [](auto& p, auto key, auto value) {
    return (key == "window" && read_number(value, 1, 4096, p.window)) ||
           (key == "kernel" && read_number(value, 1, 4095, p.kernel) && p.kernel % 2 == 1);
  };
  if (spec.name == "random") {
    made("seed=number", Random{}, [](Random& p, auto key, auto value) {
      return key == "seed" && read_number<std::uint64_t>(value, 0, ~std::uint64_t{0}, p.seed);
    });
  } else if (spec.name == "sink_recent") {
    made("num_sinks=0..1048576", SinkRecent{},
         [](SinkRecent& p, auto key, auto value) { return key == "num_sinks" && read_number(value, 0, 1 << 20, p.num_sinks); });
  } else if (spec.name == "key_norm") {
    made("none", KeyNorm{}, none);
  } else if (spec.name == "key_diff") {
    made("none", KeyDiff{}, none);
  } else if (spec.name == "snap_kv") {
    made("window=1..4096, kernel=1..4095 and odd, pool=avg or max", SnapKv{}, [&](SnapKv& p, auto key, auto value) {
      bool most = p.pool == SnapKv::Pool::maximum;
      const bool known = window(p, key, value) || (key == "pool" && read_choice(value, "avg", "max", most));
      p.pool = most ? SnapKv::Pool::maximum : SnapKv::Pool::average;
      return known;
    });
  } else if (spec.name == "tova") {
    made("none", Tova{}, none);
  } else if (spec.name == "last_query") {
    made("none", LastQuery{}, none);
  } else if (spec.name == "heavy_hitter") {
    made("over=visible (mean) or all (sum)", HeavyHitter{}, [](HeavyHitter& p, auto key, auto value) {
      bool all = false;
      const bool known = key == "over" && read_choice(value, "visible", "all", all);
      if (known) p.over = all ? HeavyHitter::Over::all : HeavyHitter::Over::visible;
      return known;
    });
  } else if (spec.name == "expected_attention") {
    made("future=1..1048576, num_sinks=0..1048576, epsilon=0..1000, covariance=on or off, value_norm=on or off",
         ExpectedAttention{}, [](ExpectedAttention& p, auto key, auto value) {
           return (key == "future" && read_number(value, 1, 1 << 20, p.future)) ||
                  (key == "num_sinks" && read_number(value, 0, 1 << 20, p.num_sinks)) ||
                  (key == "epsilon" && read_number(value, 0.f, 1000.f, p.epsilon)) ||
                  (key == "covariance" && read_choice(value, "off", "on", p.covariance)) ||
                  (key == "value_norm" && read_choice(value, "off", "on", p.value_norm));
         });
  } else if (spec.name == "lag_kv") {
    made("lag=2..1048576, num_sinks=0..1048576, cross=on or off", LagKv{}, [](LagKv& p, auto key, auto value) {
      return (key == "lag" && read_number(value, 2, 1 << 20, p.lag)) ||
             (key == "num_sinks" && read_number(value, 0, 1 << 20, p.num_sinks)) ||
             (key == "cross" && read_choice(value, "off", "on", p.cross));
    });
  } else if (spec.name == "leverage") {
    made("sketch=1..256, seed=number", Leverage{}, [](Leverage& p, auto key, auto value) {
      return (key == "sketch" && read_number(value, 1, 256, p.sketch)) ||
             (key == "seed" && read_number<std::uint64_t>(value, 0, ~std::uint64_t{0}, p.seed));
    });
  } else if (spec.name == "lava") {
    made("window=1..4096, kernel=1..4095 and odd", LavaScore{}, window);
  } else if (spec.name == "learned") {
    LearnedPolicy policy;
    wrong = learned_from_file(spec, policy);
    if (wrong.empty()) {
      out =
          AnySelector(OwnedLearned{std::make_shared<const TokenScorer<float>>(std::move(policy.scores)), policy.num_kv_heads});
    }
  } else if (spec.name == "reconstruction") {
    made("none", Reconstruction{}, none);
  } else if (spec.name == "value_norm" || spec.name == "critical_kv" || spec.name == "caote" || spec.name == "chunk_kv") {
    wrong = std::string(spec.name) + " is around another token selector: " + std::string(spec.name) + "(snap_kv)";
  } else {
    wrong = "unknown token selector \"" + std::string(spec.name) + "\"; known are " + known_selectors;
  }
  return wrong;
}

}  // namespace detail

// The name of a selector with all its parameters, those that were left out too, in one order: texts that mean the same selector
// have the same. A name that is not known stays as it is.
inline std::string full_name(std::string_view text) {
  detail::Spec spec(text);
  const std::string_view all = known_selectors;
  std::string name(spec.name);
  // Where the name begins in the list; it ends with a bracket, a parenthesis, a comma or the end.
  std::size_t at = 0;
  const auto ends = [&](std::size_t i) { return i == all.size() || std::string_view("[(,;").find(all[i]) != all.npos; };
  while ((at = all.find(spec.name, at)) != all.npos && !(ends(at + name.size()) && (at == 0 || all[at - 1] == ' '))) ++at;
  if (at == all.npos || name.empty()) return std::string(text);
  std::string_view defaults = all.substr(at + name.size());
  defaults = defaults.starts_with("[:") ? defaults.substr(2, defaults.find(']') - 2) : std::string_view();
  const auto plain = [](std::string_view value) {
    if (value.find_first_not_of("0123456789") == value.npos) return std::string(value);
    double x = 0;
    const auto [end, failure] = std::from_chars(value.data(), value.data() + value.size(), x);
    if (failure != std::errc() || end != value.data() + value.size()) return std::string(value);
    char digits[32];
    return std::string(digits, std::to_chars(digits, digits + sizeof digits, x).ptr);
  };
  for (std::string_view rest = defaults; !rest.empty();) {
    const auto item = rest.substr(0, rest.find(','));
    rest = item.size() < rest.size() ? rest.substr(item.size() + 1) : std::string_view();
    std::string_view key = item.substr(0, item.find('=')), value = item.substr(key.size() + 1), given_key, given;
    for (detail::Spec own(text); own.next(given_key, given);) {
      if (given_key == key) value = given;
    }
    name += (name.size() == spec.name.size() ? ":" : ",") + std::string(key) + "=" + plain(value);
  }
  return spec.wraps ? name + "(" + full_name(spec.inner) + ")" : name;
}

}  // namespace kvt::inline v0
