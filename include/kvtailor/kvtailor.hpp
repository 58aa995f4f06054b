// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Everything that compiles without nvcc, but for what costs compile time: the low rank (codec/low_rank.hpp, which needs Eigen's
// decompositions), make_cache (compose.hpp) and the engines (engine/).
#pragma once

#include "kvtailor/attend/plan.hpp"
#include "kvtailor/attend/softmax_state.hpp"
#include "kvtailor/budget/adaptive.hpp"
#include "kvtailor/budget/uniform.hpp"
#include "kvtailor/cache.hpp"
#include "kvtailor/codec/dense.hpp"
#include "kvtailor/codec/kivi.hpp"
#include "kvtailor/codec/kv_codec.hpp"
#include "kvtailor/codec/shifted.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant.hpp"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"
#include "kvtailor/core/rope.hpp"
#include "kvtailor/learn/option_hull.hpp"
#include "kvtailor/select/key_diff.hpp"
#include "kvtailor/select/sink_recent.hpp"
#include "kvtailor/select/snap_kv.hpp"
#include "kvtailor/version.hpp"
