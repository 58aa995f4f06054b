// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// LowRank: what the rows of a block share, as a product of two coded factors, and any other codec for what is left.
//
// Block:   n rows: header {u8 rank, u8 0, rank times {u8 bits, Half right_scale, Half left_scale}}; then the right factors,
//          [rank][head_dim] codes, and the left factors, [rank][n] codes, each a run of `bits` bits an element from the low
//          bits up, padded to bytes; zeros up to a multiple of 4 bytes; the block of the residual.
// Value:   sum over i of left[i][row] * right[i][d], plus the residual; a factor is scale * level[code], or fp16 at 16 bits.
// Error:   closed loop: that of the residual codec, relative to the residual. A block that has no low-rank part worth storing
//          (noise, few rows, numbers the residual codec cannot take) has rank 0.
// Cost:    2 + 5 rank + rank * bits * (n + head_dim) / 8 bytes a block beside the residual; 2 * rank products a row and query
//          beside those of the residual.
// Source:  eOptShrinkQ, arXiv 2605.02905. Differs from it: the residual is taken against the factors as they are stored
//          (Loop::open is as published), left factors are fitted to the stored right ones, codes have shared Gaussian levels,
//          and by RankRule::rate_distortion each pair of factors has the bits that pay.
#pragma once

#include <Eigen/Eigenvalues>
#include <cstdint>
#include <limits>
#include <vector>

#include "kvtailor/codec/codebooks.hpp"
#include "kvtailor/codec/row_wise.hpp"
#include "kvtailor/codec/shrinkage.hpp"

namespace kvt::inline v0 {

enum class Loop {
  closed,  // the residual is what the stored factors leave
  open,    // the residual is what exact factors leave: their rounding is added to the error
};
enum class RankRule {
  bbp,              // as many pairs as stand above the noise (see NoiseFit), all with factor_bits
  rate_distortion,  // pairs and their bits as long as a bit spent on them saves more error than one spent on the residual
};

struct LowRankOptions {
  Shrinkage shrinkage = Shrinkage::frobenius;
  RankRule rule = RankRule::bbp;
  Loop loop = Loop::closed;
  int factor_bits = 4;  // 1 .. 6, or 16; rate_distortion chooses its own
  int max_rank = 8;     // 0 .. 32
};

namespace detail {

// One run of factor codes.
struct FactorRun {
  const unsigned char* codes;
  int bits;
  float scale;

  static constexpr int max_bits = 6;
  static constexpr int bytes(int count, int bits) { return (count * bits + 7) / 8; }
  // Lloyd-Max levels of 1 .. 6 bits, one after another.
  struct Levels {
    float value[126] = {};
    constexpr Levels() {
      fill<1>();
      fill<2>();
      fill<3>();
      fill<4>();
      fill<5>();
      fill<6>();
    }
    template <int bits>
    constexpr void fill() {
      constexpr int half = 1 << (bits - 1);
      for (int i = 0; i < half; ++i) {
        value[2 * half - 2 + half + i] = HalfLevels<128, bits>::level[i];
        value[2 * half - 2 + half - 1 - i] = -HalfLevels<128, bits>::level[i];
      }
    }
  };

  KVT_HD KVT_INLINE float operator[](int i) const {
    if (bits == 16) {
      Half x;
      std::memcpy(&x, codes + 2 * i, 2);
      return to_float(x);
    }
    static constexpr Levels levels;
    return scale * levels.value[(1 << bits) - 2 + get(codes, i, bits)];
  }

  // Codes x [count] at `bits` into `to`, which is zero; the scale, and what comes back in x.
  static Half encode(Eigen::VectorXd& x, int bits, unsigned char* to) {
    const auto count = static_cast<int>(x.size());
    if (bits == 16) {
      for (int i = 0; i < count; ++i) {
        const Half h = from_float<Half>(static_cast<float>(x[i]));
        std::memcpy(to + 2 * i, &h, 2);
        x[i] = static_cast<double>(to_float(h));
      }
      return from_float<Half>(1.f);
    }
    static constexpr Levels levels;
    const float* const level = levels.value + (1 << bits) - 2;
    const double size = std::sqrt(x.squaredNorm() / count);
    double cross = 0, square = 0;
    std::vector<int> code(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) {
      const double u = size > 0 ? x[i] / size : 0.0;
      int c = 0;
      for (int step = 1 << (bits - 1); step > 0; step /= 2) {
        if (u > 0.5 * (static_cast<double>(level[c + step - 1]) + static_cast<double>(level[c + step]))) c += step;
      }
      code[static_cast<std::size_t>(i)] = c;
      cross += u * static_cast<double>(level[c]);
      square += static_cast<double>(level[c]) * static_cast<double>(level[c]);
    }
    const Half scale = from_float<Half>(static_cast<float>(size * cross / square));
    for (int i = 0; i < count; ++i) {
      const int c = code[static_cast<std::size_t>(i)];
      x[i] = static_cast<double>(to_float(scale) * level[c]);
      put(to, i, bits, c);
    }
    return scale;
  }
  KVT_HD KVT_INLINE static int get(const unsigned char* codes, int i, int bits) {
    const int at = i * bits;  // something always follows a run
    return (codes[at >> 3] | codes[(at >> 3) + 1] << 8) >> (at & 7) & ((1 << bits) - 1);
  }
  static void put(unsigned char* codes, int i, int bits, int code) {
    const int at = i * bits, shifted = code << (at & 7);
    codes[at >> 3] = static_cast<unsigned char>(codes[at >> 3] | (shifted & 255));
    if (shifted > 255) codes[(at >> 3) + 1] = static_cast<unsigned char>(codes[(at >> 3) + 1] | shifted >> 8);
  }
};

}  // namespace detail

template <PlainCodec Residual>
struct LowRank : PlainBasis<Residual::head_dim>, LowRankOptions {
  static constexpr int dim = Residual::head_dim;
  static constexpr int max_block_rows = std::min(512, Residual::max_block_rows);
  static constexpr int max_rank_limit = 32;

  [[no_unique_address]] Residual residual = {};

  KVT_HD int max_block_bytes(int n) const {
    const int bits = rule == RankRule::rate_distortion ? detail::FactorRun::max_bits : factor_bits;
    const int pair = 5 + detail::FactorRun::bytes(dim, bits) + detail::FactorRun::bytes(n, bits);
    return padded(2 + max_rank * pair) + residual.max_block_bytes(n);
  }
  // What is left of a row by coded factors may be a little longer than the row; a block where it is too long has rank 0.
  double max_row_norm() const { return std::min(static_cast<double>(residual.max_row_norm()), 65504.0 * std::sqrt(dim * 1.0)); }

  int encode(const float* rows, int n, std::byte* block) const {
    using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    const Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>> given(rows, n, dim);
    const Matrix x = given.cast<double>();
    std::vector<double> lambda;
    Eigen::MatrixXd right;  // [dim, p], unit columns
    factor(x, lambda, right);
    std::vector<int> bits;
    std::vector<double> keep;  // of the observed singular value
    choose(lambda, n, bits, keep);
    const int rank = static_cast<int>(bits.size());
    const int head = header_bytes(bits, n);

    auto* const bytes = reinterpret_cast<unsigned char*>(block);
    std::memset(bytes, 0, static_cast<std::size_t>(head));
    bytes[0] = static_cast<unsigned char>(rank);
    Eigen::MatrixXd exact(n, rank), left(n, rank), stored(dim, rank);
    unsigned char* to = bytes + 2 + 5 * rank;
    for (int i = 0; i < rank; ++i) {
      const int b = bits[static_cast<std::size_t>(i)];
      // Of size 1 an element, so that left factors have the size of rows.
      Eigen::VectorXd column = right.col(i) * std::sqrt(static_cast<double>(dim));
      const Half scale = detail::FactorRun::encode(column, b, to);
      stored.col(i) = column;
      bytes[2 + 5 * i] = static_cast<unsigned char>(b);
      std::memcpy(bytes + 3 + 5 * i, &scale, 2);
      to += detail::FactorRun::bytes(dim, b);
    }
    if (rank > 0) {
      const Eigen::VectorXd share = Eigen::Map<const Eigen::VectorXd>(keep.data(), rank);
      exact = x * right.leftCols(rank) * share.asDiagonal();
      left = (stored.transpose() * stored).ldlt().solve(stored.transpose() * x.transpose()).transpose() * share.asDiagonal();
    }
    for (int i = 0; i < rank; ++i) {
      const int b = bits[static_cast<std::size_t>(i)];
      Eigen::VectorXd column = left.col(i);
      const Half scale = detail::FactorRun::encode(column, b, to);
      left.col(i) = column;
      std::memcpy(bytes + 5 + 5 * i, &scale, 2);
      to += detail::FactorRun::bytes(n, b);
    }
    const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> rest =
        (loop == Loop::closed ? Matrix(x - left * stored.transpose()) : Matrix(x - exact * right.leftCols(rank).transpose()))
            .template cast<float>();
    bool fits = left.allFinite() && stored.allFinite();
    for (int row = 0; row < n && fits; ++row) fits = static_cast<double>(rest.row(row).norm()) <= residual.max_row_norm();
    if (rank > 0 && !fits) {
      std::memset(bytes, 0, 4);
      return padded(2) + residual.encode(rows, n, block + padded(2));
    }
    return head + residual.encode(rest.data(), n, block + head);
  }

  KVT_HD void decode(const std::byte* block, int n, int row, float* out) const noexcept {
    const Parts parts(block, n);
    residual.decode(block + parts.head, n, row, out);
    parts.each([&](const detail::FactorRun& right, const detail::FactorRun& left) {
      const float weight = left[row];
      for (int d = 0; d < dim; ++d) out[d] += weight * right[d];
    });
  }
  int erase(const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    const auto* const from = reinterpret_cast<const unsigned char*>(block);
    auto* const bytes = reinterpret_cast<unsigned char*>(to);
    int kept = 0;
    for (int row = 0; row < n; ++row) kept += keep[row] != 0;
    const Parts parts(block, n);
    const int right_bytes = parts.right_bytes();
    std::memcpy(bytes, from, static_cast<std::size_t>(2 + 5 * parts.rank + right_bytes));
    int at = 2 + 5 * parts.rank + right_bytes, at_from = at;
    for (int i = 0; i < parts.rank; ++i) {
      const int b = from[2 + 5 * i];
      std::memset(bytes + at, 0, static_cast<std::size_t>(detail::FactorRun::bytes(kept, b)));
      int next = 0;
      for (int row = 0; row < n; ++row) {
        if (keep[row] == 0) continue;
        if (b == 16) {
          std::memcpy(bytes + at + 2 * next++, from + at_from + 2 * row, 2);
        } else {
          detail::FactorRun::put(bytes + at, next++, b, detail::FactorRun::get(from + at_from, row, b));
        }
      }
      at += detail::FactorRun::bytes(kept, b);
      at_from += detail::FactorRun::bytes(n, b);
    }
    while (at % 4 != 0) bytes[at++] = 0;
    return at + residual.erase(block + parts.head, n, keep, to + at);
  }

  template <class Lanes>
  KVT_HD void logits(const Lanes& lanes, const std::byte* block, int n, const float* prepared, int m, float* out,
                     int stride) const noexcept {
    const Parts parts(block, n);
    residual.logits(lanes, block + parts.head, n, prepared, m, out, stride);
    parts.each([&](const detail::FactorRun& right, const detail::FactorRun& left) {
      const Decoded<Lanes, dim> basis(right, dim);
      const Decoded<Lanes, max_block_rows> weights(left, n);
      for (int j = 0; j < m; ++j) {
        typename Lanes::template Reg<float> part;
        lanes.each([&](int lane) {
          part[lane] = 0;
          for (int d = lane; d < dim; d += Lanes::size) part[lane] += basis[d] * prepared[j * dim + d];
        });
        const float along = lanes.sum(part);
        lanes.each([&](int lane) {
          for (int row = lane; row < n; row += Lanes::size) out[j * stride + row] += along * weights[row];
        });
      }
    });
  }
  template <class Lanes>
  KVT_HD void accumulate(const Lanes& lanes, const std::byte* block, int n, const float* weights, int m, int stride,
                         float* acc) const noexcept {
    const Parts parts(block, n);
    residual.accumulate(lanes, block + parts.head, n, weights, m, stride, acc);
    parts.each([&](const detail::FactorRun& right, const detail::FactorRun& left) {
      const Decoded<Lanes, dim> basis(right, dim);
      const Decoded<Lanes, max_block_rows> rows(left, n);
      for (int j = 0; j < m; ++j) {
        typename Lanes::template Reg<float> part;
        lanes.each([&](int lane) {
          part[lane] = 0;
          for (int row = lane; row < n; row += Lanes::size) part[lane] += weights[j * stride + row] * rows[row];
        });
        const float along = lanes.sum(part);
        lanes.each([&](int lane) {
          for (int d = lane; d < dim; d += Lanes::size) acc[j * dim + d] += along * basis[d];
        });
      }
    });
  }

  // Of an encoded block, for tools: the number of pairs of factors.
  static int rank(const std::byte* block) { return static_cast<int>(block[0]); }

 private:
  KVT_HD static constexpr int padded(int bytes) { return (bytes + 3) / 4 * 4; }
  static int header_bytes(const std::vector<int>& bits, int n) {
    int bytes = 2;
    for (const int b : bits) bytes += 5 + detail::FactorRun::bytes(dim, b) + detail::FactorRun::bytes(n, b);
    return padded(bytes);
  }

  // Where things are in a block.
  struct Parts {
    const unsigned char* bytes;
    int n, rank, head;

    KVT_HD Parts(const std::byte* block, int rows)
        : bytes(reinterpret_cast<const unsigned char*>(block)), n(rows), rank(bytes[0]), head(2) {
      for (int i = 0; i < rank; ++i) {
        const int b = bytes[2 + 5 * i];
        head += 5 + detail::FactorRun::bytes(dim, b) + detail::FactorRun::bytes(n, b);
      }
      head = padded(head);
    }
    KVT_HD int right_bytes() const {
      int sum = 0;
      for (int i = 0; i < rank; ++i) sum += detail::FactorRun::bytes(dim, bytes[2 + 5 * i]);
      return sum;
    }
    template <class F>
    KVT_HD KVT_INLINE void each(F&& f) const {
      const unsigned char* right = bytes + 2 + 5 * rank;
      const unsigned char* left = right + right_bytes();
      for (int i = 0; i < rank; ++i) {
        const int b = bytes[2 + 5 * i];
        Half right_scale, left_scale;
        std::memcpy(&right_scale, bytes + 3 + 5 * i, 2);
        std::memcpy(&left_scale, bytes + 5 + 5 * i, 2);
        f(detail::FactorRun{right, b, to_float(right_scale)}, detail::FactorRun{left, b, to_float(left_scale)});
        right += detail::FactorRun::bytes(dim, b);
        left += detail::FactorRun::bytes(n, b);
      }
    }
  };

  // One lane decodes a run once; lanes of a warp decode what they need when they need it.
  template <class Lanes, int most>
  struct Decoded {
    const detail::FactorRun& run;
    KVT_HD Decoded(const detail::FactorRun& from, int) : run(from) {}
    KVT_HD KVT_INLINE float operator[](int i) const { return run[i]; }
  };
  template <int most>
  struct Decoded<Serial, most> {
    float value[most];
    KVT_HD Decoded(const detail::FactorRun& run, int count) {
      for (int i = 0; i < count; ++i) value[i] = run[i];
    }
    KVT_HD KVT_INLINE float operator[](int i) const { return value[i]; }
  };

  // Squared singular values, descending, and right singular vectors, from the smaller Gram matrix.
  template <class Matrix>
  static void factor(const Matrix& x, std::vector<double>& lambda, Eigen::MatrixXd& right) {
    const bool tall = x.rows() >= x.cols();
    const Eigen::MatrixXd gram = tall ? Eigen::MatrixXd(x.transpose() * x) : Eigen::MatrixXd(x * x.transpose());
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(gram);
    const auto p = gram.rows();
    if (solver.info() != Eigen::Success) return;
    for (Eigen::Index i = 0; i < p; ++i) lambda.push_back(std::max(0.0, solver.eigenvalues()[p - 1 - i]));
    right = solver.eigenvectors().rowwise().reverse();
    if (!tall) {
      right = (x.transpose() * right).eval();
      for (Eigen::Index i = 0; i < p; ++i) {
        const double size = right.col(i).norm();
        if (size > 0) right.col(i) /= size;
      }
    }
  }

  void choose(const std::vector<double>& lambda, int n, std::vector<int>& bits, std::vector<double>& keep) const {
    if (lambda.empty() || !std::isfinite(lambda[0])) return;
    const NoiseFit fit(lambda, n, dim);
    if (rule == RankRule::bbp) {
      bits.assign(static_cast<std::size_t>(std::min(fit.rank(), max_rank)), factor_bits);
    } else {
      spend(lambda, n, bits);
    }
    const int spikes = std::min(fit.rank(), static_cast<int>(bits.size()));
    const std::vector<double> shrunk = fit.shrink(spikes, shrinkage);
    keep.assign(bits.size(), 1.0);
    for (int i = 0; i < spikes; ++i) {
      const auto at = static_cast<std::size_t>(i);
      keep[at] = lambda[at] > 0 ? shrunk[at] / std::sqrt(lambda[at]) : 1.0;
    }
  }

  // Adds bits to pairs of factors, best first, while the error they save is worth more than their bits on the residual.
  void spend(const std::vector<double>& lambda, int n, std::vector<int>& bits) const {
    // What is left of a pair coded at 0 .. 6 bits: two factors with the distortion of Lloyd-Max each.
    constexpr double left[7] = {1,
                                2 * HalfLevels<128, 1>::distortion,
                                2 * HalfLevels<128, 2>::distortion,
                                2 * HalfLevels<128, 3>::distortion,
                                2 * HalfLevels<128, 4>::distortion,
                                2 * HalfLevels<128, 5>::distortion,
                                2 * HalfLevels<128, 6>::distortion};
    const double log_per_bit = std::log(3.5);  // an additional bit divides the error of a residual by about this
    const int most = std::min({max_rank, static_cast<int>(lambda.size()), max_rank_limit});
    std::vector<int> spent(static_cast<std::size_t>(most), 0);
    double energy = 0;
    for (const double value : lambda) energy += value;
    const double floor = energy * 1e-9;
    for (;;) {
      double best = 0;
      std::size_t where = 0;
      int to = 0;
      for (std::size_t i = 0; i < spent.size(); ++i) {
        for (int b = std::max(2, spent[i] + 1); b <= detail::FactorRun::max_bits; ++b) {
          const double cost = (b - spent[i]) * (n + dim) + (spent[i] == 0 ? 40 : 0);
          const double less = lambda[i] * (left[spent[i]] - left[b]);
          const double gain = std::log(energy / std::max(energy - less, floor)) / log_per_bit * n * dim;
          if (gain - cost > 0 && (gain - cost) / cost > best) {
            best = (gain - cost) / cost;
            where = i;
            to = b;
          }
        }
        if (spent[i] == 0) break;  // the next pair is smaller
      }
      if (to == 0) break;
      energy -= lambda[where] * (left[spent[where]] - left[to]);
      spent[where] = to;
    }
    for (const int b : spent) {
      if (b > 0) bits.push_back(b);
    }
  }
};

}  // namespace kvt::inline v0
