// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// marginal_utility: how many rows each head keeps so that least is lost over all heads, found out beforehand on texts.
//
//   KVT_TRY(retention_losses(scores, importance, losses));     a head of a text: what it loses if the best k rows are kept
//   pool.add(head, losses);                                    heads of many texts
//   KVT_TRY(utility_table(pool.curves(), layers, {}, table));  what share of its rows each head drops, for budgets of 1 to 99 %
//
// What a head loses is the importance of the rows that a selector does not keep: its own mistakes count. Curves are replaced by
// their lower convex hulls, along which the head that loses most by it gets the next row; that is the least loss of the hulls.
// Source: LU-KV, arXiv 2602.08585. There the tables of texts are averaged; here the curves of all texts are added first.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <vector>

#include "kvtailor/io/table.hpp"
#include "kvtailor/learn/option_hull.hpp"

namespace kvt::inline v0 {

// losses[k], k = 0 .. n: {k, importance of all rows but the k with the highest scores}; of equal ones the earlier stays, as in
// a cut. score, importance [n]; importance is finite and not negative. O(n log n).
inline Status retention_losses(std::span<const float> score, std::span<const float> importance, std::vector<Option>& losses) {
  const std::size_t n = score.size();
  if (importance.size() != n) {
    return error(Errc::bad_shape, "there are {} scores and the importance of {} rows", static_cast<double>(n),
                 static_cast<double>(importance.size()));
  }
  for (std::size_t i = 0; i < n; ++i) {
    if (std::isnan(score[i])) return error(Errc::bad_value, "the score of row {} is NaN", static_cast<double>(i));
    if (!(std::isfinite(importance[i]) && importance[i] >= 0)) {
      return error(Errc::bad_value, "a row has the importance {}; it must be finite and not negative",
                   static_cast<double>(importance[i]));
    }
  }
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return score[a] > score[b]; });
  losses.resize(n + 1);
  losses[n] = {static_cast<double>(n), 0};
  for (std::size_t k = n; k-- > 0;) {
    losses[k] = {static_cast<double>(k), losses[k + 1].loss + static_cast<double>(importance[order[k]])};
  }
  return success();
}

// The losses of heads over texts of any length, added up at equal shares of rows kept.
class LossPool {
 public:
  static constexpr int points = 1000;  // a share of rows is known to a thousandth

  explicit LossPool(int heads) : losses_(static_cast<std::size_t>(heads) * (points + 1), 0.f) {}
  // losses as retention_losses() gives them.
  void add(int head, std::span<const Option> losses) {
    float* const to = losses_.data() + static_cast<std::ptrdiff_t>(head) * (points + 1);
    const auto n = static_cast<double>(losses.size() - 1);
    for (int i = 0; i <= points; ++i) {
      const double at = n * i / points;
      const auto below = static_cast<std::size_t>(at), above = std::min(below + 1, losses.size() - 1);
      to[i] += static_cast<float>(std::lerp(losses[below].loss, losses[above].loss, at - static_cast<double>(below)));
    }
  }
  // [heads, points + 1]: what was added, which is all there is to know.
  std::vector<float>& losses() { return losses_; }
  const std::vector<float>& losses() const { return losses_; }
  // [heads]: options of 0 .. points thousandths of the rows.
  std::vector<std::vector<Option>> curves() const {
    std::vector<std::vector<Option>> all(losses_.size() / (points + 1), std::vector<Option>(points + 1));
    for (std::size_t i = 0; i < losses_.size(); ++i) {
      const std::size_t at = i % (points + 1);
      all[i / (points + 1)][at] = {static_cast<double>(at), static_cast<double>(losses_[i])};
    }
    return all;
  }

 private:
  std::vector<float> losses_;
};

// What each place is given of each of several totals, which increase, so that the sum of losses along the hulls is least:
// given [totals, places]. Steps that gain the same are taken together, each in proportion to its cost, and so is what no loss
// tells apart, in proportion to what the options go on to. The options of each place begin at the cost 0. Of options whose
// costs and losses are convex and totals that are whole steps this is the exact optimum; elsewhere that of the hulls. O(n log
// n) for all steps of the hulls, of which there are at most as many as options, and O(totals * places).
inline Status share_totals(std::span<const std::vector<Option>> options, std::span<const double> totals,
                           std::vector<double>& given) {
  std::vector<std::vector<int>> hulls;
  std::vector<HullStep> steps;
  KVT_TRY(hull_steps(options, hulls, steps));
  const std::size_t places = options.size();
  double most = 0;
  for (const auto& own : options) {
    if (own.front().cost != 0) return error(Errc::bad_value, "options begin at the cost {}; it must be 0", own.front().cost);
    most += own.back().cost;
  }
  for (std::size_t t = 0; t < totals.size(); ++t) {
    if (!(totals[t] >= 0 && totals[t] <= most && (t == 0 || totals[t] >= totals[t - 1]))) {
      return error(Errc::bad_budget, "totals must increase, from 0 to {}; one is {}", most, totals[t]);
    }
  }
  std::vector<double> own(places, 0), made;
  made.reserve(totals.size() * places);
  double spent = 0;
  std::size_t step = 0, end = 0, total = 0;
  const auto cost_of = [&](std::size_t first, std::size_t last) {
    double sum = 0;
    for (std::size_t s = first; s < last; ++s) sum += steps[s].cost;
    return sum;
  };
  for (; step < steps.size() && total < totals.size(); step = end) {
    for (end = step; end < steps.size() && steps[end].gain == steps[step].gain;) ++end;
    const double cost = cost_of(step, end);
    for (; total < totals.size() && totals[total] <= spent + cost; ++total) {
      const std::size_t at = made.size();
      made.insert(made.end(), own.begin(), own.end());
      const double part = (totals[total] - spent) / cost;
      for (std::size_t s = step; s < end; ++s) made[at + steps[s].place] += part * steps[s].cost;
    }
    for (std::size_t s = step; s < end; ++s) own[steps[s].place] += steps[s].cost;
    spent += cost;
  }
  for (; total < totals.size(); ++total) {
    const double part = most > spent ? (totals[total] - spent) / (most - spent) : 0;
    for (std::size_t p = 0; p < places; ++p) made.push_back(own[p] + part * (options[p].back().cost - own[p]));
  }
  given = std::move(made);
  return success();
}

struct UtilityOptions {
  int steps = 99;          // budgets: 1 / (steps + 1) to steps / (steps + 1) of all rows dropped
  bool per_layer = false;  // each layer keeps as much as any other
};

// table [steps, num_layers, num_kv_heads]: the share of its rows that each head drops, as Curve (budget/curve.hpp) reads it.
// curves [num_layers * num_kv_heads], whose options all end at the same cost.
inline Status utility_table(std::span<const std::vector<Option>> curves, int num_layers, const UtilityOptions& options,
                            Table& table) {
  const std::size_t heads = curves.size(), layers = static_cast<std::size_t>(num_layers);
  if (num_layers < 1 || heads == 0 || heads % layers != 0 || options.steps < 1) {
    return error(Errc::bad_shape, "{} curves are not those of {} layers", static_cast<double>(heads), num_layers);
  }
  const std::size_t part = options.per_layer ? heads / layers : heads, steps = static_cast<std::size_t>(options.steps);
  Table made{{steps, layers, heads / layers}, std::vector<float>(steps * heads)};
  std::vector<double> totals(steps), kept;
  for (std::size_t first = 0; first < heads; first += part) {
    const double rows = curves[first].back().cost;
    for (std::size_t i = 0; i < steps; ++i) {
      totals[i] = rows * static_cast<double>(part) * static_cast<double>(i + 1) / static_cast<double>(steps + 1);
    }
    KVT_TRY(share_totals(curves.subspan(first, part), totals, kept));
    for (std::size_t i = 0; i < steps; ++i) {
      float* const to = made.numbers.data() + (steps - 1 - i) * heads + first;
      for (std::size_t h = 0; h < part; ++h) to[h] = static_cast<float>(std::clamp(1 - kept[i * part + h] / rows, 0.0, 1.0));
    }
  }
  table = std::move(made);
  return success();
}

}  // namespace kvt::inline v0
