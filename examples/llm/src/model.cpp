// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See model.hpp.
#include "model.hpp"

#include <ggml-cpu.h>
#include <gguf.h>
#include <llama.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <vector>

#include "kvtailor/core/rope.hpp"
#include "kvtailor/engine/llama_cpp.hpp"

namespace kvt_llm {

namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const std::string& sentence) { throw std::runtime_error(sentence); }

// Typed reads of GGUF metadata; a missing key without a default is an error that names it.
class Metadata {
 public:
  Metadata(const gguf_context* file, std::string path) : file_(file), path_(std::move(path)) {}
  std::string text(const std::string& key, const char* otherwise = nullptr) const {
    const auto id = gguf_find_key(file_, key.c_str());
    if (id < 0 && otherwise != nullptr) return otherwise;
    if (id < 0 || gguf_get_kv_type(file_, id) != GGUF_TYPE_STRING) fail(path_ + " has no text field " + key);
    return gguf_get_val_str(file_, id);
  }
  int integer(const std::string& key, int low, int high, int otherwise = -1) const {
    const auto id = gguf_find_key(file_, key.c_str());
    if (id < 0 && otherwise >= 0) return otherwise;
    if (id < 0 || gguf_get_kv_type(file_, id) != GGUF_TYPE_UINT32) fail(path_ + " has no number " + key);
    const std::int64_t value = gguf_get_val_u32(file_, id);
    if (value < low || value > high) {
      fail(path_ + " has " + key + " = " + std::to_string(value) + "; it must be between " + std::to_string(low) + " and " +
           std::to_string(high));
    }
    return static_cast<int>(value);
  }
  float positive(const std::string& key, float otherwise) const {
    const auto id = gguf_find_key(file_, key.c_str());
    if (id < 0) return otherwise;
    if (gguf_get_kv_type(file_, id) != GGUF_TYPE_FLOAT32) fail(path_ + " has the field " + key + ", which is no fp32 number");
    const float value = gguf_get_val_f32(file_, id);
    if (!(value > 0) || !std::isfinite(value)) {
      fail(path_ + " has " + key + " = " + std::to_string(value) + "; it must be finite and above zero");
    }
    return value;
  }
  // Of whatever type; 1 if it is no number.
  double any_number(const std::string& key) const {
    const auto id = gguf_find_key(file_, key.c_str());
    switch (gguf_get_kv_type(file_, id)) {
      case GGUF_TYPE_UINT32:
        return gguf_get_val_u32(file_, id);
      case GGUF_TYPE_INT32:
        return gguf_get_val_i32(file_, id);
      case GGUF_TYPE_FLOAT32:
        return static_cast<double>(gguf_get_val_f32(file_, id));
      case GGUF_TYPE_BOOL:
        return gguf_get_val_bool(file_, id) ? 1 : 0;
      default:
        return 1;
    }
  }

 private:
  const gguf_context* file_;
  std::string path_;
};

// What the graph does not compute must not be asked for by the file: the answer would be silently another one.
void refuse_unsupported(const gguf_context* file, const Metadata& meta, const std::string& path, const std::string& kind) {
  for (const char* key : {"expert_count", "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
                          "logit_scale", "embedding_scale", "residual_scale", "attention.scale", "attention.clamp_kqv",
                          "attention.max_alibi_bias", "rope.scaling.yarn_log_multiplier"}) {
    const std::string name = kind + "." + key;
    if (gguf_find_key(file, name.c_str()) >= 0 && meta.any_number(name) != 0) {
      fail(path + " sets " + name + ", which this engine does not compute");
    }
  }
}

std::string shape_of(const std::int64_t* extents, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(extents[i]);
  return text + "]";
}

}  // namespace

bool HyperParameters::alike() const {
  return std::all_of(layers.begin(), layers.end(), [&](const kvt::LayerShape& shape) { return shape == layers.front(); });
}

kvt::Geometry HyperParameters::geometry() const {
  if (!alike()) fail("the model's layers differ in shape; what is asked for needs them alike");
  return {num_layers, num_kv_heads, num_q_heads, head_dim};
}

void Model::expect(const std::string& name, Kind kind, std::initializer_list<std::int64_t> shape, bool optional) const {
  const ggml_tensor* const t = tensor(name, optional);
  if (t == nullptr) return;
  const int given = ggml_n_dims(t), wanted = static_cast<int>(shape.size());
  if (given > wanted || !std::equal(shape.begin(), shape.end(), t->ne)) {
    fail(path_ + ": the tensor " + name + " has the shape " + shape_of(t->ne, std::max(given, wanted)) + "; it must have " +
         shape_of(shape.begin(), wanted));
  }
  const bool product =
      t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16 || ggml_is_quantized(t->type);
  if (kind == Kind::matrix ? !product : t->type != GGML_TYPE_F32) {
    fail(path_ + ": the tensor " + name + " is of the type " + ggml_type_name(t->type) + "; it must be " +
         (kind == Kind::matrix ? "a float or a quantised type" : "f32"));
  }
}

void Model::check_tensors() {
  auto& p = parameters_;
  const std::int64_t embedding = p.embedding, q = std::int64_t{p.num_q_heads} * p.head_dim,
                     kv = std::int64_t{p.num_kv_heads} * p.head_dim;
  const ggml_tensor* const tokens = tensor("token_embd.weight");
  if (tokens->ne[1] < 1 || tokens->ne[1] > 1 << 24) fail(path_ + " has " + std::to_string(tokens->ne[1]) + " tokens");
  p.vocabulary = static_cast<int>(tokens->ne[1]);
  expect("token_embd.weight", Kind::matrix, {embedding, p.vocabulary});
  expect("output.weight", Kind::matrix, {embedding, p.vocabulary}, true);
  expect("output_norm.weight", Kind::vector, {embedding});
  expect("rope_freqs.weight", Kind::vector, {p.rotary_dim / 2}, true);
  for (int l = 0; l < p.num_layers; ++l) {
    const std::string block = "blk." + std::to_string(l) + ".";
    const std::int64_t inner = tensor(block + "ffn_gate.weight")->ne[1];
    expect(block + "attn_norm.weight", Kind::vector, {embedding});
    expect(block + "attn_q.weight", Kind::matrix, {embedding, q});
    expect(block + "attn_k.weight", Kind::matrix, {embedding, kv});
    expect(block + "attn_v.weight", Kind::matrix, {embedding, kv});
    expect(block + "attn_q.bias", Kind::vector, {q}, true);
    expect(block + "attn_k.bias", Kind::vector, {kv}, true);
    expect(block + "attn_v.bias", Kind::vector, {kv}, true);
    expect(block + "attn_output.weight", Kind::matrix, {q, embedding});
    expect(block + "ffn_norm.weight", Kind::vector, {embedding});
    expect(block + "ffn_gate.weight", Kind::matrix, {embedding, inner});
    expect(block + "ffn_up.weight", Kind::matrix, {embedding, inner});
    expect(block + "ffn_down.weight", Kind::matrix, {inner, embedding});
    for (const char* unknown : {"attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias", "attn_q_norm.weight",
                                "attn_k_norm.weight", "ffn_gate_inp.weight"}) {
      if (tensor(block + unknown, true) != nullptr) {
        fail(path_ + " has the tensor " + block + unknown + ", which this engine does not compute");
      }
    }
  }
}

Model::Model(const std::string& path, EngineKind engine)
    : path_(path), file_(nullptr, gguf_free), library_(nullptr, llama_model_free) {
  std::error_code code;
  const auto size = fs::file_size(path, code);
  if (code) fail("cannot read the model " + path + ": " + code.message());
  ggml_context* context = nullptr;
  const gguf_init_params init{true, &context};
  file_.reset(gguf_init_from_file(path.c_str(), init));
  context_.reset(context);
  if (!file_) fail(path + " is not a readable GGUF file: it is damaged, truncated or of another kind");
  if (engine == EngineKind::ggml) read_llama_family();
  const std::uint64_t start = gguf_get_data_offset(file_.get());
  for (std::int64_t i = 0; i < gguf_get_n_tensors(file_.get()); ++i) {
    const std::uint64_t offset = gguf_get_tensor_offset(file_.get(), i), bytes = gguf_get_tensor_size(file_.get(), i);
    if (start > size || offset > size - start || bytes > size - start - offset) {
      fail(path + " is truncated: it has " + std::to_string(size) + " bytes, less than its tensor " +
           gguf_get_tensor_name(file_.get(), i) + " needs");
    }
  }
  auto& p = parameters_;
  if (engine == EngineKind::ggml) {
    load_weights();
  } else {
    open_library();
  }
  if (const ggml_tensor* const factors = tensor("rope_freqs.weight", true)) {
    const std::vector<char> bytes = read_tensor(factors);
    rope_factors_.resize(static_cast<std::size_t>(p.rotary_dim / 2));
    if (factors->type == GGML_TYPE_F32 && bytes.size() == rope_factors_.size() * sizeof(float)) {
      std::memcpy(rope_factors_.data(), bytes.data(), bytes.size());
    } else {
      rope_known_ = false;
    }
  }
  rope_.pairs = p.rope_type == GGML_ROPE_TYPE_NORMAL ? kvt::Rope::Pairs::adjacent : kvt::Rope::Pairs::halves;
  rope_.scale = p.rope_scale;
  rope_.factors = rope_factors_;
  if (const auto status = rope_.validate(p.head_dim); !status.ok() && rope_known_) fail(path + ": " + status.message());
}

void Model::read_llama_family() {
  const Metadata meta(file_.get(), path_);
  const std::string kind = meta.text("general.architecture");
  if (kind != "llama" && kind != "qwen2") {
    fail("the architecture " + kind + " is not supported; it must be llama or qwen2 (--engine llama.cpp runs others)");
  }
  refuse_unsupported(file_.get(), meta, path_, kind);
  auto& p = parameters_;
  p.num_layers = meta.integer(kind + ".block_count", 1, 4096);
  p.embedding = meta.integer(kind + ".embedding_length", 1, 1 << 20);
  p.num_q_heads = meta.integer(kind + ".attention.head_count", 1, 65536);
  p.num_kv_heads = meta.integer(kind + ".attention.head_count_kv", 1, 65536, p.num_q_heads);
  p.head_dim = meta.integer(kind + ".attention.key_length", 1, 1 << 16, p.embedding / p.num_q_heads);
  p.rotary_dim = meta.integer(kind + ".rope.dimension_count", 2, 1 << 16, p.head_dim);
  p.context = meta.integer(kind + ".context_length", 1, 1 << 30);
  p.norm_epsilon = meta.positive(kind + ".attention.layer_norm_rms_epsilon", 1e-5f);
  p.rope_base = meta.positive(kind + ".rope.freq_base", 10000.f);
  p.rope_type = kind == "llama" ? GGML_ROPE_TYPE_NORMAL : GGML_ROPE_TYPE_NEOX;
  p.layers.assign(static_cast<std::size_t>(p.num_layers), {p.num_kv_heads, p.num_q_heads, p.head_dim});
  if (const auto status = p.geometry().validate(); !status.ok()) fail(path_ + ": " + status.message());
  rope_ = {.rotary_dim = p.rotary_dim, .base = p.rope_base};
  if (const auto status = rope_.validate(p.head_dim); !status.ok()) fail(path_ + ": " + status.message());
  if (const int value_dim = meta.integer(kind + ".attention.value_length", 1, 1 << 16, p.head_dim); value_dim != p.head_dim) {
    fail(path_ + " has values of " + std::to_string(value_dim) + " elements and keys of " + std::to_string(p.head_dim) +
         "; they must be equal");
  }
  // Names are those of llama.cpp: a factor counts unless the type says none, and without a type it is linear.
  const std::string scaling = meta.text(kind + ".rope.scaling.type", "linear");
  if (scaling != "none" && scaling != "linear") {
    fail(path_ + " scales RoPE by " + scaling + ", which this engine does not compute; it must be none or linear");
  }
  if (scaling == "linear") {
    p.rope_scale = 1.f / meta.positive(kind + ".rope.scaling.factor", meta.positive(kind + ".rope.scale_linear", 1.f));
  }
  check_tensors();
}

void Model::load_weights() {
  backend_.reset(ggml_backend_cpu_init());
  buffer_.reset(backend_ ? ggml_backend_alloc_ctx_tensors(context_.get(), backend_.get()) : nullptr);
  if (!buffer_) fail("out of memory while loading " + path_);
  for (ggml_tensor* t = ggml_get_first_tensor(context_.get()); t != nullptr; t = ggml_get_next_tensor(context_.get(), t)) {
    const std::vector<char> bytes = read_tensor(t);
    ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size());
  }
}

std::vector<char> Model::read_tensor(const ggml_tensor* t) const {
  std::ifstream stream(path_, std::ios::binary);
  std::vector<char> bytes(ggml_nbytes(t));
  const auto at =
      gguf_get_data_offset(file_.get()) + gguf_get_tensor_offset(file_.get(), gguf_find_tensor(file_.get(), t->name));
  stream.seekg(static_cast<std::streamoff>(at));
  if (!stream.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) fail("cannot read " + path_ + " to its end");
  return bytes;
}

// What its interface tells of a model.
void Model::open_library() {
  auto how = llama_model_default_params();
  how.n_gpu_layers = 0;
  library_.reset(llama_model_load_from_file(path_.c_str(), how));
  if (!library_) fail("llama.cpp cannot load " + path_);
  auto& p = parameters_;
  if (const auto status = kvt::llama_layers(library_.get(), p.layers, &blocks_); !status.ok())
    fail(path_ + ": " + status.message());
  const Metadata meta(file_.get(), path_);
  const std::string kind = meta.text("general.architecture");
  p.num_layers = static_cast<int>(p.layers.size());
  p.num_kv_heads = p.layers.front().num_kv_heads;
  p.num_q_heads = p.layers.front().num_q_heads;
  p.head_dim = p.layers.front().head_dim;
  p.embedding = llama_model_n_embd(library_.get());
  p.context = llama_model_n_ctx_train(library_.get());
  p.vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(library_.get()));
  p.rotary_dim = meta.integer(kind + ".rope.dimension_count", 2, 1 << 16, p.head_dim);
  p.rope_base = meta.positive(kind + ".rope.freq_base", 10000.f);
  p.rope_scale = llama_model_rope_freq_scale_train(library_.get());
  const llama_rope_type type = llama_model_rope_type(library_.get());
  p.rope_type = type == LLAMA_ROPE_TYPE_NORM ? GGML_ROPE_TYPE_NORMAL : GGML_ROPE_TYPE_NEOX;
  const std::string scaling = meta.text(kind + ".rope.scaling.type", "linear");
  // Layers with windows often have a base of their own, which the interface does not tell.
  rope_known_ = (type == LLAMA_ROPE_TYPE_NORM || type == LLAMA_ROPE_TYPE_NEOX) && (scaling == "none" || scaling == "linear") &&
                llama_model_n_swa(library_.get()) == 0 && p.alike();
  rope_ = {.rotary_dim = p.rotary_dim, .base = p.rope_base};
}

std::span<const kvt::OutputProjection> Model::output_projections() const {
  for (int l = static_cast<int>(output_projections_.size()); l < parameters_.num_layers; ++l) {
    const int block = blocks_.empty() ? l : blocks_[static_cast<std::size_t>(l)];
    const ggml_tensor* const t = layer(block, "attn_output.weight");
    const float* weights = static_cast<const float*>(t->data);
    if (t->type != GGML_TYPE_F32 || weights == nullptr) {
      const std::int64_t count = ggml_nelements(t);
      auto& own = output_weights_.emplace_back(static_cast<std::size_t>(count));
      const std::vector<char> bytes = t->data == nullptr ? read_tensor(t) : std::vector<char>();
      const void* const from = t->data == nullptr ? bytes.data() : t->data;
      if (t->type == GGML_TYPE_F32) {
        std::memcpy(own.data(), from, own.size() * sizeof(float));
      } else {
        ggml_get_type_traits(t->type)->to_float(from, own.data(), count);
      }
      weights = own.data();
    }
    output_projections_.push_back({weights, static_cast<int>(t->ne[1])});
  }
  return output_projections_;
}

ggml_tensor* Model::tensor(const std::string& name, bool optional) const {
  ggml_tensor* const t = ggml_get_tensor(context_.get(), name.c_str());
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
