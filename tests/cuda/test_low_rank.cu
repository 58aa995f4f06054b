// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "codec.cuh"
#include "kvtailor/codec/low_rank.hpp"

template <int dim>
using LowRankTurbo = kvt::Rotated<kvt::LowRank<kvt::LloydMax<2, dim, kvt::NormCorrection::least_squares, kvt::LogScale>>>;

int main() { return device::result(device::check_dims<LowRankTurbo>("low_rank_turbo2")); }
