// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// KvCache: the keys and values of one sequence, tailored by three policies.
//
//   KvCache<Adaptive, SnapKv, KvCodec<TurboQuant<3, 64>, TurboQuant<2, 64>>> cache;
//   KVT_TRY(cache.init(geometry));
//   KVT_TRY(cache.append(layer, keys, values, positions));      // each layer of each step
//   KVT_TRY(cache.observe(layer, queries, positions));          // if a policy needs queries
//   KVT_TRY(cache.attend(layer, queries, positions, {}, out));
//   KVT_TRY(cache.compress(Retain::ratio(0.25)));               // after prefill, between chunks, or while decoding
//
// Shapes: keys, values [n, num_kv_heads, head_dim]; queries, out [n, num_q_heads, head_dim]; positions [n].
// Failure: every call that returns a Status other than success leaves the cache as it was.
// Threads: calls that change a cache are for one thread; any number may attend at the same time between them.
// Memory:  everything a cache keeps comes from CacheOptions::memory. Its address must not change while a plan is in use.
#pragma once

#include <algorithm>
#include <limits>
#include <memory_resource>
#include <new>
#include <span>
#include <vector>

#include "kvtailor/attend/plan.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/store/cut.hpp"
#include "kvtailor/store/head_store.hpp"

namespace kvt::inline v0 {

struct CacheOptions {
  int sink_rows = 4;     // first rows of the text: dense, never dropped
  int recent_rows = 32;  // newest rows: dense, never dropped. The dense zone grows by a block before its oldest is encoded
  int block_rows = 128;  // rows encoded together, 1 .. 512
  std::pmr::memory_resource* memory = nullptr;  // null: the default resource; must outlive the cache
};

// Provided: the evidence this engine supplies. Without observe() say cache_evidence: what cannot work then does not compile.
template <class Budget, class Selector, class Codec, EvidenceSet Provided = full_evidence>
class KvCache {
  static_assert(BudgetAllocator<Budget>, "the first parameter of KvCache must be a BudgetAllocator (see core/concepts.hpp)");
  static_assert(TokenSelector<Selector>, "the second parameter of KvCache must be a TokenSelector (see core/concepts.hpp)");
  static constexpr EvidenceSet missing = (Budget::needs | Selector::needs).without(Provided);
  static_assert(!missing.has(Evidence::window_queries),
                "this composition needs the evidence window_queries, which the engine does not provide: call observe() and "
                "compose with full_evidence, or choose a selector that needs no queries (SinkRecent, KeyDiff)");
  static_assert(!missing.has(Evidence::keys), "this composition needs the evidence keys, which is not provided");
  static_assert(!missing.has(Evidence::values), "this composition needs the evidence values, which is not provided");
  static_assert(!missing.has(Evidence::positions), "this composition needs the evidence positions, which is not provided");
  static_assert(!missing.has(Evidence::scores), "this composition needs the evidence scores, which is not provided");

 public:
  using budget_type = Budget;
  using selector_type = Selector;
  using codec_type = Codec;
  static constexpr int head_dim = Codec::head_dim;

  explicit KvCache(Budget budget = {}, Selector selector = {}, Codec codec = {})
      : budget_(std::move(budget)), selector_(std::move(selector)), codec_(std::move(codec)) {}
  KvCache(const KvCache&) = delete;  // fork() copies, and can fail
  KvCache& operator=(const KvCache&) = delete;

  // Gives the cache its shape, or a new one; it is empty afterwards.
  Status init(const Geometry& geometry, const CacheOptions& options = {}) noexcept try {
    KVT_TRY(geometry.validate());
    if (geometry.head_dim != head_dim) {
      return error(Errc::bad_shape, "head_dim is {}; this cache was composed for {}", geometry.head_dim, head_dim);
    }
    if (options.sink_rows < 0 || options.sink_rows > 1 << 20) {
      return error(Errc::bad_shape, "sink_rows is {}; it must be between 0 and {}", options.sink_rows, 1 << 20);
    }
    if (options.recent_rows < 0 || options.recent_rows > 1 << 20) {
      return error(Errc::bad_shape, "recent_rows is {}; it must be between 0 and {}", options.recent_rows, 1 << 20);
    }
    const int most = std::min(max_block_rows_limit, Codec::max_block_rows);
    if (options.block_rows < 1 || options.block_rows > most) {
      return error(Errc::bad_shape, "block_rows is {}; it must be between 1 and {}", options.block_rows, most);
    }
    auto* const memory = options.memory != nullptr ? options.memory : std::pmr::get_default_resource();
    std::pmr::vector<Head> heads(memory);
    heads.reserve(static_cast<std::size_t>(geometry.num_heads()));
    for (int h = 0; h < geometry.num_heads(); ++h) heads.emplace_back(&codec_, memory);
    std::pmr::vector<Layer> layers(memory);
    layers.reserve(static_cast<std::size_t>(geometry.num_layers));
    for (int l = 0; l < geometry.num_layers; ++l) layers.emplace_back(memory);
    geometry_ = geometry;
    options_ = options;
    memory_ = memory;
    // A pmr vector does not take over its resource on assignment, so both are built anew in place.
    std::destroy_at(&heads_);
    std::construct_at(&heads_, std::move(heads));
    std::destroy_at(&layers_);
    std::construct_at(&layers_, std::move(layers));
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while making a cache");
  }

  const Geometry& geometry() const noexcept { return geometry_; }
  const CacheOptions& options() const noexcept { return options_; }
  int num_rows(int layer, int kv_head) const noexcept { return head(layer, kv_head).num_rows(); }
  // Positions of the rows a head holds, increasing.
  std::span<const int> positions(int layer, int kv_head) const noexcept { return head(layer, kv_head).positions(); }
  // The rows of a head as the codecs give them back, [num_rows, head_dim]; either may be null.
  void decode(int layer, int kv_head, float* keys, float* values) const { head(layer, kv_head).decode(keys, values); }
  // One past the last position appended to a layer.
  int end_position(int layer) const noexcept { return layers_[static_cast<std::size_t>(layer)].end; }

  bool wants_queries() const noexcept { return needed().has(Evidence::window_queries); }

  // Adds n rows. Positions are not negative and increase; a row that is not finite or too large to be stored is refused.
  // Encodes the oldest rows first if the dense zone is over-full: rows of one append stay dense until the next.
  template <class T>
  Status append(int layer, const T* keys, const T* values, std::span<const int> positions) noexcept try {
    KVT_TRY(check_layer(layer));
    KVT_TRY(check_positions(positions, layers_[static_cast<std::size_t>(layer)].end));
    if (positions.empty()) return success();
    KVT_TRY(check_rows(keys, positions.size(), codec_.keys.max_row_norm(),
                       "a key has the element {}; it must be finite and at most {} in size",
                       "a key has the norm {}; the codec of keys takes at most {}"));
    KVT_TRY(check_rows(values, positions.size(), codec_.values.max_row_norm(),
                       "a value has the element {}; it must be finite and at most {} in size",
                       "a value has the norm {}; the codec of values takes at most {}"));
    const int n = static_cast<int>(positions.size());
    const auto heads = static_cast<std::size_t>(geometry_.num_kv_heads);
    std::vector<std::vector<BlockRef>> fresh(heads);
    bool enough = true;
    for (std::size_t h = 0; h < heads && enough; ++h) {
      Head& store = head(layer, static_cast<int>(h));
      const int over = store.recent_rows() - options_.recent_rows;
      const int count = over > 0 ? over / options_.block_rows : 0;
      const int sinks = new_sink_rows(store, n);
      fresh[h].reserve(static_cast<std::size_t>(count));
      enough = store.encode_oldest(count, options_.block_rows, fresh[h]) &&
               store.reserve(sinks, n - sinks, count, count * options_.block_rows);
    }
    if (!enough) {
      for (std::size_t h = 0; h < heads; ++h) {
        for (const BlockRef& block : fresh[h]) head(layer, static_cast<int>(h)).free_block(block);
      }
      return error(Errc::out_of_memory, "out of memory while appending {} rows", n);
    }
    for (std::size_t h = 0; h < heads; ++h) {
      Head& store = head(layer, static_cast<int>(h));
      const int sinks = new_sink_rows(store, n);
      store.adopt_oldest(fresh[h]);
      for (int i = 0; i < n; ++i) {
        float key[head_dim], value[head_dim];
        const auto at = (static_cast<std::size_t>(i) * heads + h) * head_dim;
        for (int d = 0; d < head_dim; ++d) {
          key[d] = to_float(keys[at + static_cast<std::size_t>(d)]);
          value[d] = to_float(values[at + static_cast<std::size_t>(d)]);
        }
        store.push_row(i < sinks, key, value, positions[static_cast<std::size_t>(i)]);
      }
    }
    Layer& state = layers_[static_cast<std::size_t>(layer)];
    state.end = positions.back() + 1;
    state.appended += n;
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while appending rows");
  }

  // Shows the cache the queries (post-RoPE) that come with the rows just appended. Costs nothing if no policy needs them.
  Status observe(int layer, const float* queries, std::span<const int> positions, const AttendOptions& attend = {}) noexcept {
    KVT_TRY(check_layer(layer));
    KVT_TRY(check_attend(queries, positions, attend));
    if (!wants_queries() || positions.empty()) return success();
    Layer& state = layers_[static_cast<std::size_t>(layer)];
    KVT_TRY(check_positions(
        positions, state.window_positions.size() == 0 ? 0 : state.window_positions[state.window_positions.size() - 1] + 1));
    const auto width = static_cast<std::size_t>(geometry_.num_q_heads) * head_dim;
    const auto window = static_cast<std::size_t>(window_size());
    if (!state.window_queries.reserve(window * width) || !state.window_positions.reserve(window)) {
      return error(Errc::out_of_memory, "out of memory while keeping {} queries", static_cast<double>(window));
    }
    const std::size_t fresh = std::min(window, positions.size());
    const std::size_t held = state.window_positions.size();
    const std::size_t drop = held + fresh > window ? held + fresh - window : 0;
    state.window_queries.drop_front(drop * width);
    state.window_positions.drop_front(drop);
    state.window_queries.push(queries + (positions.size() - fresh) * width, fresh * width);
    state.window_positions.push(positions.data() + positions.size() - fresh, fresh);
    state.attend = attend;
    state.attend.sink_logits = {};
    return success();
  }

  // Prepares attention of n queries over what is stored: each sees the rows whose position is not after its own, and inside the
  // window if there is one. All pointers must live until the tasks have run; the cache must not change. No visible row gives
  // zeros.
  Status plan(int layer, const float* queries, std::span<const int> positions, const AttendOptions& attend, float* out,
              AttendPlan& plan) const noexcept try {
    KVT_TRY(check_layer(layer));
    KVT_TRY(check_attend(queries, positions, attend));
    plan.run_ = &KvCache::run_task;
    plan.cache_ = this;
    plan.layer_ = layer;
    plan.queries_ = queries;
    plan.positions_ = positions;
    plan.options_ = attend;
    plan.out_ = out;
    plan.next_ = 0;
    plan.tasks_.clear();
    plan.pending_.clear();
    int slots = 0;
    const int vectors = static_cast<int>(positions.size()) * geometry_.group_size();
    const int tiles = (vectors + tile_vectors - 1) / tile_vectors;
    for (int h = 0; h < geometry_.num_kv_heads; ++h) {
      const Head& store = head(layer, h);
      const int segments = num_segments(store);
      const int parts = tiles == 1 ? std::max(1, (store.num_rows() + rows_per_split - 1) / rows_per_split) : 1;
      if (parts == 1) {
        for (int tile = 0; tile < tiles; ++tile) plan.tasks_.push_back({h, tile, 0, segments, 0, 0, 0, 0});
        continue;
      }
      // Cut at the segment where each share of the rows is full.
      const int group = static_cast<int>(plan.pending_.size());
      const int first_slot = slots;
      int begin = 0, rows = 0, part = 0;
      for (int s = 0; s < segments; ++s) {
        rows += segment(store, s).rows;
        const bool full = static_cast<long long>(rows) * parts >= static_cast<long long>(store.num_rows()) * (part + 1);
        if (full || s + 1 == segments) {
          plan.tasks_.push_back({h, 0, begin, s + 1, first_slot, slots++, 0, group});
          begin = s + 1;
          while (static_cast<long long>(rows) * parts >= static_cast<long long>(store.num_rows()) * (part + 1)) ++part;
        }
      }
      for (auto task = plan.tasks_.end() - (slots - first_slot); task != plan.tasks_.end(); ++task) {
        task->num_slots = slots - first_slot;
      }
      plan.pending_.push_back(slots - first_slot);
    }
    const auto total = static_cast<std::size_t>(slots) * tile_vectors;
    if (plan.states_.size() < total) plan.states_.resize(total);
    if (plan.partials_.size() < total * head_dim) plan.partials_.resize(total * head_dim);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while planning attention");
  }

  // The same at once, on this thread.
  Status attend(int layer, const float* queries, std::span<const int> positions, const AttendOptions& options,
                float* out) const noexcept {
    AttendPlan work(memory_ != nullptr ? memory_ : std::pmr::get_default_resource());
    KVT_TRY(plan(layer, queries, positions, options, out, work));
    for (int task = 0; task < work.num_tasks(); ++task) work.run(task);
    return success();
  }

  // Scores every row, shares out the budget, drops what is over it and encodes all but the newest recent_rows rows.
  // Rows that are encoded already keep their bytes. A budget of rows or a ratio is met exactly; bytes are not exceeded.
  // Observed queries are used up: they take more memory than a tailored cache, and the next cut wants newer ones.
  Status compress(Retain retain) noexcept try {
    KVT_TRY(check_layer(0));
    const std::size_t heads = heads_.size();
    std::vector<int> seen(heads), floor(heads), keep(heads);
    std::int64_t rows = 0, floor_rows = 0;
    for (std::size_t h = 0; h < heads; ++h) {
      seen[h] = heads_[h].num_rows();
      floor[h] = heads_[h].sink_rows() + std::min(options_.recent_rows, seen[h] - heads_[h].sink_rows());
      rows += seen[h];
      floor_rows += floor[h];
    }
    BudgetRequest want{0, geometry_.num_layers, geometry_.num_kv_heads, seen, floor, {}};
    KVT_TRY(total_rows(retain, rows, floor_rows, want.total));

    std::vector<float> scores;
    const bool all = retain.unit != Retain::Unit::bytes && want.total == rows;
    if (!all) {
      KVT_TRY(score(seen, rows, scores));
      want.scores = scores;
      if (retain.unit == Retain::Unit::bytes) KVT_TRY(fit_bytes(retain.amount, rows, floor_rows, want, keep));
    }
    if (all) {
      keep = seen;
    } else {
      KVT_TRY(budget_.allocate(want, keep));
      KVT_TRY(check_allocation(want, keep));
    }
    std::vector<std::vector<unsigned char>> marks(heads);
    std::size_t at = 0;
    for (std::size_t h = 0; h < heads; ++h) {
      const auto n = static_cast<std::size_t>(seen[h]);
      marks[h].assign(n, 1);
      if (keep[h] < seen[h]) cut({scores.data() + at, n}, keep[h], marks[h]);
      at += n;
    }
    KVT_TRY(rebuild(marks, true));
    for (Layer& layer : layers_) {
      layer.window_queries.release();
      layer.window_positions.release();
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while compressing");
  }

  // Encodes all but the newest recent_rows rows now, instead of when a whole block has gathered.
  Status flush() noexcept try {
    std::vector<std::vector<unsigned char>> marks(heads_.size());
    for (std::size_t h = 0; h < heads_.size(); ++h) marks[h].assign(static_cast<std::size_t>(heads_[h].num_rows()), 1);
    return rebuild(marks, true);
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while encoding");
  }

  // Drops all rows at `position` and after it. What is left is bit for bit what it was: append(drafts), truncate and
  // append(x) gives the same cache as append(x). Rows that compress() dropped do not come back.
  Status truncate(int position) noexcept try {
    if (position < 0) return error(Errc::bad_position, "truncate to position {}; it must be zero or more", position);
    std::vector<std::vector<unsigned char>> marks(heads_.size());
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      const auto have = heads_[h].positions();
      const auto end = std::lower_bound(have.begin(), have.end(), position) - have.begin();
      marks[h].assign(have.size(), 0);
      std::fill(marks[h].begin(), marks[h].begin() + end, static_cast<unsigned char>(1));
      if (static_cast<std::size_t>(end) == have.size()) marks[h].clear();  // nothing to do for this head
    }
    KVT_TRY(rebuild(marks, false));
    for (Layer& layer : layers_) {
      if (layer.end <= position) continue;
      layer.appended = std::max<long long>(0, layer.appended - (layer.end - position));
      layer.end = position;
      std::size_t queries = layer.window_positions.size();
      while (queries > 0 && layer.window_positions[queries - 1] >= position) --queries;
      layer.window_positions.resize(queries);
      layer.window_queries.resize(queries * static_cast<std::size_t>(geometry_.num_q_heads) * head_dim);
    }
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while truncating");
  }

  // Makes `child` a copy that lives on its own, in the same memory resource.
  Status fork(KvCache& child) const noexcept try {
    KVT_TRY(check_layer(0));
    KvCache twin(budget_, selector_, codec_);
    KVT_TRY(twin.init(geometry_, options_));
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      if (!heads_[h].copy_to(twin.heads_[h])) return error(Errc::out_of_memory, "out of memory while copying a cache");
    }
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const Layer& from = layers_[l];
      Layer& to = twin.layers_[l];
      if (!to.window_queries.reserve(from.window_queries.size()) ||
          !to.window_positions.reserve(from.window_positions.size())) {
        return error(Errc::out_of_memory, "out of memory while copying a cache");
      }
      to.window_queries.push(from.window_queries.data(), from.window_queries.size());
      to.window_positions.push(from.window_positions.data(), from.window_positions.size());
      to.attend = from.attend;
      to.end = from.end;
      to.appended = from.appended;
    }
    child.take(std::move(twin));
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while copying a cache");
  }

  // Empty, as after init(); memory goes back to the resource.
  void clear() noexcept {
    for (Head& store : heads_) store = Head(&codec_, memory_);
    for (Layer& layer : layers_) layer = Layer(memory_);
  }

  Memory memory() const noexcept {
    Memory sum;
    long long allocated = 0;
    for (const Head& store : heads_) {
      const auto bytes = store.bytes();
      sum.payload_bytes += bytes.payload;
      sum.index_bytes += bytes.index;
      allocated += bytes.allocated;
    }
    const auto tables = static_cast<long long>(heads_.capacity() * sizeof(Head) + layers_.capacity() * sizeof(Layer));
    sum.index_bytes += tables;
    allocated += tables;
    for (const Layer& layer : layers_) {
      sum.evidence_bytes += layer.window_queries.used_bytes() + layer.window_positions.used_bytes();
      allocated += layer.window_queries.allocated_bytes() + layer.window_positions.allocated_bytes();
      sum.dense_fp16_bytes += layer.appended * geometry_.num_kv_heads * head_dim * 4;
    }
    sum.slack_bytes = allocated - sum.payload_bytes - sum.index_bytes - sum.evidence_bytes;
    return sum;
  }

  // Stored bits for each key or value element kept: codes, scales and dense rows; positions apart. Zero when empty.
  double bits_per_element() const noexcept {
    long long payload = 0, rows = 0;
    for (const Head& store : heads_) {
      payload += store.bytes().payload;
      rows += store.num_rows();
    }
    return rows == 0 ? 0 : 8.0 * static_cast<double>(payload) / (2.0 * head_dim * static_cast<double>(rows));
  }

 private:
  using Head = HeadStore<Codec>;
  using Near = typename Codec::near_type;

  struct Layer {
    explicit Layer(std::pmr::memory_resource* memory) : window_queries(memory), window_positions(memory) {}
    Buffer<float> window_queries;  // [window, num_q_heads, head_dim]
    Buffer<int> window_positions;
    AttendOptions attend;
    int end = 0;             // one past the last position
    long long appended = 0;  // rows a head was given
  };

  Head& head(int layer, int kv_head) { return heads_[static_cast<std::size_t>(layer * geometry_.num_kv_heads + kv_head)]; }
  const Head& head(int layer, int kv_head) const {
    return heads_[static_cast<std::size_t>(layer * geometry_.num_kv_heads + kv_head)];
  }

  EvidenceSet needed() const {
    EvidenceSet set = Budget::needs;
    if constexpr (requires { selector_.active_needs(); }) {
      set = set | selector_.active_needs();
    } else {
      set = set | Selector::needs;
    }
    return set;
  }
  int window_size() const {
    if constexpr (requires { selector_.window; }) {
      return std::max(1, selector_.window);
    } else {
      return 64;
    }
  }
  int new_sink_rows(const Head& store, int n) const {
    if (store.body_rows() > 0 || store.recent_rows() > 0) return 0;
    return std::clamp(options_.sink_rows - store.sink_rows(), 0, n);
  }

  void take(KvCache&& other) {
    budget_ = other.budget_;
    selector_ = other.selector_;
    codec_ = other.codec_;
    geometry_ = other.geometry_;
    options_ = other.options_;
    memory_ = other.memory_;
    std::destroy_at(&heads_);
    std::construct_at(&heads_, std::move(other.heads_));
    std::destroy_at(&layers_);
    std::construct_at(&layers_, std::move(other.layers_));
    for (Head& store : heads_) store.set_codec(&codec_);
  }

  // -- checks -----------------------------------------------------------------------------------------------------------

  Status check_layer(int layer) const {
    if (heads_.empty()) return error(Errc::bad_shape, "the cache has no shape yet; call init() first");
    if (layer < 0 || layer >= geometry_.num_layers) {
      return error(Errc::bad_shape, "layer is {}; it must be between 0 and {}", layer, geometry_.num_layers - 1);
    }
    return success();
  }
  static Status check_positions(std::span<const int> positions, int end) {
    for (const int position : positions) {
      if (position < end || position == std::numeric_limits<int>::max()) {
        return error(Errc::bad_position, "position {} goes back; it must be at least {} and below 2147483647", position, end);
      }
      end = position + 1;
    }
    return success();
  }
  template <class T>
  Status check_rows(const T* rows, std::size_t n, double max_norm, const char* bad_element, const char* bad_norm) const {
    if (rows == nullptr) return error(Errc::bad_shape, "the pointer to the rows is null");
    const std::size_t count = n * static_cast<std::size_t>(geometry_.num_kv_heads);
    constexpr float most = Near::max_element();
    for (std::size_t row = 0; row < count; ++row, rows += head_dim) {
      // In double: the square of a large element leaves fp32.
      double square = 0;
      for (int d = 0; d < head_dim; ++d) {
        const float x = to_float(rows[d]);
        if (!(x <= most && x >= -most))
          return error(Errc::bad_value, bad_element, static_cast<double>(x), static_cast<double>(most));
        square += static_cast<double>(x) * static_cast<double>(x);
      }
      if (!(square <= max_norm * max_norm)) return error(Errc::bad_value, bad_norm, std::sqrt(square), max_norm);
    }
    return success();
  }
  Status check_attend(const float* queries, std::span<const int> positions, const AttendOptions& attend) const {
    if (queries == nullptr && !positions.empty()) return error(Errc::bad_shape, "the pointer to the queries is null");
    if (!std::isfinite(attend.scale))
      return error(Errc::bad_value, "scale is {}; it must be finite", static_cast<double>(attend.scale));
    if (attend.window < 0) return error(Errc::bad_value, "window is {}; it must be zero (none) or more", attend.window);
    if (!(attend.soft_cap >= 0) || !std::isfinite(attend.soft_cap)) {
      return error(Errc::bad_value, "soft_cap is {}; it must be zero (none) or more", static_cast<double>(attend.soft_cap));
    }
    if (!attend.sink_logits.empty() && static_cast<int>(attend.sink_logits.size()) != geometry_.num_q_heads) {
      return error(Errc::bad_shape, "there are {} sink logits; num_q_heads is {}",
                   static_cast<double>(attend.sink_logits.size()), geometry_.num_q_heads);
    }
    for (const float logit : attend.sink_logits) {
      if (!std::isfinite(logit))
        return error(Errc::bad_value, "a sink logit is {}; it must be finite", static_cast<double>(logit));
    }
    const std::size_t count = positions.size() * static_cast<std::size_t>(geometry_.num_q_heads) * head_dim;
    for (std::size_t i = 0; i < count; ++i) {
      if (!std::isfinite(queries[i]))
        return error(Errc::bad_value, "a query has the element {}; it must be finite", static_cast<double>(queries[i]));
    }
    for (const int position : positions) {
      if (position < 0) return error(Errc::bad_position, "a query is at position {}; it must be zero or more", position);
    }
    return success();
  }

  // -- compress ---------------------------------------------------------------------------------------------------------

  Status total_rows(Retain retain, std::int64_t rows, std::int64_t floor_rows, std::int64_t& total) const {
    const auto heads = static_cast<double>(heads_.size());
    if (rows == 0) return error(Errc::bad_budget, "there are {} rows; nothing can be compressed", 0);
    switch (retain.unit) {
      case Retain::Unit::rows:
        if (!(retain.amount >= 1))
          return error(Errc::bad_budget, "a budget of {} rows a head; it must be at least 1", retain.amount);
        if (retain.amount * heads > static_cast<double>(rows)) {
          return error(Errc::bad_budget, "a budget of {} rows a head is above the {} there are", retain.amount,
                       static_cast<double>(rows) / heads);
        }
        total = static_cast<std::int64_t>(retain.amount * heads);
        break;
      case Retain::Unit::ratio:
        if (!(retain.amount > 0 && retain.amount <= 1)) {
          return error(Errc::bad_budget, "a budget of {} of the rows; it must be above 0 and at most 1", retain.amount);
        }
        total = std::llround(retain.amount * static_cast<double>(rows));
        break;
      case Retain::Unit::bytes:
        if (!(retain.amount >= 1)) return error(Errc::bad_budget, "a budget of {} bytes; it must be at least 1", retain.amount);
        if (retain.amount > static_cast<double>(memory().total())) {
          return error(Errc::bad_budget, "a budget of {} bytes is above the {} there are", retain.amount,
                       static_cast<double>(memory().total()));
        }
        total = rows;
        return success();
    }
    if (total < floor_rows) {
      return error(Errc::bad_budget, "a budget of {} rows in all is below the {} sink and recent rows that are never dropped",
                   static_cast<double>(total), static_cast<double>(floor_rows));
    }
    return success();
  }

  // Scores of all heads, one after another; protected rows are above all.
  Status score(std::span<const int> seen, std::int64_t rows, std::vector<float>& scores) const {
    const EvidenceSet needs = needed();
    scores.assign(static_cast<std::size_t>(rows), 0.f);
    const int longest = *std::max_element(seen.begin(), seen.end());
    const auto elements = static_cast<std::size_t>(longest) * head_dim;
    std::vector<float> keys(needs.has(Evidence::keys) ? elements : 0);
    std::vector<float> values(needs.has(Evidence::values) ? elements : 0);
    std::vector<float> scratch(4 * static_cast<std::size_t>(longest + head_dim));
    float* at = scores.data();
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      const auto n = static_cast<std::size_t>(seen[h]);
      const Head& store = heads_[h];
      const auto l = h / static_cast<std::size_t>(geometry_.num_kv_heads);
      HeadEvidence evidence;
      evidence.layer = static_cast<int>(l);
      evidence.kv_head = static_cast<int>(h % static_cast<std::size_t>(geometry_.num_kv_heads));
      evidence.head_dim = head_dim;
      evidence.group_size = geometry_.group_size();
      evidence.positions = store.positions();
      store.decode(keys.empty() ? nullptr : keys.data(), values.empty() ? nullptr : values.data());
      if (!keys.empty()) evidence.keys = {keys.data(), n * head_dim};
      if (!values.empty()) evidence.values = {values.data(), n * head_dim};
      const Layer& layer = layers_[l];
      evidence.window_stride = static_cast<std::int64_t>(geometry_.num_q_heads) * head_dim;
      evidence.window_queries =
          layer.window_queries.data() == nullptr
              ? nullptr
              : layer.window_queries.data() + static_cast<std::int64_t>(evidence.kv_head) * evidence.group_size * head_dim;
      evidence.window_positions = {layer.window_positions.data(), layer.window_positions.size()};
      evidence.attend = layer.attend;
      evidence.scratch = scratch;
      KVT_TRY(selector_.score(evidence, std::span<float>(at, n)));
      const auto sinks = static_cast<std::size_t>(store.sink_rows());
      const auto recents = static_cast<std::size_t>(std::min(options_.recent_rows, store.num_rows() - store.sink_rows()));
      for (std::size_t row = 0; row < n; ++row) {
        if (row < sinks || row >= n - recents) at[row] = std::numeric_limits<float>::infinity();
        if (std::isnan(at[row]))
          return error(Errc::bad_policy, "the token selector gave row {} the score NaN", static_cast<double>(row));
      }
      at += n;
    }
    return success();
  }

  // The largest number of rows whose allocation takes at most `bytes`.
  Status fit_bytes(double bytes, std::int64_t rows, std::int64_t floor_rows, BudgetRequest& want, std::span<int> keep) const {
    long long fixed = static_cast<long long>(heads_.capacity() * sizeof(Head) + layers_.capacity() * sizeof(Layer));
    const auto cost = [&](std::int64_t total, long long& sum) -> Status {
      want.total = total;
      KVT_TRY(budget_.allocate(want, keep));
      KVT_TRY(check_allocation(want, keep));
      sum = fixed;
      for (std::size_t h = 0; h < heads_.size(); ++h) {
        // After truncate() some of the newest rows may be encoded already.
        const int dense = heads_[h].sink_rows() + std::min(options_.recent_rows, heads_[h].recent_rows());
        sum += Head::bytes_bound(codec_, dense, keep[h] - dense, options_.block_rows);
      }
      return success();
    };
    long long sum = 0;
    KVT_TRY(cost(floor_rows, sum));
    if (static_cast<double>(sum) > bytes) {
      return error(Errc::bad_budget, "a budget of {} bytes is below the {} that sink rows, recent rows and tables take", bytes,
                   static_cast<double>(sum));
    }
    std::int64_t fits = floor_rows, over = rows + 1;
    while (over - fits > 1) {
      const std::int64_t middle = fits + (over - fits) / 2;
      KVT_TRY(cost(middle, sum));
      (static_cast<double>(sum) <= bytes ? fits : over) = middle;
    }
    want.total = fits;
    return success();
  }

  static Status check_allocation(const BudgetRequest& want, std::span<const int> keep) {
    std::int64_t sum = 0;
    for (std::size_t h = 0; h < keep.size(); ++h) {
      if (keep[h] < want.floor[h] || keep[h] > want.seen[h]) {
        return error(Errc::bad_policy, "the budget allocator gave a head {} rows; at most {} can be kept", keep[h],
                     want.seen[h]);
      }
      sum += keep[h];
    }
    if (sum != want.total) {
      return error(Errc::bad_policy, "the budget allocator gave {} rows in all; {} were asked for", static_cast<double>(sum),
                   static_cast<double>(want.total));
    }
    return success();
  }

  // Keeps the marked rows of every head; an empty mark leaves a head alone. All or nothing.
  Status rebuild(const std::vector<std::vector<unsigned char>>& marks, bool seal) {
    std::vector<Head> next;
    next.reserve(heads_.size());
    for (std::size_t h = 0; h < heads_.size(); ++h) next.emplace_back(&codec_, memory_);
    bool enough = true;
    try {
      for (std::size_t h = 0; h < heads_.size() && enough; ++h) {
        if (!marks[h].empty()) {
          enough = heads_[h].rebuild(marks[h], seal, options_.recent_rows, options_.block_rows, next[h]);
        }
      }
    } catch (const std::bad_alloc&) {
      enough = false;
    }
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      if (marks[h].empty()) continue;
      if (enough) {
        heads_[h].commit(std::move(next[h]));
      } else {
        heads_[h].discard(std::move(next[h]));
      }
    }
    return enough ? success() : error(Errc::out_of_memory, "out of memory while rebuilding a cache");
  }

  // -- attend -----------------------------------------------------------------------------------------------------------

  // A run of rows in one zone.
  struct Segment {
    bool near;
    const std::byte *keys, *values;
    int rows, first_row;
  };
  static int pieces(int rows) { return (rows + max_block_rows_limit - 1) / max_block_rows_limit; }
  static int num_segments(const Head& store) {
    return pieces(store.sink_rows()) + static_cast<int>(store.blocks().size()) + pieces(store.recent_rows());
  }
  // Segments are asked for in order, so first_row is found by whoever walks them.
  static Segment segment(const Head& store, int index) {
    const int sinks = pieces(store.sink_rows());
    const int blocks = static_cast<int>(store.blocks().size());
    if (index >= sinks && index < sinks + blocks) {
      const BlockRef& block = store.blocks()[static_cast<std::size_t>(index - sinks)];
      return {false, block.keys(), block.values(), block.rows, 0};
    }
    const bool sink = index < sinks;
    const int piece = sink ? index : index - sinks - blocks;
    const int first = piece * max_block_rows_limit;
    const int rows = std::min(max_block_rows_limit, (sink ? store.sink_rows() : store.recent_rows()) - first);
    const std::int64_t at = static_cast<std::int64_t>(first) * Near::row_bytes;
    return {true, (sink ? store.sink_keys() : store.recent_keys()) + at,
            (sink ? store.sink_values() : store.recent_values()) + at, rows, 0};
  }

  // One tile of query vectors over a range of segments. Vector v of a KV head is query head v % group of token v / group.
  static void run_task(const void* self, AttendPlan& plan, const AttendPlan::Task& task) {
    const KvCache& cache = *static_cast<const KvCache*>(self);
    const Head& store = cache.head(plan.layer_, task.kv_head);
    const Geometry& shape = cache.geometry_;
    const AttendOptions& options = plan.options_;
    const int group = shape.group_size();
    const int first = task.tile * tile_vectors;
    const int m = std::min(tile_vectors, static_cast<int>(plan.positions_.size()) * group - first);
    const float scale = options.scale != 0 ? options.scale : 1.f / std::sqrt(static_cast<float>(head_dim));
    const auto place = [&](int j) {  // of vector j in [n, num_q_heads, head_dim]
      const int v = first + j;
      return (static_cast<std::int64_t>(v / group) * shape.num_q_heads + task.kv_head * group + v % group) * head_dim;
    };
    alignas(64) float near_query[tile_vectors * head_dim], body_query[tile_vectors * head_dim];
    alignas(64) float near_sum[tile_vectors * head_dim], body_sum[tile_vectors * head_dim];
    alignas(64) float logits[tile_vectors * max_block_rows_limit];
    SoftmaxState state[tile_vectors];
    int position[tile_vectors];
    const Serial lanes;
    const Near near{};
    const bool body = !store.blocks().empty();
    for (int j = 0; j < m; ++j) {
      near.prepare(lanes, plan.queries_ + place(j), scale, near_query + j * head_dim);
      if (body) cache.codec_.keys.prepare(lanes, plan.queries_ + place(j), scale, body_query + j * head_dim);
      position[j] = plan.positions_[static_cast<std::size_t>((first + j) / group)];
    }
    for (int i = 0; i < m * head_dim; ++i) near_sum[i] = body_sum[i] = 0;

    const auto visit = [&](const Segment& s, const auto& key_codec, const auto& value_codec, const float* query, float* sum) {
      const int* const where = store.positions().data() + s.first_row;
      const int n = s.rows;
      int from[tile_vectors], to[tile_vectors];
      bool any = false;
      for (int j = 0; j < m; ++j) {
        to[j] = where[n - 1] <= position[j] ? n : static_cast<int>(std::upper_bound(where, where + n, position[j]) - where);
        from[j] = options.window == 0 || where[0] > position[j] - options.window
                      ? 0
                      : static_cast<int>(std::upper_bound(where, where + n, position[j] - options.window) - where);
        any = any || from[j] < to[j];
      }
      if (!any) return;
      key_codec.logits(lanes, s.keys, n, query, m, logits, n);
      for (int j = 0; j < m; ++j) {
        float* const x = logits + j * n;
        if (from[j] >= to[j]) {
          for (int r = 0; r < n; ++r) x[r] = 0;
          continue;
        }
        if (options.soft_cap > 0) {
          for (int r = from[j]; r < to[j]; ++r) x[r] = options.soft_cap * std::tanh(x[r] / options.soft_cap);
        }
        float largest = x[from[j]];
        for (int r = from[j] + 1; r < to[j]; ++r) largest = x[r] > largest ? x[r] : largest;
        const float factor = state[j].raise(largest);
        if (factor != 1.f) {
          for (int d = 0; d < head_dim; ++d) near_sum[j * head_dim + d] *= factor;
          if (body) {
            for (int d = 0; d < head_dim; ++d) body_sum[j * head_dim + d] *= factor;
          }
        }
        const float top = state[j].max;
        for (int r = from[j]; r < to[j]; ++r) x[r] = exp_nonpositive(x[r] - top);
        float total = 0;
        for (int r = from[j]; r < to[j]; ++r) total += x[r];
        state[j].sum += total;
        for (int r = 0; r < from[j]; ++r) x[r] = 0;
        for (int r = to[j]; r < n; ++r) x[r] = 0;
      }
      value_codec.accumulate(lanes, s.values, n, logits, m, n, sum);
    };
    int row = 0;
    for (int i = 0; i < task.last_segment; ++i) {
      Segment s = segment(store, i);
      s.first_row = row;
      row += s.rows;
      if (i < task.first_segment) continue;
      if (s.near) {
        visit(s, near, near, near_query, near_sum);
      } else {
        visit(s, cache.codec_.keys, cache.codec_.values, body_query, body_sum);
      }
    }
    if (body) {
      for (int j = 0; j < m; ++j) cache.codec_.values.finish(lanes, body_sum + j * head_dim, near_sum + j * head_dim);
    }

    const auto write = [&](int j, SoftmaxState s, const float* sum) {
      const int q_head = task.kv_head * group + (first + j) % group;
      float factor = s.empty() ? 0.f : 1.f;
      if (!options.sink_logits.empty() && !s.empty()) {
        const float logit = options.sink_logits[static_cast<std::size_t>(q_head)];
        factor = s.raise(logit);
        s.sum += exp_nonpositive(logit - s.max);
      }
      const float inverse = s.empty() ? 0.f : factor / s.sum;
      float* const out = plan.out_ + place(j);
      for (int d = 0; d < head_dim; ++d) out[d] = sum[d] * inverse;
    };
    if (task.num_slots == 0) {
      for (int j = 0; j < m; ++j) write(j, state[j], near_sum + j * head_dim);
      return;
    }
    const auto slot = [](int s) { return static_cast<std::size_t>(s) * tile_vectors; };
    for (int j = 0; j < m; ++j) plan.states_[slot(task.slot) + static_cast<std::size_t>(j)] = state[j];
    float* const partial = plan.partials_.data() + slot(task.slot) * head_dim;
    for (int i = 0; i < m * head_dim; ++i) partial[i] = near_sum[i];
    std::atomic_ref<int> pending(plan.pending_[static_cast<std::size_t>(task.group)]);
    if (pending.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    // The last part to finish joins them all, always in the order of the slots.
    for (int j = 0; j < m; ++j) {
      SoftmaxState joined;
      float* const sum = near_sum + j * head_dim;
      for (int d = 0; d < head_dim; ++d) sum[d] = 0;
      for (int s = task.first_slot; s < task.first_slot + task.num_slots; ++s) {
        const auto factors = joined.merge(plan.states_[slot(s) + static_cast<std::size_t>(j)]);
        const float* const part = plan.partials_.data() + (slot(s) + static_cast<std::size_t>(j)) * head_dim;
        for (int d = 0; d < head_dim; ++d) sum[d] = sum[d] * factors.own + part[d] * factors.other;
      }
      write(j, joined, sum);
    }
  }

  [[no_unique_address]] Budget budget_;
  [[no_unique_address]] Selector selector_;
  Codec codec_;
  Geometry geometry_;
  CacheOptions options_;
  std::pmr::memory_resource* memory_ = nullptr;
  std::pmr::vector<Head> heads_;  // [num_layers, num_kv_heads]
  std::pmr::vector<Layer> layers_;
};

}  // namespace kvt::inline v0
