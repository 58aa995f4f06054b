// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// AttendPlan: attention of one or many caches, cut into tasks that any thread may run. run_tasks: the simplest pool there is.
// plan_batch: one plan for the sequences of a batch.
//
// The cut depends on shapes alone and partial results are merged in a fixed order, so the output does not depend on who
// runs what. A plan keeps its workspace; planning again does not allocate unless the work has grown.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory_resource>
#include <thread>
#include <vector>

#include "kvtailor/attend/softmax_state.hpp"
#include "kvtailor/core/evidence.hpp"
#include "kvtailor/store/buffer.hpp"

namespace kvt::inline v0 {

inline constexpr int max_block_rows_limit = 512;  // rows attended at once
inline constexpr int tile_vectors = 16;           // query vectors attended at once
inline constexpr int rows_per_split = 512;        // rows a decode task takes, while there are less than max_splits
inline constexpr int max_splits = 16;             // tasks of a head of one decode step

class AttendPlan {
 public:
  explicit AttendPlan(std::pmr::memory_resource* memory = std::pmr::get_default_resource())
      : work_(memory), tasks_(memory), states_(memory), partials_(memory), pending_(memory) {}

  int num_tasks() const noexcept { return static_cast<int>(tasks_.size()); }
  // Each task exactly once, any thread, any order; the output is complete when all have run.
  void run(int task) noexcept {
    const Task& t = tasks_[static_cast<std::size_t>(task)];
    const Work& w = work_[static_cast<std::size_t>(t.work)];
    w.run(w, *this, t);
  }
  // Thread-safe: the next task nobody has taken, or -1.
  int take() noexcept {
    const int task = std::atomic_ref<int>(next_).fetch_add(1, std::memory_order_relaxed);
    return task < num_tasks() ? task : -1;
  }
  // Nothing is planned any more; the workspace stays.
  void clear() noexcept {
    work_.clear();
    tasks_.clear();
    pending_.clear();
    num_states_ = num_partials_ = 0;
    next_ = 0;
  }
  long long workspace_bytes() const noexcept {
    return static_cast<long long>(work_.capacity() * sizeof(Work) + tasks_.capacity() * sizeof(Task) +
                                  pending_.capacity() * sizeof(int)) +
           states_.allocated_bytes() + partials_.allocated_bytes();
  }

 private:
  template <class, class, class, EvidenceSet>
  friend class KvCache;
  template <class>
  friend class Attention;

  struct Task;
  // One call of attend.
  struct Work {
    void (*run)(const Work&, AttendPlan&, const Task&);
    const void* cache;
    int layer;
    const float* queries;
    std::span<const int> positions;
    AttendOptions options;
    float* out;
  };
  // One tile of query vectors over a range of segments of a head.
  struct Task {
    int work;
    int kv_head, tile;
    int first_segment, last_segment, first_row;
    int part, num_parts;        // of a tile whose rows are shared out; one part needs no joining
    std::size_t first_state;    // of part 0: [num_parts, vectors] states
    std::size_t first_partial;  // of part 0: [num_parts, vectors, head_dim] sums
    int pending;                // index of the counter of parts that have not finished
  };

  // Room for partial results; never set anew, since every part writes its own before they are joined.
  void grow(std::size_t states, std::size_t partials) {
    num_states_ += states;
    num_partials_ += partials;
    states_.reserve(num_states_);
    partials_.reserve(num_partials_);
  }

  int next_ = 0;
  std::size_t num_states_ = 0, num_partials_ = 0;  // in use
  std::pmr::vector<Work> work_;
  std::pmr::vector<Task> tasks_;
  Buffer<SoftmaxState> states_;
  Buffer<float> partials_;
  std::pmr::vector<int> pending_;
};

// Runs all tasks on `num_threads` threads, the caller among them.
inline void run_tasks(AttendPlan& plan, int num_threads) {
  const auto work = [&plan] {
    for (int task = plan.take(); task >= 0; task = plan.take()) plan.run(task);
  };
  std::vector<std::jthread> helpers;
  for (int i = 1; i < std::min(num_threads, plan.num_tasks()); ++i) helpers.emplace_back(work);
  work();
}

// What one sequence of a batch asks for; the parameters of KvCache::plan.
template <class Cache>
struct AttendRequest {
  const Cache* cache;
  const float* queries;
  std::span<const int> positions;
  float* out;
};

// Plans the same layer of many sequences, of any lengths. On failure the plan is empty.
template <class Cache>
Status plan_batch(std::span<const AttendRequest<Cache>> batch, int layer, const AttendOptions& options,
                  AttendPlan& plan) noexcept {
  plan.clear();
  for (const auto& one : batch) {
    if (const Status status = one.cache->add_to_plan(layer, one.queries, one.positions, options, one.out, plan); !status.ok()) {
      plan.clear();
      return status;
    }
  }
  return success();
}

}  // namespace kvt::inline v0
