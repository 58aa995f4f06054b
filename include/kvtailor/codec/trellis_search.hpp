// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// TrellisSearch: the closed path through a bit-shift trellis whose values are nearest to a row.
//
// The row's dim * bits code bits form a ring. The state of element i is the `window` bits that begin with the element's own,
// the least significant first; it stands for the value table[state]. From the last element to the first, a step shifts the
// state up by `bits` and puts the element's own bits below, so the 2^bits states that agree in their lower window - bits bits
// (a group) have the same 2^bits successors.
//
// Viterbi's algorithm finds the best path from a given group. The group where the ring closes is read off the best open path
// over the row's ends joined together; the closed path then has to begin and end in it. At window 8, for Gaussian rows of 64,
// it is the best there is in 51 / 69 / 85 / 95 % of rows at 1 / 2 / 3 / 4 bits, and the squared error is 2 / 1 / .4 / .1 %
// above the least.
//
// Elements are rounded to 1/256, and values are multiples of 1/32. Sums of squares below 256 are then exact, so that compilers
// that contract products and sums, and others, find the same path.
// Source:  A. J. Viterbi, IEEE Trans. Inf. Theory 13, 1967; M. W. Marcellin and T. R. Fischer, IEEE Trans. Commun. 38, 1990.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0 {

#if defined(KVT_HOST_VECTORS)
namespace detail {
using Int8 __attribute__((vector_size(32))) = std::int32_t;
}
#endif

template <int bits, int window>
class TrellisSearch {
 public:
  static constexpr int num_states = 1 << window, fan = 1 << bits, num_groups = num_states / fan;
  static_assert(window >= 2 * bits && window <= 12, "a state holds at least two codes and at most 12 bits");
  static constexpr float grid = 256;
  static constexpr int table_grid = 32;  // of values, so that a byte holds one
  // A row is searched at these sizes beside its root mean square, and the best is taken: 2 to 10 % less error.
  static constexpr int num_sizes = 3;
  KVT_HD static constexpr float size(int i) { return i == 0 ? 1.f : i == 1 ? 1.09050773f : 0.917004043f; }

  // Bytes of memory a search of rows [dim] needs.
  static constexpr int memory(int dim) { return dim * num_groups; }

  // x [dim] -> state [dim] of the path through values table [num_states].
  template <class State>
  void operator()(const float* x, int dim, const float* table, std::uint8_t* memory, State* state) {
    float cell[max_dim];
    for (int i = 0; i < dim; ++i) cell[i] = rounded(x[i]);
    closed_path(cell, dim, table, closing_group(cell, dim, table, memory), memory, state);
  }

  // x [dim] of multiples of 1/256 -> the best path that begins and ends in `group`; returns its squared error.
  template <class State>
  float closed_path(const float* x, int dim, const float* table, int group, std::uint8_t* from, State* state) {
    std::fill_n(least_, num_groups, 1e30f);
    least_[group] = 0;
    for (int i = dim - 1; i > 0; --i) advance(x[i], table, from + (i - 1) * num_groups);
    extend(x[0], table);
    int s = group;
    for (int k = 1; k < fan; ++k) {
      if (cost_[k * num_groups + group] < cost_[s]) s = k * num_groups + group;
    }
    const float error = cost_[s];
    for (int i = 0; i < dim; ++i) {
      state[i] = static_cast<State>(s);
      if (i + 1 < dim) s = before(s, from + i * num_groups);
    }
    return error;
  }

  // Memory that all lanes see, for a search by them.
  template <int dim>
  struct LaneMemory {
    static constexpr int words = (num_groups + 31) / 32 * bits;
    float least[2][num_groups];  // of the paths to each group so far; and after the next element
    std::uint32_t from[dim]
                      [words];  // upper bits of the element's state, given a group: bit b in bit g % 32 of g / 32 * bits + b
  };
  // The same path, by lanes; x is rounded in place.
  template <int dim, class Lanes, class State>
  KVT_HD static void find(const Lanes& lanes, float* x, const float* table, LaneMemory<dim>& memory, State* state) {
    lanes.each([&](int lane) {
      for (int i = lane; i < dim; i += Lanes::size) x[i] = rounded(x[i]);
    });
    LaneSearch<Lanes, dim> search(lanes, x, table, memory);
    const int group = search.closing_group();
    search.closed_path(group, state);
  }

 private:
  static constexpr int max_dim = 512;
  static constexpr int overlap = 32;  // elements on either side of the ring's end that decide where it closes

  KVT_HD KVT_INLINE static float rounded(float x) { return std::rint(x * grid) / grid; }

  // A lane has groups lane, lane + 32, ... and the values of the states that lead to them.
  template <class Lanes, int dim>
  class LaneSearch {
   public:
    KVT_HD LaneSearch(const Lanes& lanes, const float* x, const float* table, LaneMemory<dim>& memory)
        : lanes_(lanes), x_(x), memory_(memory) {
      lanes.each([&](int lane) {
        KVT_UNROLL
        for (int j = 0; j < own_groups; ++j) {
          const int g = j * Lanes::size + lane;
          KVT_UNROLL
          for (int k = 0; k < fan; ++k) value_[lane].of[j][k] = g < num_groups ? table[k * num_groups + g] : 0.f;
        }
      });
    }
    KVT_HD int closing_group() {
      constexpr int half = overlap < dim / 2 ? overlap : dim / 2;
      begin([](int) { return 0.f; });
      extend(half, 0);
      extend(dim, dim - half);
      int s = best_state(dim - half);
      for (int i = dim - half + 1; i < dim; ++i) s = state_of(i, s / fan);
      return s / fan;
    }
    template <class State>
    KVT_HD void closed_path(int group, State* state) {
      begin([=](int g) { return g == group ? 0.f : 1e30f; });
      extend(dim, 0);
      lanes_.once([&] {
        int s = group * fan;  // of the last element, but for its own bits
        for (int i = 0; i < dim; ++i) state[i] = static_cast<State>(s = state_of(i, s / fan));
      });
    }

   private:
    static constexpr int own_groups = (num_groups + Lanes::size - 1) / Lanes::size;
    struct Values {
      float of[own_groups][fan];
    };
    struct Choices {
      int upper[own_groups];
    };

    template <class F>
    KVT_HD void begin(F least) {
      now_ = 0;
      lanes_.each([&](int lane) {
        for (int g = lane; g < num_groups; g += Lanes::size) memory_.least[0][g] = least(g);
      });
    }
    // By elements last - 1 .. first.
    KVT_HD void extend(int last, int first) {
      KVT_LOOP_ON_DEVICE
      for (int i = last - 1; i >= first; --i) {
        const float* const before = memory_.least[now_];
        float* const after = memory_.least[now_ ^= 1];
        typename Lanes::template Reg<Choices> choice;
        lanes_.each([&](int lane) {
          KVT_UNROLL
          for (int j = 0; j < own_groups; ++j) {
            const int g = j * Lanes::size + lane;
            float least = 0;
            int upper = 0;
            if (g < num_groups) {
              KVT_UNROLL
              for (int k = 0; k < fan; ++k) {
                const float apart = x_[i] - value_[lane].of[j][k];
                const float cost = before[(k * num_groups + g) / fan] + apart * apart;
                if (k == 0 || cost < least) {
                  least = cost;
                  upper = k;
                }
              }
              after[g] = least;
            }
            choice[lane].upper[j] = upper;
          }
        });
        std::uint32_t word[LaneMemory<dim>::words];
        KVT_UNROLL
        for (int w = 0; w < LaneMemory<dim>::words; ++w) {
          word[w] = lanes_.ballot([&](int lane) { return (choice[lane].upper[w / bits] >> w % bits & 1) != 0; });
        }
        lanes_.once([&] { std::memcpy(memory_.from[i], word, sizeof word); });
      }
    }
    // Of element i, given the group of what follows.
    KVT_HD int state_of(int i, int group) const {
      const std::uint32_t* const word = memory_.from[i] + group / 32 * bits;
      int upper = 0;
      for (int b = 0; b < bits; ++b) upper |= static_cast<int>(word[b] >> group % 32 & 1) << b;
      return upper * num_groups + group;
    }
    // The first of the best after element i.
    KVT_HD int best_state(int i) const {
      const float* const least = memory_.least[now_];
      typename Lanes::template Reg<float> best, place;
      lanes_.each([&](int lane) {
        best[lane] = -INFINITY;
        for (int g = lane; g < num_groups; g += Lanes::size) best[lane] = best[lane] > -least[g] ? best[lane] : -least[g];
      });
      const float cost = -lanes_.max(best);
      lanes_.each([&](int lane) {
        int left = 0;
        for (int g = lane; g < num_groups; g += Lanes::size) {
          const int after = num_states - state_of(i, g);
          if (least[g] == cost && after > left) left = after;
        }
        place[lane] = static_cast<float>(left);
      });
      const int left = static_cast<int>(lanes_.max(place));
      return left == 0 ? 0 : num_states - left;  // no cost is the least where there are NaN
    }

    const Lanes& lanes_;
    const float* x_;
    LaneMemory<dim>& memory_;
    typename Lanes::template Reg<Values> value_;
    int now_ = 0;
  };

  int closing_group(const float* x, int dim, const float* table, std::uint8_t* from) {
    const int half = std::min(overlap, dim / 2);
    std::fill_n(least_, num_groups, 0.f);
    for (int i = half - 1; i >= 0; --i) advance(x[i], table, from);
    for (int i = 1; i < half; ++i) advance(x[dim - i], table, from + i * num_groups);
    extend(x[dim - half], table);
    int s = static_cast<int>(std::min_element(cost_, cost_ + num_states) - cost_);
    for (int i = half - 1; i > 0; --i) s = before(s, from + i * num_groups);
    return s / fan;
  }
  // The state a step earlier on the best path to s.
  static int before(int s, const std::uint8_t* from) { return s / fan + from[s / fan] * num_groups; }

#if defined(KVT_HOST_VECTORS)
  using Float = std::conditional_t<num_groups % 8 == 0, detail::Float8, float>;
  using Int = std::conditional_t<num_groups % 8 == 0, detail::Int8, std::int32_t>;
#else
  using Float = float;
  using Int = std::int32_t;
#endif
  // extend() by x, and choose().
  void advance(float x, const float* table, std::uint8_t* from) {
#if defined(KVT_HOST_AVX512)
    if constexpr (num_groups % 16 == 0) {
      static constexpr auto group_of = [] {
        std::array<int, 16> of{};
        for (int i = 0; i < 16; ++i) of[static_cast<std::size_t>(i)] = i / fan;
        return of;
      }();
      const __m512i spread = _mm512_loadu_si512(group_of.data());
      const __m512 element = _mm512_set1_ps(x);
      __m512 after[num_groups / 16];
      for (int g = 0; g < num_groups; g += 16) {
        __m512 least;
        __m512i which = _mm512_setzero_si512();
        for (int k = 0; k < fan; ++k) {
          const int s = k * num_groups + g;
          const __m512 before = _mm512_maskz_permutexvar_ps(0xffff, spread, _mm512_loadu_ps(least_ + s / fan));
          const __m512 apart = _mm512_sub_ps(element, _mm512_loadu_ps(table + s));
          const __m512 cost = _mm512_fmadd_ps(apart, apart, before);
          const __mmask16 less = k == 0 ? 0xffff : _mm512_cmp_ps_mask(cost, least, _CMP_LT_OQ);
          least = k == 0 ? cost : _mm512_mask_mov_ps(least, less, cost);
          which = k == 0 ? which : _mm512_mask_mov_epi32(which, less, _mm512_set1_epi32(k));
        }
        after[g / 16] = least;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(from + g), _mm512_cvtepi32_epi8(which));
      }
      for (int g = 0; g < num_groups; g += 16) _mm512_store_ps(least_ + g, after[g / 16]);
      return;
    }
#endif
    extend(x, table);
    choose(from);
  }
  // least_ of each group from the costs of its states; from[group] = the upper bits of the best.
  void choose(std::uint8_t* from) {
    constexpr int lanes = sizeof(Float) / sizeof(float);
    std::int32_t best[num_groups];
    for (int g = 0; g < num_groups; g += lanes) {
      Float least;
      Int which;
      best_of<0, fan>(cost_ + g, least, which);
      std::memcpy(least_ + g, &least, sizeof least);
      std::memcpy(best + g, &which, sizeof which);
    }
    for (int g = 0; g < num_groups; ++g) from[g] = static_cast<std::uint8_t>(best[g]);
  }
  // Of numbers or of vectors of them.
  template <int first, int count>
  KVT_INLINE static void best_of(const float* cost, Float& least, Int& which) {
    if constexpr (count == 1) {
      std::memcpy(&least, cost + first * num_groups, sizeof least);
      which = Int{} + first;
    } else {
      Float other;
      Int other_which;
      best_of<first, count / 2>(cost, least, which);
      best_of<first + count / 2, count / 2>(cost, other, other_which);
      which = other < least ? other_which : which;
      least = other < least ? other : least;
    }
  }
  // Costs of the states after an element x from those of their groups.
  void extend(float x, const float* table) {
#if defined(KVT_HOST_VECTORS) && defined(__AVX__)
    if constexpr (num_groups >= 4) {
      const __m256 element = _mm256_set1_ps(x);
      const __m256i lanes = _mm256_setr_epi32(0, 1 / fan, 2 / fan, 3 / fan, 4 / fan, 5 / fan, 6 / fan, 7 / fan);
      for (int s = 0; s < num_states; s += 8) {
        const __m256 groups = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(least_ + s / fan));
        const __m256 apart = _mm256_sub_ps(element, _mm256_loadu_ps(table + s));
        const __m256 cost = _mm256_add_ps(_mm256_permutevar_ps(groups, lanes), _mm256_mul_ps(apart, apart));
        _mm256_store_ps(cost_ + s, cost);
      }
      return;
    }
#endif
    for (int s = 0; s < num_states; ++s) {
      const float apart = x - table[s];
      cost_[s] = least_[s / fan] + apart * apart;
    }
  }

  alignas(64) float cost_[num_states];
  alignas(64) float least_[num_groups + 16] = {};  // the last are read, not used
};

}  // namespace kvt::inline v0
