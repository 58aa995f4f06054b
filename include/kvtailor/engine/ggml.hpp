// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// GgmlAttention: a kvtailor cache inside a ggml graph.
//
// build() adds two custom nodes for a layer: one stores keys and values, shows the cache the queries if a policy wants them,
// and plans; one attends, on all of ggml's threads. Before the first of them all threads encode what is due in any layer. The
// engine's own cache is not needed. ggml does not report errors from inside a graph, so the first one is kept: after computing,
// finish() tells it, and has then dropped the rows of this graph again.
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

namespace detail {

// What the nodes of a graph do with a cache, in any engine on ggml. The first failure is kept: ggml reports none from inside a
// graph.
template <class Cache>
class GraphSteps {
 public:
  // One layer of a graph.
  struct Layer {
    GraphSteps* owner = nullptr;
    int layer = 0;
    AttendOptions options;
  };

  void set_cache(Cache& cache) { cache_ = &cache; }
  Cache& cache() const { return *cache_; }
  bool failed() const { return failed_; }
  const std::vector<int>& positions() const { return positions_; }

  void begin(std::span<const int> positions) {
    positions_.assign(positions.begin(), positions.end());
    start_ = positions.empty() ? 0 : positions.front();
    next_head_ = 0;
    begun_ = true;
  }
  // What fails from now on has stored nothing.
  void end() { begun_ = false; }
  void fail(const Status& status) {
    if (!failed_) status_ = status;
    failed_ = true;
  }
  // By all threads, before the first store. Head by head, so that they have equal shares whatever a layer has. What fails is
  // tried again by append(), which tells.
  void encode() {
    const Geometry& shape = cache_->geometry();
    const auto next = [&] { return std::atomic_ref<int>(next_head_).fetch_add(1, std::memory_order_relaxed); };
    for (int head = next(); head < shape.num_heads(); head = next()) {
      (void)cache_->encode(head / shape.num_kv_heads, head % shape.num_kv_heads);
    }
  }
  // By one thread; a barrier has to follow. k and v [n, num_kv_heads, head_dim], q and out [n, num_q_heads, head_dim].
  void store(Layer& state, const float* k, const float* v, const float* q, float* out) {
    if (failed_) return;
    Status status = cache_->append(state.layer, k, v, positions_);
    if (status.ok()) status = cache_->observe(state.layer, q, positions_, state.options);
    if (!status.ok()) return fail(status);
    plan(state, q, out);
  }
  // The same for a layer that attends to rows which are stored already.
  void plan(Layer& state, const float* q, float* out) {
    if (failed_) return;
    const Status status = cache_->plan(state.layer, q, positions_, state.options, out, plan_);
    if (!status.ok()) fail(status);
  }
  // What was planned last, by all threads; `ith` is this one's number.
  void attend(ggml_tensor* dst, int ith) {
    if (failed_) {
      // Nothing after a failure may read what was never written.
      if (ith == 0) std::fill_n(static_cast<float*>(dst->data), ggml_nelements(dst), 0.f);
      return;
    }
    for (int task = plan_.take(); task >= 0; task = plan_.take()) plan_.run(task);
  }
  // The first failure since the last call, if any; the cache then ends where it ended at begin().
  Status finish() {
    const Status status = status_;
    if (failed_) {
      failed_ = false;
      status_ = success();
      if constexpr (requires { cache_->truncate(start_); }) {
        const Status rolled = begun_ ? cache_->truncate(start_) : success();
        if (!rolled.ok()) return rolled;
      }
    }
    end();
    return status;
  }

 private:
  Cache* cache_ = nullptr;
  std::vector<int> positions_;
  AttendPlan plan_;  // of one layer after another
  int start_ = 0;
  int next_head_ = 0;  // that no thread has encoded
  bool begun_ = false, failed_ = false;
  Status status_;
};

}  // namespace detail

template <class Cache>
class GgmlAttention {
 public:
  GgmlAttention() = default;
  explicit GgmlAttention(Cache& cache) { set_cache(cache); }
  GgmlAttention(const GgmlAttention&) = delete;
  GgmlAttention& operator=(const GgmlAttention&) = delete;

  void set_cache(Cache& cache) { steps_.set_cache(cache); }

  // The positions of the tokens the next graph computes; copied.
  void begin(std::span<const int> positions) {
    steps_.begin(positions);
    encoded_ = nullptr;
  }

  // q [head_dim, num_q_heads, n], k and v [head_dim, num_kv_heads, n] in ggml's order, F32, after RoPE.
  // Returns the attention output [head_dim * num_q_heads, n].
  ggml_tensor* build(ggml_context* context, int layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                     const AttendOptions& options) {
    while (layers_.size() <= static_cast<std::size_t>(layer)) layers_.emplace_back();
    Layer& state = layers_[static_cast<std::size_t>(layer)];
    state.owner = &steps_;
    state.layer = layer;
    state.options = options;
    if (encoded_ == nullptr) {
      encoded_ = ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, &k, 1, &encode, GGML_N_TASKS_MAX, &steps_);
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
    if (!steps_.cache().needs().has(Evidence::layer_similarity)) return nullptr;
    ggml_tensor* parts[] = {before, after};
    return ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, parts, 2, &compare_states, 1,
                          &layers_[static_cast<std::size_t>(layer)]);
  }

  // The first failure of the graph, if any; the cache then ends where it ended at begin().
  Status finish() { return steps_.finish(); }

 private:
  using Steps = detail::GraphSteps<Cache>;
  struct Layer : Steps::Layer {
    ggml_tensor* output = nullptr;  // of the attend node; its memory is known once the graph is allocated
  };

  static const float* input(const ggml_tensor* dst, int i) { return static_cast<const float*>(dst->src[i]->data); }

  static void encode(ggml_tensor* dst, int ith, int, void* data) {
    if (ith == 0) static_cast<float*>(dst->data)[0] = 0;
    static_cast<Steps*>(data)->encode();
  }

  // ggml may run it on more threads than it was asked to.
  static void store(ggml_tensor* dst, int ith, int, void* data) {
    if (ith != 0) return;
    Layer& state = *static_cast<Layer*>(data);
    static_cast<float*>(dst->data)[0] = 0;
    state.owner->store(state, input(dst, 0), input(dst, 1), input(dst, 2), static_cast<float*>(state.output->data));
  }

  static void attend(ggml_tensor* dst, int ith, int, void* data) { static_cast<Layer*>(data)->owner->attend(dst, ith); }

  static void compare_states(ggml_tensor* dst, int ith, int, void* data) {
    if (ith != 0) return;
    const Layer& state = *static_cast<Layer*>(data);
    static_cast<float*>(dst->data)[0] = 0;
    if (state.owner->failed()) return;
    const Status status = state.owner->cache().observe_hidden(
        state.layer, input(dst, 0), input(dst, 1), static_cast<int>(dst->src[0]->ne[1]), static_cast<int>(dst->src[0]->ne[0]));
    if (!status.ok()) state.owner->fail(status);
  }

  Steps steps_;
  ggml_tensor* encoded_ = nullptr;  // of the graph that is built
  std::deque<Layer> layers_;        // addresses stay: graphs point at them
};

}  // namespace kvt::inline v0
