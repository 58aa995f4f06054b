// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The model that policies are trained by: its gradient against differences in double precision, and itself against the engine.
#include <doctest/doctest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "command.hpp"
#include "kvtailor/learn/soft_top_k.hpp"
#include "lessons.hpp"
#include "measure.hpp"
#include "model/program.hpp"
#include "student.hpp"

using namespace kvt_llm;

namespace {

// A model of three small layers with grouped queries, biases and a RoPE that leaves elements alone.
Weights<double> small_model(std::mt19937& random) {
  std::normal_distribution<double> normal;
  Weights<double> w;
  w.parameters = {.num_layers = 3,
                  .embedding = 20,
                  .num_q_heads = 6,
                  .num_kv_heads = 2,
                  .head_dim = 8,
                  .rotary_dim = 6,
                  .vocabulary = 50,
                  .norm_epsilon = 1e-5f};
  w.rope = {.rotary_dim = 6, .base = 100, .pairs = kvt::Rope::Pairs::halves};
  using Matrix = Weights<double>::Matrix;
  using Row = Weights<double>::Row;
  const auto matrix = [&](int out, int in) {
    Matrix m(out, in);
    for (double& x : m.reshaped()) x = normal(random) / std::sqrt(in) * 1.5;
    return m;
  };
  const auto row = [&](int n, double middle) {
    Row r(n);
    for (double& x : r.reshaped()) x = middle + .3 * normal(random);
    return r;
  };
  w.embedding = matrix(50, 20);
  w.head = matrix(50, 20);
  w.output_norm = row(20, 1);
  for (int l = 0; l < 3; ++l) {
    w.layers.push_back({row(20, 1), row(20, 1), row(48, 0), row(16, 0), row(16, 0), matrix(48, 20), matrix(16, 20),
                        matrix(16, 20), matrix(20, 48), matrix(30, 20), matrix(30, 20), matrix(20, 30)});
  }
  return w;
}

// [rows, vocabulary] of what a student gives.
Weights<float>::Matrix logits_of(const Weights<float>& w, const Weights<float>::Matrix& out) {
  return out * w.vocabulary().transpose();
}

std::span<const float> row_of(const Weights<float>::Matrix& m, int r) {
  return {m.data() + static_cast<std::ptrdiff_t>(r) * m.cols(), static_cast<std::size_t>(m.cols())};
}

}  // namespace

TEST_CASE("the gradient by a mask is that of differences") {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const Weights<double> w = small_model(random);
  Context context;
  context.rows = 11;
  for (int i = 0; i < 3 * 2 * 11 * 8; ++i) {
    context.keys.push_back(kvt::from_float<kvt::Half>(normal(random)));
    context.values.push_back(kvt::from_float<kvt::Half>(normal(random)));
  }
  const std::vector<int> tokens = {3, 41, 7, 7, 19}, wanted = {1, 2, 4};
  Student<double> student(w);
  std::vector<double> mask(3 * 2 * 11, 1.0);
  const Weights<double>::Matrix teacher = student.run(context, tokens, wanted, mask);
  CHECK(std::fabs(student.distance(teacher)) < 1e-12);
  for (double& m : mask) m = std::uniform_real_distribution<double>(0, 1)(random);
  mask[5] = 0;
  mask[30] = 1;
  student.run(context, tokens, wanted, mask);
  CHECK(student.distance(teacher) > 1e-3);
  std::vector<double> by(mask.size());
  student.gradient(by);
  double size = 0;
  for (const double x : by) size = std::max(size, std::fabs(x));
  CHECK(size > 1e-3);
  for (std::size_t i = 0; i < mask.size(); ++i) {
    CAPTURE(i);
    const double step = 1e-5, at = mask[i];
    const auto distance = [&](double m) {
      mask[i] = m;
      student.run(context, tokens, wanted, mask);
      return student.distance(teacher);
    };
    const double slope = (distance(at + step) - distance(at - step)) / (2 * step);
    mask[i] = at;
    CHECK(std::fabs(by[i] - slope) < 1e-7 * size + 1e-9);
  }
}

TEST_CASE("a row without weight is one that is not there") {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  const Weights<double> w = small_model(random);
  Context whole, part;
  whole.rows = 9;
  part.rows = 9;
  for (int i = 0; i < 3 * 2 * 9 * 8; ++i) {
    whole.keys.push_back(kvt::from_float<kvt::Half>(normal(random)));
    whole.values.push_back(kvt::from_float<kvt::Half>(normal(random)));
  }
  part = whole;
  std::vector<double> mask(3 * 2 * 9, 1.0);
  for (std::size_t i = 0; i < mask.size(); ++i) {
    if (i % 3 != 1) continue;
    mask[i] = 0;
    std::fill_n(part.keys.begin() + static_cast<std::ptrdiff_t>(8 * i), 8, kvt::from_float<kvt::Half>(40.f));
    std::fill_n(part.values.begin() + static_cast<std::ptrdiff_t>(8 * i), 8, kvt::from_float<kvt::Half>(-7.f));
  }
  Student<double> student(w);
  const std::vector<int> tokens = {1, 2, 3}, wanted = {0, 1, 2};
  const Weights<double>::Matrix want = student.run(whole, tokens, wanted, mask);
  CHECK((student.run(part, tokens, wanted, mask) - want).cwiseAbs().maxCoeff() < 1e-9);
}

// With the weights in fp32, the engine differs by how it rounds alone.
TEST_CASE("the student is the model, and a mask is a cut") {
  init_engine();
  const Model model(dequantised(environment("KVT_MODEL")));
  const Tokenizer tokenizer(environment("KVT_MODEL"));
  Engine engine(model, 2);
  Common common;
  common.zones.sink_rows = 2;
  common.zones.recent_rows = 4;
  LessonOptions options;
  options.texts = {text_path()};
  options.samples = 2;
  options.continuation = 24;
  options.make.tokens = 150;
  const Weights<float> weights = weights_of(model);
  Student<float> student(weights);
  for (Lesson& lesson : make_lessons(tokenizer, options)) {
    const Exercise& exercise = lesson.exercises.front();
    CAPTURE(exercise.kind);
    read_lesson(engine, tokenizer, common, lesson);
    const int rows = lesson.context.rows, heads = model.parameters().geometry().num_heads();
    const auto compare_with = [&](kvt::AnyCache& cache, const std::vector<float>& mask) {
      const auto own = logits_of(weights, student.run(lesson.context, exercise.tokens, exercise.wanted, mask));
      const auto logits = engine.eval(cache, exercise.tokens, rows, Engine::Logits::all);
      double worst = 0;
      const auto vocabulary = static_cast<std::size_t>(model.parameters().vocabulary);
      for (std::size_t i = 0; i < exercise.wanted.size(); ++i) {
        const auto want = logits.subspan(static_cast<std::size_t>(exercise.wanted[i]) * vocabulary, vocabulary);
        worst = std::max(worst, compare(want, row_of(own, static_cast<int>(i))).kl);
      }
      return worst;
    };
    const kvt::Composition names{"uniform", "key_diff", "fp32"};
    const auto cache = make_cache(names, model.parameters().geometry(), told_of(model, names, common.zones));
    engine.eval(*cache, lesson.tokens, 0, Engine::Logits::last);
    std::vector<float> mask(static_cast<std::size_t>(heads) * static_cast<std::size_t>(rows), 1.f);
    const auto twin = [&] {
      std::unique_ptr<kvt::AnyCache> copy;
      check(cache->fork(copy));
      return copy;
    };
    CHECK(compare_with(*twin(), mask) < 1e-5);
    const auto cut = twin();
    check(cut->compress(kvt::Retain::ratio(0.3)));
    std::fill(mask.begin(), mask.end(), 0.f);
    for (int h = 0; h < heads; ++h) {
      for (const int position : cut->positions(h / 3, h % 3)) mask[static_cast<std::size_t>(h * rows + position)] = 1;
    }
    CHECK(compare_with(*cut, mask) < 1e-5);
  }
}
