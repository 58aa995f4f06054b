// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Budget allocators against plain loops, and what all of them have to hold to, for whatever they are asked.
#include <doctest/doctest.h>

#include <functional>
#include <numeric>
#include <random>
#include <string>

#include "kvtailor/budget/any_allocator.hpp"
#include "kvtailor/budget/request.hpp"
#include "reference/allocators.hpp"

using namespace kvt;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int steps = 99;  // of a published curve

// A request and what its spans show.
struct Request {
  std::vector<int> seen, floor;
  std::vector<float> scores, similarity, gates, table;
  BudgetRequest want;

  Request() = default;
  // Rows and floors of each head; score(head, row) of rows that are not protected, the newest being so.
  template <class Score>
  Request(std::mt19937& random, int layers, int heads, std::vector<int> rows, std::vector<int> least, Score&& score)
      : seen(std::move(rows)), floor(std::move(least)) {
    for (std::size_t h = 0; h < seen.size(); ++h) {
      for (int r = 0; r < seen[h]; ++r) scores.push_back(r >= seen[h] - floor[h] ? infinity : score(static_cast<int>(h), r));
    }
    std::uniform_real_distribution<float> part(0, 1);
    for (int l = 0; l < layers; ++l) similarity.push_back(part(random));
    for (std::size_t h = 0; h < seen.size(); ++h) gates.push_back(part(random));
    for (std::size_t i = 0; i < steps * seen.size(); ++i) table.push_back(part(random));
    want = {least_total(), layers, heads, seen, floor, scores, similarity};
  }
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;

  std::int64_t least_total() const { return std::accumulate(floor.begin(), floor.end(), std::int64_t{0}); }
  std::int64_t most_total() const { return std::accumulate(seen.begin(), seen.end(), std::int64_t{0}); }
  std::vector<std::int64_t> totals() const {
    const std::int64_t least = least_total(), most = most_total();
    std::vector<std::int64_t> all;
    for (const std::int64_t t : {least, least + 1, least + 2, (least + most) / 2, most - 1, most}) {
      if (t >= least && t <= most) all.push_back(t);
    }
    return all;
  }
  reference::Asked asked() const {
    reference::Asked out{want.total,
                         static_cast<std::size_t>(want.num_layers),
                         static_cast<std::size_t>(want.num_kv_heads),
                         {seen.begin(), seen.end()},
                         {floor.begin(), floor.end()},
                         {}};
    auto at = scores.begin();
    for (const int n : seen) {
      out.scores.emplace_back(at, at + n);
      at += n;
    }
    return out;
  }
};

// What becomes of scores matters to some: spread over many rows or few, above zero or not, with ties or without.
float any_score(std::mt19937& random, int kind) {
  std::normal_distribution<float> normal;
  switch (kind % 5) {
    case 0:
      return normal(random);
    case 1:
      return std::exp(3 * normal(random));
    case 2:
      return static_cast<float>(random() % 4);
    case 3:
      return std::fabs(normal(random)) * 1e-30f;
    default:
      return 1.f / static_cast<float>(1 + random() % 1000);
  }
}

Request any_request(std::mt19937& random, int layers, int heads, int most_rows, int kind) {
  std::vector<int> rows, least;
  const unsigned most_floor = random() % 3 == 0 ? 40 : 4;
  for (int h = 0; h < layers * heads; ++h) {
    rows.push_back(static_cast<int>(random() % static_cast<unsigned>(most_rows + 1)));
    least.push_back(std::min(rows.back(), static_cast<int>(random() % most_floor)));
  }
  return Request(random, layers, heads, rows, least,
                 [&](int h, int) { return any_score(random, kind / 5 % 2 == 0 ? kind : kind + h); });
}
void ask(Request& r, std::mt19937& random) {
  const std::int64_t least = r.least_total(), most = r.most_total();
  r.want.total = least + static_cast<std::int64_t>(random() % static_cast<unsigned>(most - least + 1));
}

struct Named {
  std::string name;
  AnyAllocator budget;
};
// Those that look at no scores.
std::vector<Named> blind_allocators(const Request& r) {
  std::vector<Named> all;
  all.push_back({"Uniform", AnyAllocator(Uniform{})});
  for (const double beta : {1.0, 2.0, 20.0, 1e9}) all.push_back({"Pyramid", AnyAllocator(Pyramid{beta})});
  for (const double share : {0.0, 0.35, 1.0}) all.push_back({"SqueezeAttention", AnyAllocator(SqueezeAttention{share})});
  for (const int rows : {0, 3, 384}) all.push_back({"StreamingHeads", AnyAllocator(StreamingHeads{r.gates, rows})});
  all.push_back({"Curve", AnyAllocator(Curve{r.table})});
  all.push_back({"Curve of one step",
                 AnyAllocator(Curve{{r.table.begin(), r.table.begin() + static_cast<std::ptrdiff_t>(r.seen.size())}})});
  return all;
}
std::vector<Named> all_allocators(const Request& r) {
  std::vector<Named> all = blind_allocators(r);
  for (const double part : {0.0, 0.2, 0.5, 1.0}) {
    all.push_back({"Adaptive", AnyAllocator(Adaptive{part})});
    all.push_back({"Global", AnyAllocator(Global{part})});
    all.push_back({"Lava", AnyAllocator(Lava{part})});
  }
  return all;
}

std::vector<int> kept(const Named& policy, const BudgetRequest& want) {
  std::vector<int> keep(want.seen.size(), -1);
  const Status status = policy.budget.allocate(want, keep);
  if (!status.ok()) FAIL(policy.name << ": " << status.message());
  return keep;
}
void check_bounds(const Named& policy, const BudgetRequest& want, const std::vector<int>& keep) {
  std::int64_t sum = 0;
  for (std::size_t h = 0; h < keep.size(); ++h) {
    sum += keep[h];
    if (!(keep[h] >= want.floor[h] && keep[h] <= want.seen[h])) {
      FAIL(policy.name << ": head " << h << " keeps " << keep[h] << " of " << want.floor[h] << " .. " << want.seen[h]);
    }
  }
  if (sum != want.total) FAIL(policy.name << " keeps " << sum << " rows, not " << want.total);
}
void check_totals(Request& r, const std::vector<Named>& policies) {
  for (const std::int64_t total : r.totals()) {
    r.want.total = total;
    for (const Named& policy : policies) check_bounds(policy, r.want, kept(policy, r.want));
  }
}

template <class Budget>
std::vector<int> kept_by(const Budget& budget, const BudgetRequest& want) {
  return kept({"one", AnyAllocator(budget)}, want);
}

// Counts of an allocator are those of the oracle, but where rounding of a share's last digits decides.
template <class Make, class Oracle>
void check_counts(unsigned seed, int rounds, Make&& make, Oracle&& oracle) {
  std::mt19937 random(seed);
  int unsure = 0;
  for (int round = 0; round < rounds; ++round) {
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    Request r = any_request(random, 1 + below(5), 1 + below(5), 1 + below(120), below(10));
    ask(r, random);
    const Named policy{"this", AnyAllocator(make(r, round))};
    const std::vector<int> keep = kept(policy, r.want);
    check_bounds(policy, r.want, keep);
    const reference::Shares shares = oracle(r.asked(), r, round);
    if (!shares.sure) {
      ++unsure;
      continue;
    }
    for (std::size_t h = 0; h < keep.size(); ++h) {
      if (keep[h] != shares.rows[h]) {
        FAIL("round " << round << ", " << r.want.num_layers << " layers of " << r.want.num_kv_heads << ": head " << h
                      << " keeps " << keep[h] << ", not " << shares.rows[h]);
      }
    }
  }
  INFO("rounds where rounding decides: " << unsure);
  CHECK(unsure <= rounds / 8);
}

// Safeguards 1 / whole, whose product with an even share is a whole number only where that is one; 0 is none.
constexpr int wholes[] = {0, 1, 2, 4, 5};
double safeguard(int round) { return wholes[round % 5] > 0 ? 1.0 / wholes[round % 5] : 0; }

std::vector<int> permuted(const std::vector<int>& x, const std::vector<std::size_t>& order) {
  std::vector<int> out;
  for (const std::size_t h : order) out.push_back(x[h]);
  return out;
}
// Heads in another order, all or within their layers; layers stay where they are.
struct Permuted {
  std::vector<std::size_t> order;  // head h is what order[h] was
  Request r;

  Permuted(const Request& from, std::mt19937& random, bool across) : order(from.seen.size()) {
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto heads = static_cast<std::ptrdiff_t>(from.want.num_kv_heads);
    for (auto at = order.begin(); at != order.end(); at += across ? order.end() - at : heads) {
      std::shuffle(at, across ? order.end() : at + heads, random);
    }
    r.similarity = from.similarity;
    r.seen = permuted(from.seen, order);
    r.floor = permuted(from.floor, order);
    for (const std::size_t h : order) {
      r.gates.push_back(from.gates[h]);
      const auto begin =
          from.scores.begin() + std::accumulate(from.seen.begin(), from.seen.begin() + static_cast<std::ptrdiff_t>(h), 0);
      r.scores.insert(r.scores.end(), begin, begin + from.seen[h]);
    }
    for (std::size_t step = 0; step < steps; ++step) {
      for (const std::size_t h : order) r.table.push_back(from.table[step * order.size() + h]);
    }
    r.want = {from.want.total, from.want.num_layers, from.want.num_kv_heads, r.seen, r.floor, r.scores, r.similarity};
  }
};

}  // namespace

TEST_CASE("Uniform keeps what an even share is") {
  check_counts(
      1, 2000, [](const Request&, int) { return Uniform{}; },
      [](const reference::Asked& want, const Request&, int) {
        return reference::divide(want.total, std::vector<double>(want.size(), 1.0), want.floor, want.seen);
      });
}

TEST_CASE("Adaptive keeps what the plain loops keep") {
  check_counts(
      2, 3000, [](const Request&, int round) { return Adaptive{safeguard(round)}; },
      [](const reference::Asked& want, const Request&, int round) { return reference::adaptive(want, wholes[round % 5]); });
}

TEST_CASE("Global keeps what the plain loops keep") {
  check_counts(
      3, 3000, [](const Request&, int round) { return Global{safeguard(round)}; },
      [](const reference::Asked& want, const Request&, int round) { return reference::global(want, wholes[round % 5]); });
}

TEST_CASE("Pyramid keeps what the plain loops keep") {
  constexpr double betas[] = {1, 1.5, 20, 1000};
  check_counts(
      4, 3000, [&](const Request&, int round) { return Pyramid{betas[round % 4]}; },
      [&](const reference::Asked& want, const Request&, int round) { return reference::pyramid(want, betas[round % 4]); });
}

TEST_CASE("Lava keeps what the plain loops keep, whose entropy is that of the definition") {
  constexpr double evens[] = {0, 0.25, 0.5, 1};
  check_counts(
      5, 3000, [&](const Request&, int round) { return Lava{evens[round % 4]}; },
      [&](const reference::Asked& want, const Request&, int round) { return reference::lava(want, evens[round % 4]); });
}

TEST_CASE("SqueezeAttention keeps what the plain loops keep") {
  constexpr double shares[] = {0, 0.35, 0.7, 1};
  check_counts(
      6, 3000, [&](const Request&, int round) { return SqueezeAttention{shares[round % 4]}; },
      [&](const reference::Asked& want, const Request& r, int round) {
        std::vector<double> sorted(r.similarity.begin(), r.similarity.end());
        std::sort(sorted.begin(), sorted.end());
        const reference::Groups groups = reference::lloyd(sorted);
        std::vector<bool> lazy;
        for (const float x : r.similarity) {
          lazy.push_back(groups.second < sorted.size() && static_cast<double>(x) >= sorted[groups.second]);
        }
        return reference::squeeze_attention(want, shares[round % 4], lazy);
      });
}

TEST_CASE("StreamingHeads keeps what the plain loops keep") {
  check_counts(
      7, 3000,
      [](const Request& r, int round) {
        return StreamingHeads{r.gates, round % 50};
      },
      [](const reference::Asked& want, const Request& r, int round) {
        return reference::streaming_heads(want, round % 50, r.gates);
      });
}

TEST_CASE("Curve keeps what the plain loops keep") {
  check_counts(
      8, 3000, [](const Request& r, int) { return Curve{r.table}; },
      [](const reference::Asked& want, const Request& r, int) { return reference::curve(want, r.table); });
}

TEST_CASE("every allocator meets the total and every bound") {
  std::mt19937 random(11);
  for (int round = 0; round < 600; ++round) {
    Request r = any_request(random, 1 + round % 6, 1 + round % 5, 1 + round % 90, round);
    check_totals(r, all_allocators(r));
  }
}

TEST_CASE("every allocator meets them where scores are equal, extreme or none") {
  std::mt19937 random(12);
  const std::vector<std::function<float(int, int)>> kinds = {
      [](int, int) { return 0.f; },
      [](int, int) { return -0.f; },
      [](int, int) { return 1.f; },
      [](int h, int r) { return (h + r) % 2 == 0 ? 3e38f : -3e38f; },
      [](int, int) { return 3e38f; },
      [](int, int) { return -3e38f; },
      [](int, int) { return std::numeric_limits<float>::max(); },
      [](int, int r) { return r % 3 == 0 ? std::numeric_limits<float>::max() : 0.25f; },
      [](int, int) { return std::numeric_limits<float>::denorm_min(); },
      [](int h, int r) { return h == 0 && r == 0 ? 1.f : 0.f; },
      [](int, int r) { return static_cast<float>(r); },
      [](int, int r) { return static_cast<float>(-r); },
      [](int, int) { return infinity; },
  };
  struct Shape {
    int layers, heads;
    std::vector<int> seen, floor;
  };
  const std::vector<Shape> shapes = {
      {1, 1, {1}, {0}},
      {1, 1, {50}, {7}},
      {1, 1, {0}, {0}},
      {2, 2, {0, 0, 0, 0}, {0, 0, 0, 0}},
      {1, 4, {20, 20, 20, 20}, {2, 2, 2, 2}},
      {4, 1, {20, 20, 20, 20}, {2, 2, 2, 2}},
      {2, 2, {0, 30, 0, 0}, {0, 3, 0, 0}},
      {2, 2, {0, 0, 5, 1}, {0, 0, 5, 1}},
      {2, 3, {1, 1, 1, 1, 1, 1}, {0, 0, 0, 0, 0, 0}},
      {3, 2, {100, 1, 100, 2, 100, 0}, {90, 0, 36, 2, 0, 0}},
      {3, 2, {9, 9, 9, 9, 9, 9}, {9, 9, 9, 9, 9, 9}},
  };
  for (const Shape& shape : shapes) {
    for (const auto& score : kinds) {
      Request r(random, shape.layers, shape.heads, shape.seen, shape.floor, score);
      check_totals(r, all_allocators(r));
    }
  }
}

TEST_CASE("every allocator meets them with very many rows, and with very many heads") {
  std::mt19937 random(13);
  constexpr int most = std::numeric_limits<int>::max();
  {
    Request r(random, 2, 3, std::vector<int>(6, 0), std::vector<int>(6, 0), [](int, int) { return 0.f; });
    r.seen = {most, most, 5, most - 1, most, 1 << 30};
    r.floor = {0, most, 5, 0, 36, 1};
    check_totals(r, blind_allocators(r));
  }
  {
    Request r(random, 1, 2, {150000, 40000}, {36, 36}, [&](int, int) { return any_score(random, 0); });
    check_totals(r, all_allocators(r));
  }
  {
    Request r(random, 64, 16, std::vector<int>(1024, 9), std::vector<int>(1024, 2),
              [&](int, int) { return any_score(random, 1); });
    check_totals(r, all_allocators(r));
  }
}

TEST_CASE("more rows in all never take one from a head, where nothing but the total decides") {
  std::mt19937 random(14);
  for (int round = 0; round < 60; ++round) {
    Request r = any_request(random, 1 + round % 3, 1 + round % 4, 40, round);
    const std::vector<Named> exact = {{"Uniform", AnyAllocator(Uniform{})},
                                      {"StreamingHeads", AnyAllocator(StreamingHeads{r.gates, round % 30})},
                                      {"Global", AnyAllocator(Global{0})}};
    for (const Named& policy : exact) {
      std::vector<int> before = r.floor;
      for (r.want.total = r.least_total(); r.want.total <= r.most_total(); ++r.want.total) {
        const std::vector<int> now = kept(policy, r.want);
        for (std::size_t h = 0; h < now.size(); ++h) {
          if (now[h] < before[h]) FAIL(policy.name << " takes a row from head " << h << " at " << r.want.total);
        }
        before = now;
      }
    }
  }
}

// Largest remainders are known to take a row from a share while the total grows; a share is less than one row off what it would
// be in fractions, and that never falls where weights stay as they are.
TEST_CASE("Pyramid never takes more than the row that rounding does") {
  std::mt19937 random(15);
  for (int round = 0; round < 60; ++round) {
    const int layers = 1 + round % 5, heads = 1 + round % 3, n = layers * heads, rows = 30 + round % 40;
    Request r(random, layers, heads, std::vector<int>(static_cast<std::size_t>(n), rows),
              std::vector<int>(static_cast<std::size_t>(n), round % 20), [](int, int) { return 0.f; });
    const Named policy{"Pyramid", AnyAllocator(Pyramid{1 + round % 20 * 1.0})};
    std::vector<int> most = r.floor;
    for (r.want.total = r.least_total(); r.want.total <= r.most_total(); ++r.want.total) {
      const std::vector<int> now = kept(policy, r.want);
      for (std::size_t h = 0; h < now.size(); ++h) {
        if (now[h] + 1 < most[h]) FAIL("Pyramid takes rows from head " << h << " at " << r.want.total);
        most[h] = std::max(most[h], now[h]);
      }
    }
  }
}

TEST_CASE("heads in another order keep the same") {
  std::mt19937 random(16);
  for (int round = 0; round < 800; ++round) {
    const bool even_floors = round % 2 == 0;  // others can use up what heads are safe for, and then the order says who gives
    const int layers = 1 + round % 3, heads = 1 + round % 5, n = layers * heads;
    std::vector<int> rows, least;
    for (int h = 0; h < n; ++h) {
      rows.push_back(6 + static_cast<int>(random() % 60));
      least.push_back(even_floors ? 3 : static_cast<int>(random() % 6));
    }
    Request r(random, layers, heads, rows, least, [&](int, int) { return any_score(random, round / 2 % 2); });
    ask(r, random);
    const auto compare = [&](const char* name, const auto& budget, const auto& other, const Permuted& p, int off) {
      const std::vector<int> want = permuted(kept_by(budget, r.want), p.order), keep = kept_by(other, p.r.want);
      for (std::size_t h = 0; h < keep.size(); ++h) {
        if (!(std::abs(keep[h] - want[h]) <= off)) FAIL(name << ": head " << h << " keeps " << keep[h] << ", not " << want[h]);
      }
    };
    const Permuted within(r, random, false), across(r, random, true);
    for (const double part : {0.0, 0.2}) {
      if (!even_floors && part > 0) continue;
      compare("Adaptive", Adaptive{part}, Adaptive{part}, within, 0);
      compare("Global", Global{part}, Global{part}, across, 0);
    }
    // What does not come out even is rounded, in the order of heads where remainders tie.
    compare("Lava", Lava{0}, Lava{0}, within, 0);
    compare("Lava", Lava{0.5}, Lava{0.5}, within, 1);
    compare("Uniform", Uniform{}, Uniform{}, across, 1);
    compare("Pyramid", Pyramid{}, Pyramid{}, within, 1);
    compare("SqueezeAttention", SqueezeAttention{}, SqueezeAttention{}, within, 1);
    compare("Curve", Curve{r.table}, Curve{across.r.table}, across, 1);
    const int rows_of_streams = round % 10;
    std::int64_t least_of_all = 0;
    for (std::size_t h = 0; h < r.seen.size(); ++h) least_of_all += std::clamp(rows_of_streams, r.floor[h], r.seen[h]);
    compare("StreamingHeads", StreamingHeads{r.gates, rows_of_streams}, StreamingHeads{across.r.gates, rows_of_streams}, across,
            r.want.total >= least_of_all ? 0 : 1);
  }
}

TEST_CASE("equal scores go to the lower row, then the lower head") {
  std::mt19937 random(17);
  Request r(random, 2, 2, {4, 4, 4, 4}, {0, 0, 0, 0}, [](int, int) { return 1.f; });
  for (const auto& [total, want] : std::vector<std::pair<int, std::vector<int>>>{
           {1, {1, 0, 0, 0}}, {2, {1, 1, 0, 0}}, {5, {2, 1, 1, 1}}, {7, {2, 2, 2, 1}}, {15, {4, 4, 4, 3}}}) {
    r.want.total = total;
    CHECK(kept_by(Global{0}, r.want) == want);
  }
  // In one layer; a later row of the first head before an earlier one of the second would be another count.
  Request one(random, 1, 3, {3, 5, 5}, {0, 0, 0}, [](int h, int row) { return h == 0 || row > 1 ? 2.f : 1.f; });
  for (const auto& [total, want] : std::vector<std::pair<int, std::vector<int>>>{
           {1, {1, 0, 0}}, {3, {3, 0, 0}}, {4, {3, 1, 0}}, {5, {3, 1, 1}}, {9, {3, 3, 3}}, {10, {3, 4, 3}}, {12, {3, 5, 4}}}) {
    one.want.total = total;
    CHECK(kept_by(Global{0}, one.want) == want);
    CHECK(kept_by(Adaptive{0}, one.want) == want);
    CHECK(kept_by(Lava{0}, one.want) == want);
  }
}

TEST_CASE("a budget just above the floors gives its row where the rule says") {
  std::mt19937 random(18);
  const int floor = 5;
  Request r(random, 3, 2, std::vector<int>(6, 40), std::vector<int>(6, floor), [&](int h, int row) {
    // Layer 1 is spread most evenly; the highest score of all is in head 4, that of layer 1 in head 3.
    if (h == 4 && row == 9) return 100.f;
    if (h == 2 || h == 3) return 1 + (h == 3 && row == 7 ? 0.01f : 0.f);
    return std::exp(any_score(random, 0));
  });
  r.want.total = 6 * floor;
  for (const Named& policy : all_allocators(r)) CHECK_MESSAGE(kept(policy, r.want) == r.floor, policy.name);
  r.want.total += 1;
  CHECK(kept_by(Global{}, r.want) == std::vector<int>{5, 5, 5, 5, 6, 5});
  CHECK(kept_by(Lava{}, r.want) == std::vector<int>{5, 5, 5, 6, 5, 5});
  CHECK(kept_by(Pyramid{}, r.want) == std::vector<int>{6, 5, 5, 5, 5, 5});
  // Layers of equal rows share alike, and the first has the remainder.
  const std::vector<int> adaptive = kept_by(Adaptive{}, r.want);
  CHECK(adaptive[0] + adaptive[1] == 11);
}

TEST_CASE("one head, and one layer of one head, keep what is asked for") {
  std::mt19937 random(19);
  Request r(random, 1, 1, {70}, {6}, [&](int, int) { return any_score(random, 1); });
  for (r.want.total = 6; r.want.total <= 70; ++r.want.total) {
    for (const Named& policy : all_allocators(r)) {
      CHECK_MESSAGE(kept(policy, r.want) == std::vector<int>{static_cast<int>(r.want.total)}, policy.name);
    }
  }
}

TEST_CASE("equal scores give all heads the same, but for what floors and rounding take") {
  std::mt19937 random(20);
  Request r(random, 4, 3, std::vector<int>(12, 60), std::vector<int>(12, 4), [](int, int) { return 0.5f; });
  for (r.want.total = 48; r.want.total <= 720; ++r.want.total) {
    for (const double part : {0.0, 0.2, 1.0}) {
      for (const auto& keep : {kept_by(Adaptive{part}, r.want), kept_by(Global{part}, r.want), kept_by(Lava{part}, r.want)}) {
        const auto [least, most] = std::minmax_element(keep.begin(), keep.end());
        if (!(*most - *least <= 1)) FAIL("from " << *least << " to " << *most << " rows at " << r.want.total);
      }
    }
  }
}

TEST_CASE("Pyramid gives each layer what its rule says where no bound is met, and is never upside down") {
  std::mt19937 random(21);
  for (const int layers : {2, 3, 8, 30}) {
    for (const int floor : {0, 8, 60}) {
      const std::size_t n = static_cast<std::size_t>(2 * layers);
      Request r(random, layers, 2, std::vector<int>(n, 100), std::vector<int>(n, floor), [](int, int) { return 0.f; });
      for (r.want.total = r.least_total(); r.want.total <= r.most_total(); r.want.total += 7) {
        const std::vector<int> keep = kept_by(Pyramid{}, r.want);
        for (std::size_t h = 2; h < n; ++h) REQUIRE(keep[h] <= keep[h - 2] + 1);
        const double mean = static_cast<double>(r.want.total) / static_cast<double>(n);
        const auto of_layer = reference::pyramid_of_layers(mean, 100 - floor, 20, static_cast<std::size_t>(layers));
        if (of_layer.back() < floor) continue;
        for (std::size_t h = 0; h < n; ++h) {
          // The sum of the weights is the total, or they are all alike: below one row off.
          const double want = 100 - floor <= mean ? mean : of_layer[h / 2];
          if (!(std::fabs(keep[h] - want) < 1 + 1e-9)) FAIL("head " << h << " keeps " << keep[h] << ", not " << want);
        }
      }
    }
  }
  Request r(random, 3, 1, {100, 100, 100}, {60, 60, 60}, [](int, int) { return 0.f; });
  r.want.total = 240;
  CHECK(kept_by(Pyramid{}, r.want) == std::vector<int>{80, 80, 80});
  // The example of the paper's form: 10 a head, from 2 * 10 - 10 / 20 down to 10 / 20.
  Request wide(random, 3, 1, {1000, 1000, 1000}, {0, 0, 0}, [](int, int) { return 0.f; });
  wide.want.total = 3000 / 3;
  CHECK(kept_by(Pyramid{.beta = 20}, wide.want) == std::vector<int>{650, 333, 17});
  CHECK(kept_by(Pyramid{.beta = 1}, wide.want) == std::vector<int>{334, 333, 333});
}

TEST_CASE("Lava does not look at rows of a selector's window, and gives layers that are spread more the more") {
  std::mt19937 random(22);
  constexpr float most = std::numeric_limits<float>::max();
  // Layer 0: all in one row. Layer 1: over 4 of 16 rows, entropy log 4 / log 16 = 1/2. Layer 2: over all, 1.
  const auto score = [&](int h, int row) {
    return row >= 16 ? most : h == 0 ? float(row == 3) : h == 1 ? float(row % 4 == 0) : 2.f;
  };
  for (const int window : {0, 2, 8}) {
    Request r(random, 3, 1, std::vector<int>(3, 16 + window), std::vector<int>(3, 0), score);
    r.want.total = 12;
    CHECK(kept_by(Lava{}, r.want) == std::vector<int>{0, 4, 8});
  }
  // Heads of a layer: 3 of 4 rows are in head 0 by score, and half of an even share is for all.
  Request r(random, 1, 2, {8, 8}, {0, 0}, [](int h, int row) { return h == 0 ? 10.f - float(row) : row == 0 ? 9.5f : 1.f; });
  r.want.total = 4;
  CHECK(kept_by(Lava{0}, r.want) == std::vector<int>{3, 1});
  CHECK(kept_by(Lava{0.5}, r.want) == std::vector<int>{3, 1});  // 2.5 and 1.5
  CHECK(kept_by(Lava{1}, r.want) == std::vector<int>{2, 2});
}

namespace {

// Layers that are given less.
std::vector<bool> squeezed_layers(const std::vector<float>& similarity) {
  std::mt19937 random(0);
  const std::size_t n = similarity.size();
  Request r(random, static_cast<int>(n), 1, std::vector<int>(n, 10000), std::vector<int>(n, 0), [](int, int) { return 0.f; });
  r.want.similarity = similarity;
  r.want.total = static_cast<std::int64_t>(100 * n);
  const std::vector<int> keep = kept_by(SqueezeAttention{0.5}, r.want);
  std::vector<bool> less;
  for (const int rows : keep) less.push_back(rows < 90);
  return less;
}

}  // namespace

TEST_CASE("SqueezeAttention: groups of cosines are those of all partitions where they lie apart") {
  std::mt19937 random(23);
  // Three groups whose middle one is nearest to the middle of all, each far narrower than what is between them: Lloyd's steps
  // end at the best of all partitions. They need not elsewhere, see the next case.
  for (int round = 0; round < 400; ++round) {
    std::uniform_real_distribution<float> around(-0.01f, 0.01f);
    std::vector<float> similarity;
    const int sizes[3] = {1 + static_cast<int>(random() % 6), 1 + static_cast<int>(random() % 6),
                          1 + static_cast<int>(random() % 6)};
    for (int k = 0; k < 3; ++k) {
      for (int i = 0; i < sizes[k]; ++i) similarity.push_back(0.2f + 0.3f * static_cast<float>(k) + around(random));
    }
    std::shuffle(similarity.begin(), similarity.end(), random);
    std::vector<double> sorted(similarity.begin(), similarity.end());
    std::sort(sorted.begin(), sorted.end());
    const reference::Groups best = reference::best_groups(sorted);
    REQUIRE(best.second == static_cast<std::size_t>(sizes[0] + sizes[1]));
    const std::vector<bool> less = squeezed_layers(similarity);
    for (std::size_t l = 0; l < less.size(); ++l)
      REQUIRE(less[l] == (static_cast<double>(similarity[l]) >= sorted[best.second]));
  }
}

TEST_CASE("SqueezeAttention: groups of any cosines are a fixed point of Lloyd's steps, mostly the best there is") {
  std::mt19937 random(24);
  std::uniform_real_distribution<float> any(-1, 1);
  int same = 0;
  constexpr int rounds = 400;
  for (int round = 0; round < rounds; ++round) {
    std::vector<float> similarity(static_cast<std::size_t>(3 + round % 12));
    for (float& x : similarity) x = any(random);
    std::vector<double> sorted(similarity.begin(), similarity.end());
    std::sort(sorted.begin(), sorted.end());
    const reference::Groups found = reference::lloyd(sorted), best = reference::best_groups(sorted);
    CHECK(reference::squares(sorted, found) >= reference::squares(sorted, best) - 1e-12);
    same += found == best;
    const std::vector<bool> less = squeezed_layers(similarity);
    for (std::size_t l = 0; l < less.size(); ++l)
      REQUIRE(less[l] == (static_cast<double>(similarity[l]) >= sorted[found.second]));
  }
  INFO("best partitions: " << same);
  CHECK(same > rounds / 2);
}

TEST_CASE("SqueezeAttention gives an even share where cosines are equal or there is one layer") {
  std::mt19937 random(25);
  for (const int layers : {1, 2, 5}) {
    const auto n = static_cast<std::size_t>(2 * layers);
    Request r(random, layers, 2, std::vector<int>(n, 50), std::vector<int>(n, 1), [](int, int) { return 0.f; });
    for (const float cosine : {-1.f, 0.f, 0.1f, 1.f}) {
      r.similarity.assign(static_cast<std::size_t>(layers), cosine);
      r.want.similarity = r.similarity;
      for (r.want.total = r.least_total(); r.want.total <= r.most_total(); ++r.want.total) {
        REQUIRE(kept_by(SqueezeAttention{}, r.want) == kept_by(Uniform{}, r.want));
      }
    }
  }
  CHECK(squeezed_layers({0.1f, 0.9f}) == std::vector<bool>{false, true});
  CHECK(squeezed_layers({0.1f, 0.9f, 0.9f, 0.5f}) == std::vector<bool>{false, true, true, false});
  CHECK(squeezed_layers({0.9f, std::nextafter(0.9f, 0.f)}) == std::vector<bool>{true, false});
  // Two of four layers with 0.35 of an even share of 100, the others with what they give up.
  Request r(random, 4, 1, std::vector<int>(4, 500), std::vector<int>(4, 0), [](int, int) { return 0.f; });
  r.similarity = {0.9f, 0.2f, 0.9f, 0.5f};
  r.want.similarity = r.similarity;
  r.want.total = 400;
  CHECK(kept_by(SqueezeAttention{}, r.want) == std::vector<int>{35, 165, 35, 165});
  CHECK(kept_by(SqueezeAttention{0}, r.want) == std::vector<int>{0, 200, 0, 200});
  CHECK(kept_by(SqueezeAttention{1}, r.want) == std::vector<int>{100, 100, 100, 100});
}

TEST_CASE("StreamingHeads: heads with the highest gates get all their rows") {
  std::mt19937 random(26);
  Request r(random, 2, 2, {100, 80, 100, 60}, {4, 4, 4, 4}, [](int, int) { return 0.f; });
  const std::vector<float> gates = {0.1f, 0.9f, 0.5f, 0.9f};
  const auto keep = [&](std::int64_t total, int rows) {
    r.want.total = total;
    return kept_by(StreamingHeads{gates, rows}, r.want);
  };
  CHECK(keep(40, 10) == std::vector<int>{10, 10, 10, 10});
  CHECK(keep(41, 10) == std::vector<int>{10, 11, 10, 10});
  CHECK(keep(110, 10) == std::vector<int>{10, 80, 10, 10});
  CHECK(keep(111, 10) == std::vector<int>{10, 80, 10, 11});
  CHECK(keep(160, 10) == std::vector<int>{10, 80, 10, 60});
  CHECK(keep(170, 10) == std::vector<int>{10, 80, 20, 60});
  CHECK(keep(339, 10) == std::vector<int>{99, 80, 100, 60});
  CHECK(keep(39, 10) == std::vector<int>{10, 10, 10, 9});  // not even that: an even share
  CHECK(keep(20, 0) == std::vector<int>{4, 8, 4, 4});      // what is protected stays
  CHECK(keep(300, 384) == std::vector<int>{80, 80, 80, 60});

  const Geometry shape{2, 2, 4, 64};
  CHECK(StreamingHeads{gates, 10}.check(shape).ok());
  CHECK(StreamingHeads{{0.1f}, 10}.check(shape).message() == "there are 1 gates; the cache has 4 heads");
  CHECK(StreamingHeads{gates, -1}.check(shape).message() == "rows is -1; it must be zero or more");
  CHECK(StreamingHeads{{0, 1, std::nanf(""), 0}, 1}.check(shape).message() == "a gate is nan; it must be a number");
  CHECK(StreamingHeads{}.check(shape).code == Errc::bad_shape);
}

TEST_CASE("Curve takes what lies between two steps of the table, and scales to the total") {
  std::mt19937 random(27);
  // At step i the two heads drop i - 1 and 100 - i parts of 99.
  std::vector<float> table;
  for (int i = 0; i < steps; ++i) {
    table.push_back(static_cast<float>(i) / steps);
    table.push_back(1 - table.back());
  }
  Request r(random, 1, 2, {1003, 1003}, {3, 3}, [](int, int) { return 0.f; });
  for (int total = 20; total <= 1000; ++total) {
    r.want.total = total + 6;
    const double step = 100 * (2000.0 - total) / 2000, want = total * (1 - (step - 1) / steps);
    const int keep = kept_by(Curve{table}, r.want)[0] - 3;
    // fp32 shares: 6e-8 of a share of at most 1000 rows.
    if (!(std::fabs(keep - want) <= 0.5 + 1e-4)) FAIL(total << " rows: head 0 keeps " << keep << ", not " << want);
  }
}

TEST_CASE("Curve: what later cuts leave is what one cut would have") {
  std::mt19937 random(30);
  // Of the first half of what is dropped, head 0 gives all it has.
  std::vector<float> table;
  for (int i = 1; i <= steps; ++i) {
    table.push_back(std::min(1.f, 0.02f * static_cast<float>(i)));
    table.push_back(std::max(0.f, 0.02f * static_cast<float>(i) - 1));
  }
  const Curve curve{table, 1, 2};
  Request whole(random, 1, 2, {1000, 1000}, {4, 4}, [](int, int) { return 0.f; });
  whole.want.total = 400;
  const std::vector<int> once = kept_by(curve, whole.want);
  CHECK(once[0] == 4);
  // Cut to 380 rows of 1900 first, of which head 0 has four; then 50 rows come to each head.
  Request later(random, 1, 2, {54, 426}, {4, 4}, [](int, int) { return 0.f; });
  const std::vector<long long> appended = {1000};
  later.want.total = 400;
  later.want.appended = appended;
  CHECK(kept_by(curve, later.want) == once);
  later.want.appended = {};  // head 0 keeps some of the new rows for want of knowing about the old ones
  CHECK(kept_by(curve, later.want)[0] > 4);
}

TEST_CASE("a curve that does not fit the model is refused, and both are named") {
  const std::vector<float> table(2 * 99, 0.5f);
  const Geometry shape{1, 2, 4, 64};
  CHECK(Curve{table}.check(shape).ok());
  CHECK(Curve{}.check(shape).message() == "the curve has 0 numbers; it must have some for each of 2 heads");
  CHECK(Curve{{0.5f, 0.5f, 0.5f}}.check(shape).message() == "the curve has 3 numbers; it must have some for each of 2 heads");
  CHECK(Curve{{0.5f, 1.5f}}.check(shape).message() == "the curve drops 1.5 of a head's rows; it must be between 0 and 1");
  for (const float bad : {-0.1f, std::nanf(""), infinity}) CHECK(Curve{{0.5f, bad}}.check(shape).code == Errc::bad_value);
  CHECK(Curve{table, 1, 2}.check(shape).ok());
  CHECK(Curve{table, 2, 1}.check(shape).message() == "the curve is of a model with 2 layers; this one has 1");
  CHECK(Curve{table, 1, 1}.check(shape).message() == "the curve is of a model with 1 KV heads; this one has 2");
}

TEST_CASE("Curve: a head that drops all its rows gets them back last") {
  std::mt19937 random(28);
  Request r(random, 1, 3, {10, 10, 10}, {0, 1, 0}, [](int, int) { return 0.f; });
  const Curve curve{{1, 1, 0}};
  for (const auto& [total, want] : std::vector<std::pair<int, std::vector<int>>>{
           {1, {0, 1, 0}}, {6, {0, 1, 5}}, {11, {0, 1, 10}}, {12, {1, 1, 10}}, {20, {5, 5, 10}}, {30, {10, 10, 10}}}) {
    r.want.total = total;
    CHECK(kept_by(curve, r.want) == want);
  }
}

TEST_CASE("allocators refuse parameters out of range, and name them") {
  std::mt19937 random(29);
  Request r(random, 1, 2, {10, 10}, {1, 1}, [](int, int) { return 0.f; });
  r.want.total = 5;
  const auto refused = [&](const auto& budget, const std::string& message) {
    std::vector<int> keep(2);
    const Status status = budget.allocate(r.want, keep);
    CHECK(status.code == Errc::bad_value);
    CHECK(status.message() == message);
    CHECK(AnyAllocator(budget).allocate(r.want, keep).message() == message);
  };
  const double nan = std::nan("");
  for (const auto& [bad, shown] : {std::pair{-0.1, "-0.1"}, {1.5, "1.5"}, {nan, "nan"}}) {
    refused(Adaptive{bad}, std::string("safeguard is ") + shown + "; it must be between 0 and 1");
    refused(Global{bad}, std::string("safeguard is ") + shown + "; it must be between 0 and 1");
    refused(Lava{bad}, std::string("even is ") + shown + "; it must be between 0 and 1");
    refused(SqueezeAttention{bad}, std::string("share is ") + shown + "; it must be between 0 and 1");
  }
  for (const auto& [bad, shown] : {std::pair{0.9, "0.9"}, {-3.0, "-3"}, {2e9, "2000000000"}, {nan, "nan"}}) {
    refused(Pyramid{bad}, std::string("beta is ") + shown + "; it must be between 1 and 1e9");
  }
}
