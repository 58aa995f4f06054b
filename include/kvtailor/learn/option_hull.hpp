// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// choose_options: one of several options at each of many places, so that the sum of losses is least under a limit on the sum
// of costs. Codecs of heads under a number of bits are one such choice.
//
// Steps along the lower convex hull of each place's (cost, loss), steepest first over all places. That is the optimum of every
// limit the steps meet exactly; in between the loss is at most one step above it (Lagrange; Shoham and Gersho, IEEE Trans.
// Acoust., Speech, Signal Process. 36, 1988).
//
// pool_losses: measured losses with most of their noise taken out, for places where the same options differ by a factor.
#pragma once

#include <algorithm>
#include <cmath>
#include <queue>
#include <span>
#include <vector>

#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

struct Option {
  double cost, loss;  // finite; any unit, the same at all places
};

// Indices into `options`, of those on the lower convex hull, cost increasing and loss decreasing. Of equal options the first.
inline std::vector<int> lower_hull(std::span<const Option> options) {
  std::vector<int> order(options.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  const auto at = [&](int i) { return options[static_cast<std::size_t>(i)]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return at(a).cost != at(b).cost ? at(a).cost < at(b).cost : at(a).loss < at(b).loss; });
  std::vector<int> hull;
  for (const int i : order) {
    if (!hull.empty() && at(i).loss >= at(hull.back()).loss) continue;
    while (hull.size() >= 2) {
      const Option a = at(hull[hull.size() - 2]), b = at(hull.back()), c = at(i);
      if ((b.loss - a.loss) * (c.cost - a.cost) < (c.loss - a.loss) * (b.cost - a.cost)) break;
      hull.pop_back();
    }
    hull.push_back(i);
  }
  return hull;
}

// Losses that were measured, at places that all have the same options, become products: all a place lost, with all options
// together, times an option's share of that, the median over the places. One place's options then differ as they do at most
// places, and what its sum says of the place stays; codecs of one family at several bits are such options.
inline Status pool_losses(std::span<std::vector<Option>> places) {
  if (places.empty()) return success();
  const std::size_t num_options = places[0].size();
  std::vector<double> total;
  for (const auto& place : places) {
    if (place.size() != num_options) {
      return error(Errc::bad_shape, "places with {} and with {} options have none in common", static_cast<double>(num_options),
                   static_cast<double>(place.size()));
    }
    double sum = 0;
    for (const Option& one : place) sum += one.loss;
    if (!std::isfinite(sum)) return error(Errc::bad_value, "the losses of a place add up to {}; they must be finite", sum);
    total.push_back(std::max(0.0, sum));
  }
  std::vector<double> ratios;
  for (std::size_t k = 0; k < num_options; ++k) {
    ratios.clear();
    for (std::size_t p = 0; p < places.size(); ++p) {
      if (total[p] > 0) ratios.push_back(places[p][k].loss / total[p]);
    }
    double share = 0;
    if (!ratios.empty()) {
      const auto middle = ratios.begin() + static_cast<std::ptrdiff_t>(ratios.size() / 2);
      std::nth_element(ratios.begin(), middle, ratios.end());
      share = *middle;
    }
    for (std::size_t p = 0; p < places.size(); ++p) places[p][k].loss = total[p] * share;
  }
  return success();
}

// options[place]: not empty. chosen[place]: an index into options[place]. bad_budget if even the cheapest cost more.
inline Status choose_options(std::span<const std::vector<Option>> options, double most, std::vector<int>& chosen) {
  struct Step {
    double gain, cost;  // of loss for each unit of cost; of the step
    std::size_t place;
    bool operator<(const Step& other) const { return gain != other.gain ? gain < other.gain : place > other.place; }
  };
  std::vector<std::vector<int>> hulls;
  std::vector<std::size_t> where(options.size(), 0);
  std::priority_queue<Step> steps;
  double cost = 0;
  const auto push = [&](std::size_t place) {
    const auto& hull = hulls[place];
    if (where[place] + 1 == hull.size()) return;
    const Option from = options[place][static_cast<std::size_t>(hull[where[place]])];
    const Option to = options[place][static_cast<std::size_t>(hull[where[place] + 1])];
    steps.push({(from.loss - to.loss) / (to.cost - from.cost), to.cost - from.cost, place});
  };
  for (const auto& place : options) {
    for (const Option& one : place) {
      if (!std::isfinite(one.cost) || !std::isfinite(one.loss)) {
        return error(Errc::bad_value, "an option has the cost {} and the loss {}; both must be finite", one.cost, one.loss);
      }
    }
    if (place.empty()) return error(Errc::bad_shape, "place {} has no options", static_cast<double>(hulls.size()));
    hulls.push_back(lower_hull(place));
    cost += place[static_cast<std::size_t>(hulls.back().front())].cost;
  }
  if (!(cost <= most))
    return error(Errc::bad_budget, "a limit of {} is below the {} that the cheapest options cost", most, cost);
  for (std::size_t place = 0; place < options.size(); ++place) push(place);
  while (!steps.empty()) {
    const Step step = steps.top();
    steps.pop();
    if (cost + step.cost > most) continue;  // a smaller step elsewhere may still fit
    cost += step.cost;
    ++where[step.place];
    push(step.place);
  }
  chosen.clear();
  for (std::size_t place = 0; place < options.size(); ++place) chosen.push_back(hulls[place][where[place]]);
  return success();
}

}  // namespace kvt::inline v0
