// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Lloyd-Max levels of one coordinate of a random unit vector times sqrt(head_dim), as whole multiples of a unit, positive half,
// and their mean squared error. Written by tools/codebooks.py; source: TurboQuant, arXiv 2504.19874, section 3.
#pragma once

namespace kvt::inline v0 {

// A level is HalfLevels<head_dim, bits>::whole[i] * unit, i below 2^(bits-1); the other half is its mirror image. Whole numbers
// are at most 64 up to 4 bits, and at most 127 above.
template <int head_dim, int bits>
struct HalfLevels;

template <>
struct HalfLevels<40, 1> {
  static constexpr double distortion = 0.3553734;
  static constexpr float unit = 0.802886433f;
  static constexpr short whole[1] = {1};
};
template <>
struct HalfLevels<40, 2> {
  static constexpr double distortion = 0.1127735;
  static constexpr float unit = 0.149429838f;
  static constexpr short whole[2] = {3, 10};
};
template <>
struct HalfLevels<40, 3> {
  static constexpr double distortion = 0.0327341;
  static constexpr float unit = 0.0631159695f;
  static constexpr short whole[4] = {4, 12, 21, 33};
};
template <>
struct HalfLevels<40, 4> {
  static constexpr double distortion = 0.0089361;
  static constexpr float unit = 0.0433997725f;
  static constexpr short whole[8] = {3, 9, 15, 21, 28, 36, 46, 60};
};
template <>
struct HalfLevels<40, 5> {
  static constexpr double distortion = 0.0023517;
  static constexpr float unit = 0.0336638598f;
  static constexpr short whole[16] = {2, 6, 10, 14, 18, 22, 26, 30, 35, 40, 45, 51, 58, 66, 76, 90};
};
template <>
struct HalfLevels<40, 6> {
  static constexpr double distortion = 0.0006121;
  static constexpr float unit = 0.0341013288f;
  static constexpr short whole[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                      33, 35, 38, 41, 44, 47, 50, 53, 56, 60, 64, 69, 74, 80, 88, 100};
};
template <>
struct HalfLevels<64, 1> {
  static constexpr double distortion = 0.3583874;
  static constexpr float unit = 0.801007265f;
  static constexpr short whole[1] = {1};
};
template <>
struct HalfLevels<64, 2> {
  static constexpr double distortion = 0.1145282;
  static constexpr float unit = 0.150034393f;
  static constexpr short whole[2] = {3, 10};
};
template <>
struct HalfLevels<64, 3> {
  static constexpr double distortion = 0.0334053;
  static constexpr float unit = 0.0414322775f;
  static constexpr short whole[4] = {6, 18, 32, 51};
};
template <>
struct HalfLevels<64, 4> {
  static constexpr double distortion = 0.0091500;
  static constexpr float unit = 0.0440701554f;
  static constexpr short whole[8] = {3, 9, 15, 21, 28, 36, 46, 60};
};
template <>
struct HalfLevels<64, 5> {
  static constexpr double distortion = 0.0024152;
  static constexpr float unit = 0.0337615888f;
  static constexpr short whole[16] = {2, 6, 10, 14, 18, 22, 26, 30, 35, 40, 46, 52, 59, 67, 77, 92};
};
template <>
struct HalfLevels<64, 6> {
  static constexpr double distortion = 0.0006290;
  static constexpr float unit = 0.0346193131f;
  static constexpr short whole[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                      33, 35, 38, 41, 44, 47, 50, 53, 56, 60, 64, 69, 74, 81, 89, 102};
};
template <>
struct HalfLevels<80, 1> {
  static constexpr double distortion = 0.3593890;
  static constexpr float unit = 0.800381785f;
  static constexpr short whole[1] = {1};
};
template <>
struct HalfLevels<80, 2> {
  static constexpr double distortion = 0.1151160;
  static constexpr float unit = 0.150235243f;
  static constexpr short whole[2] = {3, 10};
};
template <>
struct HalfLevels<80, 3> {
  static constexpr double distortion = 0.0336334;
  static constexpr float unit = 0.0415714723f;
  static constexpr short whole[4] = {6, 18, 32, 51};
};
template <>
struct HalfLevels<80, 4> {
  static constexpr double distortion = 0.0092237;
  static constexpr float unit = 0.0442948039f;
  static constexpr short whole[8] = {3, 9, 15, 21, 28, 36, 46, 60};
};
template <>
struct HalfLevels<80, 5> {
  static constexpr double distortion = 0.0024344;
  static constexpr float unit = 0.0342309582f;
  static constexpr short whole[16] = {2, 6, 10, 14, 18, 22, 26, 30, 35, 40, 45, 51, 58, 66, 76, 92};
};
template <>
struct HalfLevels<80, 6> {
  static constexpr double distortion = 0.0006348;
  static constexpr float unit = 0.0346105169f;
  static constexpr short whole[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                      33, 35, 38, 41, 44, 47, 50, 53, 57, 61, 65, 70, 75, 82, 90, 103};
};
template <>
struct HalfLevels<96, 1> {
  static constexpr double distortion = 0.3600559;
  static constexpr float unit = 0.799965055f;
  static constexpr short whole[1] = {1};
};
template <>
struct HalfLevels<96, 2> {
  static constexpr double distortion = 0.1155087;
  static constexpr float unit = 0.150368947f;
  static constexpr short whole[2] = {3, 10};
};
template <>
struct HalfLevels<96, 3> {
  static constexpr double distortion = 0.0337866;
  static constexpr float unit = 0.0416642669f;
  static constexpr short whole[4] = {6, 18, 32, 51};
};
template <>
struct HalfLevels<96, 4> {
  static constexpr double distortion = 0.0092736;
  static constexpr float unit = 0.0444448927f;
  static constexpr short whole[8] = {3, 9, 15, 21, 28, 36, 46, 60};
};
template <>
struct HalfLevels<96, 5> {
  static constexpr double distortion = 0.0024484;
  static constexpr float unit = 0.0332883794f;
  static constexpr short whole[16] = {2, 6, 10, 14, 18, 22, 26, 31, 36, 41, 47, 53, 60, 68, 79, 95};
};
template <>
struct HalfLevels<96, 6> {
  static constexpr double distortion = 0.0006384;
  static constexpr float unit = 0.034595475f;
  static constexpr short whole[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                      33, 35, 38, 41, 44, 47, 50, 53, 57, 61, 65, 70, 75, 82, 91, 104};
};
template <>
struct HalfLevels<112, 1> {
  static constexpr double distortion = 0.3605319;
  static constexpr float unit = 0.799667519f;
  static constexpr short whole[1] = {1};
};
template <>
struct HalfLevels<112, 2> {
  static constexpr double distortion = 0.1157896;
  static constexpr float unit = 0.150464352f;
  static constexpr short whole[2] = {3, 10};
};
template <>
struct HalfLevels<112, 3> {
  static constexpr double distortion = 0.0338965;
  static constexpr float unit = 0.0417305457f;
  static constexpr short whole[4] = {6, 18, 32, 51};
};
template <>
struct HalfLevels<112, 4> {
  static constexpr double distortion = 0.0093095;
  static constexpr float unit = 0.0445522558f;
  static constexpr short whole[8] = {3, 9, 15, 21, 28, 36, 46, 60};
};
template <>
struct HalfLevels<112, 5> {
  static constexpr double distortion = 0.0024584;
  static constexpr float unit = 0.0333949511f;
  static constexpr short whole[16] = {2, 6, 10, 14, 18, 22, 26, 31, 36, 41, 47, 53, 60, 68, 79, 95};
};
template <>
struct HalfLevels<112, 6> {
  static constexpr double distortion = 0.0006410;
  static constexpr float unit = 0.0347448482f;
  static constexpr short whole[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                      33, 35, 38, 41, 44, 47, 50, 53, 57, 61, 65, 70, 75, 82, 91, 104};
};
template <>
struct HalfLevels<128, 1> {
  static constexpr double distortion = 0.3608886;
  static constexpr float unit = 0.799444436f;
  static constexpr short whole[1] = {1};
};
template <>
struct HalfLevels<128, 2> {
  static constexpr double distortion = 0.1160005;
  static constexpr float unit = 0.15053585f;
  static constexpr short whole[2] = {3, 10};
};
template <>
struct HalfLevels<128, 3> {
  static constexpr double distortion = 0.0339792;
  static constexpr float unit = 0.0417802517f;
  static constexpr short whole[4] = {6, 18, 32, 51};
};
template <>
struct HalfLevels<128, 4> {
  static constexpr double distortion = 0.0093366;
  static constexpr float unit = 0.0446328633f;
  static constexpr short whole[8] = {3, 9, 15, 21, 28, 36, 46, 60};
};
template <>
struct HalfLevels<128, 5> {
  static constexpr double distortion = 0.0024660;
  static constexpr float unit = 0.0334751681f;
  static constexpr short whole[16] = {2, 6, 10, 14, 18, 22, 26, 31, 36, 41, 47, 53, 60, 68, 79, 95};
};
template <>
struct HalfLevels<128, 6> {
  static constexpr double distortion = 0.0006429;
  static constexpr float unit = 0.0346099917f;
  static constexpr short whole[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                      33, 35, 38, 41, 44, 47, 50, 53, 57, 61, 65, 70, 76, 83, 92, 105};
};
template <>
struct HalfLevels<192, 1> {
  static constexpr double distortion = 0.3617202;
  static constexpr float unit = 0.798924145f;
  static constexpr short whole[1] = {1};
};
template <>
struct HalfLevels<192, 2> {
  static constexpr double distortion = 0.1164933;
  static constexpr float unit = 0.150702494f;
  static constexpr short whole[2] = {3, 10};
};
template <>
struct HalfLevels<192, 3> {
  static constexpr double distortion = 0.0341731;
  static constexpr float unit = 0.0418962213f;
  static constexpr short whole[4] = {6, 18, 32, 51};
};
template <>
struct HalfLevels<192, 4> {
  static constexpr double distortion = 0.0094006;
  static constexpr float unit = 0.0448212287f;
  static constexpr short whole[8] = {3, 9, 15, 21, 28, 36, 46, 60};
};
template <>
struct HalfLevels<192, 5> {
  static constexpr double distortion = 0.0024850;
  static constexpr float unit = 0.0341349434f;
  static constexpr short whole[16] = {2, 6, 10, 14, 18, 22, 26, 30, 35, 40, 46, 52, 59, 67, 78, 94};
};
template <>
struct HalfLevels<192, 6> {
  static constexpr double distortion = 0.0006478;
  static constexpr float unit = 0.0342858866f;
  static constexpr short whole[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                      33, 36, 39, 42, 45, 48, 51, 54, 58, 62, 66, 71, 77, 84, 93, 107};
};
template <>
struct HalfLevels<256, 1> {
  static constexpr double distortion = 0.3621356;
  static constexpr float unit = 0.798664124f;
  static constexpr short whole[1] = {1};
};
template <>
struct HalfLevels<256, 2> {
  static constexpr double distortion = 0.1167401;
  static constexpr float unit = 0.150785717f;
  static constexpr short whole[2] = {3, 10};
};
template <>
struct HalfLevels<256, 3> {
  static constexpr double distortion = 0.0342706;
  static constexpr float unit = 0.0419541981f;
  static constexpr short whole[4] = {6, 18, 32, 51};
};
template <>
struct HalfLevels<256, 4> {
  static constexpr double distortion = 0.0094328;
  static constexpr float unit = 0.044915558f;
  static constexpr short whole[8] = {3, 9, 15, 21, 28, 36, 46, 60};
};
template <>
struct HalfLevels<256, 5> {
  static constexpr double distortion = 0.0024939;
  static constexpr float unit = 0.0342416449f;
  static constexpr short whole[16] = {2, 6, 10, 14, 18, 22, 26, 30, 35, 40, 46, 52, 59, 67, 78, 94};
};
template <>
struct HalfLevels<256, 6> {
  static constexpr double distortion = 0.0006496;
  static constexpr float unit = 0.0348406842f;
  static constexpr short whole[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                      33, 35, 38, 41, 44, 47, 50, 53, 57, 61, 65, 70, 76, 83, 92, 106};
};
template <>
struct HalfLevels<512, 1> {
  static constexpr double distortion = 0.3627582;
  static constexpr float unit = 0.798274248f;
  static constexpr short whole[1] = {1};
};
template <>
struct HalfLevels<512, 2> {
  static constexpr double distortion = 0.1171107;
  static constexpr float unit = 0.150910425f;
  static constexpr short whole[2] = {3, 10};
};
template <>
struct HalfLevels<512, 3> {
  static constexpr double distortion = 0.0344295;
  static constexpr float unit = 0.0498909356f;
  static constexpr short whole[4] = {5, 15, 27, 43};
};
template <>
struct HalfLevels<512, 4> {
  static constexpr double distortion = 0.0094751;
  static constexpr float unit = 0.0446623848f;
  static constexpr short whole[8] = {3, 9, 15, 21, 28, 36, 46, 61};
};
template <>
struct HalfLevels<512, 5> {
  static constexpr double distortion = 0.0025075;
  static constexpr float unit = 0.03439185f;
  static constexpr short whole[16] = {2, 6, 10, 14, 18, 22, 26, 30, 35, 40, 46, 52, 59, 67, 78, 94};
};
template <>
struct HalfLevels<512, 6> {
  static constexpr double distortion = 0.0006537;
  static constexpr float unit = 0.0346262774f;
  static constexpr short whole[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                      33, 36, 39, 42, 45, 48, 51, 54, 58, 62, 66, 71, 77, 84, 93, 107};
};
}  // namespace kvt::inline v0
