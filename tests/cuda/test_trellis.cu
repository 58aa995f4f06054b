// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "codec.cuh"
#include "kvtailor/codec/rotated.hpp"
#include "kvtailor/codec/trellis.hpp"

template <int dim>
using TwoBits = kvt::Rotated<kvt::Trellis<2, dim>>;
template <int dim>
using ThreeBits = kvt::Rotated<kvt::Trellis<3, dim, 8, kvt::Half>>;

int main() { return device::result(device::check_dims<TwoBits>("trellis2") + device::check_dims<ThreeBits>("trellis3")); }
