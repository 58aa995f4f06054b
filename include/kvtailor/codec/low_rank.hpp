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
//          and each pair of factors has the bits that pay (RankRule::bbp with factor_bits is as published).
#pragma once

// Blocks are factored on the host; marked for the device, Eigen makes nvcc warn.
#if defined(__CUDACC__) && !defined(EIGEN_NO_CUDA)
#define EIGEN_NO_CUDA
#endif
#include <Eigen/Cholesky>
#include <Eigen/Eigenvalues>
#include <cstdint>
#include <limits>
#include <span>
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
  static constexpr int most_rank = 32;

  Loop loop = Loop::closed;
  RankRule rule = RankRule::rate_distortion;
  Shrinkage shrinkage = Shrinkage::frobenius;
  int max_rank = 16;    // 0 .. most_rank
  int factor_bits = 4;  // of bbp: 1 .. 6, or 16
  float error_per_bit =
      3.5f;  // of rate_distortion: by what a bit more divides the error of a residual; less spends more on factors. Above 1

  Status validate() const {
    if (max_rank < 0 || max_rank > most_rank)
      return error(Errc::bad_value, "max_rank is {}; it must be 0 to {}", max_rank, most_rank);
    if ((factor_bits < 1 || factor_bits > 6) && factor_bits != 16) {
      return error(Errc::bad_value, "factor_bits is {}; it must be 1 to 6, or 16", factor_bits);
    }
    if (!(error_per_bit > 1 && error_per_bit < 1e6f)) {
      return error(Errc::bad_value, "error_per_bit is {}; it must be above 1 and below {}", static_cast<double>(error_per_bit),
                   1e6);
    }
    return success();
  }
};

namespace detail {

// One run of factor codes. Bytes up to `readable` may be read, whatever they are.
struct FactorRun {
  const unsigned char* codes;
  int bits;
  float scale;
  const unsigned char* readable;

  static constexpr int max_bits = 6;
  KVT_HD static constexpr int bytes(int count, int bits) { return (count * bits + 7) / 8; }
  KVT_HD static constexpr int padded(int bytes) { return (bytes + 3) / 4 * 4; }
  // Lloyd-Max levels of 1 .. 6 bits, one after another, and as whole multiples of a unit.
  struct Levels {
    float value[126] = {}, unit[max_bits + 1] = {};
    std::int8_t whole[126] = {};
    constexpr Levels() {
      fill(1, HalfLevels<128, 1>::whole, HalfLevels<128, 1>::unit);
      fill(2, HalfLevels<128, 2>::whole, HalfLevels<128, 2>::unit);
      fill(3, HalfLevels<128, 3>::whole, HalfLevels<128, 3>::unit);
      fill(4, HalfLevels<128, 4>::whole, HalfLevels<128, 4>::unit);
      fill(5, HalfLevels<128, 5>::whole, HalfLevels<128, 5>::unit);
      fill(6, HalfLevels<128, 6>::whole, HalfLevels<128, 6>::unit);
    }
    constexpr void fill(int b, const short* positive, float one) {
      const int half = 1 << (b - 1), middle = first(b) + half;
      unit[b] = one;
      for (int i = 0; i < half; ++i) {
        whole[middle + i] = static_cast<std::int8_t>(positive[i]);
        whole[middle - 1 - i] = static_cast<std::int8_t>(-positive[i]);
      }
      for (int c = first(b); c < first(b + 1); ++c) value[c] = whole[c] * one;
    }
    KVT_HD static constexpr int first(int b) { return (1 << b) - 2; }
  };

  KVT_HD KVT_INLINE float operator[](int i) const { return scale * level(i); }
  KVT_HD KVT_INLINE float level(int i) const {
    if (bits == 16) {
      Half x;
      std::memcpy(&x, codes + 2 * i, 2);
      return to_float(x);
    }
    static constexpr Levels levels;
    return levels.value[Levels::first(bits) + get(codes, i, bits)];
  }

  // Of at most 6 bits: a factor is unit() times its level.
  float unit() const {
    static constexpr Levels levels;
    return scale * levels.unit[bits];
  }
  void decode_levels(int count, std::int8_t* to) const {
    static constexpr Levels levels;
    int i = 0;
#if defined(KVT_HOST_AVX2)
    i = bits <= 4 ? decode_whole<16>(count, to) : bits == 5 ? decode_whole<32>(count, to) : decode_whole<64>(count, to);
#endif
    for (; i < count; ++i) to[i] = levels.whole[Levels::first(bits) + get(codes, i, bits)];
  }

  // Codes x [count] at `bits` into `to`, both memory that all lanes see; the scale, and what comes back in x.
  template <class Lanes, class Real>
  KVT_HD static Half encode(const Lanes& lanes, Real* x, int count, int bits, unsigned char* to) {
    if (bits == 16) {
      lanes.each([&](int lane) {
        for (int i = lane; i < count; i += Lanes::size) {
          const Half h = from_float<Half>(static_cast<float>(x[i]));
          std::memcpy(to + 2 * i, &h, 2);
          x[i] = static_cast<Real>(to_float(h));
        }
      });
      return from_float<Half>(1.f);
    }
    static constexpr Levels levels;
    const float* const level = levels.value + Levels::first(bits);
    const auto sum = [&](auto f) {
      typename Lanes::template Reg<Real> part;
      lanes.each([&](int lane) {
        part[lane] = 0;
        for (int i = lane; i < count; i += Lanes::size) part[lane] += f(x[i]);
      });
      return lanes.sum(part);
    };
    const Real size = std::sqrt(sum([](Real v) { return v * v; }) / static_cast<Real>(count));
    const auto unit = [=](Real v) { return size > 0 ? v / size : Real{0}; };
    const auto nearest = [=](Real u) {
      int c = 0;
      for (int step = 1 << (bits - 1); step > 0; step /= 2) {
        if (u > static_cast<Real>(0.5) * (static_cast<Real>(level[c + step - 1]) + static_cast<Real>(level[c + step])))
          c += step;
      }
      return c;
    };
    const auto value = [=](Real u) { return static_cast<Real>(level[nearest(u)]); };
    const Real cross = sum([=](Real v) { return unit(v) * value(unit(v)); });
    const Real square = sum([=](Real v) { return value(unit(v)) * value(unit(v)); });
    const Half scale = from_float<Half>(static_cast<float>(size * cross / square));
    // Eight codes are whole bytes.
    lanes.each([&](int lane) {
      for (int first = 8 * lane; first < count; first += 8 * Lanes::size) {
        const int n = count - first < 8 ? count - first : 8;
        std::uint64_t word = 0;
        for (int i = 0; i < n; ++i) {
          const int c = nearest(unit(x[first + i]));
          word |= static_cast<std::uint64_t>(c) << (i * bits);
          x[first + i] = static_cast<Real>(to_float(scale) * level[c]);
        }
        for (int i = 0; i < bytes(n, bits); ++i) to[first / 8 * bits + i] = static_cast<unsigned char>(word >> (8 * i));
      }
    });
    return scale;
  }
  KVT_HD KVT_INLINE static int get(const unsigned char* codes, int i, int bits) {
    const int at = i * bits;  // something always follows a run
    return (codes[at >> 3] | codes[(at >> 3) + 1] << 8) >> (at & 7) & ((1 << bits) - 1);
  }
#if defined(KVT_HOST_AVX2)
  // 32 by 32, if there are as many; returns how many. Up to 16 levels by the same instructions, since the bits of runs cannot
  // be foretold.
  template <int most_levels>
  int decode_whole(int count, std::int8_t* to) const {
    struct Tables {
      alignas(32) std::int8_t place[max_bits + 1][32] = {};   // of the two bytes in which code k begins; sixteen take 2 b bytes
      alignas(32) std::int16_t times[max_bits + 1][16] = {};  // moves it to the top of their 16 bits
      alignas(64) std::int8_t level[max_bits + 1][64] = {};
      constexpr Tables() {
        constexpr Levels all;
        for (int b = 1; b <= max_bits; ++b) {
          for (int k = 0; k < 16; ++k) {
            const int bit = k * b;
            place[b][2 * k] = static_cast<std::int8_t>(bit / 8);
            place[b][2 * k + 1] = static_cast<std::int8_t>(bit / 8 + 1);
            times[b][k] = static_cast<std::int16_t>(1 << (16 - b - bit % 8));
          }
          for (int c = 0; c < 1 << b; ++c) level[b][c] = all.whole[Levels::first(b) + c];
        }
      }
    };
    static constexpr Tables table;
    const __m256i place = load_bytes(table.place[bits]), times = load_bytes(table.times[bits]);
    const __m128i down = _mm_cvtsi32_si128(16 - bits);
    const auto sixteen = [&](const unsigned char* at) KVT_INLINE_LAMBDA {
      const __m256i near = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
      return _mm256_srl_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(near, place), times), down);
    };
    int done = 0;
    while (count >= 32 && done + 8 <= count) {
      const int i = std::min(done, (count - 32) / 8 * 8);  // the last ones may be met twice
      const unsigned char* const from = codes + i / 8 * bits;
      if (from + 2 * bits + 16 > readable) break;
      const __m256i code = _mm256_permute4x64_epi64(_mm256_packus_epi16(sixteen(from), sixteen(from + 2 * bits)), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), look_up_bytes<most_levels>(table.level[bits], code));
      done = i + 32;
    }
    return done;
  }
#endif
};

// Adds bits to pairs of factors, best first, while the error they save is worth more than their bits on the residual: bits
// [max_rank], memory that all lanes see; returns the number of pairs. lambda: squared singular values, descending.
template <class Lanes>
KVT_HD int spend_bits(const Lanes& lanes, const LowRankOptions& options, std::span<const double> lambda, int n, int dim,
                      int* bits) {
  constexpr int most_bits = FactorRun::max_bits;
  // What is left of a pair coded at 0 .. 6 bits: two factors with the distortion of Lloyd-Max each.
  static constexpr double left[most_bits + 1] = {1,
                                                 2 * HalfLevels<128, 1>::distortion,
                                                 2 * HalfLevels<128, 2>::distortion,
                                                 2 * HalfLevels<128, 3>::distortion,
                                                 2 * HalfLevels<128, 4>::distortion,
                                                 2 * HalfLevels<128, 5>::distortion,
                                                 2 * HalfLevels<128, 6>::distortion};
  const double log_per_bit = std::log(static_cast<double>(options.error_per_bit));
  const int count = static_cast<int>(lambda.size()), most = options.max_rank < count ? options.max_rank : count;
  double energy = 0;
  for (const double value : lambda) energy += value;
  const double floor = energy * 1e-9;
  int rank = 0;
  for (;;) {
    // Pairs there are, and the next, which is smaller. A lane looks at every 32nd way to go on.
    const int pairs = rank < most ? rank + 1 : most;
    typename Lanes::template Reg<double> best, top;
    typename Lanes::template Reg<int> before;
    lanes.each([&](int lane) {
      best[lane] = 0;
      before[lane] = 0;
      for (int way = lane; way < pairs * most_bits; way += Lanes::size) {
        const int i = way / most_bits, b = way % most_bits + 1, spent = i < rank ? bits[i] : 0;
        if (b < 2 || b <= spent) continue;
        const double cost = (b - spent) * (n + dim) + (spent == 0 ? 40 : 0);
        const double less = lambda[static_cast<std::size_t>(i)] * (left[spent] - left[b]);
        const double gain = std::log(energy / std::max(energy - less, floor)) / log_per_bit * n * dim;
        if (gain - cost > 0 && (gain - cost) / cost > best[lane]) {
          best[lane] = (gain - cost) / cost;
          before[lane] = pairs * most_bits - way;
        }
      }
      top[lane] = best[lane];
    });
    const double most_gain = lanes.max(top);
    lanes.each([&](int lane) {
      if (best[lane] != most_gain) before[lane] = 0;
    });
    const int first = lanes.max(before);  // the first way of the best
    if (first == 0) return rank;
    const int way = pairs * most_bits - first, i = way / most_bits, b = way % most_bits + 1, spent = i < rank ? bits[i] : 0;
    energy -= lambda[static_cast<std::size_t>(i)] * (left[spent] - left[b]);
    lanes.once([&] { bits[i] = b; });
    if (i == rank) ++rank;
  }
}

// The pairs of factors that a block of these squared singular values is worth: bits and share of the singular value that is
// kept, [max_rank] each, memory that all lanes see; returns their number.
template <class Lanes>
KVT_HD int choose_pairs(const Lanes& lanes, const LowRankOptions& options, std::span<const double> lambda, int n, int dim,
                        int* bits, double* share) {
  if (lambda.empty() || !std::isfinite(lambda[0])) return 0;
  const NoiseFit fit(lambda, n, dim);
  int rank = 0;
  if (options.rule == RankRule::bbp) {
    rank = fit.rank() < options.max_rank ? fit.rank() : options.max_rank;
    lanes.each([&](int lane) {
      for (int i = lane; i < rank; i += Lanes::size) bits[i] = options.factor_bits;
    });
  } else {
    rank = spend_bits(lanes, options, lambda, n, dim, bits);
  }
  lanes.each([&](int lane) {
    for (int i = lane; i < rank; i += Lanes::size) {
      share[i] = i < fit.rank() ? fit.shrink(i, options.shrinkage) / std::sqrt(lambda[static_cast<std::size_t>(i)]) : 1.0;
    }
  });
  return rank;
}

// The factors of a block as they are stored, and what they leave. One block is like another; what is made of numbers is a
// template, so that Eigen's solvers are compiled where a block is encoded, and not wherever this is included.
class LowRankFit {
 public:
  template <class Real>
  LowRankFit(const LowRankOptions& options, const Real* rows, int n, int dim) {
    const Eigen::Map<const Floats> given(rows, n, dim);
    const Doubles x = given.cast<double>();
    factor(x);
    std::vector<int> bits(static_cast<std::size_t>(options.max_rank));
    std::vector<double> shares(bits.size());
    const int rank = choose_pairs(Serial{}, options, lambda_, n, dim, bits.data(), shares.data());
    bits.resize(static_cast<std::size_t>(rank));
    int size = 2;
    for (const int b : bits) size += 5 + FactorRun::bytes(dim, b) + FactorRun::bytes(n, b);
    head_.assign(static_cast<std::size_t>(FactorRun::padded(size)), 0);
    head_[0] = static_cast<unsigned char>(rank);
    if (rank == 0) {
      rest_ = given;
      return;
    }
    unsigned char* to = head_.data() + 2 + 5 * rank;
    Eigen::MatrixXd right(dim, rank);
    for (int i = 0; i < rank; ++i) {
      const int b = bits[static_cast<std::size_t>(i)];
      // Of size 1 an element, so that left factors have the size of rows.
      Eigen::VectorXd column = vectors_.col(i) * std::sqrt(static_cast<double>(dim));
      const Half scale = FactorRun::encode(Serial{}, column.data(), static_cast<int>(column.size()), b, to);
      right.col(i) = column;
      head_[static_cast<std::size_t>(2 + 5 * i)] = static_cast<unsigned char>(b);
      std::memcpy(head_.data() + 3 + 5 * i, &scale, 2);
      to += FactorRun::bytes(dim, b);
    }
    const auto share = Eigen::Map<const Eigen::VectorXd>(shares.data(), rank).asDiagonal();
    Eigen::MatrixXd left = (right.transpose() * right).ldlt().solve(right.transpose() * x.transpose()).transpose() * share;
    for (int i = 0; i < rank; ++i) {
      const int b = bits[static_cast<std::size_t>(i)];
      Eigen::VectorXd column = left.col(i);
      const Half scale = FactorRun::encode(Serial{}, column.data(), static_cast<int>(column.size()), b, to);
      left.col(i) = column;
      std::memcpy(head_.data() + 5 + 5 * i, &scale, 2);
      to += FactorRun::bytes(n, b);
    }
    finite_ = left.allFinite() && right.allFinite();
    if (options.loop == Loop::closed) {
      rest_ = (x - left * right.transpose()).cast<float>();
    } else {
      const auto exact = vectors_.leftCols(rank);
      rest_ = (x - x * exact * share * exact.transpose()).cast<float>();
    }
  }

  bool finite() const { return finite_; }
  const std::vector<unsigned char>& head() const { return head_; }
  const float* rest() const { return rest_.data(); }  // [n, dim]
  double rest_norm(int row) const { return static_cast<double>(rest_.row(row).norm()); }

 private:
  using Floats = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Doubles = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

  // Squared singular values, descending, and right singular vectors, from the smaller Gram matrix.
  template <class Matrix>
  void factor(const Matrix& x) {
    const bool tall = x.rows() >= x.cols();
    const Eigen::MatrixXd gram = tall ? Eigen::MatrixXd(x.transpose() * x) : Eigen::MatrixXd(x * x.transpose());
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(gram);
    const auto p = gram.rows();
    if (solver.info() != Eigen::Success) return;
    for (Eigen::Index i = 0; i < p; ++i) lambda_.push_back(std::max(0.0, solver.eigenvalues()[p - 1 - i]));
    vectors_ = solver.eigenvectors().rowwise().reverse();
    if (!tall) {
      vectors_ = (x.transpose() * vectors_).eval();
      for (Eigen::Index i = 0; i < p; ++i) {
        const double size = vectors_.col(i).norm();
        if (size > 0) vectors_.col(i) /= size;
      }
    }
  }

  std::vector<double> lambda_;  // squared singular values, descending
  Eigen::MatrixXd vectors_;     // right singular vectors, [dim, p]
  std::vector<unsigned char> head_;
  Floats rest_;
  bool finite_ = true;
};

}  // namespace detail

template <PlainCodec Residual>
struct LowRank : PlainBasis<Residual::head_dim>, LowRankOptions {
  static constexpr int dim = Residual::head_dim;
  static constexpr int max_block_rows = std::min(512, Residual::max_block_rows);

  // Not [[no_unique_address]], which saves nothing, since both have the base PlainBasis<dim>, and which nvcc 13 runs out of
  // memory over when it makes a constant of a type derived from this one.
  Residual residual = {};

  KVT_HD int max_block_bytes(int n) const {
    const int bits = rule == RankRule::rate_distortion ? detail::FactorRun::max_bits : factor_bits;
    const int pair = 5 + detail::FactorRun::bytes(dim, bits) + detail::FactorRun::bytes(n, bits);
    return padded(2 + max_rank * pair) + residual.max_block_bytes(n);
  }
  // Of any options whose factors have levels.
  static constexpr int most_block_bytes(int n) {
    constexpr int bits = detail::FactorRun::max_bits;
    const int pair = 5 + detail::FactorRun::bytes(dim, bits) + detail::FactorRun::bytes(n, bits);
    return padded(2 + most_rank * pair) + Residual{}.max_block_bytes(n);
  }
  // What is left of a row by coded factors may be a little longer than the row; a block where it is too long has rank 0.
  double max_row_norm() const { return std::min(static_cast<double>(residual.max_row_norm()), 65504.0 * std::sqrt(dim * 1.0)); }

  int encode(const float* rows, int n, std::byte* block) const {
    const detail::LowRankFit fit(*this, rows, n, dim);
    bool fits = fit.finite();
    for (int row = 0; row < n && fits; ++row) fits = fit.rest_norm(row) <= static_cast<double>(residual.max_row_norm());
    if (!fits) {
      std::memset(block, 0, static_cast<std::size_t>(padded(2)));
      return padded(2) + residual.encode(rows, n, block + padded(2));
    }
    const int head = static_cast<int>(fit.head().size());
    std::memcpy(block, fit.head().data(), fit.head().size());
    return head + residual.encode(fit.rest(), n, block + head);
  }

  KVT_HD void decode(const std::byte* block, int n, int row, float* out) const noexcept {
    Parts parts(block, n);
    residual.decode(block + parts.head, n, row, out);
    for (detail::FactorRun right, left; parts.next(right, left);) {
      const float weight = left[row];
      for (int d = 0; d < dim; ++d) out[d] += weight * right[d];
    }
  }
  int erase(const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    return erase(Serial{}, block, n, keep, to);
  }
  template <class Lanes>
  KVT_HD int erase(const Lanes& lanes, const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    const Parts parts(block, n);
    const int kept = detail::count_marked(lanes, keep, n), shared = static_cast<int>(parts.left_codes - parts.bytes);
    detail::copy_bytes(lanes, block, shared, to);
    struct Place {
      int row, kept;  // so many of the rows before it
    };
    typename Lanes::template Reg<Place> place;
    lanes.each([&](int lane) { place[lane] = {0, 0}; });
    for (int first = 0; first < kept; first += 8 * Lanes::size) {
      // Eight codes are whole bytes.
      lanes.each([&](int lane) {
        const int begin = first + 8 * lane, count = kept - begin < 8 ? kept - begin : 8;
        if (count <= 0) return;
        Place& at = place[lane];
        while (at.kept < begin) at.kept += keep[at.row++] != 0 ? 1 : 0;
        copy_left(parts, at.row, keep, count, reinterpret_cast<unsigned char*>(to) + shared, kept, begin);
      });
    }
    int left_bytes = 0;
    for (int i = 0; i < parts.rank; ++i) left_bytes += detail::FactorRun::bytes(kept, parts.bytes[2 + 5 * i]);
    const int head = padded(shared + left_bytes);
    lanes.once([&] {
      for (int i = shared + left_bytes; i < head; ++i) to[i] = std::byte{0};
    });
    return head + residual.erase(lanes, block + parts.head, n, keep, to + head);
  }

  // All survivors cost the same. Looks at the first erased_head bytes alone.
  static constexpr int erased_head = 2 + 5 * most_rank;
  KVT_HD int erased_bytes_bound(const std::byte* block, int n, int left) const {
    const Parts parts(block, n);
    int bytes = static_cast<int>(parts.left_codes - parts.bytes);
    for (int i = 0; i < parts.rank; ++i) bytes += detail::FactorRun::bytes(left, parts.bytes[2 + 5 * i]);
    return padded(bytes) + residual.max_block_bytes(left);
  }

  template <class Lanes>
  KVT_HD void row_of(const Lanes& lanes, const std::byte* block, int n, int row, float* out) const noexcept {
    Parts parts(block, n);
    residual.row_of(lanes, block + parts.head, n, row, out);
    for (detail::FactorRun right, left; parts.next(right, left);) {
      lanes.each([&](int lane) {
        const float weight = left[row];
        for (int d = lane; d < dim; d += Lanes::size) out[d] += weight * right[d];
      });
    }
  }

  template <class Lanes>
  KVT_HD void logits(const Lanes& lanes, const std::byte* block, int n, const float* prepared, int m, float* out,
                     int stride) const noexcept {
    Parts parts(block, n);
    if constexpr (Lanes::size == 1) {
      for (int i = 0; i < parts.head; i += 64) lanes.template reads_tile<64>(block + i);
    }
    residual.logits(lanes, block + parts.head, n, prepared, m, out, stride);
    if constexpr (Lanes::size == 1) {
      for (Pairs pairs; pairs.next(parts, n);) pairs.add(pairs.right, dim, prepared, dim, pairs.left, n, out, stride, m);
    }
    for (detail::FactorRun right, left; parts.next(right, left);) {
      add_pair(lanes, right, dim, prepared, dim, left, n, out, stride, m);
    }
  }
  template <class Lanes>
  KVT_HD void accumulate(const Lanes& lanes, const std::byte* block, int n, const float* weights, int m, int stride,
                         float* acc) const noexcept {
    Parts parts(block, n);
    if constexpr (Lanes::size == 1) {
      for (int i = 0; i < parts.head; i += 64) lanes.template reads_tile<64>(block + i);
    }
    residual.accumulate(lanes, block + parts.head, n, weights, m, stride, acc);
    if constexpr (Lanes::size == 1) {
      for (Pairs pairs; pairs.next(parts, n);) pairs.add(pairs.left, n, weights, stride, pairs.right, dim, acc, dim, m);
    }
    for (detail::FactorRun right, left; parts.next(right, left);) {
      add_pair(lanes, left, n, weights, stride, right, dim, acc, dim, m);
    }
  }

  // Of an encoded block, for tools: the number of pairs of factors.
  static int rank(const std::byte* block) { return static_cast<int>(block[0]); }

 private:
  KVT_HD static constexpr int padded(int bytes) { return detail::FactorRun::padded(bytes); }

  // Where things are in a block.
  struct Parts {
    const unsigned char *bytes, *right_codes, *left_codes;
    int n, rank, head, done = 0;

    KVT_HD Parts(const std::byte* block, int rows)
        : bytes(reinterpret_cast<const unsigned char*>(block)), n(rows), rank(bytes[0]) {
      right_codes = left_codes = bytes + 2 + 5 * rank;
      int left_bytes = 0;
      for (int i = 0; i < rank; ++i) {
        left_codes += detail::FactorRun::bytes(dim, bytes[2 + 5 * i]);
        left_bytes += detail::FactorRun::bytes(n, bytes[2 + 5 * i]);
      }
      head = padded(static_cast<int>(left_codes - bytes) + left_bytes);
    }
    // Of the next pair; 16 after the last.
    KVT_HD int next_bits() const { return done == rank ? 16 : bytes[2 + 5 * done]; }
    // The next pair of factors; false after the last.
    KVT_HD bool next(detail::FactorRun& right, detail::FactorRun& left) {
      if (done == rank) return false;
      const unsigned char* const entry = bytes + 2 + 5 * done++;
      const int b = entry[0];
      Half right_scale, left_scale;
      std::memcpy(&right_scale, entry + 1, 2);
      std::memcpy(&left_scale, entry + 3, 2);
      // Eight rows of a residual take more than what one load reads too far.
      const unsigned char* const readable = bytes + head + (n >= 8 ? 16 : 0);
      right = {right_codes, b, to_float(right_scale), readable};
      left = {left_codes, b, to_float(left_scale), readable};
      right_codes += detail::FactorRun::bytes(dim, b);
      left_codes += detail::FactorRun::bytes(n, b);
      return true;
    }
  };

  // The left codes of `count` marked rows from `row` on, of each pair, into runs of `kept` codes: from place `begin` on, a
  // multiple of eight.
  KVT_HD static void copy_left(const Parts& parts, int row, const unsigned char* keep, int count, unsigned char* to, int kept,
                               int begin) {
    const unsigned char* from = parts.left_codes;
    for (int i = 0; i < parts.rank; ++i) {
      const int b = parts.bytes[2 + 5 * i];
      unsigned char* out = to + begin / 8 * b;
      unsigned word = 0;
      int filled = 0;
      for (int next = row, done = 0; done < count; ++next) {
        if (keep[next] == 0) continue;
        ++done;
        word |= static_cast<unsigned>(detail::FactorRun::get(from, next, b)) << filled;
        for (filled += b; filled >= 8; filled -= 8) {
          *out++ = static_cast<unsigned char>(word);
          word >>= 8;
        }
      }
      if (filled > 0) *out = static_cast<unsigned char>(word);
      from += detail::FactorRun::bytes(parts.n, b);
      to += detail::FactorRun::bytes(kept, b);
    }
  }

  // to[j] += (from[j] . a) b for m vectors, eight of which share what a lane has decoded.
  template <class Lanes>
  KVT_HD KVT_INLINE static void add_pair(const Lanes& lanes, const detail::FactorRun& a, int a_size, const float* from,
                                         int from_stride, const detail::FactorRun& b, int b_size, float* to, int to_stride,
                                         int m) {
    constexpr int most = 8;
    for (int first = 0; first < m; first += most) {
      const int count = m - first < most ? m - first : most;
      const auto each_vector = [count](auto f) KVT_INLINE_LAMBDA {
        KVT_UNROLL_ON_DEVICE
        for (int j = 0; j < most; ++j) {
          if (j < count) f(j);
        }
      };
      const float* const x = from + first * from_stride;
      float* const out = to + first * to_stride;
      typename Lanes::template Reg<float> part[most];
      float along[most];
      lanes.each([&](int lane) {
        each_vector([&](int j) { part[j][lane] = 0; });
        for (int i = lane; i < a_size; i += Lanes::size) {
          const float factor = a[i];
          each_vector([&](int j) { part[j][lane] += factor * x[j * from_stride + i]; });
        }
      });
      each_vector([&](int j) { along[j] = lanes.sum(part[j]); });
      lanes.each([&](int lane) {
        for (int i = lane; i < b_size; i += Lanes::size) {
          const float factor = b[i];
          each_vector([&](int j) { out[j * to_stride + i] += along[j] * factor; });
        }
      });
    }
  }
  // One lane decodes up to four pairs, as far as they have levels, and adds them in one pass.
  struct Pairs {
    int count;
    float scale[4];
    std::int8_t right[4][dim], left[4][max_block_rows];

    bool next(Parts& parts, int n) {
      detail::FactorRun a, b;
      for (count = 0; count < 4 && parts.next_bits() <= detail::FactorRun::max_bits && parts.next(a, b); ++count) {
        scale[count] = a.unit() * b.unit();
        a.decode_levels(dim, right[count]);
        b.decode_levels(n, left[count]);
      }
      for (int i = count; i < 4; ++i) scale[i] = 0;
      return count > 0;
    }
    // to[j] += (from[j] . a) b for m vectors, by twos and threes.
    template <int a_most, int b_most>
    void add(const std::int8_t (&a)[4][a_most], int a_size, const float* from, int from_stride,
             const std::int8_t (&b)[4][b_most], int b_size, float* to, int to_stride, int m) const {
      const auto some = [&]<int many>(int j) {
        float along[many][4];
        detail::dot_rows<many>(rows(a), from + j * from_stride, from_stride, a_size, along);
        for (auto& each : along) {
          for (int i = 0; i < 4; ++i) each[i] *= scale[i];
        }
        detail::add_rows<many>(to + j * to_stride, to_stride, along, rows(b), b_size);
      };
      int j = 0;
      for (; m - j == 2 || m - j > 3; j += 2) some.template operator()<2>(j);
      if (m - j == 3) some.template operator()<3>(j);
      if (m - j == 1) some.template operator()<1>(j);
    }

   private:
    template <int most>
    detail::FourRows<std::int8_t> rows(const std::int8_t (&factors)[4][most]) const {
      const auto row = [&](int i) { return factors[i < count ? i : 0]; };
      return {row(0), row(1), row(2), row(3)};
    }
  };
};

}  // namespace kvt::inline v0
