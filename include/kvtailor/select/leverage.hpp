// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Leverage: keys that others do not make up, whatever their place in the text.
//
// Score:   keys before RoPE, their mean taken away, times a Gaussian matrix [head_dim, sketch] of variance 1 / sketch: rows X;
//          x_j . (X'X + 0.01 I)^-1 x_j. A ridge that is too small for the Cholesky factorisation grows tenfold, up to five
//          times.
// Needs:   keys, positions, rope.  Cost: O(rows * sketch * (head_dim + sketch)).
// Source:  the leverage part of Compactor, Chari & Van Durme, arXiv 2507.08143; defaults of kvpress, whose scaling of scores
//          changes no order and is left out. Compactor's other part needs all queries of a prompt, and is not here.
#pragma once

#include "kvtailor/select/row_products.hpp"
//
#include <Eigen/Cholesky>
#include <new>
#include <vector>

#include "kvtailor/core/block_loops.hpp"
#include "kvtailor/core/concepts.hpp"
#include "kvtailor/core/device_rope.hpp"
#include "kvtailor/core/random.hpp"

namespace kvt::inline v0 {

struct Leverage {
  static constexpr EvidenceSet needs = Evidence::keys | Evidence::positions | Evidence::rope;
  int sketch = 48;  // 1 .. 256
  std::uint64_t seed = 0;

  Status check() const noexcept {
    if (sketch < 1 || sketch > 256) return error(Errc::bad_value, "sketch is {}; it must be between 1 and 256", sketch);
    return success();
  }
  Status score(const HeadEvidence& seen, std::span<float> score) const noexcept try {
    KVT_TRY(check());
    const int dim = seen.head_dim, n = seen.num_rows();
    detail::Matrix keys = detail::ConstRows(seen.keys.data(), n, dim, Eigen::OuterStride<>(dim));
    RopeInverse inverse(*seen.rope);
    for (int row = 0; row < n; ++row) {
      inverse.turn_back(keys.row(row).data(), 1, dim, seen.positions[static_cast<std::size_t>(row)]);
    }
    const std::vector<float> numbers = device_table(dim);
    const detail::ConstRows matrix(numbers.data(), dim, sketch, Eigen::OuterStride<>(sketch));
    Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(dim);
    for (int row = 0; row < n; ++row) sum += keys.row(row).cast<double>();
    keys.rowwise() -= Eigen::RowVectorXf((sum / n).cast<float>());
    const detail::Matrix rows = keys * matrix;
    const Eigen::MatrixXd squares = (rows.transpose() * rows).cast<double>();
    Eigen::LLT<Eigen::MatrixXd> factored;
    double ridge = first_ridge;
    for (int tries = 0; tries < most_tries; ++tries, ridge *= 10) {
      factored.compute(squares + ridge * Eigen::MatrixXd::Identity(sketch, sketch));
      if (factored.info() == Eigen::Success) break;
    }
    if (factored.info() != Eigen::Success || !squares.allFinite()) {
      return error(Errc::bad_value, "keys before RoPE are too large to be compared; the largest is {}",
                   static_cast<double>(keys.cwiseAbs().maxCoeff()));
    }
    const Eigen::MatrixXf lower = factored.matrixL().solve(Eigen::MatrixXd::Identity(sketch, sketch)).cast<float>();
    detail::Matrix solved;
    detail::each_tile({rows.data(), static_cast<std::size_t>(rows.size())}, sketch, [&](int first, const auto& tile) {
      solved.noalias() = tile * lower.transpose();
      Eigen::Map<Eigen::VectorXf>(score.data() + first, tile.rows()) = solved.rowwise().squaredNorm();
    });
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while scoring rows");
  }

  // The same on a device: see store/head_score.hpp. Memory for rows through the matrix, and for two squares.
  static Status refusal() noexcept { return error(Errc::bad_value, "keys before RoPE are too large to be compared"); }
  // The Gaussian matrix [head_dim, sketch].
  std::vector<float> device_table(int head_dim) const {
    const double size = 1 / std::sqrt(static_cast<double>(sketch));
    std::vector<float> matrix(static_cast<std::size_t>(head_dim) * static_cast<std::size_t>(sketch));
    for (std::size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<float>(size * normal_number(seed, i));
    return matrix;
  }
  long long device_space(int, long long) const { return 4LL * tile_floats + 16LL * sketch * sketch; }
  template <int size, int warps>
  struct Shared {
    float scratch[warps][size], row[warps][size], mean[size];
  };
  template <class Block, class Rows, class Memory>
  KVT_HD void score_on_device(const Block& block, const Rows& rows, Memory& shared, float* score) const {
    using Lanes = typename Block::Lanes;
    const int n = rows.count, many = tile_floats / sketch < 128 ? tile_floats / sketch : 128;
    find_mean(block, rows, shared);
    float* const tile = rows.template space<float>();
    auto *const squares = reinterpret_cast<double*>(tile + tile_floats), *const factor = squares + sketch * sketch;
    detail::each_index(block, 0, sketch * sketch, [&](int e) { squares[e] = 0; });
    for (int first = 0; first < n; first += many) {
      const int count = n - first < many ? n - first : many;
      fill_tile(block, rows, shared, first, count, tile);
      detail::each_index(block, 0, sketch * sketch, [&](int e) {
        const int i = e / sketch, j = e % sketch;
        float sum = 0;
        for (int t = 0; t < count && j <= i; ++t) sum += tile[t * sketch + i] * tile[t * sketch + j];
        squares[e] += static_cast<double>(sum);
      });
    }
    bool done = false;
    double ridge = first_ridge;
    for (int tries = 0; tries < most_tries && !done; ++tries, ridge *= 10) {
      detail::each_index(block, 0, sketch * sketch,
                         [&](int e) { factor[e] = squares[e] + (e / sketch == e % sketch ? ridge : 0); });
      done = factorise(block, factor);
    }
    if (!done) {
      detail::each_index(block, 0, n, [&](int r) {
        score[r] = 0;
        rows.evidence.refused[rows.head()] = 1;
      });
      return;
    }
    // The inverse of the factor, transposed: a column by each thread.
    detail::each_index(block, 0, sketch, [&](int j) {
      double* const inverse = squares + j * sketch;
      for (int i = j; i < sketch; ++i) {
        double sum = i == j ? 1 : 0;
        for (int k = j; k < i; ++k) sum -= factor[i * sketch + k] * inverse[k];
        inverse[i] = sum / factor[i * sketch + i];
      }
    });
    for (int first = 0; first < n; first += many) {
      const int count = n - first < many ? n - first : many;
      fill_tile(block, rows, shared, first, count, tile);
      block.each_warp([&](const Lanes& lanes, int warp) {
        for (int t = warp; t < count; t += Block::warps) {
          typename Lanes::template Reg<float> part;
          lanes.each([&](int lane) {
            part[lane] = 0;
            for (int i = lane; i < sketch; i += Lanes::size) {
              float sum = 0;
              for (int j = 0; j <= i; ++j) sum += static_cast<float>(squares[j * sketch + i]) * tile[t * sketch + j];
              part[lane] += sum * sum;
            }
          });
          const float own = lanes.sum(part);
          lanes.once([&] { score[first + t] = own; });
        }
      });
    }
  }

 private:
  static constexpr int most_tries = 6, tile_floats = 8192;
  static constexpr double first_ridge = 1e-2;

  // f(r) of rows first .. last - 1, with the key before RoPE at shared.row of the warp.
  template <class Lanes, class Rows, class Memory, class F>
  KVT_HD static void each_key(const Lanes& lanes, int warp, const Rows& rows, Memory& shared, int first, int last, F&& f) {
    const DeviceRope rope = rows.evidence.ropes[rows.layer];
    float* const row = shared.row[warp];
    rows.template each_decoded<true>(lanes, warp, first, last, shared.scratch[warp], row, [&](int r) {
      rope.turn_back(lanes, row, rows.position(r));
      f(r);
    });
  }
  template <class Block, class Rows, class Memory>
  KVT_HD static void find_mean(const Block& block, const Rows& rows, Memory& shared) {
    using Lanes = typename Block::Lanes;
    using Channels = LaneRow<Rows::dim, Lanes::size>;
    block.each_warp([&](const Lanes& lanes, int warp) {
      float* const row = shared.row[warp];
      typename Lanes::template Reg<Channels> sum;
      const auto each_channel = [&](auto&& f) {
        lanes.each([&](int lane) {
          KVT_UNROLL_ON_DEVICE
          for (int k = 0; k < Channels::length; ++k) {
            const int d = k * Lanes::size + lane;
            if (Rows::dim % Lanes::size == 0 || d < Rows::dim) f(sum[lane].x[k], row[d]);
          }
        });
      };
      each_channel([](float& own, float&) { own = 0; });
      each_key(lanes, warp, rows, shared, 0, rows.count, [&](int) { each_channel([](float& own, float& x) { own += x; }); });
      each_channel([](float& own, float& x) { x = own; });
    });
    detail::each_index(block, 0, Rows::dim, [&](int d) {
      float sum = 0;
      for (int w = 0; w < Block::warps; ++w) sum += shared.row[w][d];
      shared.mean[d] = sum / static_cast<float>(rows.count);
    });
  }
  // Rows through the matrix: tile [count, sketch].
  template <class Block, class Rows, class Memory>
  KVT_HD void fill_tile(const Block& block, const Rows& rows, Memory& shared, int first, int count, float* tile) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      const float* const row = shared.row[warp];
      each_key(lanes, warp, rows, shared, first, first + count, [&](int r) {
        lanes.each([&](int lane) {
          for (int j = lane; j < sketch; j += Lanes::size) {
            float sum = 0;
            for (int d = 0; d < Rows::dim; ++d) sum += (row[d] - shared.mean[d]) * rows.evidence.table[d * sketch + j];
            tile[(r - first) * sketch + j] = sum;
          }
        });
      });
    });
  }
  // Cholesky of what lies below the diagonal of a matrix [sketch, sketch], in place.
  template <class Block>
  KVT_HD bool factorise(const Block& block, double* matrix) const {
    for (int k = 0; k < sketch; ++k) {
      const double pivot = matrix[k * sketch + k];
      if (!(pivot > 0)) {
        block.each_warp([](const typename Block::Lanes&, int) {});  // all have read it
        return false;
      }
      const double root = std::sqrt(pivot);
      detail::each_index(block, k + 1, sketch, [&](int i) { matrix[i * sketch + k] /= root; });
      const int rest = sketch - k;
      detail::each_index(block, 0, rest * rest, [&](int e) {
        const int i = k + e / rest, j = k + e % rest;
        if (e == 0) matrix[k * sketch + k] = root;
        if (j > k && j <= i) matrix[i * sketch + j] -= matrix[i * sketch + k] * matrix[j * sketch + k];
      });
    }
    return true;
  }
};

static_assert(TokenSelector<Leverage>);

}  // namespace kvt::inline v0
