// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// KvCodec: the codec of keys, the codec of values, and the type of the dense rows (sinks and recent).
// OneOf:   one of several codecs, chosen at run time, for a whole cache or for a head; costs one branch a block.
#pragma once

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kvtailor/codec/dense.hpp"

namespace kvt::inline v0 {

// Whether rows of several blocks can be packed into one; OneOf knows it at run time.
template <StorageCodec Codec>
constexpr bool is_row_wise(const Codec& codec) {
  if constexpr (requires { codec.row_wise(); }) {
    return codec.row_wise();
  } else {
    return RowWiseCodec<Codec>;
  }
}

// What a block of n rows takes at most once `left` of them are; a codec that knows better than max_block_bytes(left) has a
// function of this name.
template <StorageCodec Codec>
KVT_HD int erased_bytes_bound(const Codec& codec, const std::byte* block, int n, int left) {
  if constexpr (requires { codec.erased_bytes_bound(block, n, left); }) {
    return codec.erased_bytes_bound(block, n, left);
  } else {
    return codec.max_block_bytes(left);
  }
}

// What rows are kept in until they are encoded: fp16, unless keys are stored dense anyway.
template <class Key>
struct DenseTypeFor {
  using type = Half;
};
template <class T, int dim>
struct DenseTypeFor<Dense<T, dim>> {
  using type = T;
};

template <StorageCodec Key, StorageCodec Value = Key, class DenseType = typename DenseTypeFor<Key>::type>
struct KvCodec {
  static_assert(Key::head_dim == Value::head_dim, "keys and values have one head_dim");
  using key_type = Key;
  using value_type = Value;
  using near_type = Dense<DenseType, Key::head_dim>;
  static constexpr int head_dim = Key::head_dim;
  static constexpr int max_block_rows = std::min(Key::max_block_rows, Value::max_block_rows);
  static constexpr bool can_be_row_wise = RowWiseCodec<Key> && RowWiseCodec<Value>;

  [[no_unique_address]] Key keys = {};
  [[no_unique_address]] Value values = {};

  bool row_wise() const noexcept { return is_row_wise(keys) && is_row_wise(values); }
  Status validate() const {
    KVT_TRY(kvt::validate(keys));
    return kvt::validate(values);
  }
};

template <StorageCodec... Codecs>
struct OneOf {
  using codec_types = std::tuple<Codecs...>;
  static constexpr int size = static_cast<int>(sizeof...(Codecs));
  static constexpr int head_dim = std::tuple_element_t<0, codec_types>::head_dim;
  static_assert(((Codecs::head_dim == head_dim) && ...), "all codecs of a OneOf have one head_dim");
  static constexpr int max_block_rows = std::min({Codecs::max_block_rows...});
  static constexpr int max_basis_dim = std::max({kvt::max_basis_dim<Codecs>...});

  int index = 0;  // 0 .. size - 1
  // Given one by one: in a tuple that makes its own, GCC 12 makes zeros of all fields behind a codec without any.
  [[no_unique_address]] codec_types codecs = codec_types(Codecs{}...);

  bool row_wise() const noexcept {
    return visit([](const auto& c) { return is_row_wise(c); });
  }
  Status validate() const {
    if (index < 0 || index >= size) return error(Errc::bad_value, "codec {} was chosen, of {}", index, size);
    return visit([](const auto& c) { return kvt::validate(c); });
  }
  KVT_HD int erased_bytes_bound(const std::byte* block, int n, int left) const {
    return visit([&](const auto& c) { return kvt::erased_bytes_bound(c, block, n, left); });
  }
  KVT_HD int basis_dim() const {
    return visit([](const auto& c) { return kvt::basis_dim(c); });
  }
  KVT_HD int max_block_bytes(int n) const {
    return visit([&](const auto& c) { return c.max_block_bytes(n); });
  }
  double max_row_norm() const {
    return visit([&](const auto& c) { return static_cast<double>(c.max_row_norm()); });
  }
  int encode(const float* rows, int n, std::byte* block) const {
    return visit([&](const auto& c) { return c.encode(rows, n, block); });
  }
  KVT_HD void decode(const std::byte* block, int n, int row, float* out) const noexcept {
    visit([&](const auto& c) { c.decode(block, n, row, out); });
  }
  int erase(const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    return erase(Serial{}, block, n, keep, to);
  }
  template <class Lanes>
  KVT_HD int erase(const Lanes& lanes, const std::byte* block, int n, const unsigned char* keep, std::byte* to) const noexcept {
    return visit([&](const auto& c) { return c.erase(lanes, block, n, keep, to); });
  }
  // Only while row_wise().
  KVT_HD void copy_row(const std::byte* from, int n, int row, std::byte* to, int to_n, int to_row) const noexcept
      requires(RowWiseCodec<Codecs> || ...) {
    visit([&](const auto& c) {
      if constexpr (RowWiseCodec<std::remove_cvref_t<decltype(c)>>) c.copy_row(from, n, row, to, to_n, to_row);
    });
  }
  template <class Lanes>
  KVT_HD void row_of(const Lanes& lanes, const std::byte* block, int n, int row, float* out) const noexcept {
    visit([&](const auto& c) { c.row_of(lanes, block, n, row, out); });
  }
  template <class Lanes>
  KVT_HD void prepare(const Lanes& lanes, const float* q, float scale, float* prepared) const noexcept {
    visit([&](const auto& c) { c.prepare(lanes, q, scale, prepared); });
  }
  template <class Lanes>
  KVT_HD void logits(const Lanes& lanes, const std::byte* block, int n, const float* prepared, int m, float* out,
                     int stride) const noexcept {
    visit([&](const auto& c) { c.logits(lanes, block, n, prepared, m, out, stride); });
  }
  template <class Lanes>
  KVT_HD void accumulate(const Lanes& lanes, const std::byte* block, int n, const float* weights, int m, int stride,
                         float* acc) const noexcept {
    visit([&](const auto& c) { c.accumulate(lanes, block, n, weights, m, stride, acc); });
  }
  template <class Lanes>
  KVT_HD void finish(const Lanes& lanes, float* acc, float* out) const noexcept {
    visit([&](const auto& c) { c.finish(lanes, acc, out); });
  }

  // f(the chosen codec)
  template <int i = 0, class F>
  KVT_HD KVT_INLINE decltype(auto) visit(F&& f) const {
    if constexpr (i + 1 < size) {
      if (index != i) return visit<i + 1>(std::forward<F>(f));
    }
    return f(std::get<i>(codecs));
  }
};

}  // namespace kvt::inline v0
