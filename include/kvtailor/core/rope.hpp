// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embedding (RoFormer, arXiv 2104.09864), for the two pair layouts in use, with frequency factors
// (Llama 3 style: pair i turns by position * base^(-2i/rotary_dim) / factor[i]).
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

  // Turns one row [head_dim] in place to `position`; a negative position turns back.
  void apply(float* row, int position) const noexcept {
    const int half = rotary_dim / 2;
    for (int i = 0; i < half; ++i) {
      double angle = position * std::pow(static_cast<double>(base), -2.0 * i / rotary_dim);
      if (!factors.empty()) angle /= static_cast<double>(factors[static_cast<std::size_t>(i)]);
      const float c = static_cast<float>(std::cos(angle));
      const float s = static_cast<float>(std::sin(angle));
      float& x = row[pairs == Pairs::adjacent ? 2 * i : i];
      float& y = row[pairs == Pairs::adjacent ? 2 * i + 1 : i + half];
      const float turned = x * c - y * s;
      y = x * s + y * c;
      x = turned;
    }
  }
};

}  // namespace kvt::inline v0
