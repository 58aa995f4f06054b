// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// make_cache({"adaptive", "snap_kv:window=32", "turbo3/turbo2"}, geometry) composes a cache by name.
//
// For programs and engines with flags. A virtual call a layer and a branch a block is all it costs; an engine that knows
// what it wants names a KvCache<...> and pays nothing. Compiles every codec for every head dim, which takes minutes: include it
// in one file, with KVT_EXTERN_HEAD_DIMS defined, and give each head dim a file with KVT_INSTANTIATE_HEAD_DIM(64).
#pragma once

#include <array>
#include <optional>
#include <string_view>

#include "kvtailor/any_cache.hpp"
#include "kvtailor/cache.hpp"
#include "kvtailor/codec/kivi.hpp"
#include "kvtailor/codec/low_rank.hpp"
#include "kvtailor/codec/shifted.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant.hpp"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"
#include "kvtailor/policies.hpp"

// An engine that knows its models may name fewer.
#if !defined(KVT_HEAD_DIMS)
#define KVT_HEAD_DIMS 40, 64, 80, 96, 112, 128, 192, 256, 512
#endif

namespace kvt::inline v0 {

namespace detail {

// Codecs by name, in one order for all head dims.
// clang-format off
inline constexpr auto codec_names = std::to_array<std::string_view>({
    "fp16", "bf16", "fp32",
    "turbo1", "turbo2", "turbo3", "turbo4", "turbo5", "turbo6",
    "q8_0", "q5_0", "q4_1", "q4_0", "rotated_q8_0", "rotated_q5_0", "rotated_q4_0",
    "kivi2_keys", "kivi4_keys", "kivi2_values",
    "trellis1", "trellis2", "trellis3", "trellis4",
    "mean_turbo2", "mean_trellis2",
    "low_rank_turbo1", "low_rank_turbo2", "low_rank_turbo3", "low_rank_turbo4",
    "low_rank_trellis1", "low_rank_trellis2", "low_rank_trellis3", "low_rank_trellis4",
    "turbo2_unbiased", "turbo3_unbiased", "turbo4_unbiased", "turbo3_gaussian"});
// clang-format on

// As the residual of a low rank or a mean.
template <int bits, int dim>
using ShortLloydMax = LloydMax<bits, dim, NormCorrection::least_squares, LogScale>;

template <int dim>
using AnyCodec =
    OneOf<Dense<Half, dim>, Dense<BFloat16, dim>, Dense<float, dim>,                                               //
          TurboQuant<1, dim>, TurboQuant<2, dim>, TurboQuant<3, dim>, TurboQuant<4, dim>,                          //
          TurboQuant<5, dim>, TurboQuant<6, dim>,                                                                  //
          Q8_0<dim>, Q5_0<dim>, Q4_1<dim>, Q4_0<dim>, Rotated<Q8_0<dim>>, Rotated<Q5_0<dim>>, Rotated<Q4_0<dim>>,  //
          KiviKeys<2, dim>, KiviKeys<4, dim>, KiviValues<2, dim>,                                                  //
          Rotated<Trellis<1, dim>>, Rotated<Trellis<2, dim>>, Rotated<Trellis<3, dim>>, Rotated<Trellis<4, dim>>,  //
          Rotated<Shifted<ShortLloydMax<2, dim>>>, Rotated<Shifted<Trellis<2, dim>>>,                              //
          Rotated<LowRank<ShortLloydMax<1, dim>>>, Rotated<LowRank<ShortLloydMax<2, dim>>>,                        //
          Rotated<LowRank<ShortLloydMax<3, dim>>>, Rotated<LowRank<ShortLloydMax<4, dim>>>,                        //
          Rotated<LowRank<Trellis<1, dim>>>, Rotated<LowRank<Trellis<2, dim>>>,                                    //
          Rotated<LowRank<Trellis<3, dim>>>, Rotated<LowRank<Trellis<4, dim>>>,                                    //
          TurboQuantUnbiased<2, dim>, TurboQuantUnbiased<3, dim>, TurboQuantUnbiased<4, dim>,                      //
          TurboQuantUnbiased<3, dim, Sketch::gaussian>>;

static_assert(codec_names.size() == AnyCodec<64>::size);

// Of which the precision can be chosen.
inline constexpr auto has_precision = []<class... Codecs>(std::type_identity<std::tuple<Codecs...>>) {
  return std::array{[](Codecs codec) { return set_precision(codec, Precision::fast); }(Codecs{})...};
}(std::type_identity<AnyCodec<64>::codec_types>{});

// KIVI codes keys along tokens and values along channels; 4-bit values are q4_1.
inline std::string_view resolve_alias(std::string_view name, bool keys) {
  if (name == "kivi2") return keys ? "kivi2_keys" : "kivi2_values";
  if (name == "kivi4") return keys ? "kivi4_keys" : "q4_1";
  return name;
}

// What a name says, before the head dim is known.
struct CodecChoice {
  int index = 0;
  LowRankOptions low_rank;
  std::optional<Precision> precision;  // if it is named
  // Holds numbers that fp16 does not.
  bool wide() const {
    const auto name = codec_names[static_cast<std::size_t>(index)];
    return name == "bf16" || name == "fp32";
  }

  template <class... Codecs>
  void apply(OneOf<Codecs...>& codec) const {
    codec.index = index;
    std::apply([&](auto&... each) { (set(each), ...); }, codec.codecs);
  }

 private:
  template <class Codec>
  void set(Codec& codec) const {
    if constexpr (std::derived_from<Codec, LowRankOptions>) static_cast<LowRankOptions&>(codec) = low_rank;
    if (precision.has_value()) set_precision(codec, *precision);
  }
};
struct KvChoice {
  CodecChoice keys, values;
};

template <class Cache>
class Erased final : public AnyCache {
 public:
  Erased(typename Cache::budget_type budget, typename Cache::selector_type selector, typename Cache::codec_type codec)
      : cache_(std::move(budget), std::move(selector), std::move(codec)) {}
  Cache& get() { return cache_; }

  const Geometry& geometry() const noexcept override { return cache_.geometry(); }
  const CacheOptions& options() const noexcept override { return cache_.options(); }
  Status set_policies(const AnyAllocator& allocator, const AnySelector& selector) noexcept override {
    return cache_.set_policies(allocator, selector);
  }
  Status encode(int layer, int kv_head) noexcept override { return cache_.encode(layer, kv_head); }
  Status append(int layer, const float* keys, const float* values, std::span<const int> positions) noexcept override {
    return cache_.append(layer, keys, values, positions);
  }
  bool wants_queries() const noexcept override { return cache_.wants_queries(); }
  EvidenceSet needs() const noexcept override { return cache_.needs(); }
  Status observe(int layer, const float* queries, std::span<const int> positions,
                 const AttendOptions& attend) noexcept override {
    return cache_.observe(layer, queries, positions, attend);
  }
  Status observe_hidden(int layer, const float* before, const float* after, int n, int width) noexcept override {
    return cache_.observe_hidden(layer, before, after, n, width);
  }
  void forget() noexcept override { cache_.forget(); }
  Status add_to_plan(int layer, const float* queries, std::span<const int> positions, const AttendOptions& attend, float* out,
                     AttendPlan& plan) const noexcept override {
    return cache_.add_to_plan(layer, queries, positions, attend, out, plan);
  }
  Status scores(double share, std::vector<float>& out) const noexcept override { return cache_.scores(share, out); }
  Status compress(Retain retain) noexcept override { return cache_.compress(retain); }
  Status flush() noexcept override { return cache_.flush(); }
  Status truncate(int position) noexcept override { return cache_.truncate(position); }
  Status fork(std::unique_ptr<AnyCache>& child) const noexcept override try {
    auto twin =
        std::make_unique<Erased>(typename Cache::budget_type{}, typename Cache::selector_type{}, typename Cache::codec_type{});
    KVT_TRY(cache_.fork(twin->cache_));
    child = std::move(twin);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while copying a cache");
  }
  void clear() noexcept override { cache_.clear(); }
  Memory memory() const noexcept override { return cache_.memory(); }
  double bits_per_element() const noexcept override { return cache_.bits_per_element(); }
  int num_rows(int layer, int kv_head) const noexcept override { return cache_.num_rows(layer, kv_head); }
  std::span<const int> positions(int layer, int kv_head) const noexcept override { return cache_.positions(layer, kv_head); }
  int end_position(int layer) const noexcept override { return cache_.end_position(layer); }

 private:
  Cache cache_;
};

inline std::string known_codecs() {
  std::string all;
  for (const auto name : codec_names) all += std::string(name) + ", ";
  return all + "kivi2, kivi4";
}

inline std::string parse_codec(std::string_view text, bool keys, CodecChoice& out) {
  Spec spec(text);
  const auto found = std::find(codec_names.begin(), codec_names.end(), resolve_alias(spec.name, keys));
  if (found == codec_names.end()) {
    return "unknown storage codec \"" + std::string(spec.name) + "\"; known are " + known_codecs() + ", or two as keys/values";
  }
  out.index = static_cast<int>(found - codec_names.begin());
  const bool low_rank = spec.name.starts_with("low_rank"), precise = has_precision[static_cast<std::size_t>(out.index)];
  LowRankOptions& o = out.low_rank;
  std::string_view key, value;
  while (spec.next(key, value)) {
    const auto is = [&, key = key, value = value](std::string_view name, std::string_view word) {
      return key == name && value == word;
    };
    bool known = true;
    if (precise && (is("precision", "fast") || is("precision", "accurate"))) {
      out.precision = value == "fast" ? Precision::fast : Precision::accurate;
    } else if (!low_rank) {
      known = false;
    } else if (is("shrink", "none")) {
      o.shrinkage = Shrinkage::none;
    } else if (is("shrink", "frobenius")) {
      o.shrinkage = Shrinkage::frobenius;
    } else if (is("shrink", "operator")) {
      o.shrinkage = Shrinkage::operator_norm;
    } else if (is("shrink", "nuclear")) {
      o.shrinkage = Shrinkage::nuclear;
    } else if (is("loop", "open") || is("loop", "closed")) {
      o.loop = value == "open" ? Loop::open : Loop::closed;
    } else if (is("rule", "bbp") || is("rule", "rate")) {
      o.rule = value == "bbp" ? RankRule::bbp : RankRule::rate_distortion;
    } else if (key == "bits") {
      known = read_number(value, 1, 16, o.factor_bits) && (o.factor_bits <= 6 || o.factor_bits == 16);
    } else {
      known = (key == "rank" && read_number(value, 0, LowRankOptions::most_rank, o.max_rank)) ||
              (key == "per_bit" && read_number(value, 1.5f, 20.f, o.error_per_bit));
    }
    if (!known) {
      return bad_parameter(spec.name, key, value,
                           std::string(precise ? "precision=fast or accurate" : "none") +
                               (low_rank ? ", rank=0..32, loop=closed or open, rule=rate or bbp, per_bit=1.5..20 (of rate), "
                                           "bits=1..6 or 16 (of bbp), shrink=frobenius, none, operator or nuclear"
                                         : ""));
    }
  }
  return {};
}
// One for both, or "keys/values".
inline std::string parse_codecs(std::string_view text, KvChoice& out) {
  const auto slash = text.find('/');
  std::string wrong = parse_codec(text.substr(0, slash), true, out.keys);
  if (wrong.empty()) wrong = parse_codec(slash == text.npos ? text : text.substr(slash + 1), false, out.values);
  return wrong;
}

struct ParsedComposition {
  AnyAllocator allocator;
  AnySelector selector;
  KvChoice codec;
  std::vector<KvChoice> head_codecs;

  bool wide() const {
    bool any = codec.keys.wide() || codec.values.wide();
    for (const KvChoice& one : head_codecs) any = any || one.keys.wide() || one.values.wide();
    return any;
  }
};

template <class Codec>
MadeCache make_erased(const AnyAllocator& allocator, const AnySelector& selector, const Codec& codec, const Geometry& geometry,
                      const CacheOptions& options, std::span<const Codec> head_codecs) {
  auto erased = std::make_unique<Erased<KvCache<AnyAllocator, AnySelector, Codec>>>(allocator, selector, codec);
  MadeCache made;
  made.status = erased->get().init(geometry, options, head_codecs);
  made.message = made.status.message();
  if (made.status.ok()) made.cache = std::move(erased);
  return made;
}

template <int dim, class DenseType>
MadeCache make_any_codec(const ParsedComposition& parsed, const Geometry& geometry, const CacheOptions& options) {
  using Codec = KvCodec<AnyCodec<dim>, AnyCodec<dim>, DenseType>;
  const auto codec_of = [](const KvChoice& choice) {
    Codec codec;
    choice.keys.apply(codec.keys);
    choice.values.apply(codec.values);
    return codec;
  };
  std::vector<Codec> head_codecs;
  for (const KvChoice& choice : parsed.head_codecs) head_codecs.push_back(codec_of(choice));
  return make_erased<Codec>(parsed.allocator, parsed.selector, codec_of(parsed.codec), geometry, options, head_codecs);
}

// The dense zones must hold whatever the codecs can.
template <int dim>
MadeCache make_head_dim(const ParsedComposition& parsed, const Geometry& geometry, const CacheOptions& options) {
  return parsed.wide() ? make_any_codec<dim, float>(parsed, geometry, options)
                       : make_any_codec<dim, Half>(parsed, geometry, options);
}

template <int... dims>
MadeCache make_any_head_dim(const ParsedComposition& parsed, const Geometry& geometry, const CacheOptions& options) {
  MadeCache made;
  made.status = geometry.validate();
  const auto make = [&]<int dim>() {
    made = make_head_dim<dim>(parsed, geometry, options);
    return true;
  };
  if (made.status.ok() && !((geometry.head_dim == dims && make.template operator()<dims>()) || ...)) {
    made.status = error(Errc::bad_shape, "head_dim {} was left out when this program was compiled", geometry.head_dim);
  }
  if (!made.status.ok()) made.message = made.status.message();
  return made;
}

}  // namespace detail

#define KVT_INSTANTIATE_HEAD_DIM(dim)                                                                                  \
  template kvt::MadeCache kvt::detail::make_head_dim<dim>(const kvt::detail::ParsedComposition&, const kvt::Geometry&, \
                                                          const kvt::CacheOptions&)
#if defined(KVT_EXTERN_HEAD_DIMS)
extern KVT_INSTANTIATE_HEAD_DIM(40);
extern KVT_INSTANTIATE_HEAD_DIM(64);
extern KVT_INSTANTIATE_HEAD_DIM(80);
extern KVT_INSTANTIATE_HEAD_DIM(96);
extern KVT_INSTANTIATE_HEAD_DIM(112);
extern KVT_INSTANTIATE_HEAD_DIM(128);
extern KVT_INSTANTIATE_HEAD_DIM(192);
extern KVT_INSTANTIATE_HEAD_DIM(256);
extern KVT_INSTANTIATE_HEAD_DIM(512);
#endif

// head_codecs [num_layers * num_kv_heads], or empty: the codec of each head, in the form of names.codec.
// A template, since otherwise to include this is to compile every codec for every head dim.
template <class = void>
MadeCache make_cache(const Composition& names, const Geometry& geometry, const CacheOptions& options = {},
                     std::span<const std::string> head_codecs = {}) {
  const ParsedPolicies policies(names);
  detail::ParsedComposition parsed{policies.allocator, policies.selector, {}, {}};
  std::string wrong = policies.message;
  if (wrong.empty()) wrong = detail::parse_codecs(names.codec, parsed.codec);
  for (const std::string& codec : head_codecs) {
    if (wrong.empty()) wrong = detail::parse_codecs(codec, parsed.head_codecs.emplace_back());
  }
  if (!wrong.empty()) return {nullptr, error(Errc::bad_name, "unknown name or parameter of a policy"), wrong};
  return detail::make_any_head_dim<KVT_HEAD_DIMS>(parsed, geometry, options);
}

// The same with a codec that the source names, a KvCodec of geometry.head_dim; names.codec is not looked at. Compiles in
// seconds.
template <class Codec>
MadeCache make_cache_of(const Composition& names, const Geometry& geometry, const CacheOptions& options = {}) {
  const ParsedPolicies policies(names);
  if (!policies.message.empty()) {
    return {nullptr, error(Errc::bad_name, "unknown name or parameter of a policy"), policies.message};
  }
  return detail::make_erased<Codec>(policies.allocator, policies.selector, {}, geometry, options, {});
}

// For a program's help.
inline std::string known_policies() {
  return std::string("budget allocators: ") + known_allocators + "\ntoken selectors:   " + known_selectors + "\n" +
         "storage codecs:    " + detail::known_codecs() + "; keys/values apart: turbo3/turbo2\n";
}

}  // namespace kvt::inline v0
