// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See model.hpp.
#include "model.hpp"

#include <ggml-cpu.h>
#include <gguf.h>
#include <llama.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <vector>

namespace kvt_llm {

namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const std::string& sentence) { throw std::runtime_error(sentence); }

// Typed reads of GGUF metadata; a missing key without a default is an error that names it.
class Metadata {
 public:
  Metadata(const gguf_context* file, std::string path) : file_(file), path_(std::move(path)) {}
  std::string text(const std::string& key) const {
    const auto id = gguf_find_key(file_, key.c_str());
    if (id < 0 || gguf_get_kv_type(file_, id) != GGUF_TYPE_STRING) fail(path_ + " has no text field " + key);
    return gguf_get_val_str(file_, id);
  }
  int integer(const std::string& key, int otherwise = -1) const {
    const auto id = gguf_find_key(file_, key.c_str());
    if (id >= 0 && gguf_get_kv_type(file_, id) == GGUF_TYPE_UINT32) {
      const auto value = gguf_get_val_u32(file_, id);
      if (value > 1u << 30) fail(path_ + " has the field " + key + " = " + std::to_string(value) + ", which is too large");
      return static_cast<int>(value);
    }
    if (otherwise < 0) fail(path_ + " has no number " + key);
    return otherwise;
  }
  float number(const std::string& key, float otherwise) const {
    const auto id = gguf_find_key(file_, key.c_str());
    return id >= 0 && gguf_get_kv_type(file_, id) == GGUF_TYPE_FLOAT32 ? gguf_get_val_f32(file_, id) : otherwise;
  }

 private:
  const gguf_context* file_;
  std::string path_;
};

}  // namespace

Model::Model(const std::string& path) : path_(path) {
  std::error_code code;
  const auto size = fs::file_size(path, code);
  if (code) fail("cannot read the model " + path + ": " + code.message());
  const gguf_init_params init{true, &context_};
  const std::unique_ptr<gguf_context, void (*)(gguf_context*)> file(gguf_init_from_file(path.c_str(), init), gguf_free);
  if (!file) fail(path + " is not a readable GGUF file: it is damaged, truncated or of another kind");
  const Metadata meta(file.get(), path);
  const std::string kind = meta.text("general.architecture");
  if (kind != "llama" && kind != "qwen2") {
    fail("the architecture " + kind + " is not supported; it must be llama or qwen2");
  }
  auto& p = parameters_;
  p.num_layers = meta.integer(kind + ".block_count");
  p.embedding = meta.integer(kind + ".embedding_length");
  p.num_q_heads = meta.integer(kind + ".attention.head_count");
  p.num_kv_heads = meta.integer(kind + ".attention.head_count_kv", p.num_q_heads);
  if (p.num_q_heads < 1) fail(path + " has " + std::to_string(p.num_q_heads) + " attention heads");
  p.head_dim = meta.integer(kind + ".attention.key_length", p.embedding / p.num_q_heads);
  p.rotary_dim = meta.integer(kind + ".rope.dimension_count", p.head_dim);
  p.context = meta.integer(kind + ".context_length");
  p.norm_epsilon = meta.number(kind + ".attention.layer_norm_rms_epsilon", 1e-5f);
  p.rope_base = meta.number(kind + ".rope.freq_base", 10000.f);
  p.rope_type = kind == "llama" ? GGML_ROPE_TYPE_NORMAL : GGML_ROPE_TYPE_NEOX;
  if (const auto status = p.geometry().validate(); !status.ok()) fail(path + ": " + status.message());

  const auto count = gguf_get_n_tensors(file.get());
  for (std::int64_t i = 0; i < count; ++i) {
    const ggml_tensor* const t = ggml_get_tensor(context_, gguf_get_tensor_name(file.get(), i));
    const auto end = gguf_get_data_offset(file.get()) + gguf_get_tensor_offset(file.get(), i) + ggml_nbytes(t);
    if (end > size) {
      fail(path + " is truncated: it has " + std::to_string(size) + " bytes and the tensor " + ggml_get_name(t) + " ends at " +
           std::to_string(end));
    }
  }
  backend_ = ggml_backend_cpu_init();
  buffer_ = ggml_backend_alloc_ctx_tensors(context_, backend_);
  if (backend_ == nullptr || buffer_ == nullptr) fail("out of memory while loading " + path);
  std::ifstream stream(path, std::ios::binary);
  std::vector<char> bytes;
  for (std::int64_t i = 0; i < count; ++i) {
    ggml_tensor* const t = ggml_get_tensor(context_, gguf_get_tensor_name(file.get(), i));
    bytes.resize(ggml_nbytes(t));
    stream.seekg(static_cast<std::streamoff>(gguf_get_data_offset(file.get()) + gguf_get_tensor_offset(file.get(), i)));
    if (!stream.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) fail("cannot read " + path + " to its end");
    ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size());
  }
  p.vocabulary = static_cast<int>(tensor("token_embd.weight")->ne[1]);
}

Model::~Model() {
  if (buffer_ != nullptr) ggml_backend_buffer_free(buffer_);
  if (backend_ != nullptr) ggml_backend_free(backend_);
  if (context_ != nullptr) ggml_free(context_);
}

ggml_tensor* Model::tensor(const std::string& name, bool optional) const {
  ggml_tensor* const t = ggml_get_tensor(context_, name.c_str());
  if (t == nullptr && !optional) fail(path_ + " has no tensor " + name);
  return t;
}

ggml_tensor* Model::layer(int layer, const char* name, bool optional) const {
  return tensor("blk." + std::to_string(layer) + "." + name, optional);
}

void init_engine() {
  const auto quiet = [](ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_ERROR && std::getenv("KVT_DEBUG") != nullptr) std::fputs(text, stderr);
  };
  llama_log_set(quiet, nullptr);
  ggml_log_set(quiet, nullptr);
  llama_backend_init();
}

std::string dequantised(const std::string& path) {
  const fs::path source(path);
  if (!fs::exists(source)) fail("cannot read the model " + path + ": there is no such file");
  const auto name = source.stem().string() + ".f32.gguf";
  fs::path folder = source.parent_path();
  if (fs::exists(folder / name)) return (folder / name).string();
  const fs::path probe = folder / (name + ".tmp");
  if (!std::ofstream(probe)) {
    const char* const cache = std::getenv("XDG_CACHE_HOME");
    const char* const home = std::getenv("HOME");
    folder = cache != nullptr ? fs::path(cache) : fs::path(home != nullptr ? home : ".") / ".cache";
    folder /= "kvtailor";
    fs::create_directories(folder);
    if (fs::exists(folder / name)) return (folder / name).string();
  }
  // Written under another name first, so that a run that is stopped leaves no half of a file behind.
  const fs::path temporary = folder / (name + ".tmp");
  std::fprintf(stderr, "kvt-llm: dequantising the weights to F32 once, into %s\n", (folder / name).c_str());
  auto how = llama_model_quantize_default_params();
  how.ftype = LLAMA_FTYPE_ALL_F32;
  how.allow_requantize = true;
  if (llama_model_quantize(path.c_str(), temporary.c_str(), &how) != 0) {
    fs::remove(temporary);
    fail("cannot dequantise " + path + " into " + folder.string());
  }
  fs::rename(temporary, folder / name);
  return (folder / name).string();
}

}  // namespace kvt_llm
