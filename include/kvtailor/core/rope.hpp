// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embedding (RoFormer, arXiv 2104.09864), for the two pair layouts in use, with frequency factors
// (Llama 3 style: pair i turns by scale * position * base^(-2i/rotary_dim) / factor[i]).
#pragma once

#include <cmath>
#include <span>

#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

struct Rope {
  enum class Pairs {
    adjacent,  // (x0, x1), (x2, x3), ...     GGUF files of the Llama family
    halves,    // (x0, x[d/2]), (x1, x[d/2+1]), ...   "NEOX"; Qwen, Gemma, Hugging Face weights
  };
  int rotary_dim = 0;  // even; elements from rotary_dim on are left alone
  float base = 10000.f;
  float scale = 1;  // of positions: linear scaling, below one for longer contexts
  Pairs pairs = Pairs::adjacent;
  std::span<const float> factors = {};  // [rotary_dim / 2] or empty

  Status validate(int head_dim) const {
    if (rotary_dim < 2 || rotary_dim > head_dim || rotary_dim % 2 != 0) {
      return error(Errc::bad_shape, "rotary_dim is {}; it must be even and between 2 and head_dim, which is {}", rotary_dim,
                   head_dim);
    }
    if (!(base > 0) || !std::isfinite(base)) {
      return error(Errc::bad_value, "the RoPE base is {}; it must be finite and above zero", static_cast<double>(base));
    }
    if (!(scale > 0) || !std::isfinite(scale)) {
      return error(Errc::bad_value, "the scale of RoPE's positions is {}; it must be finite and above zero",
                   static_cast<double>(scale));
    }
    if (!factors.empty() && static_cast<int>(factors.size()) != rotary_dim / 2) {
      return error(Errc::bad_shape, "there are {} frequency factors; rotary_dim / 2 is {}", static_cast<double>(factors.size()),
                   rotary_dim / 2);
    }
    for (const float factor : factors) {
      if (!(factor > 0) || !std::isfinite(factor)) {
        return error(Errc::bad_value, "a frequency factor is {}; it must be finite and above zero",
                     static_cast<double>(factor));
      }
    }
    return success();
  }

  // The angle by which pair i turns from one position to the next.
  double step(int i) const noexcept {
    const double angle = static_cast<double>(scale) * std::pow(static_cast<double>(base), -2.0 * i / rotary_dim);
    return factors.empty() ? angle : angle / static_cast<double>(factors[static_cast<std::size_t>(i)]);
  }
  // Elements of a row that make pair i.
  int first(int i) const noexcept { return pairs == Pairs::adjacent ? 2 * i : i; }
  int second(int i) const noexcept { return pairs == Pairs::adjacent ? 2 * i + 1 : i + rotary_dim / 2; }

  // Turns rows [n, head_dim] of one position back in place. step [rotary_dim / 2]: of step(i).
  void turn_back(float* rows, int n, int head_dim, int position, std::span<const double> step) const noexcept {
    for (int i = 0; i < rotary_dim / 2; ++i) {
      const double angle = position * step[static_cast<std::size_t>(i)];
      const float c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
      for (int r = 0; r < n; ++r) {
        float* const row = rows + static_cast<std::ptrdiff_t>(r) * head_dim;
        float &x = row[first(i)], &y = row[second(i)];
        const float turned = x * c + y * s;
        y = y * c - x * s;
        x = turned;
      }
    }
  }

  // Turns one row [head_dim] in place to `position`; a negative position turns back.
  void apply(float* row, int position) const noexcept {
    for (int i = 0; i < rotary_dim / 2; ++i) {
      const double angle = position * step(i);
      const float c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
      float &x = row[first(i)], &y = row[second(i)];
      const float turned = x * c - y * s;
      y = x * s + y * c;
      x = turned;
    }
  }
};

}  // namespace kvt::inline v0
