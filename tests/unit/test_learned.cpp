// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What policies are learned with: gradients against differences in double precision, and the policies that come out of it.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "kvtailor/cache.hpp"
#include "kvtailor/codec/dense.hpp"
#include "kvtailor/learn/adam.hpp"
#include "kvtailor/learn/soft_top_k.hpp"
#include "kvtailor/policies.hpp"
#include "reference/selectors.hpp"
#include "unit/files.hpp"

using namespace kvt;

namespace {

std::vector<double> draw(std::mt19937& random, std::size_t n, double size = 1) {
  std::vector<double> x(n);
  std::normal_distribution<double> normal(0, size);
  for (double& v : x) v = normal(random);
  return x;
}

// The gradient of f at x by differences, in one direction at a time.
template <class F>
std::vector<double> differences(std::vector<double> x, const F& f) {
  std::vector<double> slope(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double step = 1e-5, at = x[i];
    x[i] = at + step;
    const double up = f(x);
    x[i] = at - step;
    slope[i] = (up - f(x)) / (2 * step);
    x[i] = at;
  }
  return slope;
}

double worst(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double size = 1e-2, error = 0;  // differences are right to about 1e-10
  for (std::size_t i = 0; i < a.size(); ++i) {
    size = std::max(size, std::fabs(b[i]));
    error = std::max(error, std::fabs(a[i] - b[i]));
  }
  return error / size;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

}  // namespace

TEST_CASE("a soft mask adds up to the count, and its gradients are those of differences") {
  std::mt19937 random(1);
  for (const double temperature : {1.0, 0.2, 0.05}) {
    for (const double count : {0.3, 5.0, 12.7, 39.5}) {
      CAPTURE(temperature);
      CAPTURE(count);
      const std::size_t n = 40;
      const std::vector<double> scores = draw(random, n), by_mask = draw(random, n);
      const auto loss = [&](const std::vector<double>& s, double k, double t) {
        SoftTopK<double> soft{t};
        std::vector<double> mask(s.size());
        REQUIRE(soft.choose(s, k, mask).ok());
        return dot(mask, by_mask);
      };
      SoftTopK<double> soft{temperature};
      std::vector<double> mask(n), by_scores(n, 0.0);
      REQUIRE(soft.choose(scores, count, mask).ok());
      CHECK(std::accumulate(mask.begin(), mask.end(), 0.0) == doctest::Approx(count).epsilon(1e-12));
      CHECK(*std::min_element(mask.begin(), mask.end()) >= 0);
      CHECK(*std::max_element(mask.begin(), mask.end()) <= 1);
      const auto by = soft.add_gradient(scores, mask, by_mask, by_scores);
      CHECK(worst(by_scores, differences(scores, [&](const auto& s) { return loss(s, count, temperature); })) < 1e-5);
      CHECK(worst({by.count}, differences({count}, [&](const auto& k) { return loss(scores, k[0], temperature); })) < 1e-5);
      CHECK(worst({by.temperature}, differences({temperature}, [&](const auto& t) { return loss(scores, count, t[0]); })) <
            1e-5);
    }
  }
}

TEST_CASE("a soft mask becomes the hard one") {
  const std::vector<double> scores = {.3, 2, .3, -1, 1.5, .3};
  std::vector<double> mask(6);
  SoftTopK<double> hard{0};
  REQUIRE(hard.choose(scores, 3, mask).ok());
  CHECK(mask == std::vector<double>{1, 1, 0, 0, 1, 0});  // of equal scores the first
  REQUIRE(hard.choose(scores, 3.25, mask).ok());
  CHECK(mask == std::vector<double>{1, 1, .25, 0, 1, 0});
  REQUIRE(hard.choose(scores, 0, mask).ok());
  CHECK(mask == std::vector<double>(6, 0.0));
  REQUIRE(hard.choose(scores, 6, mask).ok());
  CHECK(mask == std::vector<double>(6, 1.0));
  std::mt19937 random(2);
  const std::vector<double> others = draw(random, 100);
  std::vector<double> soft(100), want(100);
  REQUIRE(hard.choose(others, 31, want).ok());
  double last = 100;
  for (const double temperature : {.3, .1, .03, .01, .003, .001, .0001}) {
    SoftTopK<double> own{temperature};
    REQUIRE(own.choose(others, 31, soft).ok());
    double error = 0;
    for (std::size_t i = 0; i < 100; ++i) error += std::fabs(soft[i] - want[i]);
    CHECK(error <= last);
    last = error;
  }
  CHECK(last < 1e-6);
  // In fp32, scores that are far from zero.
  SoftTopK<float> far{.1f};
  std::vector<float> large(64), kept(64);
  for (std::size_t i = 0; i < 64; ++i) large[i] = 1000.f + static_cast<float>(i) * .01f;
  REQUIRE(far.choose(large, 20, kept).ok());
  CHECK(std::accumulate(kept.begin(), kept.end(), 0.f) == doctest::Approx(20).epsilon(1e-3));
}

TEST_CASE("what cannot be chosen is refused") {
  std::vector<float> scores = {1, 2, 3}, mask(3);
  SoftTopK<float> soft{1};
  CHECK(soft.choose(scores, 3.5f, mask).code == Errc::bad_budget);
  CHECK(soft.choose(scores, -1, mask).code == Errc::bad_budget);
  CHECK(soft.choose(scores, std::nanf(""), mask).code == Errc::bad_budget);
  CHECK(soft.choose(scores, 1, std::span(mask).first(2)).code == Errc::bad_shape);
  CHECK(SoftTopK<float>{-1}.choose(scores, 1, mask).code == Errc::bad_value);
  CHECK(SoftTopK<float>{std::nanf("")}.choose(scores, 1, mask).code == Errc::bad_value);
  scores[1] = std::nanf("");
  CHECK(soft.choose(scores, 1, mask).code == Errc::bad_value);
  CHECK(soft.choose({}, 0, {}).ok());
}

TEST_CASE("shares of heads keep the mean and the bounds, and their gradients are those of differences") {
  std::mt19937 random(3);
  BudgetHead<double> budget(11, 4, 6);
  for (const double size : {0.3, 3.0, 30.0}) {
    for (double& x : budget.parameters()) x = size * draw(random, 1)[0];
    std::vector<double> shares(11);
    for (const double retention : {1e-4, .05, .15, .5, .9, .9999}) {
      CAPTURE(size);
      CAPTURE(retention);
      REQUIRE(budget.shares(retention, shares).ok());
      CHECK(std::accumulate(shares.begin(), shares.end(), 0.0) / 11 == doctest::Approx(retention).epsilon(1e-9));
      for (const double share : shares) CHECK((share >= 0 && share <= 1));
    }
  }
  for (double& x : budget.parameters()) x = draw(random, 1)[0];
  const std::vector<double> by_shares = draw(random, 11), start(budget.parameters().begin(), budget.parameters().end());
  for (const double retention : {.05, .3}) {
    const auto loss = [&](const std::vector<double>& numbers) {
      BudgetHead<double> other(11, 4, 6);
      std::copy(numbers.begin(), numbers.end(), other.parameters().begin());
      std::vector<double> shares(11);
      REQUIRE(other.shares(retention, shares).ok());
      return dot(shares, by_shares);
    };
    std::vector<double> shares(11), by(start.size(), 0.0);
    REQUIRE(budget.shares(retention, shares).ok());
    budget.add_gradient(retention, shares, by_shares, by);
    CHECK(worst(by, differences(start, loss)) < 1e-6);
  }
  std::vector<double> shares(11);
  CHECK(budget.shares(0, shares).code == Errc::bad_budget);
  CHECK(budget.shares(1, shares).code == Errc::bad_budget);
  CHECK(budget.shares(.5, std::span(shares).first(3)).code == Errc::bad_shape);
  budget.parameters()[0] = std::nan("");
  CHECK(budget.shares(.5, shares).code == Errc::bad_value);
}

namespace {

template <class T>
TokenScorer<T> some_scorer(int heads, int dim, int hidden, unsigned seed) {
  TokenScorer<T> scorer(heads, dim, hidden);
  std::mt19937 random(seed);
  for (T& x : scorer.numbers()) x = static_cast<T>(draw(random, 1, .3)[0]);
  for (int h = 0; h < heads; ++h) {
    for (int f = 0; f < scorer.layout().features(); ++f) {
      T& scale = scorer.of(h)[static_cast<std::size_t>(scorer.layout().scale() + f)];
      scale = T(.5) + std::fabs(scale);
    }
  }
  return scorer;
}

// The formula of learn/token_scorer.hpp, in double precision.
double score_of(const TokenScorer<float>& scorer, int head, const std::vector<double>& key, const std::vector<double>& value) {
  const auto own = scorer.of(head);
  const auto at = scorer.layout();
  const std::size_t features = static_cast<std::size_t>(at.features()), hidden = static_cast<std::size_t>(at.hidden);
  std::vector<double> z(key);
  z.insert(z.end(), value.begin(), value.end());
  z.push_back(std::log(std::max(1e-12, reference::norm(key.data(), key.size()))));
  z.push_back(std::log(std::max(1e-12, reference::norm(value.data(), value.size()))));
  for (std::size_t f = 0; f < features; ++f) {
    z[f] = std::clamp((z[f] - double(own[f])) * double(own[features + f]), -1000.0, 1000.0);
  }
  const auto number = [&](int first, std::size_t i) { return double(own[static_cast<std::size_t>(first) + i]); };
  double score = 0;
  for (std::size_t i = 0; i <= hidden; ++i) {
    double sum = number(at.bias(), i);
    for (std::size_t f = 0; f < features; ++f) sum += number(at.matrix(), i * features + f) * z[f];
    score += i == hidden ? sum : number(at.outer(), i) * std::max(0.0, sum);
  }
  return score;
}

}  // namespace

TEST_CASE("the gradients of a scorer are those of differences") {
  auto scorer = some_scorer<double>(2, 6, 5, 4);
  std::mt19937 random(5);
  const int n = 7;
  const std::vector<double> keys = draw(random, 6 * 7), values = draw(random, 6 * 7), by_scores = draw(random, 7);
  TokenScorer<double>::Matrix z, hidden;
  scorer.features(1, keys.data(), values.data(), n, z);
  const auto own = scorer.learned(1);
  const std::vector<double> start(own.begin(), own.end());
  const auto loss = [&](const std::vector<double>& numbers) {
    std::copy(numbers.begin(), numbers.end(), scorer.learned(1).begin());
    std::vector<double> scores(7);
    scorer.score(1, z, scores, hidden);
    return dot(scores, by_scores);
  };
  const std::vector<double> want = differences(start, loss);
  loss(start);
  std::vector<double> by(start.size(), 0.0);
  scorer.add_gradient(1, z, hidden, by_scores, by);
  CHECK(worst(by, want) < 1e-8);
}

TEST_CASE("learned scores are those of the network on keys before RoPE") {
  const Geometry shape{2, 3, 6, 40};
  const auto scorer = some_scorer<float>(6, 40, 9, 6);
  const Learned learned(scorer, 3);
  REQUIRE(learned.check(shape).ok());
  std::mt19937 random(7);
  const std::size_t rows = 150, dim = 40;
  std::vector<float> keys, values;
  std::vector<int> positions;
  for (std::size_t i = 0; i < rows * dim; ++i) {
    keys.push_back(static_cast<float>(draw(random, 1)[0]));
    values.push_back(static_cast<float>(draw(random, 1)[0]));
  }
  for (std::size_t r = 0; r < rows; ++r) positions.push_back(static_cast<int>(3 * r + r % 2));
  std::fill_n(keys.begin() + 5 * dim, dim, 0.f);  // a row without length
  keys[7 * dim] = 1e18f;                          // and one of a great one
  for (const bool adjacent : {true, false}) {
    const Rope rope{.rotary_dim = 32, .scale = .5f, .pairs = adjacent ? Rope::Pairs::adjacent : Rope::Pairs::halves};
    const reference::Turning turning{32, 10000, .5, adjacent};
    for (int head = 0; head < 6; ++head) {
      HeadEvidence seen;
      seen.layer = head / 3;
      seen.kv_head = head % 3;
      seen.head_dim = 40;
      seen.positions = positions;
      seen.keys = keys;
      seen.values = values;
      seen.rope = &rope;
      std::vector<float> scores(rows);
      REQUIRE(learned.score(seen, scores).ok());
      for (std::size_t r = 0; r < rows; ++r) {
        const auto turned = reference::times(turning.matrix(dim, positions[r]),
                                             std::vector<double>(keys.begin() + static_cast<std::ptrdiff_t>(r * dim),
                                                                 keys.begin() + static_cast<std::ptrdiff_t>((r + 1) * dim)),
                                             true);
        const double want = score_of(scorer, head, turned,
                                     std::vector<double>(values.begin() + static_cast<std::ptrdiff_t>(r * dim),
                                                         values.begin() + static_cast<std::ptrdiff_t>((r + 1) * dim)));
        REQUIRE(std::isfinite(scores[r]));
        CHECK(static_cast<double>(scores[r]) == doctest::Approx(want).epsilon(2e-5));
      }
    }
  }
  CHECK(learned.check({2, 3, 6, 64}).code == Errc::bad_shape);
  CHECK(learned.check({3, 2, 6, 40}).code == Errc::bad_shape);
  CHECK(learned.check({1, 3, 6, 40}).code == Errc::bad_shape);
  CHECK(Learned{}.check(shape).code == Errc::bad_policy);
}

namespace {

LearnedPolicy some_policy(int layers, int heads, int dim) {
  LearnedPolicy policy{layers, heads, some_scorer<float>(layers * heads, dim, 3, 8), BudgetHead<float>(layers * heads, 2, 5)};
  std::mt19937 random(9);
  for (float& x : policy.shares.parameters()) x = static_cast<float>(draw(random, 1)[0]);
  return policy;
}

}  // namespace

TEST_CASE("learned shares are given to heads, and a cut of what an earlier one left leaves what one cut would have") {
  const LearnedShares learned{some_policy(2, 3, 64).shares, 3};
  REQUIRE(learned.check({2, 3, 6, 64}).ok());
  CHECK(learned.check({3, 2, 6, 64}).code == Errc::bad_shape);
  CHECK(learned.check({1, 3, 6, 64}).code == Errc::bad_shape);
  CHECK(LearnedShares{}.check({1, 3, 6, 64}).code == Errc::bad_shape);
  const std::vector<int> seen(6, 10'000), floor(6, 12);
  std::vector<int> keep(6);
  std::vector<float> shares(6);
  for (const int total : {6 * 12, 6 * 13, 9000, 30'000, 59'000, 60'000}) {
    BudgetRequest want{total, 2, 3, seen, floor, {}};
    REQUIRE(allocate_rows(learned, want, keep).ok());
    const double retention = double(total - 72) / double(60'000 - 72);
    if (!(retention > 1e-4 && retention < 1)) continue;
    REQUIRE(learned.budget.shares(static_cast<float>(retention), shares).ok());
    for (std::size_t h = 0; h < 6; ++h) CHECK(std::fabs(keep[h] - 12 - double(shares[h]) * 9988) < 2);
  }
  const std::vector<long long> appended(2, 10'000);
  std::vector<int> first(6), again(6), at_once(6);
  BudgetRequest half{30'000, 2, 3, seen, floor, {}, {}, appended};
  REQUIRE(allocate_rows(learned, half, first).ok());
  BudgetRequest rest{9000, 2, 3, first, floor, {}, {}, appended}, whole{9000, 2, 3, seen, floor, {}, {}, appended};
  REQUIRE(allocate_rows(learned, rest, again).ok());
  REQUIRE(allocate_rows(learned, whole, at_once).ok());
  // Shares of a head may grow as the budget falls; then it has no more than it kept.
  for (std::size_t h = 0; h < 6; ++h) CHECK((again[h] == at_once[h] || first[h] < at_once[h]));
}

TEST_CASE("a learned policy comes back from its file, by name too") {
  const Folder folder;
  const std::string path = (folder.path / "policy.safetensors").string();
  const LearnedPolicy policy = some_policy(2, 3, 64);
  REQUIRE(write_learned(path, policy, {{"model", "a model"}}, FloatType::fp32).ok());
  LearnedPolicy read;
  REQUIRE(read_learned(path, read).ok());
  CHECK(read.num_layers == 2);
  CHECK(read.num_kv_heads == 3);
  CHECK(read.scores.numbers() == policy.scores.numbers());
  CHECK(std::ranges::equal(read.shares.parameters(), policy.shares.parameters()));
  CHECK(read.scores.layout().head_dim == 64);
  CHECK(read.scores.layout().hidden == 3);
  CHECK(read.shares.width() == 2);
  CHECK(read.shares.hidden() == 5);
  TensorFile file;
  REQUIRE(read_safetensors(path, file).ok());
  CHECK(file.metadata["model"] == "a model");

  const std::string name = "learned:file=" + path;
  const ParsedPolicies parsed({name, name, "fp16"});
  REQUIRE(parsed.message == "");
  const Rope rope{64};
  KvCache<AnyAllocator, AnySelector, KvCodec<Dense<Half, 64>>> cache(parsed.allocator, parsed.selector);
  CHECK(cache.init({2, 3, 6, 64}).code == Errc::no_evidence);  // keys before RoPE are wanted
  CHECK(cache.init({3, 2, 6, 64}, {.ropes = {&rope, 1}}).code == Errc::bad_shape);
  REQUIRE(cache.init({2, 3, 6, 64}, {.sink_rows = 2, .recent_rows = 4, .ropes = {&rope, 1}}).ok());
  std::mt19937 random(10);
  std::vector<float> keys(100 * 3 * 64), values(keys.size());
  std::vector<int> positions(100);
  std::iota(positions.begin(), positions.end(), 0);
  for (int layer = 0; layer < 2; ++layer) {
    for (float& x : keys) x = static_cast<float>(draw(random, 1)[0]);
    for (float& x : values) x = static_cast<float>(draw(random, 1)[0]);
    REQUIRE(cache.append(layer, keys.data(), values.data(), positions).ok());
  }
  REQUIRE(cache.compress(Retain::ratio(.3)).ok());
  int rows = 0, least = 100, most = 0;
  for (int h = 0; h < 6; ++h) {
    const int own = cache.num_rows(h / 3, h % 3);
    rows += own;
    least = std::min(least, own);
    most = std::max(most, own);
  }
  CHECK(rows == 180);
  CHECK(least < most);
  CHECK(ParsedPolicies({"uniform", "learned", "fp16"}).message.find("needs a file") != std::string::npos);
  CHECK(ParsedPolicies({"learned:file=nowhere", "tova", "fp16"}).message.find("nowhere: ") == 0);
  CHECK(ParsedPolicies({"learned:file=" + path + ",beta=1", "tova", "fp16"}).message != "");
}

TEST_CASE("what is no learned policy is refused, and the policy stays as it was") {
  const Folder folder;
  const std::string path = (folder.path / "policy.safetensors").string();
  const LearnedPolicy policy = some_policy(2, 3, 64);
  LearnedPolicy read = policy;
  TensorFile whole;
  REQUIRE(write_learned(path, policy, {}, FloatType::fp32).ok());
  REQUIRE(read_safetensors(path, whole).ok());
  const auto refused = [&](Errc code, auto&& change) {
    TensorFile file = whole;
    change(file);
    const Status written = write_safetensors(path, file, FloatType::fp32);
    CAPTURE(written.message());
    REQUIRE(written.ok());
    const Status status = read_learned(path, read);
    CAPTURE(status.message());
    CHECK(status.code == code);
    CHECK(read.scores.numbers() == policy.scores.numbers());
  };
  refused(Errc::bad_value, [](TensorFile& f) { f.metadata["format"] = "kvtailor curve 1"; });
  refused(Errc::bad_value, [](TensorFile& f) { f.metadata.clear(); });
  for (const auto& tensor : whole.tensors) {
    const std::string& name = tensor.first;
    CAPTURE(name);
    refused(Errc::bad_shape, [&](TensorFile& f) { f.tensors.erase(name); });
    refused(Errc::bad_shape, [&](TensorFile& f) { f.tensors[name].shape.push_back(1); });
    refused(Errc::bad_shape, [&](TensorFile& f) {
      auto& [shape, numbers] = f.tensors[name];
      numbers.resize(numbers.size() / shape.back() * (shape.back() + 1));
      ++shape.back();
    });
  }
  refused(Errc::bad_shape, [](TensorFile& f) { f.tensors["more"] = {{1}, {1}}; });
  // NaN does not go into a file by our own hand.
  REQUIRE(write_learned(path, policy, {}, FloatType::fp32).ok());
  std::string bytes = folder.read("policy.safetensors");
  const float none = std::nanf("");
  std::memcpy(bytes.data() + bytes.size() - sizeof none, &none, sizeof none);
  CHECK(read_learned(folder.write("nan.safetensors", bytes), read).code == Errc::bad_value);
  CHECK(read_learned(folder.write("short.safetensors", bytes.substr(0, bytes.size() - 4)), read).code == Errc::bad_shape);
  CHECK(read_learned((folder.path / "nothing").string(), read).code == Errc::bad_name);
  CHECK(read.scores.numbers() == policy.scores.numbers());
  LearnedPolicy bad = policy;
  bad.scores.numbers()[3] = none;
  CHECK(write_learned(path, bad, {}, FloatType::fp32).code == Errc::bad_value);
}

TEST_CASE("Adam goes downhill, and its first step is as long as the rate") {
  std::vector<double> x = {3, -2}, by(2);
  Adam<double> adam(2);
  for (int step = 0; step < 2000; ++step) {
    by = {2 * x[0], 20 * (x[1] - 1)};
    const std::vector<double> before = x;
    adam.step(x, by, .01);
    if (step == 0) {
      CHECK(before[0] - x[0] == doctest::Approx(.01).epsilon(1e-6));
      CHECK(x[1] - before[1] == doctest::Approx(.01).epsilon(1e-6));
    }
  }
  CHECK(std::fabs(x[0]) < 1e-3);
  CHECK(std::fabs(x[1] - 1) < 1e-3);
}
