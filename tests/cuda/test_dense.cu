// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "codec.cuh"

template <int dim>
using Fp16 = kvt::Dense<kvt::Half, dim>;
template <int dim>
using Bf16 = kvt::Dense<kvt::BFloat16, dim>;
template <int dim>
using Fp32 = kvt::Dense<float, dim>;

int main() {
  return device::result(device::check_dims<Fp16>("fp16") + device::check_dims<Bf16>("bf16") + device::check_dims<Fp32>("fp32"));
}
