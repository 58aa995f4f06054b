// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What selectors and the evidence for them have to give, as plain loops in double precision that share no code with the
// library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <map>
#include <utility>
#include <vector>

namespace reference {

using Index = std::size_t;
using Vector = std::vector<double>;

inline constexpr double infinite = std::numeric_limits<double>::infinity();

inline double norm(const double* x, Index dim) {
  double sum = 0;
  for (Index i = 0; i < dim; ++i) sum += x[i] * x[i];
  return std::sqrt(sum);
}
inline double norm(const float* x, Index dim) { return norm(Vector(x, x + dim).data(), dim); }

// ---- RoPE ----

struct Turning {
  int rotary = 0;
  double base = 10000, scale = 1;
  bool adjacent = true;
  std::vector<float> factors = {};

  // The matrix [dim, dim] that turns a row to a position.
  Vector matrix(Index dim, long long position) const {
    Vector to(dim * dim, 0.0);
    for (Index i = 0; i < dim; ++i) to[i * dim + i] = 1;
    const Index half = Index(rotary) / 2;
    for (Index i = 0; i < half; ++i) {
      double angle = double(position) * scale / std::pow(base, 2.0 * double(i) / rotary);
      if (!factors.empty()) angle /= double(factors[i]);
      const Index x = adjacent ? 2 * i : i, y = adjacent ? 2 * i + 1 : i + half;
      to[x * dim + x] = to[y * dim + y] = std::cos(angle);
      to[x * dim + y] = -std::sin(angle);
      to[y * dim + x] = std::sin(angle);
    }
    return to;
  }
};

// matrix x, or the transposed matrix times x.
inline Vector times(const Vector& matrix, const Vector& x, bool transposed = false) {
  const Index dim = x.size();
  Vector to(dim, 0.0);
  for (Index i = 0; i < dim; ++i) {
    for (Index j = 0; j < dim; ++j) to[i] += matrix[transposed ? j * dim + i : i * dim + j] * x[j];
  }
  return to;
}
// A row as it was before RoPE turned it to a position.
inline Vector turned_back(const Turning& rope, const float* row, Index dim, int position) {
  return times(rope.matrix(dim, position), Vector(row, row + dim), true);
}

struct Moments {
  Vector mean, covariance;  // [dim], [dim, dim]
};
// Of queries [n][dim].
inline Moments moments(const std::vector<Vector>& queries) {
  const Index dim = queries.front().size();
  const double n = double(queries.size());
  Moments of{Vector(dim, 0.0), Vector(dim * dim, 0.0)};
  for (const Vector& q : queries) {
    for (Index i = 0; i < dim; ++i) of.mean[i] += q[i] / n;
  }
  for (const Vector& q : queries) {
    for (Index i = 0; i < dim; ++i) {
      for (Index j = 0; j < dim; ++j) of.covariance[i * dim + j] += (q[i] - of.mean[i]) * (q[j] - of.mean[j]) / n;
    }
  }
  return of;
}

// ---- attention ----

struct Attend {
  double scale = 0, soft_cap = 0;  // 0: 1 / sqrt(dim); none
  int sliding = 0;
};

// Softmax weights [rows] of one query; rows it does not see have none. A sink logit, unless -inf, takes a share too.
inline Vector weights(const std::vector<float>& keys, const std::vector<int>& positions, const float* query, Index dim,
                      int position, const Attend& how = {}, double sink_logit = -infinite) {
  Vector weight(positions.size(), 0.0);
  double largest = sink_logit;
  const auto logit = [&](Index r) {
    double x = 0;
    for (Index i = 0; i < dim; ++i) x += double(keys[r * dim + i]) * double(query[i]);
    x *= how.scale != 0 ? how.scale : 1 / std::sqrt(double(dim));
    return how.soft_cap > 0 ? how.soft_cap * std::tanh(x / how.soft_cap) : x;
  };
  const auto sees = [&](Index r) {
    return positions[r] <= position && (how.sliding == 0 || positions[r] > position - how.sliding);
  };
  for (Index r = 0; r < positions.size(); ++r) {
    if (sees(r)) largest = std::max(largest, logit(r));
  }
  double sum = std::isinf(sink_logit) ? 0 : std::exp(sink_logit - largest);
  for (Index r = 0; r < positions.size(); ++r) {
    if (sees(r)) sum += weight[r] = std::exp(logit(r) - largest);
  }
  for (double& w : weight) w = sum > 0 ? w / sum : 0;
  return weight;
}

struct Given {
  double sum = 0, largest = 0;
  int queries = 0;
};
// What queries [n, group, dim] gave to the rows of a head, added to what they had. A row counts the queries that could see it.
inline void give(std::vector<Given>& rows, const std::vector<float>& keys, const std::vector<int>& positions,
                 const std::vector<float>& queries, const std::vector<int>& query_positions, Index group, Index dim,
                 const Attend& how = {}, const Vector& sink_logits = {}) {
  rows.resize(positions.size());
  for (Index q = 0; q < query_positions.size(); ++q) {
    for (Index g = 0; g < group; ++g) {
      const Vector weight = weights(keys, positions, &queries[(q * group + g) * dim], dim, query_positions[q], how,
                                    sink_logits.empty() ? -infinite : sink_logits[g]);
      for (Index r = 0; r < rows.size(); ++r) {
        rows[r].sum += weight[r] / double(group);
        rows[r].largest = std::max(rows[r].largest, weight[r]);
      }
    }
    for (Index r = 0; r < rows.size(); ++r) {
      const int age = query_positions[q] - positions[r];
      rows[r].queries += age >= 0 && (how.sliding == 0 || age < how.sliding) ? 1 : 0;
    }
  }
}

// ---- selectors ----

// One head. Queries are those of the window, [window, group, dim].
struct SelectorInput {
  Index dim = 0, group = 0;
  std::vector<float> keys, values, queries;
  std::vector<int> positions, window_positions;
  Attend attend = {};
};

inline Vector key_norm(const std::vector<float>& keys, Index dim) {
  Vector score;
  for (Index at = 0; at < keys.size(); at += dim) score.push_back(-norm(&keys[at], dim));
  return score;
}

// The last query: mean or maximum over the group. Rows at its position and after it get +inf.
inline Vector last_query(const SelectorInput& in, bool maximum) {
  Vector score(in.positions.size(), 0.0);
  const Index last = in.window_positions.size() - 1;
  for (Index g = 0; g < in.group; ++g) {
    const Vector weight = weights(in.keys, in.positions, &in.queries[(last * in.group + g) * in.dim], in.dim,
                                  in.window_positions[last], in.attend);
    for (Index r = 0; r < score.size(); ++r) {
      score[r] = maximum ? std::max(score[r], weight[r]) : score[r] + weight[r] / double(in.group);
    }
  }
  for (Index r = 0; r < score.size(); ++r) {
    if (in.positions[r] >= in.window_positions[last]) score[r] = infinite;
  }
  return score;
}

using Layer = std::vector<std::vector<int>>;  // positions of each head

// TOVA's heads: a position scores the mean over the heads that have it.
inline void join_mean(const Layer& positions, std::vector<Vector>& scores) {
  std::map<int, Vector> at;
  for (Index h = 0; h < positions.size(); ++h) {
    for (Index r = 0; r < positions[h].size(); ++r) at[positions[h][r]].push_back(scores[h][r]);
  }
  for (Index h = 0; h < positions.size(); ++h) {
    for (Index r = 0; r < positions[h].size(); ++r) {
      const Vector& all = at[positions[h][r]];
      double sum = 0;
      for (const double x : all) sum += x;
      scores[h][r] = sum / double(all.size());
    }
  }
}

// ChunkKV: a run of positions scores the sum over heads of the mean of their rows in it.
inline void join_chunks(const Layer& positions, std::vector<Vector>& scores, int length) {
  std::vector<Vector> next = scores;
  for (Index h = 0; h < positions.size(); ++h) {
    for (Index r = 0; r < positions[h].size(); ++r) {
      const int chunk = positions[h][r] / length;
      next[h][r] = 0;
      for (Index other = 0; other < positions.size(); ++other) {
        double sum = 0;
        int count = 0;
        for (Index i = 0; i < positions[other].size(); ++i) {
          if (positions[other][i] / length == chunk) sum += scores[other][i], ++count;
        }
        if (count > 0) next[h][r] += sum / count;
      }
    }
  }
  scores = next;
}

struct ExpectedInput {
  Index dim = 0, group = 0;
  std::vector<float> keys, values, mean, covariance;  // covariance empty: not used
  std::vector<int> positions;
  Turning rope;
  double scale = 0, epsilon = 0;
  int begin = 0, future = 0, sinks = 0;
  bool value_norm = true;
};
struct Expected {
  Vector score;
  double size = 0;  // of logits at most, when all products in them are positive
};
// Expected Attention: R, the mean of RoPE's matrices at the future positions; log of E exp(scale k . R q) for normal q;
// softmax.
inline Expected expected_attention(const ExpectedInput& in) {
  const Index d = in.dim, n = in.positions.size();
  const double scale = in.scale != 0 ? in.scale : 1 / std::sqrt(double(d));
  Vector turn(d * d, 0.0);
  for (int t = 0; t < in.future; ++t) {
    const Vector one = in.rope.matrix(d, in.begin + t);
    for (Index i = 0; i < d * d; ++i) turn[i] += one[i] / in.future;
  }
  Expected of{Vector(n, 0.0)};
  for (Index g = 0; g < in.group; ++g) {
    const float *const m = &in.mean[g * d], *const s = in.covariance.empty() ? nullptr : &in.covariance[g * d * d];
    const Vector mean = times(turn, Vector(m, m + d));
    Vector logit(n, 0.0);
    double largest = -infinite, sum = 0;
    for (Index r = 0; r < n; ++r) {
      const Vector key(&in.keys[r * d], &in.keys[r * d] + d), back = times(turn, key, true);
      for (Index i = 0; i < d; ++i) logit[r] += scale * key[i] * mean[i];
      double form = 0, spread = 0;
      for (Index i = 0; s != nullptr && i < d; ++i) {
        for (Index j = 0; j < d; ++j) {
          form += back[i] * double(s[i * d + j]) * back[j];
          spread += double(s[i * d + j]) * double(s[i * d + j]);
        }
      }
      logit[r] += scale * scale / 2 * form;
      const double length = norm(key.data(), d);
      of.size = std::max(of.size, scale * length * norm(m, d) + scale * scale / 2 * length * length * std::sqrt(spread));
      if (in.positions[r] >= in.sinks) largest = std::max(largest, logit[r]);
    }
    for (Index r = 0; r < n; ++r) sum += in.positions[r] >= in.sinks ? std::exp(logit[r] - largest) : 0;
    for (Index r = 0; r < n; ++r) of.score[r] += std::exp(logit[r] - largest) / sum / double(in.group);
  }
  for (Index r = 0; r < n; ++r) {
    if (in.value_norm) of.score[r] = (of.score[r] + in.epsilon) * norm(&in.values[r * d], d);
    if (in.positions[r] < in.sinks) of.score[r] = infinite;
  }
  return of;
}

// LagKV: a row's deviation over channels once these are scaled by what the next part has; softmax in the part; rank.
inline Vector lag_kv(const std::vector<float>& keys, const std::vector<float>& values, Index dim, int lag, int sinks,
                     bool cross) {
  const int n = int(keys.size() / dim), parts = std::max(0, n - sinks) / lag;
  Vector score(Index(n), 1.0);
  if (parts < 2) {
    for (int r = sinks; r < n; ++r) score[Index(r)] = double(r - sinks) / (n - sinks);
    return score;
  }
  const auto deviations = [&](const std::vector<float>& x, int part) {
    const auto at = [&](int row, Index d) { return double(x[Index(sinks + part * lag + row) * dim + d]); };
    Vector out;
    double sum = 0;
    for (int row = 0; row < lag; ++row) {
      Vector scaled(dim, 0.0);
      double mean = 0, squares = 0;
      for (Index d = 0; d < dim; ++d) {
        double low = infinite, high = -infinite;
        for (int i = lag; i < 2 * lag; ++i) low = std::min(low, at(i, d)), high = std::max(high, at(i, d));
        scaled[d] = high > low ? (at(row, d) - low) / (high - low) : 0;
        mean += scaled[d] / double(dim);
      }
      for (Index d = 0; d < dim; ++d) squares += (scaled[d] - mean) * (scaled[d] - mean);
      out.push_back(std::sqrt(squares / double(dim - 1)));
    }
    const double largest = *std::max_element(out.begin(), out.end());
    for (double& y : out) sum += y = std::exp(y - largest);
    for (double& y : out) y /= sum;
    return out;
  };
  for (int part = 0; part + 1 < parts; ++part) {
    const Vector of_keys = deviations(keys, part), of_values = deviations(values, part);
    Vector own(of_keys.size());
    for (Index i = 0; i < own.size(); ++i) own[i] = (of_keys[i] + of_values[i]) / 2;
    for (Index i = 0; i < own.size(); ++i) {
      int below = 0;  // rows that rank lower; of equal ones those that come later
      for (Index j = 0; j < own.size(); ++j) below += own[j] < own[i] || (own[j] == own[i] && j > i) ? 1 : 0;
      score[Index(sinks + part * lag) + i] = cross ? own[i] : double(below) / lag;
    }
  }
  return score;
}

// a x = b by elimination with the largest pivot.
inline Vector solve(Vector a, Vector b) {
  const Index n = b.size();
  for (Index k = 0; k < n; ++k) {
    Index pivot = k;
    for (Index i = k; i < n; ++i) pivot = std::fabs(a[i * n + k]) > std::fabs(a[pivot * n + k]) ? i : pivot;
    for (Index j = 0; j < n; ++j) std::swap(a[k * n + j], a[pivot * n + j]);
    std::swap(b[k], b[pivot]);
    for (Index i = k + 1; i < n; ++i) {
      const double by = a[i * n + k] / a[k * n + k];
      for (Index j = k; j < n; ++j) a[i * n + j] -= by * a[k * n + j];
      b[i] -= by * b[k];
    }
  }
  for (Index k = n; k-- > 0;) {
    for (Index j = k + 1; j < n; ++j) b[k] -= a[k * n + j] * b[j];
    b[k] /= a[k * n + k];
  }
  return b;
}

struct Leverages {
  Vector score, solved;  // solved: length of (X'X + ridge)^-1 x, of each row
  double rows = 0;       // size of X
  double key = 0;        // of the longest key, mean apart
};
// Statistical leverage of keys before RoPE, their mean taken away, through a matrix [dim, sketch].
inline Leverages leverage(const std::vector<float>& keys, const std::vector<int>& positions, const Turning& rope,
                          const Vector& matrix, Index dim, double ridge) {
  const Index n = positions.size(), sketch = matrix.size() / dim;
  std::vector<Vector> before, rows;
  Vector mean(dim, 0.0), square(sketch * sketch, 0.0);
  for (Index r = 0; r < n; ++r) {
    before.push_back(turned_back(rope, &keys[r * dim], dim, positions[r]));
    for (Index i = 0; i < dim; ++i) mean[i] += before[r][i] / double(n);
  }
  Leverages of;
  for (Vector& key : before) {
    for (Index i = 0; i < dim; ++i) key[i] -= mean[i];
    of.key = std::max(of.key, norm(key.data(), dim));
    Vector& row = rows.emplace_back(sketch, 0.0);
    for (Index j = 0; j < sketch; ++j) {
      for (Index i = 0; i < dim; ++i) row[j] += key[i] * matrix[i * sketch + j];
    }
    for (Index i = 0; i < sketch; ++i) {
      for (Index j = 0; j < sketch; ++j) square[i * sketch + j] += row[i] * row[j];
      of.rows += row[i] * row[i];
    }
  }
  of.rows = std::sqrt(of.rows);
  for (Index i = 0; i < sketch; ++i) square[i * sketch + i] += ridge;
  for (const Vector& row : rows) {
    const Vector x = solve(square, row);
    of.score.push_back(0);
    for (Index i = 0; i < sketch; ++i) of.score.back() += row[i] * x[i];
    of.solved.push_back(norm(x.data(), sketch));
  }
  return of;
}

struct Projected {
  Vector sum, root;                // mean over the group of |W v|_1 and of |W v|
  Vector sum_terms, square_terms;  // the same with all products positive: |W| |v|, and its square over twice |W v|
};
// weights [width, stride]: of query head g from element g * dim on.
inline Projected projected(const std::vector<float>& values, Index dim, const float* weight, Index width, Index stride,
                           Index group) {
  Projected of;
  for (Index at = 0; at < values.size(); at += dim) {
    double sum = 0, root = 0, sum_terms = 0, square_terms = 0;
    for (Index g = 0; g < group; ++g) {
      double squares = 0, all = 0;
      for (Index o = 0; o < width; ++o) {
        double x = 0, terms = 0;
        for (Index d = 0; d < dim; ++d) {
          const double product = double(weight[o * stride + g * dim + d]) * double(values[at + d]);
          x += product;
          terms += std::fabs(product);
        }
        sum += std::fabs(x) / double(group);
        sum_terms += terms / double(group);
        squares += x * x;
        all += terms * terms;
      }
      root += std::sqrt(squares) / double(group);
      square_terms += all / (2 * std::sqrt(squares)) / double(group);
    }
    of.sum.push_back(sum);
    of.root.push_back(root);
    of.sum_terms.push_back(sum_terms);
    of.square_terms.push_back(square_terms);
  }
  return of;
}

// CriticalKV's first stage: the `count` rows with the highest scores; of equal ones the earlier.
inline std::vector<bool> highest(const Vector& score, int count) {
  std::vector<bool> in(score.size(), false);
  for (int k = 0; k < count; ++k) {
    Index best = score.size();
    for (Index r = 0; r < score.size(); ++r) {
      if (!in[r] && (best == score.size() || score[r] > score[best])) best = r;
    }
    in[best] = true;
  }
  return in;
}

// CAOTE: how far the output of attention moves when one row is taken out and the weights of the others are scaled to one again.
inline Vector output_movement(const Vector& weight, const std::vector<float>& values, Index dim) {
  const auto output = [&](Index without) {
    double total = 0;
    Vector sum(dim, 0.0);
    for (Index r = 0; r < weight.size(); ++r) total += r == without ? 0 : weight[r];
    for (Index r = 0; r < weight.size(); ++r) {
      for (Index d = 0; d < dim; ++d) sum[d] += r == without ? 0 : weight[r] / total * double(values[r * dim + d]);
    }
    return sum;
  };
  const Vector all = output(weight.size());
  Vector score;
  for (Index r = 0; r < weight.size(); ++r) {
    Vector moved = output(r);
    for (Index d = 0; d < dim; ++d) moved[d] -= all[d];
    score.push_back(norm(moved.data(), dim));
  }
  return score;
}

// LAVa: attention of the window, largest over the group once pooled, times the largest |v|_1 before the window.
inline Vector lava(const SelectorInput& in, int kernel) {
  const int n = int(in.positions.size());
  const Index count = in.window_positions.size();
  Vector score(in.positions.size(), 0.0);
  double length = 0;
  const auto before = [&](int r) { return r >= 0 && r < n && in.positions[Index(r)] < in.window_positions.front(); };
  for (int r = 0; before(r); ++r) {
    double sum = 0;
    for (Index d = 0; d < in.dim; ++d) sum += std::fabs(double(in.values[Index(r) * in.dim + d]));
    length = std::max(length, sum);
  }
  for (Index g = 0; g < in.group; ++g) {
    Vector mass(in.positions.size(), 0.0);
    for (Index w = 0; w < count; ++w) {
      const Vector weight =
          weights(in.keys, in.positions, &in.queries[(w * in.group + g) * in.dim], in.dim, in.window_positions[w], in.attend);
      for (Index r = 0; r < mass.size(); ++r) mass[r] += weight[r] / double(count);
    }
    for (int r = 0; before(r); ++r) {
      for (int i = r - kernel / 2; i <= r + kernel / 2; ++i) {
        if (before(i)) score[Index(r)] = std::max(score[Index(r)], mass[Index(i)] * length);
      }
    }
  }
  for (int r = 0; r < n; ++r) {
    if (!before(r)) score[Index(r)] = infinite;
  }
  return score;
}

}  // namespace reference
