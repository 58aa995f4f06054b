// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Caches by name, compiled once for the whole program.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kvtailor/any_cache.hpp"
#include "kvtailor/cache.hpp"
#include "model.hpp"

namespace kvt_llm {

// Which host kernels caches run, "x86-64-v3" say. Throws std::runtime_error unless they can: without modules (see
// KVT_LLM_CPU_MODULES in CMakeLists.txt) there are those that the program was compiled for and no others.
void choose_kernels(const std::string& cpu);
std::string kernels();
std::string known_kernels();

// Throws std::runtime_error with the library's sentence. Codecs may be given for each head, those of a layer one after another,
// or chosen by the composition's codec "mixed:FILE@BITS" (see sensitivity.hpp).
std::unique_ptr<kvt::AnyCache> make_cache(const kvt::Composition& names, std::span<const kvt::LayerShape> layers,
                                          const kvt::CacheOptions& options, const std::vector<std::string>& head_codecs = {});
std::unique_ptr<kvt::AnyCache> make_cache(const kvt::Composition& names, const kvt::Geometry& geometry,
                                          const kvt::CacheOptions& options, const std::vector<std::string>& head_codecs = {});
// "bytes:FILE" stands for what a profile by `profile --bytes` makes of a budget: its composition, and the same for so many
// bytes and a text of so many rows, which caches can be made of; any other composition stays as it is.
inline constexpr const char* bytes_prefix = "bytes:";
kvt::Composition bytes_composition(const std::string& name);
kvt::Composition for_budget(const kvt::Composition& names, double bytes, double rows);
// The options with what the policies of a composition ask of the model, which has to outlive the cache.
kvt::CacheOptions told_of(const Model& model, const kvt::Composition& names, kvt::CacheOptions options);
// What the policies of a composition want a cache to collect, and how many queries; equal for those that one cache can serve.
std::pair<std::uint32_t, int> observed_by(const kvt::Composition& names);
// Gives a cache the allocator and the selector of a composition.
void set_policies(kvt::AnyCache& cache, const kvt::Composition& names);
std::string known_policies();

// Throws unless success.
void check(const kvt::Status& status);
// Rows a head holds on average.
double mean_rows(const kvt::AnyCache& cache);

}  // namespace kvt_llm
