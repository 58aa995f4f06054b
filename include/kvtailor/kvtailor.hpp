// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Everything that compiles without nvcc, but for what costs compile time: what multiplies by Eigen (codec/low_rank.hpp;
// select/expected_attention.hpp, learned.hpp, leverage.hpp, value_norm.hpp and critical_kv.hpp; learn/importance.hpp and
// token_scorer.hpp), make_cache (compose.hpp), policies by name (select/any_selector.hpp, budget/any_allocator.hpp) and
// mixed_cache.hpp, and what needs more than Eigen: io/safetensors.hpp (nlohmann-json), modules of host kernels (host/) and the
// engines (engine/).
#pragma once

#include "kvtailor/attend/plan.hpp"
#include "kvtailor/attend/softmax_state.hpp"
#include "kvtailor/budget/adaptive.hpp"
#include "kvtailor/budget/curve.hpp"
#include "kvtailor/budget/global.hpp"
#include "kvtailor/budget/lava.hpp"
#include "kvtailor/budget/learned.hpp"
#include "kvtailor/budget/pyramid.hpp"
#include "kvtailor/budget/squeeze_attention.hpp"
#include "kvtailor/budget/streaming_heads.hpp"
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
#include "kvtailor/io/table.hpp"
#include "kvtailor/learn/adam.hpp"
#include "kvtailor/learn/budget_head.hpp"
#include "kvtailor/learn/marginal_utility.hpp"
#include "kvtailor/learn/option_hull.hpp"
#include "kvtailor/learn/soft_top_k.hpp"
#include "kvtailor/select/caote.hpp"
#include "kvtailor/select/chunk_kv.hpp"
#include "kvtailor/select/heavy_hitter.hpp"
#include "kvtailor/select/key_diff.hpp"
#include "kvtailor/select/key_norm.hpp"
#include "kvtailor/select/lag_kv.hpp"
#include "kvtailor/select/last_query.hpp"
#include "kvtailor/select/lava_score.hpp"
#include "kvtailor/select/random.hpp"
#include "kvtailor/select/reconstruction.hpp"
#include "kvtailor/select/sink_recent.hpp"
#include "kvtailor/select/snap_kv.hpp"
#include "kvtailor/select/tova.hpp"
#include "kvtailor/version.hpp"
