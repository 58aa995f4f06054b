// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What compiles with nvcc: the library, with its host-device parts ready for the Warp lane group, and the kernels.
#pragma once

#if !defined(__CUDACC__)
#error "kvtailor.cuh needs nvcc; plain C++ includes kvtailor/kvtailor.hpp"
#endif

#include "kvtailor/cuda/kv_cache.cuh"
#include "kvtailor/kvtailor.hpp"
