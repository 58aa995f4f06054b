// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The F32 twin of a quantised model. Rounding activations for quantised products amplifies tiny differences to a KL
// divergence of about 4e-3, so caches are only compared on F32 weights.
#pragma once

#include <string>

#include "result.hpp"

namespace kvt::llm {

// The path of the model with F32 weights. Made once and kept beside the model as NAME.f32.gguf, or in
// $XDG_CACHE_HOME/kvtailor (~/.cache/kvtailor) where the model's folder cannot be written to.
Result<std::string> dequantised(const std::string& model_path, int threads);

}  // namespace kvt::llm
