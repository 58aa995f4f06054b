// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// TurboQuant: rotated rows at 1 to 6 bits an element and one scale a row.
//
// Block, error, host, cost: those of LloydMax, the error for rows of any kind.
// Source:  TurboQuant, arXiv 2504.19874, algorithm 1 (mean squared error). Differs from it: the rotation is a Hadamard matrix
//          with random signs, and the scale is the least-squares one, not the norm (NormCorrection::none is as published).
#pragma once

#include "kvtailor/codec/lloyd_max.hpp"
#include "kvtailor/codec/rotated.hpp"

namespace kvt::inline v0 {

template <int bits, int dim, NormCorrection correction = NormCorrection::least_squares, class Scale = Half>
using TurboQuant = Rotated<LloydMax<bits, dim, correction, Scale>>;

static_assert(RowWiseCodec<TurboQuant<3, 64>> && RowWiseCodec<TurboQuant<6, 40>>);

}  // namespace kvt::inline v0
