// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// LlamaCppAttention: a kvtailor cache inside llama.cpp, as its library is; nothing of it is patched or built anew.
//
//   kvt::Geometry geometry;
//   kvt::Status status = kvt::llama_geometry(model, geometry);      // init() the cache with it
//   kvt::LlamaCppAttention attention(cache);
//   llama_context_params params = llama_context_default_params();
//   status = attention.attach(params);                              // before llama_init_from_model()
//   ...
//   llama_decode(context, batch);                                   // fails if the cache does
//   status = attention.finish();                                    // says why
//
// llama.cpp shows each node of a graph before it runs. Nodes that store keys and values, and those that attend, become custom
// operations that do it with the cache, on all of llama.cpp's threads; its own cache is never written, and its memory goes back
// to the system. Positions, windows, scales, soft caps and sinks are taken from the graph: the mask is looked at, and one that
// is neither causal nor a sliding window is refused. llama_memory_seq_rm() from a position on, and llama_memory_clear(), are
// followed, since positions that come again replace what was there; a shift of positions, other sequences, and llama.cpp's own
// saving of its state are not.
//
// Instead of a cache there may be an observer: llama.cpp then attends by itself, and shows what it attended with.
//
//   struct Observer {
//     const kvt::Geometry& geometry() const;
//     kvt::Status attended(const kvt::LlamaCppAttended& seen);    // may change seen.outputs; a failure stops the graph
//   };
//
// One sequence, layers on the CPU. Those that have keys of their own are the layers of the cache, in their order; such as
// differ in shape want a MixedCache (llama_layers() tells). Layers that attend to the keys of another are served with it, and
// what they ask is not among the evidence of policies. The cache and this object must outlive the context. Nodes are known by
// the names of the tensors they write ("cache_k_l7") and by their operations, which no interface promises: tried with llama.cpp
// as llama-cpp-python 0.3.36 has it.
#pragma once

#include <llama.h>

#include <array>
#include <atomic>
#include <charconv>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <ggml-backend.h>

#include "kvtailor/core/half.hpp"
#include "kvtailor/engine/ggml.hpp"

namespace kvt::inline v0 {

namespace detail {

// "cache_k_l7" -> 'k' and 7; llama.cpp's names.
inline bool llama_cache_layer(const ggml_tensor* t, char& part, int& layer) {
  if (t == nullptr) return false;
  if (t->view_src != nullptr) t = t->view_src;
  const std::string_view name(t->name);
  if (!name.starts_with("cache_") || name.size() < 10 || name.substr(7, 2) != "_l") return false;
  part = name[6];
  return (part == 'k' || part == 'v') && std::from_chars(name.data() + 9, name.data() + name.size(), layer).ec == std::errc() &&
         layer >= 0;
}

// The shape of a cache's layer, whatever it calls itself.
template <class Cache>
LayerShape shape_of_layer(const Cache& cache, int layer) {
  if constexpr (requires { cache.layer_shape(layer); }) {
    return cache.layer_shape(layer);
  } else {
    return cache.geometry().layer();
  }
}

}  // namespace detail

// The shapes of the layers that have keys of their own, in their order, and their numbers in the model. Learnt from a graph of
// which nothing is computed. Errc::unsupported if there are none, or if they do not attend as a cache does.
inline Status llama_layers(llama_model* model, std::vector<LayerShape>& shapes, std::vector<int>* numbers = nullptr) {
  struct Seen {
    std::map<int, LayerShape> layers;
    Status status;
  } seen;
  if (llama_model_has_encoder(model)) return error(Errc::unsupported, "the model has an encoder, whose rows are in no cache");
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = 1;
  params.n_threads = params.n_threads_batch = 1;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  params.offload_kqv = params.op_offload = false;
  params.cb_eval_user_data = &seen;
  params.cb_eval = [](ggml_tensor* node, bool, void* data) {
    auto& [layers, status] = *static_cast<Seen*>(data);
    char part = 0;
    int l = 0;
    if (node->op == GGML_OP_FLASH_ATTN_EXT && detail::llama_cache_layer(node->src[1], part, l)) {
      const ggml_tensor *const q = node->src[0], *const k = node->src[1], *const v = node->src[2];
      if (k->ne[0] != v->ne[0] && status.ok()) {
        status = error(Errc::unsupported, "keys have {} elements and values {}; they must be equal",
                       static_cast<double>(k->ne[0]), static_cast<double>(v->ne[0]));
      }
      layers.try_emplace(l, LayerShape{static_cast<int>(k->ne[2]), static_cast<int>(q->ne[2]), static_cast<int>(k->ne[0])});
    } else if (node->op == GGML_OP_MUL_MAT && detail::llama_cache_layer(node->src[0], part, l) && status.ok()) {
      status = error(Errc::unsupported, "layer {} attends without flash attention, which its architecture lacks", l);
    }
    node->op = GGML_OP_NONE;
    return false;
  };
  const std::unique_ptr<llama_context, void (*)(llama_context*)> context(llama_init_from_model(model, params), llama_free);
  llama_token token = 0;
  if (!context || llama_decode(context.get(), llama_batch_get_one(&token, 1)) != 0)
    return error(Errc::unsupported, "llama.cpp makes no graph of the model's {} layers", llama_model_n_layer(model));
  KVT_TRY(seen.status);
  if (seen.layers.empty())
    return error(Errc::unsupported, "none of the model's {} layers attends to a cache", llama_model_n_layer(model));
  shapes.clear();
  if (numbers != nullptr) numbers->clear();
  for (const auto& [number, shape] : seen.layers) {
    shapes.push_back(shape);
    if (numbers != nullptr) numbers->push_back(number);
  }
  return success();
}

// The same for a model whose layers are alike. Errc::bad_shape if they differ, or if no cache has their shape.
inline Status llama_geometry(llama_model* model, Geometry& geometry) {
  std::vector<LayerShape> shapes;
  KVT_TRY(llama_layers(model, shapes));
  const LayerShape& first = shapes.front();
  for (const LayerShape& shape : shapes) {
    if (!(shape == first)) {
      return error(Errc::bad_shape, "layers differ in shape, heads of {} and of {}: they need a MixedCache", first.head_dim,
                   shape.head_dim);
    }
  }
  geometry = {static_cast<int>(shapes.size()), first.num_kv_heads, first.num_q_heads, first.head_dim};
  return geometry.validate();
}

// One layer's attention to a part of a text, as llama.cpp computed it. Valid during the call.
struct LlamaCppAttended {
  int layer;  // of those that have keys of their own, the one whose rows are attended to
  std::span<const int> positions;
  // [n, num_kv_heads, head_dim], keys after RoPE, as they are stored; null where a layer attends to what another has stored.
  const float *keys, *values;
  const float* queries;   // [n, num_q_heads, head_dim], after RoPE, before options.scale
  AttendOptions options;  // a window is 0 as long as the text is no longer
  float* outputs;         // [n, num_q_heads, head_dim]: the model goes on with what is here afterwards
};

// Cache: KvCache, AnyCache, or an observer.
template <class Cache>
class LlamaCppAttention {
 public:
  LlamaCppAttention() = default;
  explicit LlamaCppAttention(Cache& cache) { steps_.set_cache(cache); }
  LlamaCppAttention(const LlamaCppAttention&) = delete;
  LlamaCppAttention& operator=(const LlamaCppAttention&) = delete;

  // Another cache for what is decoded next; see advance() for what it holds already.
  void set_cache(Cache& cache) { steps_.set_cache(cache); }

  // Sets the callbacks of a context that is to be made, and what they need: flash attention, fp16 as llama.cpp's own types
  // (observers may have fp32), all layers' windows as long as the context, everything on the CPU. Errc::bad_value if something
  // else of `params` is in the way: they are then unchanged.
  Status attach(llama_context_params& params) {
    if (params.cb_eval != nullptr) return error(Errc::bad_value, "the context's cb_eval is taken by another");
    if (params.n_seq_max > 1) return error(Errc::bad_value, "n_seq_max is {}; it must be 1", params.n_seq_max);
    if (params.embeddings) return error(Errc::bad_value, "a context for embeddings does not attend to its cache");
    if (observes && (ggml_is_quantized(params.type_k) || ggml_is_quantized(params.type_v)))
      return error(Errc::bad_value, "llama.cpp rotates what it quantises, and shows it rotated");
    params.cb_eval = look;
    params.cb_eval_user_data = this;
    abort_too_ = params.abort_callback;
    abort_data_ = params.abort_callback_data;
    params.abort_callback = aborts;
    params.abort_callback_data = this;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    if (!observes) params.type_k = params.type_v = GGML_TYPE_F16;
    params.swa_full = true;
    params.offload_kqv = params.op_offload = false;
    return success();
  }

  // Tells the context that positions from `first` on, as many as there are tokens in the batch, are in the cache already: it
  // was read from a file, forked, or filled by another context. Nothing is computed, and no logits come of it. At most n_ubatch
  // tokens that follow one another.
  Status advance(llama_context* context, const llama_batch& batch) {
    if (batch.n_tokens < 1 || batch.n_tokens > static_cast<int>(llama_n_ubatch(context)))
      return error(Errc::bad_value, "the batch has {} tokens; it may have 1 to {}", batch.n_tokens, llama_n_ubatch(context));
    idle_ = true;
    const int failed = llama_decode(context, batch);
    idle_ = false;
    // The graph may be used again.
    for (const auto& [node, operation] : stopped_) node->op = operation;
    stopped_.clear();
    if (failed != 0) return error(Errc::bad_position, "llama.cpp does not take the tokens: its error is {}", failed);
    return success();
  }

  // The first failure since the last call, if any; the cache then ends where it ended before the part of a batch (n_ubatch
  // tokens at most) that failed.
  Status finish() {
    ++graph_;  // whatever came of the last one
    return steps_.finish();
  }

 private:
  static constexpr bool observes = requires(Cache & cache, const LlamaCppAttended& seen) { cache.attended(seen); };
  using Steps = detail::GraphSteps<Cache>;
  struct Attending : Steps::Layer {
    const ggml_tensor *queries = nullptr, *out = nullptr;
    LlamaCppAttention* attention = nullptr;
  };
  struct Layer : Attending {
    long long graph = 0;  // in which its nodes were shown, and how many of the three: it stores, stores, attends
    int shown = 0;
    bool opens = false;         // its graph
    bool values_first = false;  // of the two stores
  };
  // To the rows of another layer. No node comes before it in which one thread could plan while the others wait.
  struct Guest : Attending {
    std::atomic<bool> planned = false;
  };

  static bool aborts(void* data) {
    auto& self = *static_cast<LlamaCppAttention*>(data);
    if (!self.steps_.failed() && self.abort_too_ != nullptr && self.abort_too_(self.abort_data_))
      self.steps_.fail(error(Errc::stopped, "decoding was stopped by the context's abort_callback"));
    return self.steps_.failed();
  }

  // Before the nodes of a graph run, all of them are shown; for an observer those up to the next that it wants to see, which
  // then come again with their results.
  static bool look(ggml_tensor* node, bool ask, void* data) {
    auto& self = *static_cast<LlamaCppAttention*>(data);
    if constexpr (observes) {
      if (!ask) {
        if (!self.steps_.failed()) self.show(node);
        return true;  // or the graph would end here, as if it were complete; `aborts` ends it
      }
    }
    if (self.idle_) {
      self.stopped_.emplace_back(node, node->op);
      node->op = GGML_OP_NONE;
      return false;
    }
    return !self.steps_.failed() && self.take(node) && observes;
  }

  // Whether it is one of ours.
  bool take(ggml_tensor* node) {
    // A graph that is used again has our operations in it.
    const bool ours = node->op == GGML_OP_CUSTOM;
    char part = 0;
    int l = 0;
    if (node->op == GGML_OP_ROPE) {
      if (detail::llama_cache_layer(node->src[0], part, l)) {
        steps_.end();
        steps_.fail(error(Errc::unsupported, "llama.cpp shifts the positions of what is cached, which a cache cannot follow"));
      } else {
        places_ = node->src[1];
      }
      return false;
    }
    if ((ours || node->op == GGML_OP_SET_ROWS) && detail::llama_cache_layer(node, part, l)) {
      take_store(node, part, l);
      return true;
    }
    if (node->op == GGML_OP_FLASH_ATTN_EXT || (ours && detail::llama_cache_layer(node->src[1], part, l))) {
      take_attention(node);
      return true;
    }
    if (node->op == GGML_OP_MUL_MAT && detail::llama_cache_layer(node->src[0], part, l))
      steps_.fail(error(Errc::unsupported, "layer {} attends without flash attention, which its architecture lacks", l));
    return false;
  }

  void take_store(ggml_tensor* node, char part, int l) {
    const auto number = numbers_.try_emplace(l, static_cast<int>(numbers_.size())).first->second;
    const int has = steps_.cache().geometry().num_layers;
    while (static_cast<int>(layers_.size()) <= number) layers_.emplace_back();
    Layer& state = layers_[static_cast<std::size_t>(number)];
    // What was complete begins again.
    const bool opens = opened_ != graph_ || (state.graph == graph_ && state.shown != 1);
    if (opens) open(node);
    const ggml_tensor* const rows = node->src[0];
    if (number >= has)
      return steps_.fail(error(Errc::bad_shape, "the model stores keys of more layers than the {} of the cache", has));
    const LayerShape shape = detail::shape_of_layer(steps_.cache(), number);
    const int width = shape.num_kv_heads * shape.head_dim;
    if (rows->type != GGML_TYPE_F32 || rows->ne[0] != width || !ggml_is_contiguous(rows)) {
      return steps_.fail(error(Errc::bad_shape, "the model stores rows of {} numbers; the cache has {}",
                               static_cast<double>(rows->ne[0]), width));
    }
    if (state.graph != graph_) {
      state.owner = &steps_;
      state.attention = this;
      state.layer = number;
      state.graph = graph_;
      state.shown = 0;
      state.opens = opens;
      state.values_first = part == 'v';
      if constexpr (!observes) become(node, hold, state);
    } else {
      if constexpr (!observes) become(node, store, state);
    }
    ++state.shown;
    if constexpr (!observes) release(node->view_src->buffer);
  }

  // What a graph is of, when the first of its stores is shown: its inputs are there already.
  void open(const ggml_tensor* node) {
    if (opened_ == graph_) ++graph_;
    opened_ = graph_;
    guests_shown_ = 0;
    masks_.clear();
    const ggml_tensor* const cells = node->src[1];  // where llama.cpp would store the rows
    const auto n = static_cast<std::size_t>(node->src[0]->ne[1]);
    std::vector<int> positions(n);
    if (places_ != nullptr && places_->type == GGML_TYPE_I32 && static_cast<std::size_t>(places_->ne[0]) >= n) {
      std::memcpy(positions.data(), places_->data, n * sizeof(int));
    } else if (cells->type == GGML_TYPE_I64 && static_cast<std::size_t>(cells->ne[0]) >= n) {
      const auto* const from = static_cast<const std::int64_t*>(cells->data);
      std::transform(from, from + n, positions.begin(), [](std::int64_t cell) { return static_cast<int>(cell); });
    }
    steps_.begin(positions);
    if constexpr (!observes) {
      // The engine's text was cut back, and goes on otherwise.
      Cache& cache = steps_.cache();
      if (positions.front() < cache.end_position(0)) {
        if (const Status status = cache.truncate(positions.front()); !status.ok()) steps_.fail(status);
      }
    }
  }

  void take_attention(ggml_tensor* node) {
    char part = 0;
    int l = 0;
    const bool found = detail::llama_cache_layer(node->src[1], part, l) && numbers_.contains(l);
    if (!found) return steps_.fail(error(Errc::unsupported, "a layer attends to what is in no cache of its own"));
    Layer& owner = layers_[static_cast<std::size_t>(numbers_.at(l))];
    if (owner.graph != graph_ || owner.shown < 2)
      return steps_.fail(error(Errc::unsupported, "a layer attends to keys of layer {} that are not stored before it", l));
    const bool as_guest = owner.shown == 3;
    if (as_guest) {
      while (guests_.size() <= guests_shown_) guests_.emplace_back();
      Guest& guest = guests_[guests_shown_++];
      guest.owner = &steps_;
      guest.attention = this;
      guest.layer = owner.layer;
      guest.planned = false;
      if (!describe(node, l, guest)) return;
      if constexpr (!observes) become(node, attend_as_guest, guest);
    } else {
      if (!describe(node, l, owner)) return;
      owner.shown = 3;
      if constexpr (!observes) become(node, attend, owner);
    }
    as_guest_ = as_guest;
  }

  // What a node attends with.
  bool describe(const ggml_tensor* node, int l, Attending& state) {
    const LayerShape shape = detail::shape_of_layer(steps_.cache(), state.layer);
    const ggml_tensor *const q = node->src[0], *const v = node->src[2];
    const auto refuse = [&](const Status& status) {
      steps_.fail(status);
      return false;
    };
    if (q->type != GGML_TYPE_F32 || q->ne[0] != shape.head_dim || v->ne[0] != shape.head_dim || q->ne[2] != shape.num_q_heads) {
      return refuse(error(Errc::bad_shape, "the model attends with {} heads of {}, which the cache's are not",
                          static_cast<double>(q->ne[2]), static_cast<double>(q->ne[0])));
    }
    if (q->ne[3] != 1) return refuse(error(Errc::unsupported, "there are {} sequences", static_cast<double>(q->ne[3])));
    if (!ggml_backend_buffer_is_host(node->buffer)) return refuse(error(Errc::unsupported, "layer {} is not on the CPU", l));
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      float parameters[3];  // scale, slope of ALiBi, soft cap
      std::memcpy(parameters, node->op_params, sizeof parameters);
      if (parameters[1] != 0) return refuse(error(Errc::unsupported, "the model biases attention by position (ALiBi)"));
      state.options.scale = parameters[0];
      state.options.soft_cap = parameters[2];
    }
    state.queries = q;
    // Made fp16 in the graph, perhaps later than it is wanted here.
    const ggml_tensor* mask = node->src[3];
    while (mask != nullptr && mask->op == GGML_OP_CPY) mask = mask->src[0];
    if (const Status status = read_window(mask, state.options.window); !status.ok()) return refuse(status);
    state.options.sink_logits = {};
    if (const ggml_tensor* const sinks = node->src[4]) {
      if (sinks->type != GGML_TYPE_F32) return refuse(error(Errc::unsupported, "sinks of attention are not fp32"));
      state.options.sink_logits = {static_cast<const float*>(sinks->data), static_cast<std::size_t>(shape.num_q_heads)};
    }
    state.out = node;
    attending_ = &state;
    return true;
  }

  // The node runs f on all threads instead of what it was made for.
  template <class State>
  void become(ggml_tensor* node, ggml_custom_op_t f, State& state) {
    if (node->op == GGML_OP_CUSTOM) return;
    // ggml alone knows how it writes down what a custom operation does: one is made, and copied.
    const ggml_init_params init{2 * ggml_tensor_overhead(), nullptr, true};
    const std::unique_ptr<ggml_context, void (*)(ggml_context*)> context(ggml_init(init), ggml_free);
    if (!context) return steps_.fail(error(Errc::out_of_memory, "out of memory while a graph is changed"));
    const ggml_tensor* const made =
        ggml_custom_4d(context.get(), GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, f, GGML_N_TASKS_MAX, &state);
    std::memcpy(node->op_params, made->op_params, sizeof node->op_params);
    node->op = GGML_OP_CUSTOM;
  }

  // llama.cpp's own cache was filled with zeros when it was made; nobody reads them.
  void release(ggml_backend_buffer_t buffer) {
    if (buffer == nullptr || std::find(released_.begin(), released_.end(), buffer) != released_.end()) return;
    released_.push_back(buffer);
#if defined(__linux__)
    if (!ggml_backend_buffer_is_host(buffer)) return;
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const auto base = reinterpret_cast<std::uintptr_t>(ggml_backend_buffer_get_base(buffer));
    const std::uintptr_t from = (base + page - 1) / page * page,
                         to = (base + ggml_backend_buffer_get_size(buffer)) / page * page;
    if (to > from) (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
#endif
  }

  // ---- while a graph runs ----

  static void hold(ggml_tensor* dst, int ith, int, void* data) {
    Layer& state = *static_cast<Layer*>(data);
    if (state.owner->failed()) return;
    if (ith == 0) {
      const auto* const rows = static_cast<const float*>(dst->src[0]->data);
      state.attention->held_.assign(rows, rows + ggml_nelements(dst->src[0]));
    }
    if (state.opens) state.owner->encode();
  }
  static void store(ggml_tensor* dst, int ith, int, void* data) {
    Layer& state = *static_cast<Layer*>(data);
    if (ith != 0 || state.owner->failed()) return;
    if (state.shown != 3) return state.owner->fail(error(Errc::unsupported, "the graph runs in parts, not on the CPU alone"));
    const auto* const rows = static_cast<const float*>(dst->src[0]->data);
    const float *const held = state.attention->held_.data(), *k = held, *v = rows;
    if (state.values_first) std::swap(k, v);
    state.owner->store(state, k, v, state.attention->queries_of(*state.queries), static_cast<float*>(state.out->data));
  }
  static void attend(ggml_tensor* dst, int ith, int, void* data) { static_cast<Layer*>(data)->owner->attend(dst, ith); }
  static void attend_as_guest(ggml_tensor* dst, int ith, int, void* data) {
    Guest& state = *static_cast<Guest*>(data);
    if (ith == 0) {
      state.owner->plan(state, state.attention->queries_of(*state.queries), static_cast<float*>(dst->data));
      state.planned.store(true, std::memory_order_release);
      state.planned.notify_all();
    } else {
      state.planned.wait(false, std::memory_order_acquire);
    }
    state.owner->attend(dst, ith);
  }

  // To an observer: keys and values are kept until the attention they belong to.
  void show(ggml_tensor* node) {
    char part = 0;
    int l = 0;
    if (node->op == GGML_OP_SET_ROWS && detail::llama_cache_layer(node, part, l)) {
      const auto* const rows = static_cast<const float*>(node->src[0]->data);
      (part == 'k' ? held_ : values_).assign(rows, rows + ggml_nelements(node->src[0]));
    } else if (node->op == GGML_OP_FLASH_ATTN_EXT && detail::llama_cache_layer(node->src[1], part, l)) {
      const Attending& state = *attending_;
      const Status status = steps_.cache().attended({state.layer, steps_.positions(), as_guest_ ? nullptr : held_.data(),
                                                     as_guest_ ? nullptr : values_.data(), queries_of(*state.queries),
                                                     state.options, static_cast<float*>(node->data)});
      if (!status.ok()) steps_.fail(status);
    }
  }

  // A row of a mask is a query; what it sees are zeros. 0 if that is all there is.
  Status read_window(const ggml_tensor* mask, int& window) {
    const auto known = std::find_if(masks_.begin(), masks_.end(), [&](const auto& m) { return m.first == mask; });
    if (known != masks_.end()) {
      window = known->second;
      return success();
    }
    const std::vector<int>& positions = steps_.positions();
    if (mask == nullptr || (mask->type != GGML_TYPE_F16 && mask->type != GGML_TYPE_F32) ||
        mask->ne[1] < static_cast<std::int64_t>(positions.size()) || !ggml_backend_buffer_is_host(mask->buffer)) {
      return error(Errc::unsupported, "attention has no mask of its queries");
    }
    const auto seen_by = [&](std::size_t query) {
      const auto* const row = static_cast<const char*>(mask->data) + query * mask->nb[1];
      int count = 0;
      for (std::int64_t cell = 0; cell < mask->ne[0]; ++cell) {
        float x = 0;
        if (mask->type == GGML_TYPE_F32) {
          std::memcpy(&x, row + cell * 4, 4);
        } else {
          Half half;
          std::memcpy(&half, row + cell * 2, 2);
          x = to_float(half);
        }
        count += x == 0 ? 1 : 0;
      }
      return count;
    };
    const int first = positions.front() + 1, last = positions.back() + 1, seen = seen_by(positions.size() - 1);
    window = seen == last ? 0 : seen;
    if (seen < 1 || seen > last || seen_by(0) != (window == 0 ? first : std::min(first, window))) {
      return error(Errc::unsupported, "a query at position {} sees {} rows, which is no text and no sliding window over one",
                   positions.back(), seen);
    }
    masks_.emplace_back(mask, window);
    return success();
  }

  // Heads of a token side by side, as ggml makes them, or copied so.
  const float* queries_of(const ggml_tensor& q) {  // [head_dim, n, num_q_heads]
    const auto dim = static_cast<std::size_t>(q.ne[0]), n = static_cast<std::size_t>(q.ne[1]),
               heads = static_cast<std::size_t>(q.ne[2]);
    if (q.nb[0] == sizeof(float) && q.nb[2] == dim * sizeof(float) && (n == 1 || q.nb[1] == heads * dim * sizeof(float)))
      return static_cast<const float*>(q.data);
    queries_.resize(n * heads * dim);
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t h = 0; h < heads; ++h) {
        const char* const from = static_cast<const char*>(q.data) + i * q.nb[1] + h * q.nb[2];
        for (std::size_t d = 0; d < dim; ++d)
          std::memcpy(&queries_[(i * heads + h) * dim + d], from + d * q.nb[0], sizeof(float));
      }
    }
    return queries_.data();
  }

  Steps steps_;
  std::map<int, int> numbers_;            // of the model's layers that store, as they came, among the cache's
  std::deque<Layer> layers_;              // addresses stay: graphs point at them
  std::deque<Guest> guests_;              // in the order of a graph
  std::size_t guests_shown_ = 0;          // in this one
  const Attending* attending_ = nullptr;  // the last that was shown
  bool as_guest_ = false;
  long long graph_ = 1, opened_ = 0;  // the graph that is shown, and the last one that has begun
  const ggml_tensor* places_ = nullptr;
  std::vector<std::pair<const ggml_tensor*, int>> masks_;  // of the graph that is shown, and their windows
  std::vector<ggml_backend_buffer_t> released_;
  std::vector<float>
      held_;  // what the first store of a layer would have stored: its memory may be used again before the second
  std::vector<float> values_;   // for an observer
  std::vector<float> queries_;  // side by side, if they are not
  bool idle_ = false;
  std::vector<std::pair<ggml_tensor*, ggml_op>> stopped_;  // nodes of an idle graph, and what they were for
  ggml_abort_callback abort_too_ = nullptr;
  void* abort_data_ = nullptr;
};

}  // namespace kvt::inline v0
