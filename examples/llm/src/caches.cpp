// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See caches.hpp.
#include "caches.hpp"

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>

#define KVT_EXTERN_HEAD_DIMS  // see CMakeLists.txt
#include "kvtailor/compose.hpp"
#include "kvtailor/host/cpu_module.hpp"
#include "kvtailor/io/policy_file.hpp"
#include "kvtailor/mixed_cache.hpp"
#include "sensitivity.hpp"

namespace kvt_llm {

namespace {

// "mixed:FILE@BITS": the codecs of the heads by their sensitivities. Empty for any other name.
std::vector<std::string> mixed_codecs(const std::string& codec, const kvt::Geometry& geometry) {
  const std::string prefix = "mixed:";
  if (!codec.starts_with(prefix)) return {};
  const auto at = codec.rfind('@');
  char* end = nullptr;
  const double bits = at == codec.npos ? 0 : std::strtod(codec.c_str() + at + 1, &end);
  if (end == nullptr || *end != '\0' || !(bits > 0 && bits <= 32)) {
    throw std::runtime_error("the codec \"" + codec + "\" must be mixed:FILE@BITS, with 0 to 32 bits an element on average");
  }
  return Sensitivities::read(codec.substr(prefix.size(), at - prefix.size())).choose(bits, geometry);
}

// "bytes:FILE@BYTES@ROWS": what the profile in FILE makes of so many bytes for a text of so many rows. None for any other name.
std::optional<kvt::TailoredHeads> tailored_by(const std::string& codec, kvt::ByteBudget& profile) {
  const std::string prefix = bytes_prefix;
  if (!codec.starts_with(prefix)) return {};
  const auto rows_at = codec.rfind('@'), bytes_at = rows_at == codec.npos ? rows_at : codec.rfind('@', rows_at - 1);
  if (bytes_at == codec.npos) throw std::runtime_error("\"" + codec + "\" needs a budget in bytes");
  const std::string path = codec.substr(prefix.size(), bytes_at - prefix.size());
  if (const auto status = kvt::read_byte_budget(path, profile); !status.ok())
    throw std::runtime_error(path + ": " + status.message());
  kvt::TailoredHeads tailored;
  const double bytes = std::strtod(codec.c_str() + bytes_at + 1, nullptr),
               rows = std::strtod(codec.c_str() + rows_at + 1, nullptr);
  if (const auto status = profile.solve(bytes, rows, tailored); !status.ok())
    throw std::runtime_error(path + ": " + status.message());
  return tailored;
}

#if defined(KVT_LLM_CPU_MODULES)
// The best at the first call, unless one was asked for.
kvt::CpuModule& opened(const std::string& cpu = {}) {
  static kvt::CpuModule module;
  if (module.cpu().empty() || !cpu.empty()) {
    if (!module.open("kvt_llm_caches", cpu).ok()) throw std::runtime_error(module.message());
    std::fprintf(stderr, "kvt-llm: host kernels for %s\n", std::string(module.cpu()).c_str());
  }
  return module;
}
#endif

}  // namespace

#if defined(KVT_LLM_CPU_MODULES)
void choose_kernels(const std::string& cpu) { opened(cpu); }
std::string kernels() { return std::string(opened().cpu()); }
std::string known_kernels() {
  std::string all;
  for (const auto cpu : kvt::known_cpus) all += std::string(cpu) + ", ";
  return all + "of which the best that runs is the default, or the environment's KVT_CPU";
}
#else
void choose_kernels(const std::string& cpu) {
  if (cpu != kernels()) throw std::runtime_error("the host kernels are those for " + known_kernels() + ", not for " + cpu);
}
std::string kernels() { return KVT_COMPILED_CPU; }
std::string known_kernels() { return kernels() + ", which this program was compiled for"; }
#endif

std::unique_ptr<kvt::AnyCache> make_cache(const kvt::Composition& names, const kvt::Geometry& geometry,
                                          const kvt::CacheOptions& options, const std::vector<std::string>& head_codecs) {
  const std::vector<kvt::LayerShape> layers(static_cast<std::size_t>(geometry.num_layers), geometry.layer());
  return make_cache(names, layers, options, head_codecs);
}

std::unique_ptr<kvt::AnyCache> make_cache(const kvt::Composition& names, std::span<const kvt::LayerShape> layers,
                                          const kvt::CacheOptions& options, const std::vector<std::string>& head_codecs) {
  if (kvt::ByteBudget profile; const auto tailored = tailored_by(names.codec, profile)) {
    std::vector<std::string> codecs;
    for (const int codec : tailored->codecs) codecs.push_back(profile.codecs[static_cast<std::size_t>(codec)]);
    std::size_t heads = 0;
    for (const kvt::LayerShape& layer : layers) heads += static_cast<std::size_t>(layer.num_kv_heads);
    if (heads != codecs.size()) {
      throw std::runtime_error("the profile is of a model with " + std::to_string(codecs.size()) + " KV heads; this one has " +
                               std::to_string(heads));
    }
    auto cache = make_cache({"uniform", profile.selector, codecs.front()}, layers, options, codecs);
    check(cache->set_policies(kvt::AnyAllocator(tailored->curve),
                              kvt::ParsedPolicies({"uniform", profile.selector, ""}).selector));
    return cache;
  }
  std::vector<std::size_t> first_head = {0};
  for (const kvt::LayerShape& layer : layers)
    first_head.push_back(first_head.back() + static_cast<std::size_t>(layer.num_kv_heads));
  auto made = kvt::MixedCache::make(
      layers, options, [&](const kvt::Geometry& geometry, const kvt::CacheOptions& told, std::span<const int> numbers) {
        kvt::Composition resolved = names;
        std::vector<std::string> codecs;
        for (const int l : numbers) {
          for (auto h = first_head[static_cast<std::size_t>(l)]; h < first_head[static_cast<std::size_t>(l) + 1]; ++h)
            if (!head_codecs.empty()) codecs.push_back(head_codecs[h]);
        }
        if (codecs.empty()) {
          codecs = mixed_codecs(names.codec, geometry);
          if (!codecs.empty()) resolved.codec = codecs.front();
        }
#if defined(KVT_LLM_CPU_MODULES)
        return opened().make_cache(resolved, geometry, told, codecs);
#else
        return kvt::make_cache(resolved, geometry, told, codecs);
#endif
      });
  if (!made.status.ok()) throw std::runtime_error(made.message);
  return std::move(made.cache);
}

kvt::Composition bytes_composition(const std::string& name) {
  const std::string path = name.substr(std::string(bytes_prefix).size());
  kvt::ByteBudget profile;
  if (const auto status = kvt::read_byte_budget(path, profile); !status.ok())
    throw std::runtime_error(path + ": " + status.message());
  return {"uniform", profile.selector, name};
}

kvt::Composition for_budget(const kvt::Composition& names, double bytes, double rows) {
  kvt::Composition made = names;
  if (names.codec.starts_with(bytes_prefix))
    made.codec += "@" + std::to_string(static_cast<long long>(bytes)) + "@" + std::to_string(static_cast<long long>(rows));
  return made;
}

kvt::CacheOptions told_of(const Model& model, const kvt::Composition& names, kvt::CacheOptions options) {
  options.ropes = model.ropes();
  if (kvt::needs_of(names).has(kvt::Evidence::output_projection)) options.output_projections = model.output_projections();
  return options;
}

std::pair<std::uint32_t, int> observed_by(const kvt::Composition& names) {
  constexpr kvt::EvidenceSet collected = kvt::query_evidence | kvt::Evidence::reconstruction | kvt::Evidence::layer_similarity;
  const kvt::ParsedPolicies policies(names);
  const kvt::EvidenceSet seen(policies.needs().bits & collected.bits);
  return {seen.bits, seen.has(kvt::Evidence::window_queries) ? policies.selector.window : 0};
}

void set_policies(kvt::AnyCache& cache, const kvt::Composition& names) {
  if (kvt::ByteBudget profile; const auto tailored = tailored_by(names.codec, profile)) {
    check(cache.set_policies(kvt::AnyAllocator(tailored->curve),
                             kvt::ParsedPolicies({"uniform", profile.selector, ""}).selector));
    return;
  }
#if defined(KVT_LLM_CPU_MODULES)
  std::string message;
  const kvt::Status status = opened().set_policies(cache, names, message);
  if (!message.empty()) throw std::runtime_error(message);
  check(status);
#else
  const kvt::ParsedPolicies policies(names);
  if (!policies.message.empty()) throw std::runtime_error(policies.message);
  check(cache.set_policies(policies.allocator, policies.selector));
#endif
}

std::string known_policies() {
  return kvt::known_policies() +
         "                   mixed:FILE@BITS for a codec for each head, FILE from the command sensitivity\n";
}

void check(const kvt::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

double mean_rows(const kvt::AnyCache& cache) {
  double rows = 0;
  int heads = 0;
  for (int l = 0; l < cache.geometry().num_layers; ++l) {
    const int of_layer = cache.layer_shape(l).num_kv_heads;
    for (int h = 0; h < of_layer; ++h) rows += cache.num_rows(l, h);
    heads += of_layer;
  }
  return rows / heads;
}

}  // namespace kvt_llm
