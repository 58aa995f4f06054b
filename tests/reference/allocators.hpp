// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What allocators have to give, as plain loops in double precision that share no code with the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <vector>

namespace reference {

// A request as its parts.
struct Asked {
  long long total = 0;
  std::size_t layers = 0, heads = 0;  // heads of a layer
  std::vector<long long> seen, floor;
  std::vector<std::vector<double>> scores;  // of each head

  std::size_t size() const { return layers * heads; }
};

// Rows of each head. Not sure: remainders so near to one another decide that rounding may turn them.
struct Shares {
  std::vector<long long> rows;
  std::vector<double> ideal;
  bool sure = true;
};

// `total` in proportion to weights, within bounds: the common factor from the points where heads meet their bounds, then the
// largest remainders, of equal ones the first.
inline Shares divide(long long total, const std::vector<double>& weight, const std::vector<long long>& lower,
                     const std::vector<long long>& upper) {
  const std::size_t n = weight.size();
  const auto at = [&](double factor) {
    std::vector<double> x(n);
    for (std::size_t i = 0; i < n; ++i) x[i] = std::min(std::max(weight[i] * factor, double(lower[i])), double(upper[i]));
    return x;
  };
  const auto sum = [](const std::vector<double>& x) { return std::accumulate(x.begin(), x.end(), 0.0); };
  std::vector<double> points{0};
  for (std::size_t i = 0; i < n; ++i) {
    points.push_back(double(lower[i]) / weight[i]);
    points.push_back(double(upper[i]) / weight[i]);
  }
  std::sort(points.begin(), points.end());
  // The last point with no more than the total, and the next; between the two the sum is a line.
  std::size_t k = 0;
  while (k + 1 < points.size() && sum(at(points[k + 1])) <= double(total)) ++k;
  double factor = points[k];
  if (k + 1 < points.size()) {
    const double low = sum(at(points[k])), high = sum(at(points[k + 1]));
    factor += (points[k + 1] - points[k]) * (double(total) - low) / (high - low);
  }
  Shares shares;
  shares.ideal = at(factor);
  std::vector<double> rest(n);
  std::vector<bool> taken(n, false);
  long long left = total;
  for (std::size_t i = 0; i < n; ++i) {
    shares.rows.push_back(std::min(upper[i], static_cast<long long>(std::floor(shares.ideal[i] + 1e-7))));
    rest[i] = shares.ideal[i] - double(shares.rows[i]);
    left -= shares.rows[i];
  }
  for (; left > 0; --left) {
    std::size_t best = n;
    for (std::size_t i = 0; i < n; ++i) {
      if (!taken[i] && shares.rows[i] < upper[i] && (best == n || rest[i] > rest[best])) best = i;
    }
    if (best == n) break;
    taken[best] = true;
    ++shares.rows[best];
  }
  // The library compares remainders to six digits.
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      if (taken[i] && !taken[j] && rest[j] > 1e-7 && rest[i] - rest[j] < 2e-6 && shares.ideal[i] != shares.ideal[j]) {
        shares.sure = false;
      }
    }
  }
  return shares;
}

// Rows one by one to the highest score that is left in any of the heads, each from its own start[h] on: of equal ones to the
// lower row, then the lower head.
inline std::vector<long long> take_highest(const Asked& want, std::size_t first, std::size_t last, long long left,
                                           const std::vector<long long>& start) {
  std::vector<long long> keep = start;
  std::vector<std::vector<std::size_t>> order(want.size());
  for (std::size_t h = first; h < last; ++h) {
    const auto& own = want.scores[h];
    for (std::size_t row = 0; row < own.size(); ++row) order[h].push_back(row);
    std::stable_sort(order[h].begin(), order[h].end(), [&](std::size_t a, std::size_t b) { return own[a] > own[b]; });
  }
  for (; left > 0; --left) {
    std::size_t best = last;
    const auto next = [&](std::size_t h) { return order[h][static_cast<std::size_t>(keep[h])]; };
    for (std::size_t h = first; h < last; ++h) {
      if (keep[h] == want.seen[h]) continue;
      if (best == last) {
        best = h;
        continue;
      }
      const double own = want.scores[h][next(h)], other = want.scores[best][next(best)];
      if (own > other || (own == other && next(h) < next(best))) best = h;
    }
    if (best == last) break;
    ++keep[best];
  }
  return keep;
}

// Heads first .. last - 1 that share `share` rows: each is safe for one of `whole` parts of an even share (none for zero),
// the rest goes to the highest scores. What floors take beyond the share comes from the last heads.
inline void safe_then_highest(const Asked& want, std::size_t first, std::size_t last, long long share, long long whole,
                              std::vector<long long>& keep) {
  long long left = share;
  for (std::size_t h = first; h < last; ++h) {
    const long long safe = whole > 0 ? share / (whole * static_cast<long long>(last - first)) : 0;
    keep[h] = std::min(std::max(safe, want.floor[h]), want.seen[h]);
    left -= keep[h];
  }
  for (std::size_t h = last; h-- > first;) {
    for (; left < 0 && keep[h] > want.floor[h]; ++left) --keep[h];
  }
  const auto taken = take_highest(want, first, last, left, keep);
  std::copy(taken.begin() + static_cast<std::ptrdiff_t>(first), taken.begin() + static_cast<std::ptrdiff_t>(last),
            keep.begin() + static_cast<std::ptrdiff_t>(first));
}

inline Shares global(const Asked& want, long long whole) {
  Shares shares;
  shares.rows.resize(want.size());
  safe_then_highest(want, 0, want.size(), want.total, whole, shares.rows);
  return shares;
}

// Ada-KV in every layer; layers share in proportion to their rows.
inline Shares adaptive(const Asked& want, long long whole) {
  std::vector<double> weight;
  std::vector<long long> lower, upper;
  for (std::size_t l = 0; l < want.layers; ++l) {
    long long least = 0, most = 0;
    for (std::size_t h = l * want.heads; h < (l + 1) * want.heads; ++h) {
      least += want.floor[h];
      most += want.seen[h];
    }
    lower.push_back(least);
    upper.push_back(most);
    weight.push_back(most > 0 ? double(most) : 1e-9);
  }
  const Shares layer = divide(want.total, weight, lower, upper);
  Shares shares;
  shares.sure = layer.sure;
  shares.rows.resize(want.size());
  for (std::size_t l = 0; l < want.layers; ++l) {
    safe_then_highest(want, l * want.heads, (l + 1) * want.heads, layer.rows[l], whole, shares.rows);
  }
  return shares;
}

// Rows a head by the rule of PyramidKV, before protected rows and rows there are count.
inline std::vector<double> pyramid_of_layers(double mean, double room, double beta, std::size_t layers) {
  double least = mean / beta, most = 2 * mean - least;
  if (most >= room) {
    most = room;
    least = 2 * mean - most < most ? 2 * mean - most : most;
  }
  std::vector<double> rows;
  for (std::size_t l = 0; l < layers; ++l) {
    rows.push_back(layers == 1 ? 1.0 : most - double(l) * (most - least) / double(layers - 1));
  }
  return rows;
}
inline Shares pyramid(const Asked& want, double beta) {
  double room = 0;
  for (std::size_t h = 0; h < want.size(); ++h) room += double(want.seen[h] - want.floor[h]);
  const double heads = double(want.size());
  const auto of_layer = pyramid_of_layers(double(want.total) / heads, room / heads, beta, want.layers);
  std::vector<double> weight;
  for (std::size_t h = 0; h < want.size(); ++h) weight.push_back(std::max(1e-9, of_layer[h / want.heads]));
  return divide(want.total, weight, want.floor, want.seen);
}

// H(p) / ln n for p = scores over their sum; what stays anyway, of score infinity or the largest float, is not among them.
inline double spread(const Asked& want, std::size_t layer) {
  std::vector<double> x;
  for (std::size_t h = layer * want.heads; h < (layer + 1) * want.heads; ++h) {
    for (const double s : want.scores[h]) {
      if (std::fabs(s) < double(std::numeric_limits<float>::max())) x.push_back(s);
    }
  }
  if (x.size() < 2) return 0;
  const double least = *std::min_element(x.begin(), x.end());
  if (least < 0) {
    for (double& s : x) s -= least;
  }
  const double total = std::accumulate(x.begin(), x.end(), 0.0);
  if (total == 0) return 1;  // all alike, as near as a limit goes
  double entropy = 0;
  for (const double s : x) entropy += s > 0 ? -(s / total) * std::log(s / total) : 0;
  return entropy / std::log(double(x.size()));
}
inline Shares lava(const Asked& want, double even) {
  std::vector<double> entropy;
  std::vector<long long> none(want.layers, 0), room(want.layers, 0);
  long long left = want.total;
  for (std::size_t l = 0; l < want.layers; ++l) {
    entropy.push_back(std::max(1e-9, spread(want, l)));
    for (std::size_t h = l * want.heads; h < (l + 1) * want.heads; ++h) {
      room[l] += want.seen[h] - want.floor[h];
      left -= want.floor[h];
    }
  }
  const Shares layer = divide(left, entropy, none, room);
  Shares shares;
  shares.sure = layer.sure;
  shares.rows = want.floor;
  for (std::size_t l = 0; l < want.layers; ++l) {
    const std::size_t first = l * want.heads;
    const auto highest = take_highest(want, first, first + want.heads, layer.rows[l], want.floor);
    std::vector<double> weight;
    std::vector<long long> lower(want.heads, 0), upper;
    for (std::size_t h = first; h < first + want.heads; ++h) {
      const double by_score = double(highest[h] - want.floor[h]), alike = double(layer.rows[l]) / double(want.heads);
      weight.push_back(std::max(1e-9, (1 - even) * by_score + even * alike));
      upper.push_back(want.seen[h] - want.floor[h]);
    }
    const Shares own = divide(layer.rows[l], weight, lower, upper);
    shares.sure = shares.sure && own.sure;
    for (std::size_t h = 0; h < want.heads; ++h) shares.rows[first + h] += own.rows[h];
  }
  return shares;
}

// Three contiguous groups of sorted numbers: those before `first`, those before `second` and the others.
struct Groups {
  std::size_t first = 0, second = 0;
  friend bool operator==(const Groups&, const Groups&) = default;
};

// Lloyd's steps from the least, the middle and the largest number; of equally near centres the lower; a group that is empty
// keeps its centre. All alike: one group, the lowest.
inline Groups lloyd(const std::vector<double>& sorted) {
  const std::size_t n = sorted.size();
  double centre[3] = {sorted[0], (sorted[0] + sorted[n - 1]) / 2, sorted[n - 1]};
  Groups groups{n + 1, n + 1}, next;
  while (true) {
    next = {0, 0};
    for (const double x : sorted) {
      const double to[3] = {std::fabs(x - centre[0]), std::fabs(x - centre[1]), std::fabs(x - centre[2])};
      const bool lowest = to[0] <= to[1] && to[0] <= to[2];
      next.first += lowest;
      next.second += lowest || to[1] <= to[2];
    }
    if (next == groups) return groups;
    groups = next;
    const std::size_t ends[4] = {0, groups.first, groups.second, n};
    for (int k = 0; k < 3; ++k) {
      double sum = 0;
      for (std::size_t i = ends[k]; i < ends[k + 1]; ++i) sum += sorted[i];
      if (ends[k + 1] > ends[k]) centre[k] = sum / double(ends[k + 1] - ends[k]);
    }
  }
}

// Sum of squared distances to the means of the groups.
inline double squares(const std::vector<double>& sorted, const Groups& groups) {
  const std::size_t ends[4] = {0, groups.first, groups.second, sorted.size()};
  double all = 0;
  for (int k = 0; k < 3; ++k) {
    double sum = 0;
    for (std::size_t i = ends[k]; i < ends[k + 1]; ++i) sum += sorted[i];
    for (std::size_t i = ends[k]; i < ends[k + 1]; ++i) {
      const double e = sorted[i] - sum / double(ends[k + 1] - ends[k]);
      all += e * e;
    }
  }
  return all;
}
// The least of all there are.
inline Groups best_groups(const std::vector<double>& sorted) {
  Groups best{sorted.size(), sorted.size()};
  for (std::size_t first = 0; first <= sorted.size(); ++first) {
    for (std::size_t second = first; second <= sorted.size(); ++second) {
      if (squares(sorted, {first, second}) < squares(sorted, best)) best = {first, second};
    }
  }
  return best;
}

// lazy: the layers of the highest group.
inline Shares squeeze_attention(const Asked& want, double share, const std::vector<bool>& lazy) {
  const double all = double(want.layers), less = double(std::count(lazy.begin(), lazy.end(), true));
  std::vector<double> weight;
  for (std::size_t h = 0; h < want.size(); ++h) {
    const double rest = less < all ? 1 + less * (1 - share) / (all - less) : 1;
    weight.push_back(std::max(1e-9, lazy[h / want.heads] && less < all ? share : rest));
  }
  return divide(want.total, weight, want.floor, want.seen);
}

inline Shares streaming_heads(const Asked& want, long long rows, const std::vector<float>& gates) {
  Shares shares;
  long long left = want.total;
  for (std::size_t h = 0; h < want.size(); ++h) {
    shares.rows.push_back(std::min(std::max(rows, want.floor[h]), want.seen[h]));
    left -= shares.rows[h];
  }
  if (left < 0) return divide(want.total, std::vector<double>(want.size(), 1.0), want.floor, shares.rows);
  std::vector<bool> done(want.size(), false);
  while (left > 0) {
    std::size_t best = want.size();
    for (std::size_t h = 0; h < want.size(); ++h) {
      if (!done[h] && (best == want.size() || gates[h] > gates[best])) best = h;
    }
    if (best == want.size()) break;
    done[best] = true;
    for (; left > 0 && shares.rows[best] < want.seen[best]; --left) ++shares.rows[best];
  }
  return shares;
}

// table [steps, layers, heads], of rows that are not protected; nothing is dropped at step 0, all at the one after the last.
inline Shares curve(const Asked& want, const std::vector<float>& table) {
  const std::size_t heads = want.size(), steps = table.size() / heads;
  std::vector<std::vector<double>> all(1, std::vector<double>(heads, 0));
  for (std::size_t s = 0; s < steps; ++s)
    all.emplace_back(table.begin() + long(s * heads), table.begin() + long((s + 1) * heads));
  all.emplace_back(heads, 1);
  all.emplace_back(heads, 1);
  long long free = 0, total = want.total;
  std::vector<long long> none(heads, 0), most;
  for (std::size_t h = 0; h < heads; ++h) {
    most.push_back(want.seen[h] - want.floor[h]);
    free += most.back();
    total -= want.floor[h];
  }
  const long long parts = free > 0 ? (free - total) * static_cast<long long>(steps + 1) : 0;
  const auto step = static_cast<std::size_t>(free > 0 ? parts / free : 0);
  const double part = free > 0 ? double(parts % free) / double(free) : 0;
  std::vector<double> weight;
  for (std::size_t h = 0; h < heads; ++h) {
    const double own = (1 - part) * all[step][h] + part * all[step + 1][h];
    weight.push_back(std::max(1e-9, (1 - own) * double(most[h])));
  }
  Shares shares = divide(total, weight, none, most);
  for (std::size_t h = 0; h < heads; ++h) shares.rows[h] += want.floor[h], shares.ideal[h] += want.floor[h];
  return shares;
}

}  // namespace reference
