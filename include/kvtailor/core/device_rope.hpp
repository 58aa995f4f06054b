// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// DeviceRope: RopeInverse on a device. Angles are counted in whole turns, of which only the fraction matters: cosines need no
// long reduction then.
#pragma once

#include "kvtailor/core/config.hpp"
#include "kvtailor/core/rope.hpp"

namespace kvt::inline v0 {

// Where a number of turns points to, right to 1e-15 and what the number has lost.
struct Direction {
  double cosine, sine;

  KVT_HD explicit Direction(double turns) {
    constexpr double two_pi = 6.283185307179586;
    const double quarters = std::rint(4 * (turns - std::rint(turns)));
    const double x = two_pi * (turns - std::rint(turns) - quarters / 4), square = x * x;  // |x| <= pi / 4
    double c = 0, s = 0;
    for (int k = 16; k >= 2; k -= 2) {
      c = -(1 + c) * square / (k * (k - 1));
      s = -(1 + s) * square / (k * (k + 1));
    }
    c += 1;
    s = x * (1 + s);
    const int quarter = static_cast<int>(quarters) & 3;
    cosine = quarter % 2 == 0 ? c : s;
    sine = quarter % 2 == 0 ? s : c;
    if (quarter == 1 || quarter == 2) cosine = -cosine;
    if (quarter == 2 || quarter == 3) sine = -sine;
  }
};

struct DeviceRope {
  Rope rope;            // its factors are not looked at
  const double* turns;  // [rotary_dim / 2] from one position to the next, of the device

  KVT_HD int pairs() const { return rope.rotary_dim / 2; }
  // A row that all lanes see, in place.
  template <class Lanes>
  KVT_HD void turn_back(const Lanes& lanes, float* row, int position) const {
    lanes.each([&](int lane) {
      for (int i = lane; i < pairs(); i += Lanes::size) {
        const Direction to(position * turns[i]);
        const auto c = static_cast<float>(to.cosine), s = static_cast<float>(to.sine);
        float &a = row[rope.first(i)], &b = row[rope.second(i)];
        const float x = a * c + b * s;
        b = b * c - a * s;
        a = x;
      }
    });
  }
};

}  // namespace kvt::inline v0
