// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// GgmlAttention: a kvtailor cache inside a ggml graph.
//
// build() adds two custom nodes for a layer: one stores keys and values, shows the cache the queries if a policy wants them,
// and plans; one attends, on all of ggml's threads. Before the first of them all threads encode what is due in any layer. The
// engine's own cache is not needed. ggml does not report errors from
// inside a graph, so the first one is kept: after computing, finish() tells it, and has then dropped the rows of this graph
// again.
//
//   kvt::GgmlAttention attention(cache);
//   attention.begin(positions);                                  // before building a graph
//   ggml_tensor* out = attention.build(context, layer, q, k, v, {});   // once a layer
//   ggml_backend_graph_compute(backend, graph);
//   kvt::Status status = attention.finish();
//
// The cache and this object must outlive the graph. Needs ggml's CPU backend.
#pragma once

#include <ggml.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <span>

#include "kvtailor/attend/plan.hpp"

namespace kvt::inline v0 {

template <class Cache>
class GgmlAttention {
 public:
  GgmlAttention() = default;
  explicit GgmlAttention(Cache& cache) : cache_(&cache) {}
  GgmlAttention(const GgmlAttention&) = delete;
  GgmlAttention& operator=(const GgmlAttention&) = delete;

  void set_cache(Cache& cache) { cache_ = &cache; }

  // The positions of the tokens the next graph computes; copied.
  void begin(std::span<const int> positions) {
    positions_.assign(positions.begin(), positions.end());
    start_ = positions.empty() ? 0 : positions.front();
    next_head_ = 0;
    encoded_ = nullptr;
    failed_ = false;
    status_ = success();
  }

  // q [head_dim, num_q_heads, n], k and v [head_dim, num_kv_heads, n] in ggml's order, F32, after RoPE.
  // Returns the attention output [head_dim * num_q_heads, n].
  ggml_tensor* build(ggml_context* context, int layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                     const AttendOptions& options) {
    while (layers_.size() <= static_cast<std::size_t>(layer)) layers_.emplace_back();
    Layer& state = layers_[static_cast<std::size_t>(layer)];
    state.owner = this;
    state.layer = layer;
    state.options = options;
    if (encoded_ == nullptr) {
      encoded_ = ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, &k, 1, &encode, GGML_N_TASKS_MAX, this);
    }
    ggml_tensor* inputs[] = {ggml_cont(context, k), ggml_cont(context, v), ggml_cont(context, q), encoded_};
    // One element, so that attention depends on it: ggml runs nodes in order with a barrier between them.
    ggml_tensor* const stored = ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, inputs, 4, &store, 1, &state);
    ggml_tensor* parts[] = {inputs[2], stored};
    state.output = ggml_custom_4d(context, GGML_TYPE_F32, q->ne[0] * q->ne[1], q->ne[2], 1, 1, parts, 2, &attend,
                                  GGML_N_TASKS_MAX, &state);
    return state.output;
  }

  // Shows the cache the hidden states [width, n], F32, before and after a layer's attention was added, if it wants them: null
  // if not, or what has to be a part of the graph.
  ggml_tensor* compare(ggml_context* context, int layer, ggml_tensor* before, ggml_tensor* after) {
    if (!cache_->needs().has(Evidence::layer_similarity)) return nullptr;
    ggml_tensor* parts[] = {before, after};
    return ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, parts, 2, &compare_states, 1,
                          &layers_[static_cast<std::size_t>(layer)]);
  }

  // The first failure of the graph, if any; the cache then ends where it ended at begin().
  Status finish() {
    if (failed_) {
      const Status rolled = cache_->truncate(start_);
      if (!rolled.ok()) return rolled;
    }
    return status_;
  }

 private:
  struct Layer {
    GgmlAttention* owner = nullptr;
    int layer = 0;
    AttendOptions options;
    AttendPlan plan;
    ggml_tensor* output = nullptr;  // of the attend node; its memory is known once the graph is allocated
  };

  void fail(const Status& status) {
    if (!failed_) status_ = status;
    failed_ = true;
  }

  // Head by head, so that threads have equal shares whatever a layer has. What fails is tried again by append(), which tells.
  static void encode(ggml_tensor* dst, int ith, int, void* data) {
    GgmlAttention& self = *static_cast<GgmlAttention*>(data);
    if (ith == 0) static_cast<float*>(dst->data)[0] = 0;
    const Geometry& shape = self.cache_->geometry();
    const auto next = [&] { return std::atomic_ref<int>(self.next_head_).fetch_add(1, std::memory_order_relaxed); };
    for (int head = next(); head < shape.num_heads(); head = next()) {
      (void)self.cache_->encode(head / shape.num_kv_heads, head % shape.num_kv_heads);
    }
  }

  // ggml may run it on more threads than it was asked to.
  static void store(ggml_tensor* dst, int ith, int, void* data) {
    if (ith != 0) return;
    Layer& state = *static_cast<Layer*>(data);
    GgmlAttention& self = *state.owner;
    static_cast<float*>(dst->data)[0] = 0;
    if (self.failed_) return;
    const auto input = [&](int i) { return static_cast<const float*>(dst->src[i]->data); };
    Cache& cache = *self.cache_;
    Status status = cache.append(state.layer, input(0), input(1), self.positions_);
    if (status.ok()) status = cache.observe(state.layer, input(2), self.positions_, state.options);
    if (status.ok()) {
      status = cache.plan(state.layer, input(2), self.positions_, state.options, static_cast<float*>(state.output->data),
                          state.plan);
    }
    self.failed_ = !status.ok();
    if (self.failed_) self.status_ = status;
  }

  static void attend(ggml_tensor* dst, int ith, int, void* data) {
    Layer& state = *static_cast<Layer*>(data);
    if (state.owner->failed_) {
      // Nothing after a failure may read what was never written.
      if (ith == 0) std::fill_n(static_cast<float*>(dst->data), ggml_nelements(dst), 0.f);
      return;
    }
    for (int task = state.plan.take(); task >= 0; task = state.plan.take()) state.plan.run(task);
  }

  static void compare_states(ggml_tensor* dst, int ith, int, void* data) {
    if (ith != 0) return;
    Layer& state = *static_cast<Layer*>(data);
    GgmlAttention& self = *state.owner;
    static_cast<float*>(dst->data)[0] = 0;
    if (self.failed_) return;
    const auto input = [&](int i) { return static_cast<const float*>(dst->src[i]->data); };
    const Status status = self.cache_->observe_hidden(state.layer, input(0), input(1), static_cast<int>(dst->src[0]->ne[1]),
                                                      static_cast<int>(dst->src[0]->ne[0]));
    if (!status.ok()) self.fail(status);
  }

  Cache* cache_ = nullptr;
  std::vector<int> positions_;
  int start_ = 0;
  int next_head_ = 0;               // that no thread has encoded
  ggml_tensor* encoded_ = nullptr;  // of the graph that is built
  bool failed_ = false;
  Status status_;
  std::deque<Layer> layers_;  // addresses stay: graphs point at them
};

}  // namespace kvt::inline v0
