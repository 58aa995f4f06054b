// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DeviceKvCache: a device cache composed with policies that decide which rows stay.
//
//   KVT_TRY(cache.append(layer, keys, values, positions, n));
//   KVT_TRY(cache.observe(layer, queries, positions, n));   // if the selector needs queries
//   KVT_TRY(cache.compress(Retain::ratio(0.25)));           // after prefill, between chunks, or while decoding
//   KVT_TRY(cache.reserve(1));                              // what was reserved before is gone
//
// compress() waits for the device, and takes memory while it runs: five bytes for each row of each head, four more if the
// selector needs queries, and four if its heads decide together. observe() and truncate() are as append(): they allocate
// nothing, wait for nothing, and can be captured.
#pragma once

#include "kvtailor/budget/request.hpp"
#include "kvtailor/core/check.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/store/device_cache.hpp"
#include "kvtailor/store/device_model.hpp"
#include "kvtailor/store/device_queries.hpp"
#include "kvtailor/store/head_score.hpp"
#include "kvtailor/store/head_share.hpp"

namespace kvt::inline v0 {

// A token selector with a side for the device: see store/head_score.hpp.
template <class S>
concept DeviceTokenSelector = TokenSelector<S> && requires {
  sizeof(typename S::template Shared<64, 8>);
};

// A budget allocator that gives a head rows for sure, and the rest of a layer's to its highest scores. Scores stay on the
// device then; for others that need them they are copied to the host.
template <class B>
concept LayerSharing = BudgetAllocator<B> &&
    requires(const B& budget, const BudgetRequest& want, std::span<int> safe, std::span<std::int64_t> left) {
  { budget.share_out(want, safe, left) } -> std::same_as<Status>;
};

template <class Budget, class Selector, class Codec, class Device>
class DeviceKvCache : public DeviceCache<Codec, Device> {
  static_assert(BudgetAllocator<Budget>, "the first policy is a budget allocator");
  static_assert(DeviceTokenSelector<Selector>, "the token selector has no side for devices");
  static_assert(!EvidenceSet(Budget::needs).has(Evidence::layer_similarity),
                "hidden states are not compared on devices, as the budget allocator wants");
  using Rows = DeviceCache<Codec, Device>;

 public:
  // Queries are kept only if the selector needs them: fp32, for the life of the cache.
  Status init(Device& device, typename Rows::Pool& pool, const Geometry& geometry, const DeviceCacheOptions& options = {},
              const Budget& budget = {}, const Selector& selector = {}, const Codec& codec = {},
              std::span<const Codec> head_codecs = {}) {
    if constexpr (requires { selector.check(); }) KVT_TRY(selector.check());
    if constexpr (requires { budget.check(geometry); }) KVT_TRY(budget.check(geometry));
    Window window;
    Model model;
    KVT_TRY(geometry.validate());
    KVT_TRY(detail::check_model(geometry, options, needs_of(selector)));
    KVT_TRY(model.init(device, geometry, options.ropes, options.output_projections, needs_of(selector)));
    if constexpr (needs_queries) KVT_TRY(window.init(device, geometry, window_of(selector)));
    DeviceArray<int, Device> chosen;
    const auto layers = static_cast<std::size_t>(geometry.num_layers);
    if constexpr (slides) KVT_TRY(chosen.allocate(device, layers));
    KVT_TRY(Rows::init(device, pool, geometry, options, codec, head_codecs));
    budget_ = budget;
    selector_ = selector;
    window_ = std::move(window);
    model_ = std::move(model);
    chosen_ = std::move(chosen);
    chosen_before_.assign(chosen_.size(), 0);
    return success();
  }

  // Shows the cache the queries (post-RoPE) that come with the rows just appended: [n, num_q_heads, head_dim] at positions [n],
  // which increase, after all it was shown; both of the device. Costs nothing if the selector needs none. T is Half, BFloat16
  // or float. Sink logits are not looked at.
  template <class T>
  Status observe(int layer, const T* queries, const int* positions, int n, const AttendOptions& attend = {}) {
    KVT_TRY(this->check_layer(layer));
    KVT_TRY(detail::check_options(this->geometry(), attend));
    if (n < 0) return error(Errc::bad_shape, "there are {} queries; it must be zero or more", n);
    if (n > 0 && (queries == nullptr || positions == nullptr)) return error(Errc::bad_shape, "a pointer to queries is null");
    if (!needs_queries || n == 0) return success();
    const int heads = this->geometry().num_kv_heads;
    const float scale = attend.scale != 0 ? attend.scale : 1.f / std::sqrt(static_cast<float>(Rows::head_dim));
    return this->device()->launch(ObserveWork<T>{window_.queries().from_head(layer * heads),
                                                 queries,
                                                 positions,
                                                 n,
                                                 heads,
                                                 {0, 0, attend.window, scale, attend.soft_cap}},
                                  heads);
  }

  // Keeps so many rows: the budget allocator says how many of each head, the token selector which. Sink rows and the newest
  // recent_rows always stay, in number as in kind. A budget of rows or a ratio is met exactly; bytes are not exceeded: what
  // falls is pages of a head, and the dense zone and tables stay as they are. Observed queries are used up.
  Status compress(Retain retain) {
    std::vector<int> near, body;
    KVT_TRY(this->read_rows(near, body));
    const Geometry& geometry = this->geometry();
    const DeviceCacheOptions& options = this->options();
    const std::size_t heads = near.size();
    std::vector<int> seen(heads), floor(heads), keep(heads), dense(heads);  // dense: rows that will not be encoded
    long long rows = 0, floor_rows = 0, stride = 1;
    for (std::size_t h = 0; h < heads; ++h) {
      const int sinks = std::min(near[h], options.sink_rows);
      seen[h] = near[h] + body[h];
      floor[h] = sinks + std::min(options.recent_rows, seen[h] - sinks);
      dense[h] = sinks + std::min(options.recent_rows, near[h] - sinks);
      rows += seen[h];
      floor_rows += floor[h];
      stride = std::max<long long>(stride, this->most_rows(static_cast<int>(h)));
    }
    BudgetRequest want{0, geometry.num_layers, geometry.num_kv_heads, seen, floor, {}};
    KVT_TRY(resolve_rows(retain, geometry.num_heads(), rows, floor_rows, this->memory().total(), want.total));

    Device& device = *this->device();
    const auto places = heads * static_cast<std::size_t>(stride);
    DeviceArray<float, Device> scores;
    DeviceArray<unsigned char, Device> marks;
    DeviceArray<int, Device> kept;
    KVT_TRY(scores.allocate(device, places));
    KVT_TRY(marks.allocate(device, places));
    KVT_TRY(kept.allocate(device, heads));
    const bool bytes = retain.unit == Retain::Unit::bytes;
    if (!bytes && want.total == rows) {  // needs no scores, but MarkWork any numbers
      keep = seen;
      KVT_TRY(device.clear(scores.data(), places * sizeof(float)));
    } else {
      std::vector<float> seen_scores;
      const double share = bytes ? retain.amount / static_cast<double>(memory().total())
                                 : static_cast<double>(want.total) / static_cast<double>(rows);
      KVT_TRY(score(want, share, scores.data(), stride, seen_scores));
      want.scores = seen_scores;
      Sharing sharing(budget_);
      KVT_TRY(sharing.init(device, this->all_heads(), scores.data(), stride, kept.data(), want));
      if (bytes) {
        Status measured = success();
        const Status fitted = fit_bytes(sharing, retain.amount, rows, floor_rows, want, keep, [&](std::span<const int> counts) {
          std::size_t pages = 0;
          if constexpr (Rows::in_blocks) {
            // What a row takes depends on those it shares a block with: rows are marked, and what stays is measured.
            std::vector<int> stream(heads);
            const auto measure = [&] {
              KVT_TRY(device.copy_to(kept.data(), counts.data(), heads * sizeof(int)));
              KVT_TRY(device.launch(MarkWork{this->all_heads(), kept.data(), scores.data(), marks.data(), stride},
                                    geometry.num_heads()));
              KVT_TRY(device.launch(MeasureBlocksWork<Codec>{this->all_heads(), marks.data(), stride, kept.data()},
                                    geometry.num_heads()));
              return device.copy_from(stream.data(), kept.data(), heads * sizeof(int));
            };
            if (measured.ok()) measured = measure();
            for (const int own : stream) pages += static_cast<std::size_t>(Rows::Body::pages_of(own));
          } else {
            for (std::size_t h = 0; h < heads; ++h) pages += Rows::pages_of(counts[h] - dense[h]);
          }
          return this->memory_with_pages(pages).total() + evidence_bytes();
        });
        KVT_TRY(measured);
        KVT_TRY(fitted);
      }
      KVT_TRY(allocate_rows(sharing, want, keep));
    }
    KVT_TRY(device.copy_to(kept.data(), keep.data(), heads * sizeof(int)));
    KVT_TRY(device.launch(MarkWork{this->all_heads(), kept.data(), scores.data(), marks.data(), stride}, geometry.num_heads()));
    KVT_TRY(this->cut(marks.data(), stride));
    KVT_TRY(window_.forget());
    if constexpr (slides) KVT_TRY(set_chosen(want));
    return this->refresh();
  }
  // As DeviceCache::truncate(), queries too.
  Status truncate(int position) {
    KVT_TRY(Rows::truncate(position));
    for (int& chosen : chosen_before_) chosen = std::min(chosen, position);
    return window_.truncate(position);
  }
  // As DeviceCache::upload(); what was observed is forgotten.
  template <class Host>
  Status upload(const Host& host) noexcept {
    KVT_TRY(Rows::upload(host));
    std::fill(chosen_before_.begin(), chosen_before_.end(), 0);
    return window_.forget();
  }
  // As DeviceCache::fork(), policies and queries too.
  Status fork(DeviceKvCache& child) const {
    KVT_TRY(this->check_layer(0));
    Window window;
    KVT_TRY(window_.copy_to(window));
    Model model;
    DeviceArray<int, Device> chosen;
    KVT_TRY(model.init(*this->device(), this->geometry(), this->options().ropes, this->options().output_projections,
                       needs_of(selector_)));
    KVT_TRY(chosen.allocate(*this->device(), chosen_.size()));
    KVT_TRY(Rows::fork(child));
    child.budget_ = budget_;
    child.selector_ = selector_;
    child.window_ = std::move(window);
    child.model_ = std::move(model);
    child.chosen_ = std::move(chosen);
    child.chosen_before_ = chosen_before_;
    return success();
  }
  // As DeviceCache::memory(); evidence is the room for queries.
  Memory memory() const {
    Memory m = Rows::memory();
    m.evidence_bytes = evidence_bytes();
    return m;
  }

 private:
  static constexpr bool needs_queries = EvidenceSet(Selector::needs).has(Evidence::window_queries);
  static constexpr bool slides = slides_after_cut<Selector>();
  using Leaf = std::remove_cvref_t<decltype(innermost(std::declval<const Selector&>()))>;
  static constexpr bool takes_space = requires(const Leaf& leaf) { leaf.device_space(64, 1LL); };
  static constexpr bool refuses = requires { Leaf::refusal(); };
  static constexpr bool takes_table = requires(const Leaf& leaf) { leaf.device_table(64); };
  using Window = DeviceQueryWindow<Device>;
  using Model = DeviceModel<Device>;

  long long evidence_bytes() const { return window_.bytes() + model_.bytes() + chosen_.bytes(); }

  // The budget allocator, which asks the device where the highest scores of a layer are.
  class Sharing {
   public:
    explicit Sharing(const Budget& budget) : budget_(budget) {}
    // scores [heads, stride]; kept [heads] is memory of the device.
    Status init(Device& device, const DeviceHeads& heads, const float* scores, long long stride, int* kept,
                const BudgetRequest& want) {
      device_ = &device;
      heads_ = heads;
      scores_ = scores;
      stride_ = stride;
      kept_ = kept;
      if constexpr (LayerSharing<Budget>) {
        KVT_TRY(safe_.allocate(device, want.seen.size()));
        KVT_TRY(left_.allocate(device, static_cast<std::size_t>(want.num_layers)));
      }
      return success();
    }
    Status allocate(const BudgetRequest& want, std::span<int> keep) const {
      if constexpr (LayerSharing<Budget>) {
        std::vector<std::int64_t> left(static_cast<std::size_t>(want.num_layers));
        KVT_TRY(budget_.share_out(want, keep, left));
        KVT_TRY(device_->copy_to(kept_, keep.data(), keep.size_bytes()));
        KVT_TRY(device_->copy_to(left_.data(), left.data(), left.size() * sizeof(std::int64_t)));
        KVT_TRY(device_->launch(SafeRowsWork{heads_, kept_, scores_, stride_, safe_.data()}, static_cast<int>(keep.size())));
        KVT_TRY(device_->launch(ShareRowsWork{heads_, want.num_kv_heads, safe_.data(), left_.data(), scores_, stride_, kept_},
                                want.num_layers));
        return device_->copy_from(keep.data(), kept_, keep.size_bytes());
      } else {
        return budget_.allocate(want, keep);
      }
    }

   private:
    const Budget& budget_;
    Device* device_ = nullptr;
    DeviceHeads heads_ = {};
    const float* scores_ = nullptr;
    long long stride_ = 0;
    int* kept_ = nullptr;
    DeviceArray<HighestRows, Device> safe_;
    DeviceArray<std::int64_t, Device> left_;
  };

  // After a cut: where rows that it chose end. See Layer::cut() of the host's cache.
  Status set_chosen(const BudgetRequest& want) {
    KVT_TRY(
        this->device()->launch(OldestRecentWork<Codec>{this->all_heads(), want.num_kv_heads, chosen_.data()}, want.num_layers));
    std::vector<int> oldest(chosen_.size());
    KVT_TRY(this->device()->copy_from(oldest.data(), chosen_.data(), oldest.size() * sizeof(int)));
    for (std::size_t l = 0; l < oldest.size(); ++l) {
      if (!this->decodes(static_cast<int>(l)) || chosen_before_[l] == 0) chosen_before_[l] = oldest[l];
    }
    return success();
  }
  // Scores [heads, stride] of all rows, and those of the rows that are there, for an allocator that needs them.
  Status score(const BudgetRequest& want, double share, float* scores, long long stride,
               std::vector<float>& seen_scores) const {
    Device& device = *this->device();
    const auto places = want.seen.size() * static_cast<std::size_t>(stride);
    DeviceArray<float, Device> mass, apart;
    DeviceArray<std::byte, Device> space;
    DeviceEvidence evidence;
    evidence.group = this->geometry().group_size();
    evidence.share = share;
    evidence.ropes = model_.ropes();
    evidence.projections = model_.projections();
    DeviceArray<int, Device> refused;
    if constexpr (refuses) {
      KVT_TRY(refused.allocate(device, want.seen.size()));
      KVT_TRY(device.clear(refused.data(), want.seen.size() * sizeof(int)));
      evidence.refused = refused.data();
    }
    DeviceArray<float, Device> table;
    if constexpr (takes_table) {
      const std::vector<float> from = innermost(selector_).device_table(Rows::head_dim);
      KVT_TRY(table.allocate(device, from.size()));
      KVT_TRY(device.copy_to(table.data(), from.data(), from.size() * sizeof(float)));
      evidence.table = table.data();
    }
    if constexpr (takes_space) {
      evidence.space_bytes = (innermost(selector_).device_space(Rows::head_dim, stride) + 15) / 16 * 16;
      KVT_TRY(space.allocate(device, want.seen.size() * static_cast<std::size_t>(evidence.space_bytes)));
      evidence.space = space.data();
    }
    std::vector<int> chosen(chosen_before_.size());
    for (std::size_t l = 0; l < chosen.size(); ++l) chosen[l] = this->decodes(static_cast<int>(l)) ? chosen_before_[l] : 0;
    if constexpr (slides) {
      KVT_TRY(device.copy_to(chosen_.data(), chosen.data(), chosen.size() * sizeof(int)));
      evidence.chosen_before = chosen_.data();
    }
    if constexpr (needs_queries) {
      KVT_TRY(window_.check_seen(want.num_kv_heads, chosen));
      KVT_TRY(mass.allocate(device, places));
    }
    if constexpr (joins_on_device<Selector>) KVT_TRY(apart.allocate(device, places));
    const auto heads = static_cast<int>(want.seen.size());
    float* const to = joins_on_device<Selector> ? apart.data() : scores;
    KVT_TRY(device.launch(ScoreWork<Codec, Selector>{this->all_heads(), selector_, evidence, want.num_kv_heads, to, stride,
                                                     window_.queries(), mass.data()},
                          heads));
    if constexpr (joins_on_device<Selector>) {
      KVT_TRY(device.launch(
          JoinWork<Codec, Selector>{this->all_heads(), selector_, want.num_kv_heads, apart.data(), scores, stride}, heads));
    }
    if constexpr (refuses) {
      std::vector<int> all(want.seen.size());
      KVT_TRY(device.copy_from(all.data(), refused.data(), all.size() * sizeof(int)));
      for (const int one : all) {
        if (one != 0) return Leaf::refusal();
      }
    }
    if constexpr (EvidenceSet(Budget::needs).has(Evidence::scores) && !LayerSharing<Budget>) {
      std::vector<float> padded(places);
      KVT_TRY(device.copy_from(padded.data(), scores, places * sizeof(float)));
      for (std::size_t h = 0; h < want.seen.size(); ++h) {
        const auto first = padded.begin() + static_cast<std::ptrdiff_t>(h) * stride;
        seen_scores.insert(seen_scores.end(), first, first + want.seen[h]);
      }
    }
    return success();
  }

  Budget budget_ = {};
  Selector selector_ = {};
  Window window_;  // empty if the selector needs no queries
  Model model_;
  DeviceArray<int, Device> chosen_;  // [layers] room for what the selector is told of earlier cuts, or none
  std::vector<int> chosen_before_;   // the same as the host remembers it
};

}  // namespace kvt::inline v0
