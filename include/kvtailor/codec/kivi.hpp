// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// KIVI: keys per channel, values per token, both asymmetric at 2 to 5 bits with groups of 32.
//
// Block, error, cost: those of PerChannelInt and GroupInt.
// Source:  KIVI, arXiv 2402.02750, with a group size of 32. Values of 4 bits are ggml's q4_1.
#pragma once

#include "kvtailor/codec/group_int.hpp"
#include "kvtailor/codec/per_channel_int.hpp"

namespace kvt::inline v0 {

template <int bits, int dim>
using KiviKeys = PerChannelInt<bits, dim>;
template <int bits, int dim>
using KiviValues = GroupInt<bits, dim, IntRange::asymmetric>;

}  // namespace kvt::inline v0
