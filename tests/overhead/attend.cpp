// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
//   attend cache|hand HEAD_DIM
//
// One decode step over dense fp16 rows, through KvCache or by loops written by hand for plain arrays. Callgrind counts that
// step alone; compare.sh runs both and compares the counts.
#include <immintrin.h>
#include <valgrind/callgrind.h>

#include <cstdio>
#include <random>
#include <string_view>

#include "kvtailor/kvtailor.hpp"

namespace {

template <int dim>
struct Rows {
  int heads, group, rows;
  std::vector<kvt::Half> keys, values;  // [heads, rows, dim]
  std::vector<float> queries;           // [heads * group, dim]
};

float sum_of(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
float max_of(__m256 x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

// 4 KiB ahead of `count` rows. GCC leaves calls of such a function out, since it computes nothing.
template <int dim>
[[gnu::always_inline]] inline void prefetch(const kvt::Half* row, int count) {
  constexpr int ahead = 4096 / (2 * dim);
  for (int i = 0; i < count * dim; i += 32) __builtin_prefetch(row + ahead * dim + i);
}

// Online softmax block by block. A row is decoded once for all queries of its group, and values are added four rows at a time,
// as the cache does it.
template <int dim>
[[gnu::noinline]] void attend_by_hand(const Rows<dim>& cache, float* out) {
  constexpr int block = 128, most = 16;
  alignas(64) float query[most * dim], sum[most * dim], weight[most * block];
  float top[most], total[most];
  const int group = cache.group;
  const float scale = 1.f / std::sqrt(static_cast<float>(dim));
  for (int head = 0; head < cache.heads; ++head) {
    const float* const q = cache.queries.data() + head * group * dim;
    for (int i = 0; i < group * dim; ++i) query[i] = q[i] * scale;
    for (int i = 0; i < group * dim; ++i) sum[i] = 0;
    for (int j = 0; j < group; ++j) top[j] = -std::numeric_limits<float>::infinity();
    for (int j = 0; j < group; ++j) total[j] = 0;
    for (int first = 0; first < cache.rows; first += block) {
      const int n = std::min(block, cache.rows - first);
      const kvt::Half* key = cache.keys.data() + (head * cache.rows + first) * dim;
      const kvt::Half* value = cache.values.data() + (head * cache.rows + first) * dim;
      for (int r = 0; r < n; ++r, key += dim) {
        prefetch<dim>(key, 1);
        float x[dim];
        kvt::load_floats<dim>(key, x);
        for (int j = 0; j < group; ++j) {
          const float* const y = query + j * dim;
          __m256 even = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(y));
          __m256 odd = _mm256_mul_ps(_mm256_loadu_ps(x + 8), _mm256_loadu_ps(y + 8));
          for (int d = 16; d < dim; d += 16) {
            even = _mm256_fmadd_ps(_mm256_loadu_ps(x + d), _mm256_loadu_ps(y + d), even);
            odd = _mm256_fmadd_ps(_mm256_loadu_ps(x + d + 8), _mm256_loadu_ps(y + d + 8), odd);
          }
          weight[j * n + r] = sum_of(_mm256_add_ps(even, odd));
        }
      }
      for (int j = 0; j < group; ++j) {
        float* const w = weight + j * n;
        float largest = top[j];
        int r = 0;
        if (n >= 8) {
          __m256 most_of = _mm256_loadu_ps(w);
          for (r = 8; r + 8 <= n; r += 8) most_of = _mm256_max_ps(most_of, _mm256_loadu_ps(w + r));
          largest = std::max(largest, max_of(most_of));
        }
        for (; r < n; ++r) largest = std::max(largest, w[r]);
        if (largest > top[j]) {
          const float factor = kvt::exp_nonpositive(top[j] - largest);
          top[j] = largest;
          total[j] *= factor;
          for (int d = 0; d < dim; ++d) sum[j * dim + d] *= factor;
        }
        for (r = 0; r < n; ++r) w[r] = kvt::exp_nonpositive(w[r] - largest);
        __m256 part = _mm256_setzero_ps();
        for (r = 0; r + 8 <= n; r += 8) part = _mm256_add_ps(part, _mm256_loadu_ps(w + r));
        total[j] += sum_of(part);
        for (; r < n; ++r) total[j] += w[r];
      }
      int r = 0;
      for (; r + 4 <= n; r += 4, value += 4 * dim) {
        prefetch<dim>(value, 4);
        float x[4][dim];
        for (int i = 0; i < 4; ++i) kvt::load_floats<dim>(value + i * dim, x[i]);
        for (int j = 0; j < group; ++j) {
          const float* const w = weight + j * n + r;
          const __m256 w0 = _mm256_broadcast_ss(w), w1 = _mm256_broadcast_ss(w + 1);
          const __m256 w2 = _mm256_broadcast_ss(w + 2), w3 = _mm256_broadcast_ss(w + 3);
          for (int d = 0; d < dim; d += 8) {
            __m256 s = _mm256_loadu_ps(sum + j * dim + d);
            s = _mm256_fmadd_ps(w0, _mm256_loadu_ps(x[0] + d), s);
            s = _mm256_fmadd_ps(w1, _mm256_loadu_ps(x[1] + d), s);
            s = _mm256_fmadd_ps(w2, _mm256_loadu_ps(x[2] + d), s);
            s = _mm256_fmadd_ps(w3, _mm256_loadu_ps(x[3] + d), s);
            _mm256_storeu_ps(sum + j * dim + d, s);
          }
        }
      }
      for (; r < n; ++r, value += dim) {
        float x[dim];
        kvt::load_floats<dim>(value, x);
        for (int j = 0; j < group; ++j) {
          const float w = weight[j * n + r];
          for (int d = 0; d < dim; ++d) sum[j * dim + d] += w * x[d];
        }
      }
    }
    for (int j = 0; j < group; ++j) {
      for (int d = 0; d < dim; ++d) *out++ = sum[j * dim + d] / total[j];
    }
  }
}

template <int dim, int group>
int run(bool by_hand) {
  constexpr int heads = 2, rows = 2048;
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  Rows<dim> plain{heads, group, rows, {}, {}, {}};
  plain.keys.resize(heads * rows * dim);
  plain.values.resize(plain.keys.size());
  plain.queries.resize(heads * group * dim);
  for (float& x : plain.queries) x = normal(random);

  using Codec = kvt::Dense<kvt::Half, dim>;
  kvt::KvCache<kvt::Uniform, kvt::SinkRecent, kvt::KvCodec<Codec>> cache;
  kvt::Status status = cache.init({1, heads, heads * group, dim});
  // Row by row, as decoding goes: the rows lie in all three zones.
  std::vector<kvt::Half> key(heads * dim), value(key.size());
  for (int r = 0; r < rows && status.ok(); ++r) {
    for (int i = 0; i < heads * dim; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const auto to = static_cast<std::size_t>((i / dim * rows + r) * dim + i % dim);
      plain.keys[to] = key[at] = kvt::from_float<kvt::Half>(normal(random));
      plain.values[to] = value[at] = kvt::from_float<kvt::Half>(normal(random));
    }
    status = cache.append(0, key.data(), value.data(), std::span(&r, 1));
  }
  std::vector<float> by_cache(plain.queries.size(), NAN), hand(by_cache);
  const int now = rows - 1;
  if (status.ok()) status = cache.attend(0, plain.queries.data(), std::span(&now, 1), {}, by_cache.data());
  attend_by_hand(plain, hand.data());
  // Sums of 2,048 terms in another order, far below the 5e-4 that a lost row makes.
  bool same = status.ok();
  for (std::size_t i = 0; i < hand.size(); ++i) same = same && std::fabs(by_cache[i] - hand[i]) <= 2e-6f;
  if (!same) {
    std::puts("the cache and the loops give different outputs");
    return 1;
  }

  CALLGRIND_TOGGLE_COLLECT;
  if (by_hand) {
    attend_by_hand(plain, hand.data());
  } else {
    status = cache.attend(0, plain.queries.data(), std::span(&now, 1), {}, by_cache.data());
  }
  CALLGRIND_TOGGLE_COLLECT;
  return status.ok() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view what = argc == 3 ? argv[1] : "", dim = argc == 3 ? argv[2] : "";
  if (what == "cache" || what == "hand") {
    if (dim == "128") return run<128, 4>(what == "hand");
    if (dim == "64") return run<64, 3>(what == "hand");
  }
  std::puts("usage: attend cache|hand 128|64");
  return 2;
}
