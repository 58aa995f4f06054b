// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine_log.hpp"

#include <mutex>
#include <utility>

#include "gguf.h"
#include "llama.h"

namespace kvt::llm {
namespace {

struct Log {
  std::mutex mutex;
  std::string errors;
  ggml_log_level level = GGML_LOG_LEVEL_NONE;
};

Log& engine_log() {
  static Log log;
  return log;
}

void keep_errors(ggml_log_level level, const char* text, void* /*user*/) {
  Log& log = engine_log();
  const std::lock_guard lock(log.mutex);
  if (level != GGML_LOG_LEVEL_CONT) log.level = level;
  if (log.level == GGML_LOG_LEVEL_ERROR) log.errors += text;
}

}  // namespace

void quiet_engine_log() {
  static std::once_flag once;
  std::call_once(once, [] {
    llama_log_set(keep_errors, nullptr);
    ggml_log_set(keep_errors, nullptr);
    llama_backend_init();
  });
}

std::string take_engine_errors() {
  Log& log = engine_log();
  const std::lock_guard lock(log.mutex);
  std::string out;
  bool line_break = true;
  for (const char c : std::exchange(log.errors, {})) {
    if (c == '\n') {
      line_break = true;
      continue;
    }
    if (line_break) out += out.empty() ? ": " : "; ";
    line_break = false;
    out += c;
  }
  return out;
}

}  // namespace kvt::llm
