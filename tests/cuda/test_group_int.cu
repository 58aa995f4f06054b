// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "codec.cuh"
#include "kvtailor/codec/kivi.hpp"

template <int dim>
using Keys2 = kvt::KiviKeys<2, dim>;
template <int dim>
using Values2 = kvt::KiviValues<2, dim>;

int main() {
  return device::result(device::check_dims<kvt::Q8_0>("q8_0") + device::check_dims<kvt::Q4_0>("q4_0") +
                        device::check_dims<kvt::Q4_1>("q4_1") + device::check_dims<kvt::Q5_0>("q5_0") +
                        device::check_dims<Keys2>("KIVI's keys") + device::check_dims<Values2>("KIVI's values"));
}
