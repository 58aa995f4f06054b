// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "codec.cuh"

template <int dim>
using Turbo = kvt::TurboQuant<4, dim>;

int main() { return device::result(device::check_dims<Turbo>("turbo4")); }
