// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// AttendPlan: one attend call, cut into tasks that any thread may run. run_tasks: the simplest pool there is.
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

namespace kvt::inline v0 {

inline constexpr int max_block_rows_limit = 512;  // rows attended at once
inline constexpr int tile_vectors = 16;           // query vectors attended at once
inline constexpr int rows_per_split = 1024;       // rows a decode task takes

class AttendPlan {
 public:
  explicit AttendPlan(std::pmr::memory_resource* memory = std::pmr::get_default_resource())
      : tasks_(memory), states_(memory), partials_(memory), pending_(memory) {}

  int num_tasks() const noexcept { return static_cast<int>(tasks_.size()); }
  // Each task exactly once, any thread, any order; the output is complete when all have run.
  void run(int task) noexcept { run_(cache_, *this, tasks_[static_cast<std::size_t>(task)]); }
  // Thread-safe: the next task nobody has taken, or -1.
  int take() noexcept {
    const int task = std::atomic_ref<int>(next_).fetch_add(1, std::memory_order_relaxed);
    return task < num_tasks() ? task : -1;
  }
  long long workspace_bytes() const noexcept {
    return static_cast<long long>(tasks_.capacity() * sizeof(Task) + states_.capacity() * sizeof(SoftmaxState) +
                                  partials_.capacity() * sizeof(float) + pending_.capacity() * sizeof(int));
  }

 private:
  template <class, class, class, EvidenceSet>
  friend class KvCache;

  struct Task {
    int kv_head, tile;
    int first_segment, last_segment;
    int first_slot, slot, num_slots;  // partial results of one tile; no slot when the tile is not split
    int group;                        // index of the counter its parts share
  };

  void (*run_)(const void* cache, AttendPlan& plan, const Task& task) = nullptr;
  const void* cache_ = nullptr;
  int layer_ = 0;
  const float* queries_ = nullptr;
  std::span<const int> positions_;
  AttendOptions options_;
  float* out_ = nullptr;
  int next_ = 0;
  std::pmr::vector<Task> tasks_;
  std::pmr::vector<SoftmaxState> states_;  // [slots, tile_vectors]
  std::pmr::vector<float> partials_;       // [slots, tile_vectors, head_dim]
  std::pmr::vector<int> pending_;          // parts of a tile that have not finished
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

}  // namespace kvt::inline v0
