// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Sensitivities: what each codec costs and loses on the keys and on the values of each KV head, one at a time.
#pragma once

#include <string>
#include <vector>

#include "kvtailor/core/geometry.hpp"

namespace kvt_llm {

struct Sensitivities {
  // Of a codec on the keys or values of one head.
  struct Entry {
    double bits, kl;  // an element; mean KL to the full cache
  };
  kvt::Geometry geometry;
  std::vector<std::string> codecs;
  std::vector<std::vector<Entry>> places;  // [num_layers, num_kv_heads, keys then values][codecs]

  // Throw std::runtime_error with one sentence that names the file.
  static Sensitivities read(const std::string& path);
  void write(const std::string& path, const std::string& text, int tokens) const;

  // Codecs of the heads, "keys/values", that lose least at `bits` an element on average.
  std::vector<std::string> choose(double bits, const kvt::Geometry& wanted) const;
};

}  // namespace kvt_llm
