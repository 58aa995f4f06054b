// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See trainer.hpp.
#include "trainer.hpp"

#include <Eigen/Cholesky>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <filesystem>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "kvtailor/io/safetensors.hpp"
#include "kvtailor/learn/marginal_utility.hpp"
#include "kvtailor/learn/soft_top_k.hpp"

namespace kvt_llm {

namespace {

using Matrix = kvt::TokenScorer<float>::Matrix;
constexpr const char* state_format = "kvt-llm train 1";

// f(i, thread) of 0 .. n - 1; which thread has which makes no difference.
template <class F>
void in_parallel(int n, int threads, const F& f) {
  std::atomic<int> next = 0;
  std::exception_ptr failure;
  std::atomic<bool> failed = false;
  const auto work = [&](int thread) {
    try {
      for (int i; !failed && (i = next++) < n;) f(i, thread);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  };
  std::vector<std::jthread> others;
  for (int t = 1; t < std::min(n, threads); ++t) others.emplace_back(work, t);
  work(0);
  others.clear();
  if (failure) std::rethrow_exception(failure);
}

// <random>'s distributions differ between libraries.
double unit(std::mt19937_64& random) { return static_cast<double>(random() >> 11) * 0x1p-53; }
float normal(std::mt19937_64& random) {
  const double size = std::sqrt(-2 * std::log(1 - unit(random)));
  return static_cast<float>(size * std::cos(6.283185307179586 * unit(random)));
}

}  // namespace

Trainer::Trainer(const Weights<float>& weights, const kvt::CacheOptions& zones, std::vector<Lesson>& lessons,
                 std::size_t learned, const TrainOptions& options, int threads)
    : weights_(weights),
      lessons_(lessons),
      learned_(learned),
      o_(options),
      threads_(threads),
      sinks_(zones.sink_rows),
      recent_(zones.recent_rows),
      heads_(weights.parameters.geometry().num_heads()),
      policy_{weights.parameters.num_layers, weights.parameters.num_kv_heads,
              kvt::TokenScorer<float>(heads_, weights.parameters.head_dim, options.hidden),
              kvt::BudgetHead<float>(heads_, options.width, options.shared)},
      score_steps_(static_cast<std::size_t>(heads_) * static_cast<std::size_t>(policy_.scores.layout().learned())),
      share_steps_(policy_.shares.parameters().size()) {
  for (int t = 0; t < threads; ++t) students_.emplace_back(weights);
  std::map<std::string, std::vector<Task>> kinds;
  std::vector<std::pair<Lesson*, Exercise*>> all;
  for (std::size_t i = 0; i < lessons.size(); ++i) {
    for (Exercise& exercise : lessons[i].exercises) {
      all.emplace_back(&lessons[i], &exercise);
      (i < learned ? kinds[exercise.kind] : held_out_).push_back({&lessons[i], &exercise});
    }
  }
  for (auto& [kind, tasks] : kinds) kinds_.push_back(std::move(tasks));
  in_parallel(static_cast<int>(all.size()), threads, [&](int i, int thread) {
    const auto& [lesson, exercise] = all[static_cast<std::size_t>(i)];
    const std::vector<float> whole(static_cast<std::size_t>(heads_) * static_cast<std::size_t>(lesson->context.rows), 1.f);
    exercise->teacher =
        students_[static_cast<std::size_t>(thread)].run(lesson->context, exercise->tokens, exercise->wanted, whole);
  });
}

float Trainer::free_retention(const Lesson& lesson, double retention) const {
  const double rows = retention * lesson.context.rows - sinks_ - recent_;
  return static_cast<float>(std::clamp(rows / free_rows(lesson), 1e-3, 0.999));
}

// [free rows, features] of a head.
void Trainer::features(const Lesson& lesson, int head, Matrix& z) const {
  const int dim = weights_.parameters.head_dim, n = free_rows(lesson);
  Matrix keys(n, dim), values(n, dim);
  const auto at = (static_cast<std::ptrdiff_t>(head) * lesson.context.rows + sinks_) * dim;
  std::transform(lesson.context.keys.begin() + at, lesson.context.keys.begin() + at + keys.size(), keys.data(),
                 [](kvt::Half x) { return kvt::to_float(x); });
  std::transform(lesson.context.values.begin() + at, lesson.context.values.begin() + at + values.size(), values.data(),
                 [](kvt::Half x) { return kvt::to_float(x); });
  kvt::RopeInverse inverse(weights_.rope);
  for (int r = 0; r < n; ++r) inverse.turn_back(keys.row(r).data(), 1, dim, sinks_ + r);
  policy_.scores.features(head, keys.data(), values.data(), n, z);
}

// [heads, free rows]
void Trainer::scores_of(const Lesson& lesson, std::vector<float>& scores) const {
  const auto n = static_cast<std::size_t>(free_rows(lesson));
  scores.resize(static_cast<std::size_t>(heads_) * n);
  Matrix z, hidden;
  for (int h = 0; h < heads_; ++h) {
    features(lesson, h, z);
    policy_.scores.score(h, z, std::span(scores).subspan(static_cast<std::size_t>(h) * n, n), hidden);
  }
}

void Trainer::warm_start() {
  regress_scores();
  regress_shares();
}

void Trainer::regress_scores() {
  constexpr double floor = 1e-9, ridge = 30;
  constexpr int epochs = 12, part = 512;
  auto& scores = policy_.scores;
  const auto& at = scores.layout();
  const int width = at.features();
  // Each text counts the same.
  std::vector<double> whole(learned_);
  for (std::size_t i = 0; i < learned_; ++i) {
    whole[i] = std::accumulate(lessons_[i].importance.begin(), lessons_[i].importance.end(), 0.0) + 1e-30;
  }
  in_parallel(heads_, threads_, [&](int h, int) {
    const std::span<float> own = scores.of(h);
    std::fill(own.begin(), own.end(), 0.f);
    std::fill_n(own.begin() + at.scale(), width, 1.f);
    Eigen::Index rows = 0;
    for (std::size_t i = 0; i < learned_; ++i) rows += free_rows(lessons_[i]);
    Matrix all(rows, width), z;
    Eigen::VectorXf target(rows);
    Eigen::Index row = 0;
    for (std::size_t i = 0; i < learned_; ++i) {
      const Lesson& lesson = lessons_[i];
      features(lesson, h, z);
      all.middleRows(row, z.rows()) = z;
      const float* const seen = lesson.importance.data() + static_cast<std::ptrdiff_t>(h) * lesson.context.rows + sinks_;
      for (Eigen::Index r = 0; r < z.rows(); ++r) {
        target[row + r] = static_cast<float>(std::log(static_cast<double>(seen[r]) / whole[i] + floor));
      }
      row += z.rows();
    }
    const Eigen::RowVectorXf mean = all.colwise().mean();
    all.rowwise() -= mean;
    const Eigen::RowVectorXf scale =
        (all.colwise().squaredNorm() / static_cast<float>(rows)).array().sqrt().max(1e-4f).inverse();
    all.array().rowwise() *= scale.array();
    std::copy_n(mean.data(), width, own.begin() + at.mean());
    std::copy_n(scale.data(), width, own.begin() + at.scale());
    // What a line through all features gives.
    const float middle = target.mean();
    Eigen::MatrixXd square = (all.transpose() * all).cast<double>();
    square.diagonal().array() += ridge;
    const Eigen::VectorXf line =
        square.llt().solve((all.transpose() * (target.array() - middle).matrix()).cast<double>()).cast<float>();
    std::copy_n(line.data(), width, own.begin() + at.matrix() + at.hidden * width);
    own[static_cast<std::size_t>(at.bias() + at.hidden)] = middle;
    // What bends goes into the hidden units.
    std::mt19937_64 random(o_.seed * 1000003u + static_cast<unsigned>(h));
    for (int i = 0; i < at.hidden * width; ++i) {
      own[static_cast<std::size_t>(at.matrix() + i)] = normal(random) / std::sqrt(static_cast<float>(width));
    }
    for (int i = 0; i < at.hidden; ++i) {
      own[static_cast<std::size_t>(at.bias() + i)] = 0.5f * normal(random);
      own[static_cast<std::size_t>(at.outer() + i)] = 0.05f * normal(random);
    }
    kvt::Adam<float> adam(static_cast<std::size_t>(at.learned()));
    std::vector<Eigen::Index> order(static_cast<std::size_t>(rows));
    std::iota(order.begin(), order.end(), Eigen::Index{0});
    std::vector<float> gradient(static_cast<std::size_t>(at.learned())), found(part), by(part);
    Matrix some(part, width), hidden;
    const int steps = epochs * static_cast<int>(rows / part);
    for (int step = 0, next = 0; step < steps; ++step) {
      if (next == 0) {
        for (std::size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[random() % k]);
      }
      for (int r = 0; r < part; ++r) some.row(r) = all.row(order[static_cast<std::size_t>(next + r)]);
      scores.score(h, some, found, hidden);
      for (int r = 0; r < part; ++r) {
        const auto k = static_cast<std::size_t>(r);
        by[k] = (found[k] - target[order[static_cast<std::size_t>(next + r)]]) * (2.f / part);
      }
      std::fill(gradient.begin(), gradient.end(), 0.f);
      scores.add_gradient(h, some, hidden, by, gradient);
      const float left = 1 - static_cast<float>(step) / static_cast<float>(steps);
      adam.step(scores.learned(h), gradient, 3e-3f * left);
      next += part;
      if (next + part > static_cast<int>(rows)) next = 0;
    }
  });
}

void Trainer::regress_shares() {
  // Losses of the order that the scores give, of all texts.
  kvt::LossPool pool(heads_);
  std::vector<float> scores;
  std::vector<kvt::Option> losses;
  for (std::size_t i = 0; i < learned_; ++i) {
    const Lesson& lesson = lessons_[i];
    const auto n = static_cast<std::size_t>(free_rows(lesson)), rows = static_cast<std::size_t>(lesson.context.rows);
    scores_of(lesson, scores);
    for (const auto* importance : {&lesson.importance, &lesson.answer_importance}) {
      const double whole = std::accumulate(importance->begin(), importance->end(), 0.0);
      if (whole <= 0) continue;
      std::vector<float> part(n);
      for (std::size_t h = 0; h < static_cast<std::size_t>(heads_); ++h) {
        const float* const seen = importance->data() + h * rows + static_cast<std::size_t>(sinks_);
        std::transform(seen, seen + n, part.begin(),
                       [&](float x) { return static_cast<float>(static_cast<double>(x) / whole); });
        check(kvt::retention_losses(std::span(scores).subspan(h * n, n), part, losses));
        pool.add(static_cast<int>(h), losses);
      }
    }
  }
  kvt::Table table;
  check(kvt::utility_table(pool.curves(), policy_.num_layers, {99, false}, table));

  auto& budget = policy_.shares;
  std::mt19937_64 random(o_.seed);
  const std::span<float> own = budget.parameters();
  const auto heads = static_cast<std::size_t>(heads_), width = static_cast<std::size_t>(o_.width),
             shared = static_cast<std::size_t>(o_.shared);
  // As BudgetHead has them: embeddings, slopes, starts, and the layer that heads share.
  for (float& x : own) x = normal(random) / std::sqrt(static_cast<float>(width));
  std::fill_n(own.begin() + static_cast<std::ptrdiff_t>(heads * width), heads, 1.f);
  std::fill_n(own.begin() + static_cast<std::ptrdiff_t>(heads * (width + 1)), heads, 0.f);
  std::fill(own.end() - static_cast<std::ptrdiff_t>(2 * shared), own.end() - static_cast<std::ptrdiff_t>(shared), 0.f);
  kvt::Adam<float> adam(own.size());
  constexpr int steps = 3000;
  constexpr int kept[] = {2, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 75, 90};
  std::vector<float> shares(heads), by(heads), gradient(own.size());
  for (int step = 0; step < steps; ++step) {
    std::fill(gradient.begin(), gradient.end(), 0.f);
    for (const int percent : kept) {
      const float retention = static_cast<float>(percent) / 100;
      const float* const dropped = table.numbers.data() + static_cast<std::size_t>(99 - percent) * heads;
      check(budget.shares(retention, shares));
      // Small shares count as much as large ones, up to a thousandth.
      for (std::size_t h = 0; h < heads; ++h) {
        const float want = 1 - dropped[h];
        by[h] = 2 * (shares[h] - want) / (want + 0.1f * retention) / static_cast<float>(heads);
      }
      budget.add_gradient(retention, shares, by, gradient);
    }
    adam.step(own, gradient, 0.03f * (1 - static_cast<float>(step) / steps));
  }
}

double Trainer::learn(const Task& task, double retention, float temperature, Student<float>& student,
                      std::vector<float>& by_numbers, std::vector<float>& by_budget) const {
  const Lesson& lesson = *task.lesson;
  const auto n = static_cast<std::size_t>(free_rows(lesson)), rows = static_cast<std::size_t>(lesson.context.rows),
             heads = static_cast<std::size_t>(heads_);
  const auto& at = policy_.scores.layout();
  std::vector<float> shares(heads), scores(heads * n), soft(heads * n), mask(heads * rows, 1.f), by_mask(heads * rows);
  const float free = free_retention(lesson, retention);
  check(policy_.shares.shares(free, shares));
  std::vector<Matrix> z(heads), hidden(heads);
  std::vector<kvt::SoftTopK<float>> chosen(heads, kvt::SoftTopK<float>{temperature});
  const auto count = [&](std::size_t h) {
    return std::clamp(shares[h] * static_cast<float>(n), 0.5f, static_cast<float>(n) - 0.5f);
  };
  for (std::size_t h = 0; h < heads; ++h) {
    features(lesson, static_cast<int>(h), z[h]);
    const auto own = std::span(scores).subspan(h * n, n), kept = std::span(soft).subspan(h * n, n);
    policy_.scores.score(static_cast<int>(h), z[h], own, hidden[h]);
    check(chosen[h].choose(own, count(h), kept));
    std::copy(kept.begin(), kept.end(), mask.begin() + static_cast<std::ptrdiff_t>(h * rows) + sinks_);
  }
  student.run(lesson.context, task.exercise->tokens, task.exercise->wanted, mask);
  const double distance = student.distance(task.exercise->teacher);
  student.gradient(by_mask);
  std::vector<float> by_scores(n), by_shares(heads);
  const auto learned = static_cast<std::size_t>(at.learned());
  for (std::size_t h = 0; h < heads; ++h) {
    std::fill(by_scores.begin(), by_scores.end(), 0.f);
    const auto by =
        chosen[h].add_gradient(std::span(scores).subspan(h * n, n), std::span(soft).subspan(h * n, n),
                               std::span(by_mask).subspan(h * rows + static_cast<std::size_t>(sinks_), n), by_scores);
    const float all = shares[h] * static_cast<float>(n);
    by_shares[h] = count(h) == all ? by.count * static_cast<float>(n) : 0.f;
    policy_.scores.add_gradient(static_cast<int>(h), z[h], hidden[h], by_scores,
                                std::span(by_numbers).subspan(h * learned, learned));
  }
  policy_.shares.add_gradient(free, shares, by_shares, by_budget);
  return distance;
}

double Trainer::step() {
  const float left = 1 - static_cast<float>(steps_) / static_cast<float>(o_.steps);
  const auto temperature = static_cast<float>(o_.warm * std::pow(o_.cold / o_.warm, 1 - static_cast<double>(left)));
  const auto batch = static_cast<std::size_t>(o_.batch);
  std::vector<std::vector<float>> by_numbers(batch), by_budget(batch);
  std::vector<double> distance(batch), retention(batch);
  std::vector<const Task*> chosen(batch);
  for (std::size_t b = 0; b < batch; ++b) {
    // Each kind in turn, and its exercises in an order that is another each round.
    const std::size_t at = static_cast<std::size_t>(steps_) * batch + b;
    const auto& tasks = kinds_[at % kinds_.size()];
    const std::size_t turn = at / kinds_.size(), round = turn / tasks.size();
    std::mt19937_64 random(o_.seed * 7919u + round);
    std::vector<std::size_t> order(tasks.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    for (std::size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[random() % k]);
    chosen[b] = &tasks[order[turn % tasks.size()]];
    std::mt19937_64 own(o_.seed * 104729u + at);
    retention[b] = o_.least * std::pow(o_.most / o_.least, unit(own));
  }
  in_parallel(o_.batch, threads_, [&](int i, int thread) {
    const auto b = static_cast<std::size_t>(i);
    by_numbers[b].assign(static_cast<std::size_t>(heads_) * static_cast<std::size_t>(policy_.scores.layout().learned()), 0.f);
    by_budget[b].assign(policy_.shares.parameters().size(), 0.f);
    distance[b] =
        learn(*chosen[b], retention[b], temperature, students_[static_cast<std::size_t>(thread)], by_numbers[b], by_budget[b]);
  });
  const auto added = [&](std::vector<std::vector<float>>& parts) -> std::vector<float>& {
    for (std::size_t b = 1; b < batch; ++b) {
      for (std::size_t i = 0; i < parts[0].size(); ++i) parts[0][i] += parts[b][i];
    }
    for (float& x : parts[0]) x /= static_cast<float>(batch);
    return parts[0];
  };
  const float rate = 0.1f + 0.9f * left;
  if (!o_.keep_scores) {
    std::vector<float>& by = added(by_numbers);
    const auto learned = static_cast<std::size_t>(policy_.scores.layout().learned());
    std::vector<float> numbers;
    for (int h = 0; h < heads_; ++h) {
      const auto own = policy_.scores.learned(h);
      numbers.insert(numbers.end(), own.begin(), own.end());
    }
    score_steps_.most = 0.3f;
    score_steps_.step(numbers, by, static_cast<float>(o_.score_rate) * rate);
    for (int h = 0; h < heads_; ++h) {
      std::copy_n(numbers.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(h) * learned), learned,
                  policy_.scores.learned(h).begin());
    }
  }
  if (!o_.keep_shares) {
    share_steps_.most = 0.3f;
    share_steps_.step(policy_.shares.parameters(), added(by_budget), static_cast<float>(o_.share_rate) * rate);
  }
  ++steps_;
  return std::accumulate(distance.begin(), distance.end(), 0.0) / static_cast<double>(batch);
}

std::map<std::string, double> Trainer::held_out(double retention) {
  std::vector<double> distance(held_out_.size());
  in_parallel(static_cast<int>(held_out_.size()), threads_, [&](int i, int thread) {
    const auto& [lesson, exercise] = held_out_[static_cast<std::size_t>(i)];
    const auto n = static_cast<std::size_t>(free_rows(*lesson)), rows = static_cast<std::size_t>(lesson->context.rows),
               heads = static_cast<std::size_t>(heads_);
    std::vector<float> shares(heads), scores, mask(heads * rows, 1.f);
    check(policy_.shares.shares(free_retention(*lesson, retention), shares));
    scores_of(*lesson, scores);
    for (std::size_t h = 0; h < heads; ++h) {
      kvt::SoftTopK<float> hard{0};
      check(hard.choose(std::span(scores).subspan(h * n, n), std::round(shares[h] * static_cast<float>(n)),
                        std::span(mask).subspan(h * rows + static_cast<std::size_t>(sinks_), n)));
    }
    Student<float>& student = students_[static_cast<std::size_t>(thread)];
    student.run(lesson->context, exercise->tokens, exercise->wanted, mask);
    distance[static_cast<std::size_t>(i)] = student.distance(exercise->teacher);
  });
  std::map<std::string, std::vector<double>> kinds;
  for (std::size_t i = 0; i < held_out_.size(); ++i) kinds[held_out_[i].exercise->kind].push_back(distance[i]);
  std::map<std::string, double> means;
  for (const auto& [kind, own] : kinds)
    means[kind] = std::accumulate(own.begin(), own.end(), 0.0) / static_cast<double>(own.size());
  return means;
}

void Trainer::write_state(const std::string& path, const std::string& parameters) {
  kvt::TensorFile file;
  file.metadata = {{"format", state_format}, {"parameters", parameters}, {"steps", std::to_string(steps_)}};
  const auto put = [&](const char* name, std::vector<float> numbers) {
    file.tensors[name] = {{numbers.size()}, std::move(numbers)};
  };
  const auto own = policy_.shares.parameters();
  put("scores", policy_.scores.numbers());
  put("shares", {own.begin(), own.end()});
  put("score_steps", score_steps_.state());
  put("share_steps", share_steps_.state());
  check(kvt::write_safetensors(path, file, kvt::FloatType::fp32));
}

void Trainer::read_state(const std::string& path, const std::string& parameters) {
  kvt::TensorFile file;
  check(kvt::read_safetensors(path, file));
  if (file.metadata["format"] != state_format || file.metadata["parameters"] != parameters) {
    throw std::runtime_error("the file " + path + " is of another training: other lessons, sizes or options");
  }
  const auto get = [&](const char* name, std::span<float> to) {
    const auto& numbers = file.tensors[name].numbers;
    if (numbers.size() != to.size()) throw std::runtime_error("the file " + path + " does not hold what its header says");
    std::copy(numbers.begin(), numbers.end(), to.begin());
  };
  get("scores", policy_.scores.numbers());
  get("shares", policy_.shares.parameters());
  get("score_steps", score_steps_.state());
  get("share_steps", share_steps_.state());
  steps_ = std::clamp(std::atoi(file.metadata["steps"].c_str()), 0, o_.steps);
  if (!o_.keep_scores) score_steps_.steps() = steps_;
  if (!o_.keep_shares) share_steps_.steps() = steps_;
}

}  // namespace kvt_llm
