// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What the states of Trellis stand for, and the mean squared error of rows of 64 normal numbers relative to their squared norm
// if scales are exact. Written by tools/trellis_tables.cpp.
#pragma once

namespace kvt::inline v0 {

// A state stands for size[k] / 32: bit i of k is the parity of the bits of the state that are set in index[i]. It is negative
// if the parity of those in `sign` is odd. The complement of a state stands for the opposite.
template <int bits, int window>
struct TrellisTable;

template <>
struct TrellisTable<1, 8> {
  static constexpr double distortion = 0.278972;
  static constexpr int sign = 143;
  static constexpr int index[3] = {45, 198, 221};
  static constexpr signed char size[8] = {3, 8, 13, 17, 24, 28, 38, 54};
};
template <>
struct TrellisTable<2, 8> {
  static constexpr double distortion = 0.071353;
  static constexpr int sign = 229;
  static constexpr int index[4] = {71, 149, 201, 90};
  static constexpr signed char size[16] = {1, 4, 6, 9, 13, 14, 17, 20, 27, 27, 30, 34, 44, 46, 54, 74};
};
template <>
struct TrellisTable<3, 8> {
  static constexpr double distortion = 0.018329;
  static constexpr int sign = 140;
  static constexpr int index[5] = {166, 144, 132, 195, 249};
  static constexpr signed char size[32] = {1,  2,  3,  4,  6,  7,  8,  10, 11, 12, 14, 15, 16, 18, 19, 21,
                                           22, 24, 26, 27, 29, 31, 33, 36, 38, 41, 45, 47, 55, 57, 69, 88};
};
template <>
struct TrellisTable<4, 8> {
  static constexpr double distortion = 0.004858;
  static constexpr int sign = 103;
  static constexpr int index[6] = {240, 183, 96, 237, 24, 169};
  static constexpr signed char size[64] = {0,  1,  2,  2,  3,  3,  4,  5,  5,  6,  7,  7,  8,  9,  9,  10,
                                           11, 11, 12, 13, 13, 14, 15, 15, 16, 17, 17, 18, 19, 20, 20, 21,
                                           22, 23, 24, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36,
                                           37, 39, 40, 41, 43, 45, 46, 48, 50, 52, 55, 58, 62, 68, 78, 96};
};
template <>
struct TrellisTable<1, 6> {
  static constexpr double distortion = 0.283937;
  static constexpr int sign = 47;
  static constexpr int index[3] = {20, 63, 53};
  static constexpr signed char size[8] = {9, 8, 14, 18, 24, 29, 39, 53};
};
template <>
struct TrellisTable<2, 6> {
  static constexpr double distortion = 0.074827;
  static constexpr int sign = 25;
  static constexpr int index[4] = {9, 20, 17, 58};
  static constexpr signed char size[16] = {2, 4, 6, 9, 14, 15, 17, 20, 26, 29, 32, 35, 44, 48, 54, 74};
};
template <>
struct TrellisTable<3, 6> {
  static constexpr double distortion = 0.020113;
  static constexpr int sign = 25;
  static constexpr int index[5] = {5, 24, 15, 60, 60};
  static constexpr signed char size[32] = {3,  4,  6,  7,  14, 15, 20, 21, 11, 12, 14, 15, 16, 18, 19, 21,
                                           22, 24, 26, 27, 29, 31, 33, 36, 29, 32, 38, 42, 49, 56, 66, 85};
};
}  // namespace kvt::inline v0
