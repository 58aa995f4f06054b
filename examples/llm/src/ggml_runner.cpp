// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// A small engine for the Llama family on ggml: see engine.hpp.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <numeric>
#include <stdexcept>

#include "engine.hpp"
#include "kvtailor/engine/ggml.hpp"

namespace kvt_llm {

namespace {

// A layer takes about 30 nodes.
std::size_t max_nodes(const Model& model) { return 64 + 48 * static_cast<std::size_t>(model.parameters().num_layers); }

class GgmlRunner : public Engine::Runner {
 public:
  GgmlRunner(const Model& model, int num_threads)
      : model_(model),
        backend_(ggml_backend_cpu_init()),
        allocator_(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend_))),
        graph_memory_(ggml_tensor_overhead() * max_nodes(model) + ggml_graph_overhead_custom(max_nodes(model), false)) {
    ggml_backend_cpu_set_n_threads(backend_, num_threads);
  }
  ~GgmlRunner() override {
    ggml_gallocr_free(allocator_);
    ggml_backend_free(backend_);
  }

  void run(kvt::AnyCache& cache, std::span<const int> tokens, int first, Engine::Logits which, std::span<float> to) override;

 private:
  const Model& model_;
  ggml_backend_t backend_;
  ggml_gallocr_t allocator_;
  std::vector<unsigned char> graph_memory_;
  std::vector<int> positions_;
  kvt::GgmlAttention<kvt::AnyCache> attention_;
};

void GgmlRunner::run(kvt::AnyCache& cache, std::span<const int> tokens, int first, Engine::Logits which, std::span<float> to) {
  const HyperParameters& p = model_.parameters();
  const int n = static_cast<int>(tokens.size());
  const ggml_init_params init{graph_memory_.size(), graph_memory_.data(), true};
  const std::unique_ptr<ggml_context, void (*)(ggml_context*)> owner(ggml_init(init), ggml_free);
  ggml_context* const c = owner.get();
  ggml_cgraph* const graph = ggml_new_graph_custom(c, max_nodes(model_), false);
  ggml_tensor* const ids = ggml_new_tensor_1d(c, GGML_TYPE_I32, n);
  ggml_tensor* const places = ggml_new_tensor_1d(c, GGML_TYPE_I32, n);
  ggml_set_input(ids);
  ggml_set_input(places);
  ggml_tensor* const factors = model_.tensor("rope_freqs.weight", true);

  const auto norm = [&](ggml_tensor* x, ggml_tensor* weight) {
    return ggml_mul(c, ggml_rms_norm(c, x, p.norm_epsilon), weight);
  };
  const auto rope = [&](ggml_tensor* x) {
    return ggml_rope_ext(c, x, places, factors, p.rotary_dim, p.rope_type, 0, p.rope_base, p.rope_scale, 0.f, 1.f, 32.f, 1.f);
  };
  const auto project = [&](int layer, const char* name, ggml_tensor* x, int heads) {
    ggml_tensor* y = ggml_mul_mat(c, model_.layer(layer, (std::string(name) + ".weight").c_str()), x);
    if (ggml_tensor* const bias = model_.layer(layer, (std::string(name) + ".bias").c_str(), true)) y = ggml_add(c, y, bias);
    return ggml_reshape_3d(c, y, p.head_dim, heads, n);
  };

  attention_.set_cache(cache);
  positions_.resize(tokens.size());
  std::iota(positions_.begin(), positions_.end(), first);
  attention_.begin(positions_);
  ggml_tensor* x = ggml_get_rows(c, model_.tensor("token_embd.weight"), ids);
  for (int l = 0; l < p.num_layers; ++l) {
    ggml_tensor* const a = norm(x, model_.layer(l, "attn_norm.weight"));
    ggml_tensor* const q = rope(project(l, "attn_q", a, p.num_q_heads));
    ggml_tensor* const k = rope(project(l, "attn_k", a, p.num_kv_heads));
    ggml_tensor* const v = project(l, "attn_v", a, p.num_kv_heads);
    ggml_tensor* const o = attention_.build(c, l, q, k, v, {});
    ggml_tensor* const added = ggml_add(c, x, ggml_mul_mat(c, model_.layer(l, "attn_output.weight"), o));
    if (ggml_tensor* const compared = attention_.compare(c, l, x, added)) ggml_build_forward_expand(graph, compared);
    x = added;
    ggml_tensor* const f = norm(x, model_.layer(l, "ffn_norm.weight"));
    ggml_tensor* const gate = ggml_mul_mat(c, model_.layer(l, "ffn_gate.weight"), f);
    ggml_tensor* const up = ggml_mul_mat(c, model_.layer(l, "ffn_up.weight"), f);
    x = ggml_add(c, x, ggml_mul_mat(c, model_.layer(l, "ffn_down.weight"), ggml_swiglu_split(c, gate, up)));
  }
  const int rows = which == Engine::Logits::all ? n : 1;
  if (rows < n) x = ggml_view_2d(c, x, x->ne[0], rows, x->nb[1], static_cast<std::size_t>(n - rows) * x->nb[1]);
  ggml_tensor* head = model_.tensor("output.weight", true);
  if (head == nullptr) head = model_.tensor("token_embd.weight");  // tied
  ggml_tensor* const logits = ggml_mul_mat(c, head, norm(x, model_.tensor("output_norm.weight")));
  ggml_set_output(logits);
  ggml_build_forward_expand(graph, logits);

  if (!ggml_gallocr_alloc_graph(allocator_, graph))
    throw std::runtime_error("out of memory for " + std::to_string(n) + " tokens");
  ggml_backend_tensor_set(ids, tokens.data(), 0, tokens.size_bytes());
  ggml_backend_tensor_set(places, positions_.data(), 0, tokens.size_bytes());
  const auto computed = ggml_backend_graph_compute(backend_, graph);
  if (const auto status = attention_.finish(); !status.ok()) throw std::runtime_error(status.message());
  if (computed != GGML_STATUS_SUCCESS) throw std::runtime_error("ggml could not compute the graph");
  ggml_backend_tensor_get(logits, to.data(), 0, to.size_bytes());
}

}  // namespace

std::unique_ptr<Engine::Runner> make_ggml_runner(const Model& model, int num_threads) {
  return std::make_unique<GgmlRunner>(model, num_threads);
}

}  // namespace kvt_llm
