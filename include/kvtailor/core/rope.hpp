// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embedding (RoFormer, arXiv 2104.09864), for the two pair layouts in use, with frequency factors
// (Llama 3 style: pair i turns by scale * position * base^(-2i/rotary_dim) / factor[i]).
#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "kvtailor/core/config.hpp"
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
  KVT_HD int first(int i) const noexcept { return pairs == Pairs::adjacent ? 2 * i : i; }
  KVT_HD int second(int i) const noexcept { return pairs == Pairs::adjacent ? 2 * i + 1 : i + rotary_dim / 2; }

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

// Turns many rows back. The angles of a position that follows the last one come from those by a product; one in 256 is made
// anew, so that they stay right to 1e-13.
class RopeInverse {
 public:
  // May throw std::bad_alloc.
  explicit RopeInverse(const Rope& rope)
      : rope_(rope), pairs_(static_cast<std::size_t>(rope.rotary_dim / 2)), now_(pairs_), step_(pairs_), turn_(pairs_) {
    for (std::size_t i = 0; i < pairs_; ++i) {
      const double angle = rope.step(static_cast<int>(i));
      step_.set(i, angle);
      angle_.push_back(angle);
    }
  }
  // Rows [n, head_dim] of one position, in place.
  void turn_back(float* rows, int n, int head_dim, int position) noexcept {
    move_to(position);
    for (int r = 0; r < n; ++r, rows += head_dim) {
      const float *const c = turn_.cosine.data(), *const s = turn_.sine.data();
      // Each layout has a loop that can be vectorised.
      if (rope_.pairs == Rope::Pairs::halves) {
        float *const a = rows, *const b = rows + pairs_;
        for (std::size_t i = 0; i < pairs_; ++i) {
          const float x = a[i] * c[i] + b[i] * s[i];
          b[i] = b[i] * c[i] - a[i] * s[i];
          a[i] = x;
        }
      } else {
        for (std::size_t i = 0; i < pairs_; ++i) {
          const float x = rows[2 * i] * c[i] + rows[2 * i + 1] * s[i];
          rows[2 * i + 1] = rows[2 * i + 1] * c[i] - rows[2 * i] * s[i];
          rows[2 * i] = x;
        }
      }
    }
  }

 private:
  template <class T>
  struct Angles {
    explicit Angles(std::size_t n) : cosine(n), sine(n) {}
    void set(std::size_t i, double angle) {
      cosine[i] = static_cast<T>(std::cos(angle));
      sine[i] = static_cast<T>(std::sin(angle));
    }
    std::vector<T> cosine, sine;
  };
  void move_to(int position) noexcept {
    if (position == position_) return;
    const bool follows = position == position_ + 1 && position % 256 != 0;
    for (std::size_t i = 0; i < pairs_; ++i) {
      double &c = now_.cosine[i], &s = now_.sine[i];
      if (follows) {
        const double turned = c * step_.cosine[i] - s * step_.sine[i];
        s = c * step_.sine[i] + s * step_.cosine[i];
        c = turned;
      } else {
        now_.set(i, position * angle_[i]);
      }
      turn_.cosine[i] = static_cast<float>(c);
      turn_.sine[i] = static_cast<float>(s);
    }
    position_ = position;
  }

  const Rope& rope_;
  std::size_t pairs_;
  Angles<double> now_, step_;
  Angles<float> turn_;
  std::vector<double> angle_;
  int position_ = -2;
};

}  // namespace kvt::inline v0
