// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// OracleImportance: what rows turn out to matter, once the queries that come later are known. Budgets are learned from it (see
// marginal_utility.hpp), and a cut by it is what a selector that cannot see the future is measured against.
//
// Score:   largest over the group's query heads of a * |v W_O|, where v is a row's value and a what queries give the row: the
//          largest of them, or all added.
// Needs:   keys, values, positions, window queries (as many as are to count), the output projection.
//          Cost: O(queries * group * rows * head_dim).
// Source:  LU-KV, arXiv 2602.08585, which takes the largest over the steps of an answer and divides by what OutputNorm adds up
//          to over all rows of a layer.
#pragma once

#include <new>
#include <vector>

#include "kvtailor/select/row_products.hpp"
#include "kvtailor/select/window_attention.hpp"

namespace kvt::inline v0 {

struct OracleImportance {
  static constexpr EvidenceSet needs =
      Evidence::keys | Evidence::values | Evidence::positions | Evidence::window_queries | Evidence::output_projection;
  int window = 256;
  OverQueries over = OverQueries::largest;

  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    const WindowAttention queries(seen, window);
    KVT_TRY(queries.check());
    std::vector<float> norms(score.size());
    std::fill(score.begin(), score.end(), 0.f);
    HeadEvidence alone = seen;
    alone.group_size = 1;
    return queries.each_head(
        [&](const float* mass) {
          projected_norms(alone, Norm::root, norms);
          alone.output.weights += seen.head_dim;
          for (std::size_t r = 0; r < score.size(); ++r) score[r] = std::max(score[r], mass[r] * norms[r]);
        },
        over);
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }
};

// Score: mean over the group's query heads of |v W_O|.
struct OutputNorm {
  static constexpr EvidenceSet needs = Evidence::values | Evidence::output_projection;

  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    projected_norms(seen, Norm::root, score);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }
};

static_assert(TokenSelector<OracleImportance> && TokenSelector<OutputNorm>);

}  // namespace kvt::inline v0
