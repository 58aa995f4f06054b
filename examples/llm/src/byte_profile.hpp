// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// ByteProfile: finds out on texts what each head loses with how many of its rows in which form, for budgets in bytes.
#pragma once

#include <optional>

#include "samples.hpp"

namespace kvt_llm {

struct ByteProfileOptions {
  std::vector<std::string> codecs = {"fp16",
                                     "turbo6",
                                     "turbo5",
                                     "turbo4",
                                     "turbo4/turbo2",
                                     "turbo3",
                                     "turbo2",
                                     "turbo1",
                                     "low_rank_turbo3/turbo2",
                                     "low_rank_turbo2/turbo2"};
  std::string perturbed = "turbo2";  // the codec by which layers are weighed
  std::string weights = "f32";       // or "file": KL of quantised weights has a floor that hides small losses
  int weighed = 2;                   // samples, at most
  int checked = 0;                   // single options whose prediction is measured
};

// Learns from the samples, writes the profile and says what it found. Throws std::runtime_error.
void profile_bytes(const Common& common, SampleOptions samples, const ByteProfileOptions& options, const std::string& selector,
                   const std::string& out);

}  // namespace kvt_llm
