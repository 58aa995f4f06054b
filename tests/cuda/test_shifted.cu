// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "codec.cuh"
#include "kvtailor/codec/shifted.hpp"

template <int dim>
using MeanTurbo = kvt::Rotated<kvt::Shifted<kvt::LloydMax<2, dim, kvt::NormCorrection::least_squares, kvt::LogScale>>>;

int main() { return device::result(device::check_dims<MeanTurbo>("mean_turbo2")); }
