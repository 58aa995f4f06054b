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
#include <limits>
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
  const auto before = [](const Option& a, const Option& b) { return a.cost != b.cost ? a.cost < b.cost : a.loss < b.loss; };
  if (!std::is_sorted(options.begin(), options.end(), before)) {
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return before(at(a), at(b)); });
  }
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

// Losses that were measured, at places that all have the same options, become products: the size of a place times what is usual
// for an option. The size is the geometric mean of the place's losses relative to the usual ones, so that one place's options
// then differ as they do at most places; codecs of one family at several bits are such options. Sizes of the places of a group
// (`group_size` that follow one another; KV heads of a layer) are drawn towards their geometric mean, to `own_share` of their
// logarithms' distance from it: between two texts, all that layers differ by is kept and two fifths of what their heads do.
// Losses below a thousandth of an option's median count as that.
inline Status pool_losses(std::span<std::vector<Option>> places, int group_size = 1, double own_share = .4) {
  if (places.empty()) return success();
  const std::size_t num_places = places.size(), num_options = places[0].size(), group = static_cast<std::size_t>(group_size);
  if (group_size < 1 || num_places % group != 0) {
    return error(Errc::bad_shape, "{} places are not groups of {}", static_cast<double>(num_places), group_size);
  }
  if (!(own_share >= 0 && own_share <= 1)) return error(Errc::bad_value, "an own share of {} is not from 0 to 1", own_share);
  for (const auto& place : places) {
    if (place.size() != num_options) {
      return error(Errc::bad_shape, "places with {} and with {} options have none in common", static_cast<double>(num_options),
                   static_cast<double>(place.size()));
    }
    for (const Option& one : place) {
      if (!std::isfinite(one.loss)) return error(Errc::bad_value, "a loss is {}; losses must be finite", one.loss);
    }
  }
  const auto median = [](std::vector<double>& x) {
    const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
    std::nth_element(x.begin(), middle, x.end());
    return *middle;
  };
  std::vector<double> column(num_places), usual(num_options), size(num_places, 0);
  std::vector<std::size_t> telling;  // options that lose something at most places
  for (std::size_t k = 0; k < num_options; ++k) {
    for (std::size_t p = 0; p < num_places; ++p) column[p] = places[p][k].loss;
    usual[k] = std::max(0.0, median(column));
    if (usual[k] > 0) telling.push_back(k);
  }
  const auto loss = [&](std::size_t p, std::size_t k) { return std::max(places[p][k].loss, 1e-3 * usual[k]); };
  std::vector<double> level(num_options);  // logarithms of what is usual at a place of size 1
  for (const std::size_t k : telling) level[k] = std::log(usual[k]);
  for (int pass = 0; pass < 16; ++pass) {  // Tukey's polish, with means along the places, of which options are few
    for (std::size_t p = 0; p < num_places; ++p) {
      size[p] = 0;
      for (const std::size_t k : telling) size[p] += (std::log(loss(p, k)) - level[k]) / static_cast<double>(telling.size());
    }
    for (const std::size_t k : telling) {
      for (std::size_t p = 0; p < num_places; ++p) column[p] = std::log(loss(p, k)) - size[p];
      level[k] = median(column);
    }
  }
  for (std::size_t first = 0; first < num_places; first += group) {
    double mean = 0;
    for (std::size_t p = first; p < first + group; ++p) mean += size[p] / static_cast<double>(group);
    for (std::size_t p = first; p < first + group; ++p) {
      if (group > 1) size[p] = mean + own_share * (size[p] - mean);
      for (std::size_t k = 0; k < num_options; ++k) places[p][k].loss = usual[k] > 0 ? std::exp(size[p] + level[k]) : 0;
    }
  }
  return success();
}

// From one option of a place's hull to the next.
struct HullStep {
  double gain;  // of loss for each unit of cost
  double cost;
  std::size_t place;
};

// The first option of each place's hull, and the steps of all places, those that gain most first: along a place gains fall, so
// that its steps stay in order. options[place]: not empty. O(n log n) for n options, O(n) at places whose costs increase.
inline Status hull_steps(std::span<const std::vector<Option>> options, std::vector<std::vector<int>>& hulls,
                         std::vector<HullStep>& steps) {
  for (std::size_t place = 0; place < options.size(); ++place) {
    const auto& own = options[place];
    for (const Option& one : own) {
      if (!std::isfinite(one.cost) || !std::isfinite(one.loss)) {
        return error(Errc::bad_value, "an option has the cost {} and the loss {}; both must be finite", one.cost, one.loss);
      }
    }
    if (own.empty()) return error(Errc::bad_shape, "place {} has no options", static_cast<double>(place));
    const auto& hull = hulls.emplace_back(lower_hull(own));
    double least = std::numeric_limits<double>::infinity();  // gains fall by the hull's making, but for rounding
    for (std::size_t k = 1; k < hull.size(); ++k) {
      const Option from = own[static_cast<std::size_t>(hull[k - 1])], to = own[static_cast<std::size_t>(hull[k])];
      least = std::min(least, (from.loss - to.loss) / (to.cost - from.cost));
      steps.push_back({least, to.cost - from.cost, place});
    }
  }
  std::stable_sort(steps.begin(), steps.end(), [](const HullStep& a, const HullStep& b) { return a.gain > b.gain; });
  return success();
}

// chosen[place]: an index into options[place]. bad_budget if even the cheapest cost more.
inline Status choose_options(std::span<const std::vector<Option>> options, double most, std::vector<int>& chosen) {
  std::vector<std::vector<int>> hulls;
  std::vector<HullStep> steps;
  KVT_TRY(hull_steps(options, hulls, steps));
  double cost = 0;
  for (std::size_t place = 0; place < options.size(); ++place) {
    cost += options[place][static_cast<std::size_t>(hulls[place].front())].cost;
  }
  if (!(cost <= most))
    return error(Errc::bad_budget, "a limit of {} is below the {} that the cheapest options cost", most, cost);
  std::vector<std::size_t> where(options.size(), 0);
  std::vector<bool> done(options.size(), false);
  for (const HullStep& step : steps) {
    // Where a step does not fit none after it is taken; a smaller one elsewhere may still fit.
    done[step.place] = done[step.place] || cost + step.cost > most;
    if (done[step.place]) continue;
    cost += step.cost;
    ++where[step.place];
  }
  chosen.clear();
  for (std::size_t place = 0; place < options.size(); ++place) chosen.push_back(hulls[place][where[place]]);
  return success();
}

}  // namespace kvt::inline v0
