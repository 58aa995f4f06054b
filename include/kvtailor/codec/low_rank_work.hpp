// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The BlockEncoder of LowRank.
//
// The smaller side of a block, its rows or its columns, is rotated pair by pair until all are at right angles. Their lengths
// are then the singular values. There is no Gram matrix, which would square their range: in fp32 a value is off by 1.2e-5 of
// the largest at most, and rules and codes need no more. Pairs and their bits, shares and codes are those of the host
// (low_rank.hpp), and so is the format of a block; factors are rounded otherwise, and two of a pair may have the other sign.
// Source:  M. R. Hestenes, J. SIAM 6, 1958; in rounds of disjoint pairs: R. P. Brent and F. T. Luk, SIAM J. Sci. Stat. Comput.
//          6, 1985.
#pragma once

#include "kvtailor/codec/block_encode.hpp"
#include "kvtailor/codec/low_rank.hpp"
#include "kvtailor/codec/rotated.hpp"
#include "kvtailor/core/device.hpp"

namespace kvt::inline v0 {

namespace detail {

template <class Residual, int max_rows>
class LowRankEncoder {
 public:
  static constexpr int dim = Residual::head_dim, warps = 16, max_pairs = LowRankOptions::most_rank;
  static constexpr int most = max_rows < dim ? max_rows : dim, length = max_rows < dim ? dim : max_rows;  // vectors, of theirs
  static constexpr int row_warps = std::clamp(std::max(max_pairs * dim, 8704) / Residual::scratch_floats, 1, warps);  // that
  // encode rows of the residual

  struct Shared {
    double value[most], lambda[most];  // squared singular values as vectors lie, and descending
    double share[max_pairs];
    int order[most];  // of vectors by descending value
    int bits[max_pairs], right_at[max_pairs], left_at[max_pairs];
    float gram[max_pairs][max_pairs + 1];  // of the stored right factors; then its LDL^T factors, L^T above the diagonal
    float square[most];                    // of the vectors' lengths
    float largest[warps];
    int rank, head, turned, unfit;
  };
  struct Factors {
    float basis[max_pairs][length];                          // right singular vectors: lies where the first vectors do
    float right[max_pairs][dim], left[max_pairs][max_rows];  // as they are stored
    union {
      float inverse[max_pairs][dim];  // a row times these are its left factors
      float row[row_warps][Residual::scratch_floats];
    };
  };
  union Memory {
    float vectors[most][length];
    Factors factors;
  };

  const LowRank<Residual>& codec;
  double max_row_norm;  // of the residual codec
  const float* rows;    // [n, dim], memory that all warps see
  int n;                // 1 .. max_rows
  std::byte* out;       // max_block_bytes(n)
  Shared& shared;
  Memory& memory;

  // Returns the bytes written.
  template <class Block>
  KVT_HD int encode(const Block& block) const {
    if (const float scale = inverse_size(block); scale > 0) {
      load(block, scale);
      turn(block);
      choose(block);
      if (const int rank = shared.rank; rank > 0) {
        const int head = shared.head;
        find_basis(block, rank, scale);
        store_right(block, rank);
        store_left(block, rank);
        encode_rows(block, rank, head);
        if (shared.unfit == 0) return head + residual_bytes();
      }
    }
    // As the host does where there is no low rank, or what it leaves is too long.
    block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
      if (warp == 0) lanes.once([&] { std::memset(out, 0, FactorRun::padded(2)); });
    });
    encode_rows(block, 0, FactorRun::padded(2));
    return FactorRun::padded(2) + residual_bytes();
  }

 private:
  static constexpr int max_sweeps = 20;

  KVT_HD bool tall() const { return n >= dim; }
  KVT_HD int count() const { return tall() ? dim : n; }
  KVT_HD int size() const { return tall() ? n : dim; }
  KVT_HD int residual_bytes() const { return codec.residual.max_block_bytes(n); }

  // The power of two that makes the largest element 1 .. 2, or 0 if there is none.
  template <class Block>
  KVT_HD float inverse_size(const Block& block) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      typename Lanes::template Reg<float> part;
      lanes.each([&](int lane) {
        part[lane] = 0;
        for (int i = warp * Lanes::size + lane; i < n * dim; i += warps * Lanes::size) {
          const float x = std::fabs(rows[i]);
          if (!(x <= part[lane])) part[lane] = x <= 3.4028235e38f ? x : INFINITY;
        }
      });
      const float largest = lanes.max(part);
      lanes.once([&] {
        shared.largest[warp] = largest;
        if (warp == 0) shared.unfit = 0;
      });
    });
    float largest = 0;
    for (int i = 0; i < warps; ++i) largest = shared.largest[i] > largest ? shared.largest[i] : largest;
    if (largest == 0 || largest == INFINITY) return 0;
    const int inverse = 254 - static_cast<int>(bits_from_float(largest) >> 23);
    return float_from_bits(static_cast<std::uint32_t>(inverse < 1 ? 1 : inverse) << 23);
  }
  template <class Block>
  KVT_HD void load(const Block& block, float scale) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        for (int i = warp * Lanes::size + lane; i < n * dim; i += warps * Lanes::size) {
          const int row = i / dim, d = i % dim;
          memory.vectors[tall() ? d : row][tall() ? row : d] = rows[i] * scale;
        }
      });
    });
  }

  // In each round all vectors meet in pairs; in a sweep each meets each.
  template <class Block>
  KVT_HD void turn(const Block& block) const {
    using Lanes = typename Block::Lanes;
    const int p = count(), seats = (p + 1) / 2 * 2;
    for (int sweep = 0; sweep < max_sweeps; ++sweep) {
      block.each_warp([&](const Lanes& lanes, int warp) {
        if (warp == 0) lanes.once([&] { shared.turned = 0; });
        for (int i = warp; i < p; i += warps) {
          const float square = product(lanes, memory.vectors[i], memory.vectors[i], size());
          lanes.once([&] { shared.square[i] = square; });
        }
      });
      for (int round = 0; round < seats - 1; ++round) {
        const auto at = [=](int seat) { return seat == 0 ? 0 : 1 + (seat - 1 + round) % (seats - 1); };
        block.each_warp([&](const Lanes& lanes, int warp) {
          for (int seat = warp; seat < seats / 2; seat += warps) {
            const int a = at(seat), b = at(seats - 1 - seat);
            if (a < p && b < p) turn_pair(lanes, a, b);
          }
        });
      }
      const bool done = shared.turned == 0;
      block.each_warp([](const Lanes&, int) {});
      if (done) return;
    }
  }
  // Turns two vectors in their plane, so that they are at right angles.
  template <class Lanes>
  KVT_HD void turn_pair(const Lanes& lanes, int first, int second) const {
    constexpr int own = LaneRow<length, Lanes::size>::length;
    struct Two {
      float a[own], b[own];
    };
    float *const a = memory.vectors[first], *const b = memory.vectors[second];
    const int q = size();
    typename Lanes::template Reg<Two> x;
    typename Lanes::template Reg<float> part;
    lanes.each([&](int lane) {
      part[lane] = 0;
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < own; ++k) {
        const int i = k * Lanes::size + lane;
        x[lane].a[k] = i < q ? a[i] : 0.f;
        x[lane].b[k] = i < q ? b[i] : 0.f;
        part[lane] += x[lane].a[k] * x[lane].b[k];
      }
    });
    const float cross = lanes.sum(part), a_square = shared.square[first], b_square = shared.square[second];
    // The cosine between them, squared: what is rounding, and what another sweep makes so small that it does not count.
    constexpr float right_angle = 1e-12f, nearly = 1e-4f;
    const float square = cross * cross, both = a_square * b_square;
    if (!(square > right_angle * both)) return;
    const float zeta = (b_square - a_square) / (2 * cross);
    const float tangent = (zeta < 0 ? -1.f : 1.f) / (std::fabs(zeta) + std::sqrt(1 + zeta * zeta));
    const float cosine = 1 / std::sqrt(1 + tangent * tangent), sine = cosine * tangent;
    lanes.each([&](int lane) {
      KVT_UNROLL_ON_DEVICE
      for (int k = 0; k < own; ++k) {
        const int i = k * Lanes::size + lane;
        if (i < q) {
          a[i] = cosine * x[lane].a[k] - sine * x[lane].b[k];
          b[i] = sine * x[lane].a[k] + cosine * x[lane].b[k];
        }
      }
    });
    lanes.once([&] {
      const float less = a_square - tangent * cross, more = b_square + tangent * cross;
      shared.square[first] = less > 0 ? less : 0.f;
      shared.square[second] = more > 0 ? more : 0.f;
      if (square > nearly * both) shared.turned = 1;
    });
  }

  // Singular values, the pairs they are worth, and where these will lie.
  template <class Block>
  KVT_HD void choose(const Block& block) const {
    using Lanes = typename Block::Lanes;
    const int p = count(), q = size();
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int i = warp; i < p; i += warps) {
        typename Lanes::template Reg<double> part;
        lanes.each([&](int lane) {
          part[lane] = 0;
          for (int k = lane; k < q; k += Lanes::size) {
            part[lane] += static_cast<double>(memory.vectors[i][k]) * static_cast<double>(memory.vectors[i][k]);
          }
        });
        const double square = lanes.sum(part);
        lanes.once([&] { shared.value[i] = square; });
      }
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        for (int i = warp * Lanes::size + lane; i < p; i += warps * Lanes::size) {
          int before = 0;
          for (int j = 0; j < p; ++j) {
            before += shared.value[j] > shared.value[i] || (shared.value[j] == shared.value[i] && j < i) ? 1 : 0;
          }
          shared.order[before] = i;
          shared.lambda[before] = shared.value[i];
        }
      });
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp != 0) return;
      // Below is rounding; its vectors lie anywhere.
      lanes.each([&](int lane) {
        for (int i = 1 + lane; i < p; i += Lanes::size) {
          if (shared.lambda[i] < 1e-9 * shared.lambda[0]) shared.lambda[i] = 0;
        }
      });
      const std::span<const double> lambda(shared.lambda, static_cast<std::size_t>(p));
      const int rank = choose_pairs(lanes, codec, lambda, n, dim, shared.bits, shared.share);
      lanes.once([&] {
        int end = 2 + 5 * rank;
        for (int i = 0; i < rank; ++i) {
          shared.right_at[i] = end;
          end += FactorRun::bytes(dim, shared.bits[i]);
        }
        for (int i = 0; i < rank; ++i) {
          shared.left_at[i] = end;
          end += FactorRun::bytes(n, shared.bits[i]);
        }
        shared.rank = rank;
        shared.head = FactorRun::padded(end);
        out[0] = static_cast<std::byte>(rank);
        out[1] = std::byte{0};
        while (end < shared.head) out[end++] = std::byte{0};
      });
    });
  }
  // The vectors of the largest values, to the front, and the right singular vectors made of them.
  template <class Block>
  KVT_HD void find_basis(const Block& block, int rank, float scale) const {
    using Lanes = typename Block::Lanes;
    for (int i = 0; i < rank; ++i) {
      block.each_warp([&](const Lanes& lanes, int warp) {
        const int from = shared.order[i];
        lanes.each([&](int lane) {
          for (int k = warp * Lanes::size + lane; k < size(); k += warps * Lanes::size) {
            const float x = memory.vectors[i][k];
            memory.vectors[i][k] = memory.vectors[from][k];
            memory.vectors[from][k] = x;
          }
          for (int k = i + 1 + warp * Lanes::size + lane; k < rank; k += warps * Lanes::size) {
            if (shared.order[k] == i) shared.order[k] = from;
          }
        });
      });
    }
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int i = warp; i < rank; i += warps) {
        float* const basis = memory.factors.basis[i];
        typename Lanes::template Reg<LaneRow<dim, Lanes::size>> sum;
        typename Lanes::template Reg<float> part;
        lanes.each([&](int lane) {
          for (int k = 0; k < LaneRow<dim, Lanes::size>::length; ++k) {
            const int d = k * Lanes::size + lane;
            sum[lane].x[k] = !tall() && d < dim ? basis[d] : 0.f;
          }
          for (int row = 0; row < n && tall(); ++row) {
            const float weight = basis[row] * scale;
            for (int k = 0; k < LaneRow<dim, Lanes::size>::length; ++k) {
              const int d = k * Lanes::size + lane;
              if (d < dim) sum[lane].x[k] += weight * rows[row * dim + d];
            }
          }
          part[lane] = 0;
          for (const float x : sum[lane].x) part[lane] += x * x;
        });
        const float square = lanes.sum(part), inverse = square > 0 ? 1 / std::sqrt(square) : 0.f;
        lanes.each([&](int lane) {
          for (int k = 0; k < LaneRow<dim, Lanes::size>::length; ++k) {
            const int d = k * Lanes::size + lane;
            if (d < dim) basis[d] = sum[lane].x[k] * inverse;
          }
        });
      }
    });
  }

  template <class Lanes>
  KVT_HD void store(const Lanes& lanes, float* factor, int length_of, int i, int at, int scale_at) const {
    const Half scale = FactorRun::encode(lanes, factor, length_of, shared.bits[i], bytes() + at);
    lanes.once([&] { std::memcpy(out + scale_at, &scale, sizeof scale); });
    lanes.each([&](int lane) {
      for (int k = lane; k < length_of; k += Lanes::size) {
        if (!(std::fabs(factor[k]) <= 3.4028235e38f)) shared.unfit = 1;
      }
    });
  }
  template <class Block>
  KVT_HD void store_right(const Block& block, int rank) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int i = warp; i < rank; i += warps) {
        // Of size 1 an element, so that left factors have the size of rows.
        const float root = std::sqrt(static_cast<float>(dim));
        lanes.each([&](int lane) {
          for (int d = lane; d < dim; d += Lanes::size) memory.factors.right[i][d] = memory.factors.basis[i][d] * root;
        });
        lanes.once([&] { out[2 + 5 * i] = static_cast<std::byte>(shared.bits[i]); });
        store(lanes, memory.factors.right[i], dim, i, shared.right_at[i], 3 + 5 * i);
      }
    });
  }
  // By least squares, given the right ones as they are stored.
  template <class Block>
  KVT_HD void store_left(const Block& block, int rank) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int i = warp; i < rank; i += warps) {
        for (int j = 0; j <= i; ++j) {
          const float both = product(lanes, memory.factors.right[i], memory.factors.right[j]);
          lanes.once([&] { shared.gram[i][j] = both; });
        }
      }
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp != 0) return;
      for (int j = 0; j < rank; ++j) {
        lanes.each([&](int lane) {
          for (int i = j + 1 + lane; i < rank; i += Lanes::size) {
            const float factor = shared.gram[j][i] = shared.gram[i][j] * inverse_pivot(j);
            for (int k = j + 1; k <= i; ++k) shared.gram[i][k] -= factor * shared.gram[k][j];
          }
        });
      }
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        for (int d = warp * Lanes::size + lane; d < dim; d += warps * Lanes::size) solve(d, rank);
      });
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int row = warp; row < n; row += warps) {
        for (int i = 0; i < rank; ++i) {
          const float factor = product(lanes, rows + row * dim, memory.factors.inverse[i]);
          lanes.once([&] { memory.factors.left[i][row] = factor; });
        }
      }
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int i = warp; i < rank; i += warps) store(lanes, memory.factors.left[i], n, i, shared.left_at[i], 5 + 5 * i);
    });
  }
  // Right factors that depend on those before have none: with codes of few bits two may be the same.
  KVT_HD float inverse_pivot(int i) const { return shared.gram[i][i] > 1e-5f * dim ? 1 / shared.gram[i][i] : 0.f; }
  KVT_HD void solve(int d, int rank) const {
    for (int i = 0; i < rank; ++i) {
      float x = memory.factors.right[i][d];
      for (int k = 0; k < i; ++k) x -= shared.gram[k][i] * memory.factors.inverse[k][d];
      memory.factors.inverse[i][d] = x;
    }
    for (int i = rank - 1; i >= 0; --i) {
      float x = memory.factors.inverse[i][d] * inverse_pivot(i);
      for (int k = i + 1; k < rank; ++k) x -= shared.gram[i][k] * memory.factors.inverse[k][d];
      memory.factors.inverse[i][d] = x;
    }
    for (int i = 0; i < rank; ++i) memory.factors.inverse[i][d] *= static_cast<float>(shared.share[i]);
  }
  template <class Lanes>
  KVT_HD static float product(const Lanes& lanes, const float* x, const float* y, int size = dim) {
    typename Lanes::template Reg<float> part;
    lanes.each([&](int lane) {
      part[lane] = 0;
      for (int d = lane; d < size; d += Lanes::size) part[lane] += x[d] * y[d];
    });
    return lanes.sum(part);
  }

  // What `rank` pairs leave of the rows, by the residual codec, behind `head` bytes.
  template <class Block>
  KVT_HD void encode_rows(const Block& block, int rank, int head) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp >= row_warps) return;
      float* const rest = memory.factors.row[warp];
      for (int row = warp; row < n; row += row_warps) {
        const float* const x = rows + row * dim;
        const auto subtract = [&](const float* right, float left) {
          lanes.each([&](int lane) {
            for (int d = lane; d < dim; d += Lanes::size) rest[d] -= left * right[d];
          });
        };
        lanes.each([&](int lane) {
          for (int d = lane; d < dim; d += Lanes::size) rest[d] = x[d];
        });
        for (int i = 0; i < rank; ++i) {
          if (codec.loop == Loop::closed) {
            subtract(memory.factors.right[i], memory.factors.left[i][row]);
          } else {
            subtract(memory.factors.basis[i], product(lanes, x, memory.factors.basis[i]) * static_cast<float>(shared.share[i]));
          }
        }
        if (rank > 0) {
          typename Lanes::template Reg<double> part;
          lanes.each([&](int lane) {
            part[lane] = 0;
            for (int d = lane; d < dim; d += Lanes::size)
              part[lane] += static_cast<double>(rest[d]) * static_cast<double>(rest[d]);
          });
          const double norm = std::sqrt(lanes.sum(part));
          lanes.once([&] {
            if (!(norm <= max_row_norm)) shared.unfit = 1;
          });
        }
        codec.residual.encode_row(lanes, rest, out + head, n, row, rest);
      }
    });
  }
  KVT_HD unsigned char* bytes() const { return reinterpret_cast<unsigned char*>(out); }
};

}  // namespace detail

// The options' max_rank is 32 at most.
template <LaneRowCodec Residual, int max_rows>
struct BlockEncoder<LowRank<Residual>, max_rows> {
  using Encoder = detail::LowRankEncoder<Residual, max_rows>;
  static constexpr int warps = Encoder::warps;
  using Shared = typename Encoder::Shared;
  using Memory = typename Encoder::Memory;

  template <class Block>
  KVT_HD static int encode(const Block& block, const LowRank<Residual>& codec, float* rows, int n, std::byte* out,
                           Shared& shared, Memory& memory) {
    static_assert(Block::warps == warps);
    const auto max_row_norm = static_cast<double>(codec.residual.max_row_norm());
    const int bytes = Encoder{codec, max_row_norm, rows, n, out, shared, memory}.encode(block);
    block.each_warp([](const typename Block::Lanes&, int) {});  // all have read what is shared
    return bytes;
  }
};

}  // namespace kvt::inline v0
