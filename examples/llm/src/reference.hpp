// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Reference: llama.cpp itself on the same file, with a cache of its own, to be compared with.
#pragma once

#include <ggml.h>

#include <set>
#include <span>
#include <string>
#include <vector>

struct llama_model;
struct llama_context;
struct ggml_backend_buffer;

namespace kvt_llm {

// How llama.cpp keeps keys and values; fp16 if not told otherwise.
struct PeerCache {
  ggml_type key = GGML_TYPE_F16, value = GGML_TYPE_F16;
  // What is quantised goes through a Hadamard matrix first, where the head dim is a multiple of 64: llama.cpp does so unasked.
  bool rotate = true;
  // Quantised values need flash attention. Without it llama.cpp's decoding is often faster.
  bool flash = true;

  // "q8_0", "q8_0/q4_0" for keys and values apart, "q4_0+unrotated", "f16+no_flash". Throws std::runtime_error with one
  // sentence.
  static PeerCache parse(const std::string& name);
  static std::string known();
  double bits_per_element() const;
};

class Reference {
 public:
  Reference(const std::string& model_path, int context, int num_threads, const PeerCache& cache = {});
  ~Reference();
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;

  // Runs tokens at positions first, first + 1, ...; logits of all of them or of the last, valid until the next call.
  std::span<const float> eval(std::span<const int> tokens, int first, bool all);
  // Forgets positions from `position` on.
  void truncate(int position);

  // Seen in the first graph that ran: the size of the buffers that rows are written into (rows for the whole context, which is
  // a multiple of 256), and what was rotated.
  long long cache_bytes() const;
  bool rotates_keys() const { return seen_.rotates_keys; }
  bool rotates_values() const { return seen_.rotates_values; }

 private:
  struct Seen {
    bool complete = false, rotates_keys = false, rotates_values = false;
    std::set<ggml_backend_buffer*> buffers;
  };
  static bool look(ggml_tensor* node, bool ask, void* seen);

  llama_model* model_;
  llama_context* context_;
  Seen seen_;
};

}  // namespace kvt_llm
