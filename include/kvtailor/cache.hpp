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
// Shapes:  keys, values [n, num_kv_heads, head_dim]; queries, out [n, num_q_heads, head_dim]; positions [n].
// Failure: every call that returns a Status other than success leaves the cache as it was.
// Threads: calls that change a cache are for one thread, but for encode(), which may be called for different heads at the same
//          time; any number may attend between them.
// Memory:  everything a cache keeps comes from CacheOptions::memory. A cut takes little more than is there before it: rows that
//          are encoded by it and a block. A cache may be moved, but not while a plan is in use.
#pragma once

#include <algorithm>
#include <limits>
#include <memory_resource>
#include <mutex>
#include <numeric>
#include <span>
#include <vector>

#include "kvtailor/attend/row_attention.hpp"
#include "kvtailor/budget/request.hpp"
#include "kvtailor/core/check.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/store/cut.hpp"
#include "kvtailor/store/head_cut.hpp"
#include "kvtailor/store/layer_evidence.hpp"

namespace kvt::inline v0 {

// Provided: the evidence this engine supplies. Without observe() say cache_evidence: what cannot work then does not compile.
template <class Budget, class Selector, class Codec, EvidenceSet Provided = full_evidence>
class KvCache {
  static_assert(BudgetAllocator<Budget>, "the first parameter of KvCache must be a BudgetAllocator (see core/concepts.hpp)");
  static_assert(TokenSelector<Selector>, "the second parameter of KvCache must be a TokenSelector (see core/concepts.hpp)");
  static constexpr EvidenceSet missing = (Budget::needs | Selector::needs).without(Provided);
  static_assert(!missing.has(Evidence::window_queries),
                "this composition needs the evidence window_queries, which the engine does not provide: call observe() and "
                "compose with full_evidence, or choose a selector that needs no queries (SinkRecent, KeyDiff)");
  static_assert(!missing.has(Evidence::query_moments),
                "this composition needs the evidence query_moments, which the engine does not provide: call observe()");
  static_assert(!missing.has(Evidence::attention),
                "this composition needs the evidence attention, which the engine does not provide: call observe()");
  static_assert(!missing.has(Evidence::reconstruction),
                "this composition needs the evidence reconstruction, which the engine does not provide: let it repeat the "
                "context over the cache, see select/reconstruction.hpp");
  static_assert(
      !missing.has(Evidence::layer_similarity),
      "this composition needs the evidence layer_similarity, which the engine does not provide: call observe_hidden()");
  static_assert(!missing.has(Evidence::rope), "this composition needs the evidence rope, which is not provided");
  static_assert(!missing.has(Evidence::output_projection),
                "this composition needs the evidence output_projection, which is not provided");
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
  KvCache(KvCache&& other) noexcept { take(std::move(other)); }
  KvCache& operator=(KvCache&& other) noexcept {
    if (this != &other) take(std::move(other));
    return *this;
  }

  // Gives the cache its shape, or a new one; it is empty afterwards. Heads may have codecs of their own, which differ in their
  // fields (see OneOf): head_codecs [num_layers, num_kv_heads], or empty for the one codec of the cache.
  Status init(const Geometry& geometry, const CacheOptions& options = {}, std::span<const Codec> head_codecs = {}) noexcept {
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
    if (!head_codecs.empty() && head_codecs.size() != static_cast<std::size_t>(geometry.num_heads())) {
      return error(Errc::bad_shape, "there are codecs for {} heads; the cache has {}", static_cast<double>(head_codecs.size()),
                   geometry.num_heads());
    }
    KVT_TRY(detail::check_model(geometry, options, needs()));
    KVT_TRY(check_policy(selector_, geometry));
    KVT_TRY(check_policy(budget_, geometry));
    KVT_TRY(codec_.validate());
    for (const Codec& each : head_codecs) KVT_TRY(each.validate());
    return guarded([&] {
      auto* const memory = options.memory != nullptr ? options.memory : std::pmr::get_default_resource();
      std::pmr::vector<Head> heads(memory);
      heads.reserve(static_cast<std::size_t>(geometry.num_heads()));
      for (int h = 0; h < geometry.num_heads(); ++h) {
        heads.emplace_back(head_codecs.empty() ? codec_ : head_codecs[static_cast<std::size_t>(h)], memory);
      }
      std::pmr::vector<Layer> layers(memory);
      layers.reserve(static_cast<std::size_t>(geometry.num_layers));
      for (int l = 0; l < geometry.num_layers; ++l) layers.emplace_back(memory);
      replace(heads_, std::move(heads));
      replace(layers_, std::move(layers));
      geometry_ = geometry;
      options_ = options;
      options_.memory = memory;
      return success();
    });
  }

  // Takes other policies from here on: after prefill, say, for those that rows are chosen by while decoding. What was observed
  // serves them as far as they look at it; what only they look at is collected from now on.
  Status set_policies(Budget budget, Selector selector) noexcept {
    KVT_TRY(check_layer(0));
    const EvidenceSet wanted = needs_of(budget) | needs_of(selector);
    KVT_TRY(detail::check_model(geometry_, options_, wanted));
    KVT_TRY(check_policy(selector, geometry_));
    KVT_TRY(check_policy(budget, geometry_));
    return guarded([&] {
      const bool keeps = wanted.has(Evidence::window_queries);
      const auto window = keeps ? static_cast<std::size_t>(window_of(selector)) : 0;
      std::vector<QueryWindow> windows;
      for (const Layer& layer : layers_) windows.push_back(layer.evidence.queries.resized(options_.memory, window));
      for (std::size_t l = 0; l < layers_.size(); ++l) {
        LayerEvidence& evidence = layers_[l].evidence;
        evidence.queries = std::move(windows[l]);
        if (!wanted.has(Evidence::query_moments)) evidence.statistics.release();
        if (!wanted.has(Evidence::attention)) evidence.attention.clear();
      }
      budget_ = std::move(budget);
      selector_ = std::move(selector);
      return success();
    });
  }

  const Geometry& geometry() const noexcept { return geometry_; }
  const CacheOptions& options() const noexcept { return options_; }  // the memory resource as it was resolved
  const Codec& codec(int layer, int kv_head) const noexcept { return head(layer, kv_head).codec(); }
  int num_rows(int layer, int kv_head) const noexcept { return head(layer, kv_head).num_rows(); }
  // Positions of the rows a head holds, increasing.
  std::span<const int> positions(int layer, int kv_head) const noexcept { return head(layer, kv_head).positions(); }
  // The rows of a head as the codecs give them back, [num_rows, head_dim]; either may be null.
  void decode(int layer, int kv_head, float* keys, float* values) const noexcept { head(layer, kv_head).decode(keys, values); }
  // They as they are stored.
  const HeadStore<Codec>& store(int layer, int kv_head) const noexcept { return head(layer, kv_head); }
  // Rows appended to a layer and not truncated, those dropped too.
  long long appended(int layer) const noexcept { return layers_[static_cast<std::size_t>(layer)].appended(); }
  // One past the last position appended to a layer.
  int end_position(int layer) const noexcept { return layers_[static_cast<std::size_t>(layer)].end; }

  // What the policies need as their fields are.
  EvidenceSet needs() const noexcept { return needs_of(budget_) | needs_of(selector_); }
  // Whether observe() has anything to do.
  bool wants_queries() const noexcept { return (needs().bits & query_evidence.bits) != 0; }

  // Encodes the oldest rows of a head if its dense zone is over-full, as append() would do first. Threads may do so for
  // different heads at once, whatever the memory resource, as long as nothing else happens to the cache.
  Status encode(int layer, int kv_head) noexcept {
    KVT_TRY(check_layer(layer));
    if (kv_head < 0 || kv_head >= geometry_.num_kv_heads) {
      return error(Errc::bad_shape, "KV head {}; the cache has {}", kv_head, geometry_.num_kv_heads);
    }
    return guarded([&] {
      const std::vector<int> oldest = due_rows(layer, kv_head);
      if (oldest.empty()) return success();
      LockedResource memory(options_.memory, lock_);
      BlockList fresh(&memory);
      Head& store = head(layer, kv_head);
      store.encode(oldest, options_.block_rows, fresh);
      const std::lock_guard held(lock_);
      store.reserve(0, 0, static_cast<int>(fresh.blocks().size()), static_cast<int>(oldest.size()));
      store.adopt_oldest(fresh);
      return success();
    });
  }

  // Adds n rows. Positions are not negative and increase; a row that is not finite or too large to be stored is refused.
  // Encodes the oldest rows first if the dense zone is over-full: rows of one append stay dense until the next.
  template <class T>
  Status append(int layer, const T* keys, const T* values, std::span<const int> positions) noexcept {
    KVT_TRY(check_layer(layer));
    Layer& state = layers_[static_cast<std::size_t>(layer)];
    KVT_TRY(detail::check_positions(positions, state.end));
    if (positions.empty()) return success();
    const std::size_t heads = static_cast<std::size_t>(geometry_.num_kv_heads), rows = positions.size() * heads;
    double key_norm = std::numeric_limits<double>::infinity(), value_norm = key_norm;
    for (int h = 0; h < geometry_.num_kv_heads; ++h) {
      key_norm = std::min<double>(key_norm, codec(layer, h).keys.max_row_norm());
      value_norm = std::min<double>(value_norm, codec(layer, h).values.max_row_norm());
    }
    KVT_TRY(detail::check_rows<head_dim>(keys, rows, Near::max_element(), key_norm,
                                         {"a key has the element {}; it must be finite and at most {} in size",
                                          "a key has the norm {}; the codec of keys takes at most {}"}));
    KVT_TRY(detail::check_rows<head_dim>(values, rows, Near::max_element(), value_norm,
                                         {"a value has the element {}; it must be finite and at most {} in size",
                                          "a value has the norm {}; the codec of values takes at most {}"}));
    return guarded([&] {
      const int n = static_cast<int>(positions.size());
      const auto new_sinks = [&](const Head& store) {
        const bool begun = store.body_rows() > 0 || store.recent().rows() > 0;
        return begun ? 0 : std::clamp(options_.sink_rows - store.sink().rows(), 0, n);
      };
      std::vector<BlockList> fresh;
      for (std::size_t h = 0; h < heads; ++h) {
        Head& store = head(layer, static_cast<int>(h));
        const std::vector<int> oldest = due_rows(layer, static_cast<int>(h));
        store.encode(oldest, options_.block_rows, fresh.emplace_back(options_.memory));
        const int sinks = new_sinks(store);
        store.reserve(sinks, n - sinks, static_cast<int>(fresh.back().blocks().size()), static_cast<int>(oldest.size()));
      }
      state.reserve_runs(positions);
      // Nothing fails from here on.
      for (std::size_t h = 0; h < heads; ++h) {
        Head& store = head(layer, static_cast<int>(h));
        const int sinks = new_sinks(store);
        store.adopt_oldest(fresh[h]);
        for (int i = 0; i < n; ++i) {
          float key[head_dim], value[head_dim];
          const auto at = (static_cast<std::size_t>(i) * heads + h) * head_dim;
          for (std::size_t d = 0; d < head_dim; ++d) {
            key[d] = to_float(keys[at + d]);
            value[d] = to_float(values[at + d]);
          }
          store.push_row(i < sinks, key, value, positions[static_cast<std::size_t>(i)]);
        }
      }
      state.add(positions);
      return success();
    });
  }

  // Shows the cache the queries (post-RoPE) that come with the rows just appended. Costs nothing if no policy needs them, and
  // as much as the logits of attention if one needs the attention of rows.
  Status observe(int layer, const float* queries, std::span<const int> positions, const AttendOptions& attend = {}) noexcept {
    KVT_TRY(check_layer(layer));
    KVT_TRY(detail::check_attend(geometry_, queries, positions, attend));
    if (!wants_queries() || positions.empty()) return success();
    const EvidenceSet wanted = needs();
    LayerEvidence& evidence = layers_[static_cast<std::size_t>(layer)].evidence;
    KVT_TRY(detail::check_positions(positions, evidence.end));
    return guarded([&] {
      const auto heads = static_cast<std::size_t>(geometry_.num_kv_heads);
      std::vector<std::vector<RowAttention>> given(wanted.has(Evidence::attention) ? heads : 0);
      for (std::size_t h = 0; h < given.size(); ++h) {
        const Head& store = head(layer, static_cast<int>(h));
        evidence.attention_of(h, static_cast<std::size_t>(store.num_rows()), given[h]);
        add_row_attention(store, geometry_, static_cast<int>(h), queries, positions, attend, given[h]);
        if (h == evidence.attention.size()) evidence.attention.emplace_back(options_.memory);
        evidence.attention[h].reserve(given[h].size(), true);
      }
      std::vector<float> turned;
      if (wanted.has(Evidence::query_moments)) {
        turn_back(layer, queries, positions, turned);
        evidence.statistics.reserve(geometry_.num_q_heads, head_dim);
      }
      const auto width = static_cast<std::size_t>(geometry_.num_q_heads) * head_dim;
      if (wanted.has(Evidence::window_queries)) {
        evidence.queries.push(queries, positions, width, static_cast<std::size_t>(window_of(selector_)));
      }
      // Nothing fails from here on.
      for (std::size_t h = 0; h < given.size(); ++h) {
        evidence.attention[h].resize(0);
        evidence.attention[h].push(given[h].data(), given[h].size());
      }
      if (!turned.empty()) {
        evidence.statistics.add(turned.data(), static_cast<long long>(turned.size() / width), geometry_.num_q_heads, head_dim);
      }
      evidence.attend = attend;
      evidence.attend.sink_logits = {};
      evidence.end = positions.back() + 1;
      return success();
    });
  }

  // Shows the cache the hidden states [n, width] before and after a layer's attention is added. Costs nothing if no policy
  // compares them.
  Status observe_hidden(int layer, const float* before, const float* after, int n, int width) noexcept {
    KVT_TRY(check_layer(layer));
    if (n < 0 || width < 1) return error(Errc::bad_shape, "there are {} hidden states of width {}", n, width);
    if (n > 0 && (before == nullptr || after == nullptr)) return error(Errc::bad_shape, "a pointer to hidden states is null");
    if (!needs().has(Evidence::layer_similarity)) return success();
    double sum = 0;
    for (int i = 0; i < n; ++i, before += width, after += width) {
      double xy = 0, xx = 0, yy = 0;
      for (int d = 0; d < width; ++d) {
        const auto x = static_cast<double>(before[d]), y = static_cast<double>(after[d]);
        xy += x * y;
        xx += x * x;
        yy += y * y;
      }
      if (!std::isfinite(xx + yy)) return error(Errc::bad_value, "the hidden state {} is not finite", i);
      sum += xx > 0 && yy > 0 ? xy / std::sqrt(xx * yy) : 0;
    }
    LayerEvidence& evidence = layers_[static_cast<std::size_t>(layer)].evidence;
    evidence.similarity += sum;
    evidence.compared += n;
    return success();
  }

  // Forgets all that was observed, so that what comes next counts alone: queries that repeat a text, say, whose rows are
  // truncated before the cut.
  void forget() noexcept {
    for (Layer& layer : layers_) layer.evidence.release();
  }

  // Prepares attention of n queries over what is stored: each sees the rows whose position is not after its own, and inside the
  // window if there is one. All pointers must live until the tasks have run; the cache must not change. No visible row gives
  // zeros.
  Status plan(int layer, const float* queries, std::span<const int> positions, const AttendOptions& attend, float* out,
              AttendPlan& plan) const noexcept {
    plan.clear();
    return add_to_plan(layer, queries, positions, attend, out, plan);
  }
  // The same beside what the plan holds already, of this cache or of others; see plan_batch.
  Status add_to_plan(int layer, const float* queries, std::span<const int> positions, const AttendOptions& attend, float* out,
                     AttendPlan& plan) const noexcept {
    KVT_TRY(check_layer(layer));
    KVT_TRY(detail::check_attend(geometry_, queries, positions, attend));
    if (out == nullptr && !positions.empty()) return error(Errc::bad_shape, "the pointer to the output is null");
    const std::size_t tasks = plan.tasks_.size(), pending = plan.pending_.size(), work = plan.work_.size();
    const std::size_t states = plan.num_states_, partials = plan.num_partials_;
    const Status status = guarded([&] {
      plan.work_.push_back({&KvCache::run_task, this, layer, queries, positions, attend, out});
      const int vectors = static_cast<int>(positions.size()) * geometry_.group_size();
      for (int h = 0; h < geometry_.num_kv_heads; ++h) {
        Attention<Codec>::add_tasks(head(layer, h), static_cast<int>(work), h, vectors, plan);
      }
      return success();
    });
    if (!status.ok()) {
      plan.tasks_.resize(tasks);
      plan.pending_.resize(pending);
      plan.work_.resize(work);
      plan.num_states_ = states;
      plan.num_partials_ = partials;
    }
    return status;
  }

  // The same at once, on this thread. The workspace is on the stack, or from the default memory resource if it is large.
  Status attend(int layer, const float* queries, std::span<const int> positions, const AttendOptions& options,
                float* out) const noexcept {
    alignas(storage_alignment) std::byte space[16384];
    std::pmr::monotonic_buffer_resource arena(space, sizeof space);
    AttendPlan work(&arena);
    KVT_TRY(plan(layer, queries, positions, options, out, work));
    for (int task = 0; task < work.num_tasks(); ++task) work.run(task);
    return success();
  }

  // Scores every row, shares out the budget, drops what is over it and encodes all but the newest recent_rows rows.
  // Rows that are encoded already keep their bytes. A budget of rows or a ratio is met exactly; bytes are not exceeded, but
  // where memory to move to could not be had: what is left over is slack until the next cut.
  // Observed queries are used up: they take more memory than a tailored cache, and the next cut wants newer ones. The
  // attention that rows were given stays with those that stay.
  Status compress(Retain retain) noexcept {
    KVT_TRY(check_layer(0));
    return guarded([&] {
      const std::size_t heads = heads_.size();
      std::vector<int> seen(heads), floor(heads), keep(heads);
      std::int64_t rows = 0, floor_rows = 0;
      for (std::size_t h = 0; h < heads; ++h) {
        const int sinks = heads_[h].sink().rows();
        seen[h] = heads_[h].num_rows();
        floor[h] = sinks + std::min(options_.recent_rows, seen[h] - sinks);
        rows += seen[h];
        floor_rows += floor[h];
      }
      std::vector<float> similarity;
      if (needs_of(budget_).has(Evidence::layer_similarity)) KVT_TRY(read_similarity(similarity));
      std::vector<long long> appended;
      for (const Layer& layer : layers_) appended.push_back(layer.appended());
      BudgetRequest want{0, geometry_.num_layers, geometry_.num_kv_heads, seen, floor, {}, similarity, appended};
      const bool bytes = retain.unit == Retain::Unit::bytes;
      KVT_TRY(resolve_rows(retain, geometry_.num_heads(), rows, floor_rows, memory().total(), want.total));
      std::vector<float> scores;
      if (!bytes && want.total == rows) {
        keep = seen;
      } else {
        const double share = bytes ? retain.amount / static_cast<double>(memory().total())
                                   : static_cast<double>(want.total) / static_cast<double>(rows);
        KVT_TRY(score(share, scores));
        protect(floor, scores);
        want.scores = scores;
        if (bytes) {
          KVT_TRY(fit_bytes(budget_, retain.amount, rows, floor_rows, want, keep,
                            [&](std::span<const int> kept) { return bytes_bound(scores, kept); }));
        }
        KVT_TRY(allocate_rows(budget_, want, keep));
      }
      std::vector<std::vector<unsigned char>> marks(heads);
      std::size_t at = 0;
      for (std::size_t h = 0; h < heads; ++h) {
        const auto n = static_cast<std::size_t>(seen[h]);
        marks[h].assign(n, 1);
        if (keep[h] < seen[h]) cut({scores.data() + at, n}, keep[h], marks[h]);
        at += n;
      }
      HeadCut<Codec> heads_cut = prepare_cut(marks, true, true);
      // Nothing fails from here on.
      for (std::size_t l = 0; l < layers_.size(); ++l) {
        layers_[l].evidence.used_up();
        layers_[l].evidence.keep_rows(&marks[l * static_cast<std::size_t>(geometry_.num_kv_heads)]);
      }
      heads_cut.commit();
      for (std::size_t l = 0; l < layers_.size(); ++l) {
        layers_[l].evidence.shrink();
        layers_[l].cut(oldest_recent(l));
      }
      return success();
    });
  }

  // What the token selector gives each row if the share `share` of all is to be kept, heads one after another: what compress()
  // goes by, but for the rows that always stay, which it puts above all.
  Status scores(double share, std::vector<float>& out) const noexcept {
    KVT_TRY(check_layer(0));
    if (!(share >= 0 && share <= 1)) return error(Errc::bad_budget, "a share of {} is not between 0 and 1", share);
    return guarded([&] {
      std::vector<float> made;
      KVT_TRY(score(share, made));
      out = std::move(made);
      return success();
    });
  }

  // Encodes all but the newest recent_rows rows now, instead of when a whole block has gathered.
  Status flush() noexcept {
    return guarded([&] {
      std::vector<std::vector<unsigned char>> marks(heads_.size());
      for (std::size_t h = 0; h < heads_.size(); ++h) {
        if (heads_[h].recent().rows() > options_.recent_rows)
          marks[h].assign(static_cast<std::size_t>(heads_[h].num_rows()), 1);
      }
      prepare_cut(marks, true).commit();
      return success();
    });
  }

  // Drops all rows at `position` and after it. What is left is bit for bit what it was: append(drafts), truncate and
  // append(x) gives the same cache as append(x). Rows that compress() dropped do not come back.
  Status truncate(int position) noexcept {
    if (position < 0) return error(Errc::bad_position, "truncate to position {}; it must be zero or more", position);
    return guarded([&] {
      std::vector<std::vector<unsigned char>> marks(heads_.size());
      for (std::size_t h = 0; h < heads_.size(); ++h) {
        const auto have = heads_[h].positions();
        const auto end = std::lower_bound(have.begin(), have.end(), position) - have.begin();
        if (static_cast<std::size_t>(end) == have.size()) continue;
        marks[h].assign(have.size(), 0);
        std::fill(marks[h].begin(), marks[h].begin() + end, static_cast<unsigned char>(1));
      }
      prepare_cut(marks, false).commit();
      for (std::size_t l = 0; l < layers_.size(); ++l) {
        layers_[l].truncate(position);
        auto& attention = layers_[l].evidence.attention;
        for (std::size_t h = 0; h < attention.size(); ++h) {
          const auto rows = static_cast<std::size_t>(num_rows(static_cast<int>(l), static_cast<int>(h)));
          attention[h].resize(std::min(attention[h].size(), rows));
        }
      }
      return success();
    });
  }

  // Makes `child` a copy that lives on its own, in the same memory resource.
  Status fork(KvCache& child) const noexcept {
    KVT_TRY(check_layer(0));
    return guarded([&] {
      KvCache twin(budget_, selector_, codec_);
      KVT_TRY(init_alike(twin));
      for (std::size_t h = 0; h < heads_.size(); ++h) heads_[h].copy_to(twin.heads_[h]);
      for (std::size_t l = 0; l < layers_.size(); ++l) layers_[l].copy_to(twin.layers_[l]);
      child = std::move(twin);
      return success();
    });
  }

  // Takes what fill(h, store) puts into the empty store of each head, h = layer * num_kv_heads + kv_head, in place of what
  // there is. appended [num_layers]: rows ever, which count as if the last of them had followed one another up to the layer's
  // last position. No queries are left.
  template <class Fill>
  Status assign(std::span<const long long> appended, Fill&& fill) noexcept {
    KVT_TRY(check_layer(0));
    return guarded([&] {
      KvCache next(budget_, selector_, codec_);
      KVT_TRY(init_alike(next));
      for (std::size_t h = 0; h < heads_.size(); ++h) KVT_TRY(fill(h, next.heads_[h]));
      for (int l = 0; l < geometry_.num_layers; ++l) {
        int end = 0;
        for (int h = 0; h < geometry_.num_kv_heads; ++h) {
          if (const auto have = next.positions(l, h); !have.empty()) end = std::max(end, have.back() + 1);
        }
        next.layers_[static_cast<std::size_t>(l)].resume(appended[static_cast<std::size_t>(l)], end);
      }
      take(std::move(next));
      return success();
    });
  }

  // Empty, as after init(); memory goes back to the resource.
  void clear() noexcept {
    for (Head& store : heads_) store = Head(store.codec(), options_.memory);
    for (Layer& layer : layers_) layer = Layer(options_.memory);
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
    sum.index_bytes += table_bytes();
    allocated += table_bytes();
    for (const Layer& layer : layers_) {
      sum.evidence_bytes += layer.evidence.used_bytes();
      sum.index_bytes += layer.runs.used_bytes();
      allocated += layer.evidence.allocated_bytes() + layer.runs.allocated_bytes();
      sum.dense_fp16_bytes += layer.appended() * geometry_.num_kv_heads * head_dim * 4;
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
    // Positions that follow one another; a text has one run.
    struct Run {
      int first, count;
    };
    LayerEvidence evidence;
    Buffer<Run> runs;       // all that was appended and not truncated, dropped rows too
    int end = 0;            // one past the last position
    int newest = 0;         // rows of the last append
    int chosen_before = 0;  // see HeadEvidence

    explicit Layer(std::pmr::memory_resource* memory) : evidence(memory), runs(memory) {}
    bool decodes() const noexcept { return newest == 1; }
    // After a cut that left all rows from `position` on.
    void cut(int position) noexcept {
      if (!decodes() || chosen_before == 0) chosen_before = position;
    }
    bool continues(int position) const noexcept {
      return !runs.empty() && position == runs[runs.size() - 1].first + runs[runs.size() - 1].count;
    }
    void reserve_runs(std::span<const int> positions) {
      std::size_t fresh = continues(positions.front()) ? 0 : 1;
      for (std::size_t i = 1; i < positions.size(); ++i) fresh += positions[i] != positions[i - 1] + 1;
      runs.reserve(runs.size() + fresh, true);
    }
    void add(std::span<const int> positions) noexcept {
      for (const int position : positions) {
        if (continues(position)) {
          ++runs[runs.size() - 1].count;
        } else {
          const Run run{position, 1};
          runs.push(&run, 1);
        }
      }
      end = positions.back() + 1;
      newest = static_cast<int>(positions.size());
    }
    void truncate(int position) noexcept {
      while (!runs.empty() && runs[runs.size() - 1].first >= position) runs.resize(runs.size() - 1);
      if (!runs.empty()) {
        Run& last = runs[runs.size() - 1];
        last.count = std::min(last.count, position - last.first);
      }
      end = std::min(end, position);
      chosen_before = std::min(chosen_before, position);
      evidence.truncate(position);
    }
    long long appended() const noexcept {
      long long rows = 0;
      for (const Run& run : runs.span()) rows += run.count;
      return rows;
    }
    // In a fresh layer: so many rows up to `last`, one past the last position.
    void resume(long long rows, int last) {
      end = last;
      const int count = static_cast<int>(std::min<long long>(rows, last));
      if (count == 0) return;
      const Run run{last - count, count};
      runs.reserve(1);
      runs.push(&run, 1);
    }
    // Fills a fresh layer.
    void copy_to(Layer& other) const {
      evidence.copy_to(other.evidence);
      other.runs.reserve(runs.size());
      other.runs.push(runs.data(), runs.size());
      other.end = end;
      other.newest = newest;
      other.chosen_before = chosen_before;
    }
  };

  // A memory resource may throw what it likes; whatever it is, memory could not be had.
  template <class F>
  static Status guarded(F&& f) noexcept try {
    return f();
  } catch (...) {
    return error(Errc::out_of_memory, "out of memory; the cache is as it was");
  }
  // A pmr vector does not take over its resource on assignment, so it is built anew in place.
  template <class T>
  static void replace(std::pmr::vector<T>& to, std::pmr::vector<T>&& from) noexcept {
    std::destroy_at(&to);
    std::construct_at(&to, std::move(from));
  }
  void take(KvCache&& other) noexcept {
    budget_ = std::move(other.budget_);
    selector_ = std::move(other.selector_);
    codec_ = std::move(other.codec_);
    geometry_ = other.geometry_;
    options_ = other.options_;
    replace(heads_, std::move(other.heads_));
    replace(layers_, std::move(other.layers_));
  }

  // The recent rows of a head that are encoded before others come: whole blocks of the oldest.
  std::vector<int> due_rows(int layer, int kv_head) const {
    const int over = head(layer, kv_head).recent().rows() - options_.recent_rows, wait = options_.block_rows / 2;
    if (over < options_.block_rows) return {};
    const int turn = wait * (layer * geometry_.num_kv_heads + kv_head) / geometry_.num_heads();
    if (options_.staggered && over < options_.block_rows + wait && (end_position(layer) - turn) % wait != 0) return {};
    std::vector<int> rows(static_cast<std::size_t>(over / options_.block_rows * options_.block_rows));
    std::iota(rows.begin(), rows.end(), 0);
    return rows;
  }

  Head& head(int layer, int kv_head) noexcept {
    return heads_[static_cast<std::size_t>(layer * geometry_.num_kv_heads + kv_head)];
  }
  const Head& head(int layer, int kv_head) const noexcept {
    return heads_[static_cast<std::size_t>(layer * geometry_.num_kv_heads + kv_head)];
  }
  long long table_bytes() const noexcept {
    return static_cast<long long>(heads_.capacity() * sizeof(Head) + layers_.capacity() * sizeof(Layer));
  }

  // An empty cache of the same shape, options and codecs.
  Status init_alike(KvCache& other) const {
    std::vector<Codec> codecs;
    for (const Head& store : heads_) codecs.push_back(store.codec());
    return other.init(geometry_, options_, codecs);
  }

  const Rope& rope(int layer) const noexcept {
    return options_.ropes[options_.ropes.size() == 1 ? 0 : static_cast<std::size_t>(layer)];
  }
  // Queries that are not of sink rows, as before RoPE: [n, num_q_heads, head_dim].
  void turn_back(int layer, const float* queries, std::span<const int> positions, std::vector<float>& turned) const {
    const auto heads = static_cast<std::size_t>(geometry_.num_q_heads);
    RopeInverse inverse(rope(layer));
    turned.reserve(positions.size() * heads * head_dim);
    for (std::size_t q = 0; q < positions.size(); ++q) {
      if (positions[q] < options_.sink_rows) continue;
      const std::size_t at = turned.size();
      turned.insert(turned.end(), queries + q * heads * head_dim, queries + (q + 1) * heads * head_dim);
      inverse.turn_back(turned.data() + at, static_cast<int>(heads), head_dim, positions[q]);
    }
  }
  // The mean cosine of each layer.
  Status read_similarity(std::vector<float>& similarity) const {
    for (const Layer& layer : layers_) {
      if (layer.evidence.compared == 0) {
        return error(Errc::no_evidence, "the budget allocator compares hidden states: call observe_hidden() before compress()");
      }
      similarity.push_back(static_cast<float>(layer.evidence.similarity / static_cast<double>(layer.evidence.compared)));
    }
    return success();
  }
  // Where the recent rows of a layer begin.
  int oldest_recent(std::size_t layer) const noexcept {
    int first = layers_[layer].end;
    for (int h = 0; h < geometry_.num_kv_heads; ++h) {
      const Head& store = head(static_cast<int>(layer), h);
      const auto recent = static_cast<std::size_t>(std::min(options_.recent_rows, store.recent().rows()));
      if (recent > 0) first = std::min(first, store.positions()[store.positions().size() - recent]);
    }
    return first;
  }

  Status check_layer(int layer) const noexcept {
    if (heads_.empty()) return error(Errc::bad_shape, "the cache has no shape yet; call init() first");
    if (layer < 0 || layer >= geometry_.num_layers) {
      return error(Errc::bad_shape, "layer is {}; it must be between 0 and {}", layer, geometry_.num_layers - 1);
    }
    return success();
  }

  // Scores of all heads, one after another.
  Status score(double share, std::vector<float>& scores) const {
    const EvidenceSet needs = needs_of(selector_);
    std::size_t rows = 0, longest = 0;
    for (const Head& store : heads_) {
      rows += static_cast<std::size_t>(store.num_rows());
      longest = std::max(longest, static_cast<std::size_t>(store.num_rows()));
    }
    scores.assign(rows, 0.f);
    std::vector<float> keys(needs.has(Evidence::keys) ? longest * head_dim : 0);
    std::vector<float> values(needs.has(Evidence::values) ? longest * head_dim : 0);
    std::vector<float> scratch(4 * (longest + head_dim)), queries, mean, covariance;
    std::vector<int> query_positions;
    std::vector<RowAttention> attention;
    const auto heads = static_cast<std::size_t>(geometry_.num_kv_heads);
    std::vector<std::span<const int>> positions(heads);
    std::vector<std::span<float>> layer_scores(heads);
    float* at = scores.data();
    for (int l = 0; l < geometry_.num_layers; ++l) {
      const Layer& layer = layers_[static_cast<std::size_t>(l)];
      layer.evidence.queries.unroll(queries, query_positions);
      for (std::size_t kv_head = 0; kv_head < heads; ++kv_head) {
        const Head& store = head(l, static_cast<int>(kv_head));
        const auto n = static_cast<std::size_t>(store.num_rows());
        const int group = geometry_.group_size(), first_query = static_cast<int>(kv_head) * group;
        HeadEvidence evidence;
        evidence.layer = l;
        evidence.kv_head = static_cast<int>(kv_head);
        evidence.head_dim = head_dim;
        evidence.group_size = group;
        evidence.positions = positions[kv_head] = store.positions();
        store.decode(keys.empty() ? nullptr : keys.data(), values.empty() ? nullptr : values.data());
        if (!keys.empty()) evidence.keys = {keys.data(), n * head_dim};
        if (!values.empty()) evidence.values = {values.data(), n * head_dim};
        evidence.window_stride = static_cast<std::int64_t>(geometry_.num_q_heads) * head_dim;
        if (!queries.empty()) evidence.window_queries = queries.data() + first_query * head_dim;
        evidence.window_positions = query_positions;
        evidence.attend = layer.evidence.attend;
        if (needs.has(Evidence::query_moments) && layer.evidence.statistics.count() > 0) {
          layer.evidence.statistics.unpack(first_query, group, head_dim, mean, covariance);
          evidence.moments = {layer.evidence.statistics.count(), mean.data(), covariance.data()};
        }
        if (needs.has(Evidence::attention)) {
          layer.evidence.attention_of(kv_head, n, attention);
          evidence.attention = attention;
        }
        if (!options_.ropes.empty()) evidence.rope = &rope(l);
        if (!options_.output_projections.empty()) {
          evidence.output = options_.output_projections[static_cast<std::size_t>(l)];
          evidence.output.weights += first_query * head_dim;
          evidence.output_stride = evidence.window_stride;
        }
        evidence.end_position = layer.end;
        evidence.share = share;
        evidence.chosen_before = layer.decodes() ? layer.chosen_before : 0;
        evidence.scratch = scratch;
        layer_scores[kv_head] = {at, n};
        KVT_TRY(selector_.score(evidence, layer_scores[kv_head]));
        at += n;
      }
      if constexpr (JoinsHeads<Selector>) KVT_TRY(selector_.join({positions, layer_scores}));
      for (const std::span<const float> own : layer_scores) {
        const auto nan = std::find_if(own.begin(), own.end(), [](float x) { return std::isnan(x); });
        if (nan == own.end()) continue;
        return error(Errc::bad_policy, "the token selector gave row {} of a head of layer {} the score NaN",
                     static_cast<double>(nan - own.begin()), l);
      }
    }
    return success();
  }

  // Rows that always stay are above all others.
  void protect(std::span<const int> floor, std::vector<float>& scores) const {
    float* at = scores.data();
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      const int rows = heads_[h].num_rows(), sinks = heads_[h].sink().rows();
      std::fill_n(at, sinks, std::numeric_limits<float>::infinity());
      at += rows;
      std::fill_n(at - (floor[h] - sinks), floor[h] - sinks, std::numeric_limits<float>::infinity());
    }
  }

  // What the cache takes at most once heads keep so many rows: those with the highest scores [rows of all heads].
  long long bytes_bound(std::span<const float> scores, std::span<const int> keep) const {
    long long all = table_bytes();
    for (const Layer& layer : layers_) {
      all += layer.runs.allocated_bytes();
      all += static_cast<long long>(layer.evidence.attention.capacity() * sizeof(layer.evidence.attention[0]));
    }
    std::vector<unsigned char> mark;
    const float* at = scores.data();
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      const auto n = static_cast<std::size_t>(heads_[h].num_rows());
      mark.assign(n, 1);
      if (keep[h] < static_cast<int>(n)) cut({at, n}, keep[h], mark);
      all += heads_[h].bytes_bound(mark, options_.recent_rows, options_.block_rows);
      const Layer& layer = layers_[h / static_cast<std::size_t>(geometry_.num_kv_heads)];
      if (!layer.evidence.attention.empty()) all += keep[h] * static_cast<long long>(sizeof(RowAttention));
      at += n;
    }
    return all;
  }

  // A cut that keeps the marked rows of every head; an empty mark leaves a head alone. Throws, and has changed nothing then.
  HeadCut<Codec> prepare_cut(std::vector<std::vector<unsigned char>>& marks, bool seal, bool move = false) {
    HeadCut<Codec> cut(options_.recent_rows, options_.block_rows, move);
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      if (!marks[h].empty()) cut.add(heads_[h], marks[h], seal);
    }
    return cut;
  }

  static void run_task(const AttendPlan::Work& work, AttendPlan& plan, const AttendPlan::Task& task) {
    const KvCache& cache = *static_cast<const KvCache*>(work.cache);
    Attention<Codec>::run(cache.head(work.layer, task.kv_head), cache.geometry_, work, plan, task);
  }

  [[no_unique_address]] Budget budget_;
  [[no_unique_address]] Selector selector_;
  Codec codec_;
  Geometry geometry_;
  CacheOptions options_;
  std::mutex lock_;               // of the memory resource, while heads are encoded
  std::pmr::vector<Head> heads_;  // [num_layers, num_kv_heads]
  std::pmr::vector<Layer> layers_;
};

}  // namespace kvt::inline v0
