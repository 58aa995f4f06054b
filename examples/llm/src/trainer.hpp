// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Trainer: a learned policy, from what the model itself would have done with its full cache.
#pragma once

#include <map>
#include <random>
#include <string>
#include <vector>

#include "kvtailor/io/policy_file.hpp"
#include "kvtailor/learn/adam.hpp"
#include "lessons.hpp"

namespace kvt_llm {

struct TrainOptions {
  int steps = 400, batch = 4;
  int hidden = 16, width = 16, shared = 32;  // of token scorers; of embeddings of heads, and the layer that heads share
  double score_rate = 5e-4, share_rate = 0.02;
  double warm = 0.5, cold = 0.1;    // temperatures of the first and the last step, in units of scores
  double least = 0.08, most = 0.4;  // retention, drawn evenly in its logarithm
  bool keep_scores = false, keep_shares = false;
  unsigned seed = 1;
};

class Trainer {
 public:
  // Lessons are read, and their teachers are made here. The first `learned` of them are trained on, the others held out.
  Trainer(const Weights<float>& weights, const kvt::CacheOptions& zones, std::vector<Lesson>& lessons, std::size_t learned,
          const TrainOptions& options, int threads);

  // Scores: regressed to the logarithm of importance. Shares: what LU-KV would give with these scores.
  void warm_start();
  // One step of all; the mean distance of its lessons. The k-th of steps depends on nothing but the options and those before.
  double step();
  int steps_done() const { return steps_; }
  // Mean distance of the full cache's answers where rows are really left out, by kind of lesson, over held-out lessons.
  std::map<std::string, double> held_out(double retention);

  kvt::LearnedPolicy& policy() { return policy_; }
  // All that the next step depends on, and back. read_state() throws std::runtime_error if the file is of other parameters.
  void write_state(const std::string& path, const std::string& parameters);
  void read_state(const std::string& path, const std::string& parameters);

 private:
  struct Task {
    const Lesson* lesson;
    const Exercise* exercise;
  };
  float free_retention(const Lesson& lesson, double retention) const;
  int free_rows(const Lesson& lesson) const { return lesson.context.rows - sinks_ - recent_; }
  void features(const Lesson& lesson, int head, kvt::TokenScorer<float>::Matrix& z) const;
  void scores_of(const Lesson& lesson, std::vector<float>& scores) const;
  double learn(const Task& task, double retention, float temperature, Student<float>& student, std::vector<float>& by_numbers,
               std::vector<float>& by_budget) const;
  void regress_scores();
  void regress_shares();

  const Weights<float>& weights_;
  std::vector<Lesson>& lessons_;
  std::size_t learned_;
  TrainOptions o_;
  int threads_, sinks_, recent_, heads_;
  std::vector<std::vector<Task>> kinds_;  // exercises of each kind in turn are trained on
  std::vector<Task> held_out_;
  kvt::LearnedPolicy policy_;
  std::vector<Student<float>> students_;  // one a thread
  kvt::Adam<float> score_steps_, share_steps_;
  int steps_ = 0;
};

}  // namespace kvt_llm
