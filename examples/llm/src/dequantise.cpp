// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "dequantise.hpp"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <vector>

#include "engine_log.hpp"
#include "llama.h"

namespace kvt::llm {
namespace {

namespace fs = std::filesystem;

constexpr const char* suffix = ".f32.gguf";

fs::path cache_folder() {
  if (const char* folder = std::getenv("XDG_CACHE_HOME"); folder != nullptr && *folder != '\0') {
    return fs::path(folder) / "kvtailor";
  }
  if (const char* home = std::getenv("HOME"); home != nullptr && *home != '\0') {
    return fs::path(home) / ".cache" / "kvtailor";
  }
  return {};
}

bool is_current(const fs::path& twin, const fs::path& model) {
  std::error_code code;
  if (!fs::is_regular_file(twin, code)) return false;
  const auto made = fs::last_write_time(twin, code);
  return !code && made >= fs::last_write_time(model, code) && !code;
}

Done convert(const fs::path& model, const fs::path& twin, int threads) {
  // Written under another name first, so that an interrupted run leaves no half a model behind.
  const fs::path unfinished = twin.string() + "." + std::to_string(getpid()) + ".part";
  std::fprintf(stderr, "making F32 weights once: %s\n", twin.c_str());
  llama_model_quantize_params params = llama_model_quantize_default_params();
  params.nthread = threads;
  params.ftype = LLAMA_FTYPE_ALL_F32;
  params.allow_requantize = true;
  const std::uint32_t refused = llama_model_quantize(model.c_str(), unfinished.c_str(), &params);
  const std::string reasons = take_engine_errors();
  std::error_code code;
  if (refused == 0) fs::rename(unfinished, twin, code);
  if (refused != 0 || code) {
    std::error_code ignored;
    fs::remove(unfinished, ignored);
    return failure("F32 weights cannot be written to ", twin.string(), code ? ": " + code.message() : reasons,
                   "; they need about 4 bytes a parameter");
  }
  return done();
}

}  // namespace

Result<std::string> dequantised(const std::string& model_path, int threads) {
  quiet_engine_log();
  std::error_code code;
  const fs::path model = fs::canonical(model_path, code);
  if (code) return failure("model file \"", model_path, "\" does not exist; give the path of a GGUF file");
  if (model.string().ends_with(suffix)) return model.string();

  const std::string name = model.stem().string();
  const fs::path beside = model.parent_path() / (name + suffix);
  if (is_current(beside, model)) return beside.string();
  if (access(model.parent_path().c_str(), W_OK) == 0) {
    KVT_LLM_TRY(convert(model, beside, threads));
    return beside.string();
  }

  const fs::path folder = cache_folder();
  if (folder.empty()) {
    return failure("the folder of ", model.string(), " cannot be written to; set XDG_CACHE_HOME to one that can");
  }
  // Models of one name in two folders must not share a twin.
  const std::size_t place = std::hash<std::string>{}(model.parent_path().string());
  const fs::path cached = folder / concat(name, ".", std::hex, place, suffix);
  if (is_current(cached, model)) return cached.string();
  fs::create_directories(folder, code);
  if (code) return failure("the folder ", folder.string(), " cannot be made: ", code.message());
  KVT_LLM_TRY(convert(model, cached, threads));
  return cached.string();
}

}  // namespace kvt::llm
