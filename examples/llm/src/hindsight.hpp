// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Hindsight: what rows of a text turn out to matter once what comes after it is known. Curves are learned from it, and the
// oracle cuts by it: no policy that anybody can run, since it has read what is only asked later, but what is left to others.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "engine.hpp"
#include "kvtailor/select/window_attention.hpp"

namespace kvt_llm {

using Look = std::function<void()>;

// [heads, rows]: what the rows of a cache give to what comes then, each layer divided by what its values are through the output
// projection, which the cache has to know. go_on(look) lets the model read on over the cache and calls look() after each chunk
// of at most `chunk` tokens whose queries count; forget() keeps others from counting. The cache is left with other policies.
std::vector<float> see_importance(kvt::AnyCache& cache, int chunk, kvt::OverQueries over,
                                  const std::function<void(const Look& look)>& go_on);

// Reads a question and its answer over the cache that ends before them; the queries that make the answer's tokens are looked
// at.
void read_answer(Engine& engine, kvt::AnyCache& cache, std::span<const int> asked, std::span<const int> reply, int chunk,
                 const Look& look);

// Whether the token selector of a composition is "oracle", a name that commands know which cut a text before something known.
// It then gets one that a cache can be made with, needs the output projection and observes nothing: until the cut.
bool take_oracle(kvt::Composition& names);

// Token selector: scores that are known already.
struct KnownScores {
  static constexpr kvt::EvidenceSet needs = kvt::Evidence::positions;
  std::shared_ptr<const std::vector<float>> of_rows;  // [heads, rows], the first at position 0
  kvt::Geometry shape;

  kvt::Status score(const kvt::HeadEvidence& seen, std::span<float> score) const noexcept;
};

}  // namespace kvt_llm
