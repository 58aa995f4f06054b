// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Learned: rows of which a small network, trained on the model itself, says that they will matter.
//
// Score:   TokenScorer (learn/token_scorer.hpp) of the row's key before RoPE and its value. Scores of all heads are on one
//          scale, so that Adaptive and Global may share rows out by them.
// Needs:   keys, values, positions, rope; the numbers of a trained policy, from a file (io/policy_file.hpp).
//          Cost: O(rows * head_dim * hidden); no queries.
// Source:  LKV, arXiv 2605.06676 (its token scorer, LKV-T); how it is trained: `kvt-llm train`, docs/policies.md.
#pragma once

#include "kvtailor/select/row_products.hpp"
//
#include <memory>
#include <new>
#include <vector>

#include "kvtailor/core/block_loops.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/device_rope.hpp"
#include "kvtailor/core/rope.hpp"
#include "kvtailor/learn/token_scorer.hpp"

namespace kvt::inline v0 {

struct Learned {
  static constexpr EvidenceSet needs = Evidence::keys | Evidence::values | Evidence::positions | Evidence::rope;
  const TokenScorer<float>* scorer = nullptr;  // outlives the cache
  TokenScorerLayout layout = {};               // of the scorer: its own is out of a device's reach
  int num_kv_heads = 0;                        // of a layer

  Learned() = default;
  Learned(const TokenScorer<float>& of, int kv_heads) : scorer(&of), layout(of.layout()), num_kv_heads(kv_heads) {}

  Status check(const Geometry& shape) const noexcept {
    if (scorer == nullptr) return error(Errc::bad_policy, "the learned token selector has no scorer; read one from a file");
    if (layout.head_dim != shape.head_dim) {
      return error(Errc::bad_shape, "the learned scores are of a model with head_dim {}; this one has {}", layout.head_dim,
                   shape.head_dim);
    }
    if (num_kv_heads != shape.num_kv_heads) {
      return error(Errc::bad_shape, "the learned scores are of a model with {} KV heads; this one has {}", num_kv_heads,
                   shape.num_kv_heads);
    }
    if (scorer->num_heads() != shape.num_heads()) {
      return error(Errc::bad_shape, "the learned scores are of a model with {} layers; this one has {}",
                   scorer->num_heads() / num_kv_heads, shape.num_layers);
    }
    return success();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    const int dim = seen.head_dim, head = seen.layer * num_kv_heads + seen.kv_head;
    RopeInverse inverse(*seen.rope);
    detail::Matrix keys, z, hidden;
    detail::each_tile(seen.keys, dim, [&](int first, const auto& tile) {
      keys = tile;
      const auto count = static_cast<int>(keys.rows());
      for (int r = 0; r < count; ++r) {
        inverse.turn_back(keys.row(r).data(), 1, dim, seen.positions[static_cast<std::size_t>(first + r)]);
      }
      scorer->features(head, keys.data(), seen.values.data() + static_cast<std::ptrdiff_t>(first) * dim, count, z);
      scorer->score(head, z, score.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)), hidden);
    });
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

  // The same on a device: see store/head_score.hpp. Sums of each row, first over its key, take hidden + 1 floats.
  std::vector<float> device_table(int) const { return scorer->numbers(); }
  long long device_space(int, long long rows) const { return 4 * rows * (layout.hidden + 1); }
  template <int size, int warps>
  struct Shared {
    float scratch[warps][size], row[warps][size];
  };
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    const float* const own = rows.evidence.table + static_cast<long long>(rows.head()) * layout.size();
    float* const sums = rows.template space<float>();
    const DeviceRope rope = rows.evidence.ropes[rows.layer];
    detail::each_index(block, 0, rows.count * (layout.hidden + 1),
                       [&](int i) { sums[i] = own[layout.bias() + i % (layout.hidden + 1)]; });
    add_sums<true>(block, rows, shared, own, sums,
                   [&](const auto& lanes, float* row, int r) { rope.turn_back(lanes, row, rows.position(r)); });
    add_sums<false>(block, rows, shared, own, sums, [](const auto&, float*, int) {});
    detail::each_index(block, 0, rows.count, [&](int r) {
      const float* const sum = sums + static_cast<long long>(r) * (layout.hidden + 1);
      float all = sum[layout.hidden];
      for (int i = 0; i < layout.hidden; ++i) all += sum[i] > 0 ? own[layout.outer() + i] * sum[i] : 0;
      score[r] = all;
    });
  }

 private:
  KVT_HD float standard(const float* own, int f, float x) const {
    constexpr float most = 1000;
    const float z = (x - own[layout.mean() + f]) * own[layout.scale() + f];
    return z < -most ? -most : z > most ? most : z;
  }
  // Adds the part of keys, or of values, to the sums of each row.
  template <bool keys, class Block, class Rows, class Memory, class Turn>
  KVT_HD void add_sums(const Block& block, const Rows& rows, Memory& shared, const float* own, float* sums, Turn&& turn) const {
    using Lanes = typename Block::Lanes;
    constexpr int dim = Rows::dim;
    block.each_warp([&](const Lanes& lanes, int warp) {
      float* const row = shared.row[warp];
      rows.template each_decoded<keys>(lanes, warp, 0, rows.count, shared.scratch[warp], row, [&](int r) {
        turn(lanes, row, r);
        const float square = detail::product<dim>(lanes, row, row), least = 1e-12f;
        const float length = std::log(std::fmax(std::sqrt(square), least));
        const int first = keys ? 0 : dim, last = keys ? 2 * dim : 2 * dim + 1;
        lanes.each([&](int lane) {
          for (int d = lane; d < dim; d += Lanes::size) row[d] = standard(own, first + d, row[d]);
        });
        const float z = standard(own, last, length);
        lanes.each([&](int lane) {
          for (int i = lane; i <= layout.hidden; i += Lanes::size) {
            const float* const weights = own + layout.matrix() + i * layout.features();
            float sum = weights[last] * z;
            for (int d = 0; d < dim; ++d) sum += weights[first + d] * row[d];
            sums[static_cast<long long>(r) * (layout.hidden + 1) + i] += sum;
          }
        });
      });
    });
  }
};

static_assert(TokenSelector<Learned>);

// The same with a scorer of its own, shared by copies.
struct OwnedLearned {
  static constexpr EvidenceSet needs = Learned::needs;
  std::shared_ptr<const TokenScorer<float>> scorer;
  int num_kv_heads = 0;

  Status check(const Geometry& shape) const noexcept { return policy().check(shape); }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept { return policy().score(seen, score); }

 private:
  Learned policy() const noexcept { return scorer ? Learned(*scorer, num_kv_heads) : Learned(); }
};

}  // namespace kvt::inline v0
