// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Products of many rows with many vectors, fp32: a tile of rows by some vectors at a time, its sums in registers. Vectors are
// packed before, so that lanes are vectors and a row's elements are read one at a time; all vectors meet a block of rows while
// it is in the nearest caches.
// Error: a product is one sum in the order of the elements, whatever the instruction set.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>

#include "kvtailor/core/simd.hpp"

namespace kvt::inline v0::detail {

struct RowTile {
#if defined(KVT_HOST_AVX512)
  static constexpr int lanes = 16, triples = 4;  // with two registers of vectors 24 sums in 32 registers
#elif defined(KVT_HOST_AVX2)
  static constexpr int lanes = 8, triples = 2;  // 12 in 16
#else
  static constexpr int lanes = 4, triples = 2;
#endif
  static constexpr int rows = 3 * triples;

  // out[i * out_stride + c] = row i . vector c, for `rows` rows, `stride` floats apart, and one or two times `lanes` vectors:
  // each [.., lanes], `apart` floats apart. Sums end at element n, those of the last vectors `more` elements later.
  template <int many>
  KVT_INLINE static void multiply(const float* row, int stride, const float* by, int apart, int n, int more, float* out,
                                  int out_stride) {
#if defined(KVT_HOST_VECTORS)
    using Lanes __attribute__((vector_size(4 * lanes))) = float;
    // Three rows to a pointer: pointers to twelve are more than there are registers.
    const float* triple[triples];
    for (int t = 0; t < triples; ++t) triple[t] = row + static_cast<std::ptrdiff_t>(3 * t) * stride;
    const std::ptrdiff_t next = stride;
    Lanes sum[triples][3][many] = {};
    const auto add = [&]<int first>() KVT_INLINE_LAMBDA {
      Lanes x[many];
      KVT_UNROLL
      for (int v = first; v < many; ++v) std::memcpy(&x[v], by + v * apart, sizeof x[v]);
      KVT_UNROLL
      for (int t = 0; t < triples; ++t) {
        KVT_UNROLL
        for (int i = 0; i < 3; ++i) {
          const float own = triple[t][i * next];
          KVT_UNROLL
          for (int v = first; v < many; ++v) sum[t][i][v] = own * x[v] + sum[t][i][v];
        }
        ++triple[t];
      }
      by += lanes;
    };
    for (int k = 0; k < n; ++k) add.template operator()<0>();
    for (int k = 0; k < more; ++k) add.template operator()<many - 1>();
    KVT_UNROLL
    for (int i = 0; i < rows; ++i, out += out_stride) {
      KVT_UNROLL
      for (int v = 0; v < many; ++v) std::memcpy(out + v * lanes, &sum[i / 3][i % 3][v], sizeof sum[i / 3][i % 3][v]);
    }
#else
    for (int i = 0; i < rows; ++i, row += stride, out += out_stride) {
      std::fill_n(out, many * lanes, 0.f);
      for (int c = 0; c < many * lanes; ++c) {
        const float* const vector = by + c / lanes * apart + c % lanes;
        for (int k = 0; k < n + (c / lanes == many - 1 ? more : 0); ++k) out[c] += row[k] * vector[k * lanes];
      }
    }
#endif
  }
};

// Floats from the beginning of a cache line on, as they come.
class LineFloats {
 public:
  // What was there is lost.
  void resize(std::size_t n) {
    if (n <= size_) return;
    size_ = (n + 15) / 16 * 16;
    lines_ = std::make_unique_for_overwrite<Line[]>(size_ / 16);
  }
  float* data() noexcept { return size_ > 0 ? lines_[0].x : nullptr; }
  const float* data() const noexcept { return size_ > 0 ? lines_[0].x : nullptr; }

 private:
  struct alignas(64) Line {
    float x[16];
  };
  std::size_t size_ = 0;
  std::unique_ptr<Line[]> lines_;
};

// `count` vectors [dim], as many zeros after them as fill the last lanes.
struct PackedVectors {
  static constexpr int lanes = RowTile::lanes;
  int dim = 0, count = 0;
  LineFloats memory;

  int wide() const noexcept { return (count + lanes - 1) / lanes * lanes; }
  // element(c, k) is element k of vector c.
  template <class Element>
  void assign(int vectors, int elements, Element&& element) {
    count = vectors;
    dim = elements;
    memory.resize(static_cast<std::size_t>(wide()) * static_cast<std::size_t>(dim));
    float* to = memory.data();
    for (int first = 0; first < count; first += lanes) {
      for (int k = 0; k < dim; ++k) {
        for (int c = first; c < first + lanes; ++c) *to++ = c < count ? element(c, k) : 0.f;
      }
    }
  }
};

// Some of the rows [.., dim] of an array; those that would not fill a tile are copied, and zeros after them.
class RowBlock {
 public:
  static constexpr int most = 16 * RowTile::rows, vectors = 2 * RowTile::lanes;

  explicit RowBlock(int dim) : dim_(dim) { copy_.resize(static_cast<std::size_t>(most * dim + RowTile::lanes)); }

  // `after` rows follow.
  void assign(const float* rows, int count, int after) {
    rows_ = rows;
    count_ = count;
    after_ = after;
    if (count % RowTile::rows != 0) own();
  }
  int count() const noexcept { return count_; }
  const float* row(int i) const noexcept { return rows_ + static_cast<std::ptrdiff_t>(i) * dim_; }
  // A copy of the rows, in their place; `lanes` elements follow the last, which are zero.
  float* own() {
    const auto size = static_cast<std::ptrdiff_t>(count_) * dim_;
    float* const copy = copy_.data();
    std::copy(rows_, rows_ + size, copy);
    std::fill(copy + size, copy + static_cast<std::ptrdiff_t>(tiles() * RowTile::rows) * dim_ + RowTile::lanes, 0.f);
    rows_ = copy;
    after_ = 0;
    return copy;
  }
  // out[i * stride + c] = row i . vector first + c, for `vectors` vectors, or `lanes` where there are no more; whole tiles of
  // rows. Sums end at element n, those of the last `lanes` vectors `more` elements later. Returns the number of vectors.
  int multiply(const PackedVectors& by, int first, int n, int more, float* out, int stride) const noexcept {
    const bool two = first + PackedVectors::lanes < by.wide();
    const float* const from = by.memory.data() + static_cast<std::ptrdiff_t>(first) * dim_;
    const int apart = PackedVectors::lanes * dim_;
    for (int tile = 0; tile < tiles(); ++tile, out += static_cast<std::ptrdiff_t>(RowTile::rows) * stride) {
      const float* const own = row(tile * RowTile::rows);
      if (first == 0) fetch((tile * RowTile::rows + most));
      if (two) {
        RowTile::multiply<2>(own, dim_, from, apart, n, more, out, stride);
      } else {
        RowTile::multiply<1>(own, dim_, from, apart, n, 0, out, stride);
      }
    }
    return two ? vectors : PackedVectors::lanes;
  }

 private:
  int tiles() const noexcept { return (count_ + RowTile::rows - 1) / RowTile::rows; }
  // The tile that begins at row i, of the next block.
  void fetch([[maybe_unused]] int i) const noexcept {
#if defined(KVT_HOST_VECTORS)
    if (i + RowTile::rows > count_ + after_) return;
    for (const float *x = row(i), *const end = row(i + RowTile::rows); x < end; x += 16) __builtin_prefetch(x, 0, 2);
#endif
  }

  int dim_, count_ = 0, after_ = 0;
  const float* rows_ = nullptr;
  LineFloats copy_;
};

// f(first, block) of rows [n, dim], a block at a time.
template <class F>
void each_block(std::span<const float> rows, int dim, F&& f) {
  RowBlock block(dim);
  const int n = static_cast<int>(rows.size() / static_cast<std::size_t>(dim));
  for (int first = 0; first < n; first += RowBlock::most) {
    const int count = std::min(RowBlock::most, n - first);
    block.assign(rows.data() + static_cast<std::ptrdiff_t>(first) * dim, count, n - first - count);
    f(first, block);
  }
}

}  // namespace kvt::inline v0::detail
