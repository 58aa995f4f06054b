// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Everything that compiles without nvcc, but for make_cache (compose.hpp) and the engines (engine/), which cost compile time.
#pragma once

#include "kvtailor/attend/plan.hpp"
#include "kvtailor/attend/softmax_state.hpp"
#include "kvtailor/budget/adaptive.hpp"
#include "kvtailor/budget/uniform.hpp"
#include "kvtailor/cache.hpp"
#include "kvtailor/codec/dense.hpp"
#include "kvtailor/codec/kv_codec.hpp"
#include "kvtailor/codec/turbo_quant.hpp"
#include "kvtailor/core/rope.hpp"
#include "kvtailor/select/key_diff.hpp"
#include "kvtailor/select/sink_recent.hpp"
#include "kvtailor/select/snap_kv.hpp"
#include "kvtailor/version.hpp"
