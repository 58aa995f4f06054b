// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "codec.cuh"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"

template <int dim>
using Unbiased = kvt::TurboQuantUnbiased<3, dim>;

int main() { return device::result(device::check_dims<Unbiased>("turbo3_unbiased")); }
