// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Adam: steps along a gradient, each parameter's as large as its gradient is steady.
// Source:  Kingma & Ba, arXiv 1412.6980.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

namespace kvt::inline v0 {

template <class T>
class Adam {
 public:
  T decay_mean = T(0.9), decay_square = T(0.98), epsilon = T(1e-8);
  T most = T(1);  // the gradient is shortened to this norm before all else

  explicit Adam(std::size_t parameters) : state_(2 * parameters, T(0)) {}

  // parameters -= rate * step; gradient as long as the parameters.
  void step(std::span<T> parameters, std::span<const T> gradient, T rate) {
    double square = 0;
    for (const T g : gradient) square += static_cast<double>(g) * static_cast<double>(g);
    const T by = static_cast<T>(std::min(1.0, static_cast<double>(most) / std::max(1e-30, std::sqrt(square))));
    ++steps_;
    const T mean_part = 1 - std::pow(decay_mean, static_cast<T>(steps_));
    const T square_part = 1 - std::pow(decay_square, static_cast<T>(steps_));
    T *const mean = state_.data(), *const squares = mean + parameters.size();
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const T g = gradient[i] * by;
      mean[i] = decay_mean * mean[i] + (1 - decay_mean) * g;
      squares[i] = decay_square * squares[i] + (1 - decay_square) * g * g;
      parameters[i] -= rate * (mean[i] / mean_part) / (std::sqrt(squares[i] / square_part) + epsilon);
    }
  }

  // What a checkpoint keeps: [2, parameters], and the number of steps made.
  std::vector<T>& state() { return state_; }
  int& steps() { return steps_; }

 private:
  std::vector<T> state_;
  int steps_ = 0;
};

}  // namespace kvt::inline v0
