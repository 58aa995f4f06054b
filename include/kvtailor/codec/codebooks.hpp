// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Lloyd-Max levels of one coordinate of a random unit vector times sqrt(head_dim), as whole multiples of a unit, positive half,
// and their mean squared error. Written by tools/codebooks.py; source: TurboQuant, arXiv 2504.19874, section 3.
#pragma once

namespace kvt::inline v0 {

// A level is HalfLevels<head_dim, bits>::whole[i] * unit, i below 2^(bits-1); the other half is its mirror image. Up to 4 bits,
// whole numbers are at most 64.
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
  static constexpr double distortion = 0.0023387;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[16] = {17, 50, 83, 117, 152, 188, 224, 263, 303, 346, 392, 442, 500, 567, 652, 777};
};
template <>
struct HalfLevels<40, 6> {
  static constexpr double distortion = 0.0006001;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[32] = {8,   25,  42,  59,  76,  93,  110, 128, 145, 163, 181, 199, 218, 237, 257, 276,
                                      297, 318, 340, 362, 386, 411, 437, 464, 494, 526, 561, 601, 646, 700, 769, 873};
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
  static constexpr double distortion = 0.0023996;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[16] = {17, 50, 84, 118, 153, 189, 226, 265, 306, 349, 396, 448, 507, 577, 665, 798};
};
template <>
struct HalfLevels<64, 6> {
  static constexpr double distortion = 0.0006166;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[32] = {8,   25,  42,  59,  77,  94,  111, 129, 146, 164, 182, 201, 220, 239, 259, 279,
                                      300, 321, 343, 366, 391, 416, 443, 471, 502, 535, 571, 612, 660, 717, 791, 903};
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
  static constexpr double distortion = 0.0024207;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[16] = {17, 50, 84, 118, 153, 189, 227, 266, 307, 350, 398, 450, 509, 580, 670, 805};
};
template <>
struct HalfLevels<80, 6> {
  static constexpr double distortion = 0.0006224;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[32] = {8,   25,  42,  60,  77,  94,  111, 129, 147, 165, 183, 202, 220, 240, 260, 280,
                                      301, 322, 345, 368, 392, 418, 445, 473, 504, 538, 575, 616, 664, 723, 798, 914};
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
  static constexpr double distortion = 0.0024344;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[16] = {17, 50, 84, 119, 154, 190, 227, 266, 307, 351, 399, 451, 511, 582, 673, 810};
};
template <>
struct HalfLevels<96, 6> {
  static constexpr double distortion = 0.0006259;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[32] = {8,   25,  43,  60,  77,  94,  112, 129, 147, 165, 183, 202, 221, 240, 260, 280,
                                      301, 323, 345, 369, 393, 419, 446, 475, 506, 540, 577, 619, 668, 726, 803, 921};
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
  static constexpr double distortion = 0.0024447;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[16] = {17, 50, 84, 119, 154, 190, 227, 266, 308, 352, 399, 452, 512, 584, 675, 813};
};
template <>
struct HalfLevels<112, 6> {
  static constexpr double distortion = 0.0006286;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[32] = {9,   26,  43,  60,  77,  94,  112, 129, 147, 165, 183, 202, 221, 241, 260, 281,
                                      302, 323, 346, 369, 394, 420, 447, 476, 507, 541, 578, 621, 670, 729, 807, 926};
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
  static constexpr double distortion = 0.0024520;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[16] = {17, 50, 84, 119, 154, 190, 228, 267, 308, 352, 400, 453, 513, 585, 677, 816};
};
template <>
struct HalfLevels<128, 6> {
  static constexpr double distortion = 0.0006307;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[32] = {9,   26,  43,  60,  77,  94,  112, 129, 147, 165, 184, 202, 221, 241, 261, 281,
                                      302, 324, 346, 370, 394, 420, 447, 477, 508, 542, 580, 622, 672, 731, 810, 930};
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
  static constexpr double distortion = 0.0024697;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[16] = {17, 51, 85, 119, 154, 191, 228, 267, 309, 353, 401, 454, 515, 588, 681, 822};
};
template <>
struct HalfLevels<192, 6> {
  static constexpr double distortion = 0.0006352;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[32] = {9,   26,  43,  60,  77,  94,  112, 130, 148, 166, 184, 203, 222, 241, 261, 282,
                                      303, 325, 347, 371, 396, 422, 449, 478, 510, 545, 583, 626, 676, 737, 816, 939};
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
  static constexpr double distortion = 0.0024788;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[16] = {17, 51, 85, 119, 154, 191, 228, 268, 309, 353, 402, 455, 516, 589, 683, 825};
};
template <>
struct HalfLevels<256, 6> {
  static constexpr double distortion = 0.0006376;
  static constexpr float unit = 0.00390625f;
  static constexpr short whole[32] = {9,   26,  43,  60,  77,  95,  112, 130, 148, 166, 184, 203, 222, 242, 262, 282,
                                      303, 325, 348, 372, 396, 422, 450, 479, 511, 546, 584, 627, 678, 739, 819, 944};
};
}  // namespace kvt::inline v0
