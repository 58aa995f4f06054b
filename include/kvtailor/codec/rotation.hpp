// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Rotation: the orthogonal map y = (H x D x) / sqrt(head_dim), D random signs and H a Hadamard matrix of exactly head_dim.
//
// H = P (x) W: W is Walsh-Hadamard of the largest power of two, P one of order 1, 12, 20 or 28 by Paley's constructions
// (J. Math. Phys. 12, 1933): I from GF(11) and GF(19), II from GF(13). No head dim of the library needs padding.
// Cost: head_dim * (log2(power) + order) additions. Lanes need no memory of their own beyond the row.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kvtailor/core/lanes.hpp"
#include "kvtailor/core/random.hpp"
#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

namespace detail {

constexpr int paley_order(int head_dim) {
  while (head_dim % 2 == 0) head_dim /= 2;
  return head_dim == 1 ? 1 : head_dim * 4;  // 3, 5, 7 -> 12, 20, 28
}

// 1 for a square modulo the prime q, -1 for none, 0 for zero.
constexpr int legendre(int a, int q) {
  a = ((a % q) + q) % q;
  if (a == 0) return 0;
  for (int x = 1; x < q; ++x) {
    if (x * x % q == a) return 1;
  }
  return -1;
}

template <int order>
struct Paley {
  signed char sign[order][order] = {};

  constexpr Paley() {
    if constexpr (order == 1) {
      sign[0][0] = 1;
    } else if constexpr (order == 28) {
      constexpr int q = 13;
      for (int i = 0; i <= q; ++i) {
        for (int j = 0; j <= q; ++j) {
          const int c = i == j ? 0 : i == 0 || j == 0 ? 1 : legendre(i - j, q);
          const int e = i == j ? 1 : 0;
          sign[2 * i][2 * j] = static_cast<signed char>(c + e);
          sign[2 * i][2 * j + 1] = static_cast<signed char>(c - e);
          sign[2 * i + 1][2 * j] = static_cast<signed char>(c - e);
          sign[2 * i + 1][2 * j + 1] = static_cast<signed char>(-c - e);
        }
      }
    } else {
      constexpr int q = order - 1;
      for (int i = 0; i <= q; ++i) {
        for (int j = 0; j <= q; ++j) {
          const int s = i == j ? 1 : i == 0 ? 1 : j == 0 ? -1 : legendre(j - i, q);
          sign[i][j] = static_cast<signed char>(s);
        }
      }
    }
  }
};

#if defined(KVT_HOST_VECTORS)
// a + b and a - b of x[i] and x[i + step]; `swapped` has them taken for each other.
KVT_INLINE void butterfly(Float8& x, const Float8& swapped, int step) {
  Float8 sign;
  KVT_UNROLL
  for (int i = 0; i < 8; ++i) sign[i] = i & step ? -1.f : 1.f;
  x = swapped + sign * x;
}
// Of each `power` of n numbers, not scaled: from `step` on.
template <int power, int n, int step = 8>
KVT_INLINE void far_butterflies(float* x) {
  if constexpr (step < power) {
    for (int base = 0; base < n; base += 2 * step) {
      for (int i = base; i < base + step; i += 8) {
        Float8 a, b;
        load(x + i, a);
        load(x + i + step, b);
        const Float8 sum = a + b, difference = a - b;
        std::memcpy(x + i, &sum, sizeof sum);
        std::memcpy(x + i + step, &difference, sizeof difference);
      }
    }
    far_butterflies<power, n, 2 * step>(x);
  }
}
template <int power, int n>
KVT_INLINE void walsh_hadamard(float* x) {
  static_assert(n % 8 == 0);
  for (int i = 0; i < n; i += 8) {
    Float8 v;
    load(x + i, v);
    if constexpr (power > 1) butterfly(v, Float8{v[1], v[0], v[3], v[2], v[5], v[4], v[7], v[6]}, 1);
    if constexpr (power > 2) butterfly(v, Float8{v[2], v[3], v[0], v[1], v[6], v[7], v[4], v[5]}, 2);
    if constexpr (power > 4) butterfly(v, Float8{v[4], v[5], v[6], v[7], v[0], v[1], v[2], v[3]}, 4);
    std::memcpy(x + i, &v, sizeof v);
  }
  far_butterflies<power, n>(x);
}
#endif

}  // namespace detail

template <int head_dim, std::uint64_t seed = 0x6b76746169ull>
struct Rotation {
  static constexpr int order = detail::paley_order(head_dim);
  static constexpr int power = head_dim / order;
  static_assert(order * power == head_dim && (power & (power - 1)) == 0 && order <= 28);

  // Sign of element d.
  KVT_HD static constexpr float sign(int d) { return (mixed_bits(seed, static_cast<std::uint64_t>(d)) & 1) != 0 ? 1.f : -1.f; }

  // In place; x[head_dim] is memory all lanes see.
  template <class Lanes>
  KVT_HD static void forward(const Lanes& lanes, float* x) {
    lanes.each([&](int lane) {
      for (int d = lane; d < head_dim; d += Lanes::size) x[d] *= signs(d);
    });
    transform<false>(lanes, x);
  }
  template <class Lanes>
  KVT_HD static void inverse(const Lanes& lanes, float* x) {
    transform<true>(lanes, x);
    lanes.each([&](int lane) {
      for (int d = lane; d < head_dim; d += Lanes::size) x[d] *= signs(d);
    });
  }

 private:
  struct Signs {
    float value[head_dim] = {};
    constexpr Signs() {
      for (int d = 0; d < head_dim; ++d) value[d] = sign(d);
    }
  };
  KVT_HD KVT_INLINE static float signs(int d) {
    static constexpr Signs table;  // not static, it would be copied to the local memory of every thread
    return table.value[d];
  }
  static constexpr double root() {
    double root = head_dim;
    for (int i = 0; i < 64; ++i) root = 0.5 * (root + head_dim / root);
    return root;
  }

  template <bool transposed, class Lanes>
  KVT_HD static void transform(const Lanes& lanes, float* x) {
    constexpr auto scale = static_cast<float>(1.0 / root());
#if defined(KVT_HOST_VECTORS)
    if constexpr (Lanes::size == 1) {
      detail::walsh_hadamard<power, head_dim>(x);
      if constexpr (order == 1) {
        for (int d = 0; d < head_dim; ++d) x[d] = 0.f + x[d] * scale;
      } else {
        for (int column = 0; column < power; ++column) mix_eights<transposed>(x + column);
      }
      return;
    }
#endif
    for (int step = 1; step < power; step *= 2) {
      lanes.each([&](int lane) {
        for (int pair = lane; pair < head_dim / 2; pair += Lanes::size) {
          const int i = pair / step * 2 * step + pair % step;
          const float a = x[i], b = x[i + step];
          x[i] = a + b;
          x[i + step] = a - b;
        }
      });
    }
    lanes.each([&](int lane) {
      static constexpr detail::Paley<order> paley;
      for (int column = lane; column < power; column += Lanes::size) {
        float in[order];
        for (int j = 0; j < order; ++j) in[j] = x[j * power + column] * scale;
        for (int i = 0; i < order; ++i) {
          float total = 0;
          for (int j = 0; j < order; ++j) total += (transposed ? paley.sign[j][i] : paley.sign[i][j]) * in[j];
          x[i * power + column] = total;
        }
      }
    });
  }
#if defined(KVT_HOST_VECTORS)
  // The Paley matrix and a column, eight rows of the matrix at a time.
  template <bool transposed>
  KVT_INLINE static void mix_eights(float* x) {
    struct Columns {
      float of[order][(order + 7) / 8 * 8] = {};
      constexpr Columns() {
        constexpr detail::Paley<order> paley;
        for (int i = 0; i < order; ++i) {
          for (int j = 0; j < order; ++j) of[j][i] = transposed ? paley.sign[j][i] : paley.sign[i][j];
        }
      }
    };
    static constexpr Columns matrix;
    constexpr auto scale = static_cast<float>(1.0 / root());
    float in[order];
    for (int j = 0; j < order; ++j) in[j] = x[j * power] * scale;
    for (int i = 0; i < order; i += 8) {
      detail::Float8 total = {};
      for (int j = 0; j < order; ++j) {
        detail::Float8 signs;
        detail::load(matrix.of[j] + i, signs);
        total += signs * in[j];
      }
      for (int k = 0; k < 8 && i + k < order; ++k) x[(i + k) * power] = total[k];
    }
  }
#endif
};

}  // namespace kvt::inline v0
