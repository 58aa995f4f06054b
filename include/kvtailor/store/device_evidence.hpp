// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DeviceLayersEvidence: what the selector of a device cache wants to know beside rows: LayerEvidence is the host's. Only what
// it needs is kept. observe() collects it, and a cut uses it up, but for what rows were given, which stays with those that
// stay. ScoringMemory: what it takes while it scores.
#pragma once

#include <span>
#include <vector>

#include "kvtailor/core/concepts.hpp"
#include "kvtailor/store/device_attention.hpp"
#include "kvtailor/store/device_model.hpp"
#include "kvtailor/store/device_moments.hpp"
#include "kvtailor/store/device_queries.hpp"
#include "kvtailor/store/head_score.hpp"

namespace kvt::inline v0 {

template <class Codec, class Selector, class Device>
class DeviceLayersEvidence {
  static constexpr EvidenceSet needs = Selector::needs;
  static constexpr bool needs_moments = needs.has(Evidence::query_moments), needs_attention = needs.has(Evidence::attention);
  static constexpr bool largest = needs.has(Evidence::reconstruction);  // of weights, instead of their sum
  static constexpr bool slides = slides_after_cut<Selector>();
  static constexpr bool needs_ends = slides || needs_moments;
  static constexpr int staged_queries = 128;  // whose weights are made at once

 public:
  static constexpr bool needs_window = needs.has(Evidence::window_queries);
  static constexpr bool needs_queries = needs_window || needs_moments || needs_attention;

  Status init(Device& device, const Geometry& geometry, std::span<const Rope> ropes,
              std::span<const OutputProjection> projections, int sink_rows, int max_rows, const Selector& selector) {
    KVT_TRY(model_.init(device, geometry, ropes, projections, needs_of(selector)));
    const auto layers = static_cast<std::size_t>(geometry.num_layers);
    if constexpr (needs_window) KVT_TRY(window_.init(device, geometry, window_of(selector)));
    if constexpr (needs_moments) KVT_TRY(moments_.init(device, geometry));
    if constexpr (needs_attention) KVT_TRY(attention_.init(device, geometry, max_rows));
    KVT_TRY(init_rest(device, geometry, sink_rows));
    chosen_before_.assign(slides ? layers : 0, 0);
    return success();
  }
  long long bytes() const {
    return model_.bytes() + window_.bytes() + moments_.bytes() + attention_.bytes() + staged_.bytes() + chosen_.bytes() +
           ends_.bytes();
  }

  // heads: of the layer.
  template <class T>
  Status observe(const HeadsOf<Codec>& heads, int layer, const T* queries, const int* positions, int n,
                 const AttendOptions& attend) {
    const int kv_heads = geometry_.num_kv_heads, q_heads = geometry_.num_q_heads;
    const float scale = attend.scale != 0 ? attend.scale : 1.f / std::sqrt(static_cast<float>(geometry_.head_dim));
    const DeviceQueries::State options{0, 0, attend.window, scale, attend.soft_cap};
    if constexpr (needs_window) {
      KVT_TRY(device_->launch(
          ObserveWork<T>{window_.queries().from_head(layer * kv_heads), queries, positions, n, kv_heads, options}, kv_heads));
    }
    if constexpr (needs_moments) {
      KVT_TRY(device_->launch(MomentsWork<T, Codec::head_dim>{moments_.moments().from_head(layer * q_heads), queries, positions,
                                                              n, q_heads, sink_rows_, model_.ropes() + layer, scale},
                              q_heads));
    }
    if constexpr (needs_attention) {
      const long long width = static_cast<long long>(q_heads) * geometry_.head_dim;
      for (int first = 0; first < n; first += staged_queries) {
        const int count = std::min(staged_queries, n - first);
        KVT_TRY(staged_.forget());
        KVT_TRY(device_->launch(
            ObserveWork<T>{staged_.queries(), queries + first * width, positions + first, count, kv_heads, options}, kv_heads));
        KVT_TRY(device_->launch(
            GiveWork<Codec, largest>{heads, kv_heads, staged_.queries(), attention_.attention().from_head(layer * kv_heads),
                                     attend.sink_logits.empty() ? nullptr : attend.sink_logits.data()},
            kv_heads));
      }
    }
    return success();
  }
  // Before rows are scored. decodes(layer): whether rows come one by one.
  template <class Decodes>
  Status prepare(const HeadsOf<Codec>& all, Decodes&& decodes, DeviceEvidence& evidence) const {
    std::vector<int> chosen(chosen_before_.size());
    for (std::size_t l = 0; l < chosen.size(); ++l) chosen[l] = decodes(static_cast<int>(l)) ? chosen_before_[l] : 0;
    if constexpr (needs_window) KVT_TRY(window_.check_seen(geometry_.num_kv_heads, chosen));
    if constexpr (slides) KVT_TRY(device_->copy_to(chosen_.data(), chosen.data(), chosen.size() * sizeof(int)));
    if constexpr (needs_moments) KVT_TRY(find_ends(all));
    evidence.group = geometry_.group_size();
    evidence.ropes = model_.ropes();
    evidence.projections = model_.projections();
    evidence.moments = moments_.moments();
    evidence.attention = attention_.attention();
    evidence.chosen_before = chosen_.data();
    evidence.ends = ends_.data();
    return success();
  }
  DeviceQueries window() const { return window_.queries(); }

  // Before rows are cut by the same marks, and after those of compress().
  Status cut(const DeviceHeads& all, const unsigned char* keep, long long stride) { return attention_.cut(all, keep, stride); }
  template <class Decodes>
  Status used_up(const HeadsOf<Codec>& all, Decodes&& decodes) {
    KVT_TRY(window_.forget());
    KVT_TRY(moments_.forget());
    if constexpr (slides) {  // see Layer::cut() of the host's cache
      KVT_TRY(find_ends(all));
      std::vector<LayerEnds> ends(ends_.size());
      KVT_TRY(device_->copy_from(ends.data(), ends_.data(), ends.size() * sizeof(LayerEnds)));
      for (std::size_t l = 0; l < ends.size(); ++l) {
        if (!decodes(static_cast<int>(l)) || chosen_before_[l] == 0) chosen_before_[l] = ends[l].recent;
      }
    }
    return success();
  }
  // After rows were truncated.
  Status truncated(const DeviceHeads& all, int position) {
    for (int& chosen : chosen_before_) chosen = std::min(chosen, position);
    KVT_TRY(attention_.truncated(all));
    return window_.truncate(position);
  }
  Status forget() {
    KVT_TRY(window_.forget());
    KVT_TRY(moments_.forget());
    return attention_.forget();
  }
  // After all rows were replaced.
  Status replaced() {
    std::fill(chosen_before_.begin(), chosen_before_.end(), 0);
    return forget();
  }
  // Into memory of its own.
  Status copy_to(DeviceLayersEvidence& other, std::span<const Rope> ropes, std::span<const OutputProjection> projections,
                 const Selector& selector) const {
    KVT_TRY(other.model_.init(*device_, geometry_, ropes, projections, needs_of(selector)));
    KVT_TRY(window_.copy_to(other.window_));
    KVT_TRY(moments_.copy_to(other.moments_));
    KVT_TRY(attention_.copy_to(other.attention_));
    KVT_TRY(other.init_rest(*device_, geometry_, sink_rows_));
    other.chosen_before_ = chosen_before_;
    return success();
  }

 private:
  // What holds nothing from call to call.
  Status init_rest(Device& device, const Geometry& geometry, int sink_rows) {
    const auto layers = static_cast<std::size_t>(geometry.num_layers);
    if constexpr (slides) KVT_TRY(chosen_.allocate(device, layers));
    if constexpr (needs_ends) KVT_TRY(ends_.allocate(device, layers));
    if constexpr (needs_attention) {
      Geometry layer = geometry;
      layer.num_layers = 1;
      KVT_TRY(staged_.init(device, layer, staged_queries));
    }
    device_ = &device;
    geometry_ = geometry;
    sink_rows_ = sink_rows;
    return success();
  }
  Status find_ends(const HeadsOf<Codec>& all) const {
    return device_->launch(LayerEndsWork<Codec>{all, geometry_.num_kv_heads, ends_.data()}, geometry_.num_layers);
  }

  Device* device_ = nullptr;
  Geometry geometry_ = {};
  int sink_rows_ = 0;
  DeviceModel<Device> model_;
  DeviceQueryWindow<Device> window_, staged_;  // staged: those of one layer whose weights are made
  DeviceQueryMoments<Device> moments_;
  DeviceRowAttention<Device> attention_;
  DeviceArray<int, Device> chosen_;  // [layers], of earlier cuts, as the selector is told
  DeviceArray<LayerEnds, Device> ends_;
  std::vector<int> chosen_before_;  // [layers], see HeadEvidence, or none
};

template <class Selector, class Device>
class ScoringMemory {
  using Leaf = std::remove_cvref_t<decltype(innermost(std::declval<const Selector&>()))>;
  static constexpr bool takes_space = requires(const Leaf& leaf) { leaf.device_space(64, 1LL); };
  static constexpr bool takes_table = requires(const Leaf& leaf) { leaf.device_table(64); };
  static constexpr bool refuses = requires { Leaf::refusal(); };

 public:
  // For heads of up to so many rows.
  Status init(Device& device, const Selector& selector, int head_dim, std::size_t heads, long long rows,
              DeviceEvidence& evidence) {
    device_ = &device;
    if constexpr (takes_space) {
      evidence.space_bytes = (innermost(selector).device_space(head_dim, rows) + 15) / 16 * 16;
      KVT_TRY(space_.allocate(device, heads * static_cast<std::size_t>(evidence.space_bytes)));
      evidence.space = space_.data();
    }
    if constexpr (takes_table) {
      const std::vector<float> table = innermost(selector).device_table(head_dim);
      KVT_TRY(table_.allocate(device, table.size()));
      KVT_TRY(device.copy_to(table_.data(), table.data(), table.size() * sizeof(float)));
      evidence.table = table_.data();
    }
    if constexpr (refuses) {
      KVT_TRY(refused_.allocate(device, heads));
      KVT_TRY(device.clear(refused_.data(), heads * sizeof(int)));
      evidence.refused = refused_.data();
    }
    return success();
  }
  // Whether all heads could be scored. Waits for the device.
  Status check() const {
    if constexpr (refuses) {
      std::vector<int> refused(refused_.size());
      KVT_TRY(device_->copy_from(refused.data(), refused_.data(), refused.size() * sizeof(int)));
      for (const int one : refused) {
        if (one != 0) return Leaf::refusal();
      }
    }
    return success();
  }

 private:
  Device* device_ = nullptr;
  DeviceArray<std::byte, Device> space_;
  DeviceArray<float, Device> table_;
  DeviceArray<int, Device> refused_;
};

}  // namespace kvt::inline v0
