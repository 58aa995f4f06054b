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
// selector needs window_queries, four if its heads decide together, and what it asks for by device_space(). observe(), forget()
// and truncate() are as append(): they allocate nothing, wait for nothing, and can be captured. What init() takes for
// observe(): windows of queries in fp32, moments of head_dim + head_dim * (head_dim + 1) / 2 numbers a query head, or, if the
// selector needs the attention of rows, 8 bytes for each of max_rows rows of a head and 128 queries of a layer.
#pragma once

#include "kvtailor/budget/request.hpp"
#include "kvtailor/core/check.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/store/device_cache.hpp"
#include "kvtailor/store/device_evidence.hpp"
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
    KVT_TRY(check_policy(selector, geometry));
    KVT_TRY(check_policy(budget, geometry));
    KVT_TRY(Rows::check_shape(geometry, options));
    KVT_TRY(detail::check_model(geometry, options, needs_of(selector)));
    Known known;
    KVT_TRY(
        known.init(device, geometry, options.ropes, options.output_projections, options.sink_rows, options.max_rows, selector));
    KVT_TRY(Rows::init(device, pool, geometry, options, codec, head_codecs));
    budget_ = budget;
    selector_ = selector;
    known_ = std::move(known);
    return success();
  }

  // Shows the cache the queries (post-RoPE) that come with the rows just appended: [n, num_q_heads, head_dim] at positions [n],
  // which increase, after all it was shown; both of the device. Costs nothing if the selector needs none. T is Half, BFloat16
  // or float. Sink logits, of the device, take their share of what rows are given (Evidence::attention) alone, as on the host.
  template <class T>
  Status observe(int layer, const T* queries, const int* positions, int n, const AttendOptions& attend = {}) {
    KVT_TRY(this->check_layer(layer));
    KVT_TRY(detail::check_options(this->geometry(), attend));
    if (n < 0) return error(Errc::bad_shape, "there are {} queries; it must be zero or more", n);
    if (n > 0 && (queries == nullptr || positions == nullptr)) return error(Errc::bad_shape, "a pointer to queries is null");
    if (!Known::needs_queries || n == 0) return success();
    return known_.observe(this->layer_heads(layer), layer, queries, positions, n, attend);
  }
  // Forgets all that was observed, so that what comes next counts alone: see KvCache::forget().
  Status forget() {
    KVT_TRY(this->check_layer(0));
    return known_.forget();
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
    const std::vector<long long> appended = this->appended();
    BudgetRequest want{0, geometry.num_layers, geometry.num_kv_heads, seen, floor, {}, {}, appended};
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
          return this->memory_with_pages(pages).total() + known_.bytes();
        });
        KVT_TRY(measured);
        KVT_TRY(fitted);
      }
      KVT_TRY(allocate_rows(sharing, want, keep));
    }
    KVT_TRY(device.copy_to(kept.data(), keep.data(), heads * sizeof(int)));
    KVT_TRY(device.launch(MarkWork{this->all_heads(), kept.data(), scores.data(), marks.data(), stride}, geometry.num_heads()));
    KVT_TRY(cut(marks.data(), stride));
    KVT_TRY(known_.used_up(this->all_heads(), [&](int layer) { return this->decodes(layer); }));
    return this->refresh();
  }
  // As DeviceCache::cut(): what rows were given goes with them.
  Status cut(const unsigned char* keep, long long stride) {
    KVT_TRY(this->prepare_cut(keep, stride));
    KVT_TRY(known_.cut(this->all_heads(), keep, stride));
    return this->cut_rows(keep, stride);
  }
  // As DeviceCache::truncate(), queries too; what these gave to rows that stay remains.
  Status truncate(int position) {
    KVT_TRY(Rows::truncate(position));
    return known_.truncated(this->all_heads(), position);
  }
  // As DeviceCache::upload(); what was observed is forgotten.
  template <class Host>
  Status upload(const Host& host) noexcept {
    KVT_TRY(Rows::upload(host));
    return known_.replaced();
  }
  // As DeviceCache::fork(), policies and what was observed too.
  Status fork(DeviceKvCache& child) const {
    KVT_TRY(this->check_layer(0));
    Known known;
    KVT_TRY(known_.copy_to(known, this->options().ropes, this->options().output_projections, selector_));
    KVT_TRY(Rows::fork(child));
    child.budget_ = budget_;
    child.selector_ = selector_;
    child.known_ = std::move(known);
    return success();
  }
  // As DeviceCache::memory(); evidence is the room for all that is observed, and for what is known of the model.
  Memory memory() const {
    Memory m = Rows::memory();
    m.evidence_bytes = known_.bytes();
    return m;
  }

 private:
  using Known = DeviceLayersEvidence<Codec, Selector, Device>;

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

  // Scores [heads, stride] of all rows, and those of the rows that are there, for an allocator that needs them.
  Status score(const BudgetRequest& want, double share, float* scores, long long stride,
               std::vector<float>& seen_scores) const {
    Device& device = *this->device();
    const auto places = want.seen.size() * static_cast<std::size_t>(stride);
    DeviceArray<float, Device> mass, apart;
    DeviceEvidence evidence;
    evidence.share = share;
    KVT_TRY(known_.prepare(
        this->all_heads(), [&](int layer) { return this->decodes(layer); }, evidence));
    ScoringMemory<Selector, Device> memory;
    KVT_TRY(memory.init(device, selector_, Rows::head_dim, want.seen.size(), stride, evidence));
    if constexpr (Known::needs_window) KVT_TRY(mass.allocate(device, places));
    if constexpr (joins_on_device<Selector>) KVT_TRY(apart.allocate(device, places));
    const auto heads = static_cast<int>(want.seen.size());
    float* const to = joins_on_device<Selector> ? apart.data() : scores;
    KVT_TRY(device.launch(ScoreWork<Codec, Selector>{this->all_heads(), selector_, evidence, want.num_kv_heads, to, stride,
                                                     known_.window(), mass.data()},
                          heads));
    if constexpr (joins_on_device<Selector>) {
      KVT_TRY(device.launch(
          JoinWork<Codec, Selector>{this->all_heads(), selector_, want.num_kv_heads, apart.data(), scores, stride}, heads));
    }
    KVT_TRY(memory.check());
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
  Known known_;
};

}  // namespace kvt::inline v0
