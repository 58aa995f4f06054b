// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// KvCodec: the codec of keys, the codec of values, and the type of the dense rows (sinks and recent).
// OneOf:   one of several codecs, chosen at run time for a whole cache; costs one branch a block.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "kvtailor/codec/dense.hpp"

namespace kvt::inline v0 {

template <StorageCodec Key, StorageCodec Value = Key, class DenseType = Half>
struct KvCodec {
  static_assert(Key::head_dim == Value::head_dim, "keys and values have one head_dim");
  using key_type = Key;
  using value_type = Value;
  using near_type = Dense<DenseType, Key::head_dim>;
  static constexpr int head_dim = Key::head_dim;
  static constexpr int max_block_rows =
      Key::max_block_rows < Value::max_block_rows ? Key::max_block_rows : Value::max_block_rows;
  static constexpr bool row_wise = RowWiseCodec<Key> && RowWiseCodec<Value>;

  [[no_unique_address]] Key keys = {};
  [[no_unique_address]] Value values = {};
};

template <StorageCodec First, StorageCodec... Rest>
struct OneOf {
  static_assert(((Rest::head_dim == First::head_dim) && ...), "all codecs of a OneOf have one head_dim");
  static constexpr int head_dim = First::head_dim;
  static constexpr int max_block_rows = First::max_block_rows;
  static constexpr int size = 1 + static_cast<int>(sizeof...(Rest));
  static_assert(((Rest::max_block_rows == First::max_block_rows) && ...) && RowWiseCodec<First> && (RowWiseCodec<Rest> && ...));

  int index = 0;  // 0 .. size - 1

  int max_block_bytes(int n) const {
    return visit([&](const auto& c) { return c.max_block_bytes(n); });
  }
  double max_row_norm() const {
    return visit([&](const auto& c) { return static_cast<double>(c.max_row_norm()); });
  }
  int encode(const float* rows, int n, std::byte* block) const noexcept {
    return visit([&](const auto& c) { return c.encode(rows, n, block); });
  }
  void decode(const std::byte* block, int n, int row, float* out) const noexcept {
    visit([&](const auto& c) { c.decode(block, n, row, out); });
  }
  int erase(const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    return visit([&](const auto& c) { return c.erase(block, n, keep, to); });
  }
  void copy_row(const std::byte* from, int n, int row, std::byte* to, int to_n, int to_row) const noexcept {
    visit([&](const auto& c) { c.copy_row(from, n, row, to, to_n, to_row); });
  }
  template <class Lanes>
  void prepare(const Lanes& lanes, const float* q, float scale, float* prepared) const noexcept {
    visit([&](const auto& c) { c.prepare(lanes, q, scale, prepared); });
  }
  template <class Lanes>
  void logits(const Lanes& lanes, const std::byte* block, int n, const float* prepared, int m, float* out,
              int stride) const noexcept {
    visit([&](const auto& c) { c.logits(lanes, block, n, prepared, m, out, stride); });
  }
  template <class Lanes>
  void accumulate(const Lanes& lanes, const std::byte* block, int n, const float* weights, int m, int stride,
                  float* acc) const noexcept {
    visit([&](const auto& c) { c.accumulate(lanes, block, n, weights, m, stride, acc); });
  }
  template <class Lanes>
  void finish(const Lanes& lanes, float* acc, float* out) const noexcept {
    visit([&](const auto& c) { c.finish(lanes, acc, out); });
  }

 private:
  template <int i = 0, class F>
  decltype(auto) visit(F&& f) const {
    using Codec = std::tuple_element_t<i, std::tuple<First, Rest...>>;
    if constexpr (i + 1 < size) {
      if (index != i) return visit<i + 1>(std::forward<F>(f));
    }
    return f(Codec{});
  }
};

}  // namespace kvt::inline v0
