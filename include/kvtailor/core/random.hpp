// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Numbers that look random and are the same everywhere: splitmix64 (Steele, Lea & Flood, OOPSLA 2014) of a seed and a place.
#pragma once

#include <cmath>
#include <cstdint>

#include "kvtailor/core/config.hpp"

namespace kvt::inline v0 {

KVT_HD constexpr std::uint64_t mixed_bits(std::uint64_t seed, std::uint64_t place) {
  std::uint64_t z = seed + 0x9e3779b97f4a7c15ull * (place + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// In [0, 1), a multiple of 2^-24.
KVT_HD constexpr float uniform_number(std::uint64_t seed, std::uint64_t place) {
  return static_cast<float>(mixed_bits(seed, place) >> 40) * 0x1p-24f;
}

// Of mean zero and variance one, by Box and Muller's transform.
inline double normal_number(std::uint64_t seed, std::uint64_t place) {
  const auto unit = [&](std::uint64_t k) { return (static_cast<double>(mixed_bits(seed, k) >> 11) + 0.5) * 0x1p-53; };
  return std::sqrt(-2 * std::log(unit(2 * place))) * std::cos(6.283185307179586 * unit(2 * place + 1));
}

}  // namespace kvt::inline v0
