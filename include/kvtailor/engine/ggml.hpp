// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// GgmlAttention: a kvtailor cache inside a ggml graph.
//
// build() adds two custom nodes for a layer: one stores keys and values (and shows the cache the queries, if a policy wants
// them), one attends. The engine's own cache is not needed. ggml does not report errors from inside a graph, so the first one
// is kept: after computing, finish() tells it, and has then rolled the cache back to what it was before the graph ran.
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
    q = ggml_cont(context, q);
    ggml_tensor* rows[] = {ggml_cont(context, k), ggml_cont(context, v)};
    // One element, so that attention depends on it: ggml runs nodes in order with a barrier between them.
    ggml_tensor* stored = ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, rows, 2, &store, 1, &state);
    // The plan needs the address of the output, which the attend node itself has: thread 0 plans in a node of its own before.
    ggml_tensor* parts[] = {q, stored};
    return ggml_custom_4d(context, GGML_TYPE_F32, q->ne[0] * q->ne[1], q->ne[2], 1, 1, parts, 2, &attend, GGML_N_TASKS_MAX,
                          &state);
  }

  // The first failure of the graph, if any; the cache is then as it was at begin().
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
    std::atomic<bool> ready{false};
  };

  void fail(const Status& status) {
    if (!failed_) status_ = status;
    failed_ = true;
  }

  static void store(ggml_tensor* dst, int ith, int, void* data) {
    if (ith != 0) return;
    Layer& state = *static_cast<Layer*>(data);
    GgmlAttention& self = *state.owner;
    static_cast<float*>(dst->data)[0] = 0;
    state.ready = false;
    if (self.failed_) return;
    const Status status = self.cache_->append(state.layer, static_cast<const float*>(dst->src[0]->data),
                                              static_cast<const float*>(dst->src[1]->data), self.positions_);
    if (!status.ok()) self.fail(status);
  }

  static void attend(ggml_tensor* dst, int ith, int, void* data) {
    Layer& state = *static_cast<Layer*>(data);
    GgmlAttention& self = *state.owner;
    if (ith == 0) {
      self.prepare(state, static_cast<const float*>(dst->src[0]->data), static_cast<float*>(dst->data), ggml_nelements(dst));
      state.ready.store(true, std::memory_order_release);
    } else {
      // Planning takes microseconds; ggml has no barrier inside a node.
      while (!state.ready.load(std::memory_order_acquire)) std::this_thread::yield();
    }
    if (self.failed_) return;
    for (int task = state.plan.take(); task >= 0; task = state.plan.take()) state.plan.run(task);
  }

  void prepare(Layer& state, const float* queries, float* out, std::int64_t elements) {
    if (!failed_ && cache_->wants_queries()) {
      const Status status = cache_->observe(state.layer, queries, positions_, state.options);
      if (!status.ok()) fail(status);
    }
    if (!failed_) {
      const Status status = cache_->plan(state.layer, queries, positions_, state.options, out, state.plan);
      if (!status.ok()) fail(status);
    }
    // Nothing after a failure may read what was never written.
    if (failed_) std::fill(out, out + elements, 0.f);
  }

  Cache* cache_ = nullptr;
  std::vector<int> positions_;
  int start_ = 0;
  bool failed_ = false;
  Status status_;
  std::deque<Layer> layers_;  // addresses stay: graphs point at them
};

}  // namespace kvt::inline v0
