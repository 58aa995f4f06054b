// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Random rows in slices, as the codecs of the host encode them, and as those decode them.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "kvtailor/attend/split_decode.hpp"
#include "kvtailor/codec/turbo_quant.hpp"

namespace reference {

using namespace kvt;

// Codecs by their bits; 16 is fp16.
template <int bits, int size>
struct Format {
  using Codec = TurboQuant<bits, size>;
};
template <int size>
struct Format<16, size> {
  using Codec = Dense<Half, size>;
};

// Code or element d of a row of a block of the host, by the codec's own description of its blocks.
template <class Codec>
int host_element(const Codec&, const std::byte* block, int n, int row, int d) {
  std::byte own[Codec::row_bytes];
  Codec{}.copy_row(block, n, row, own, 1, 0);
  return FragmentsOf<Codec>::element(own, d);
}
template <int size>
int host_element(const Dense<Half, size>&, const std::byte* block, int, int row, int d) {
  Half x;
  std::memcpy(&x, block + (row * size + d) * 2, 2);
  return x.bits;
}

template <class Key, class Value>
struct SliceRows {
  using Layout = LayoutOf<Key, Value>;
  static constexpr int dim = Key::head_dim;
  static constexpr int page_bytes = static_cast<int>(SlicePages::bytes_of_page(Layout::bytes));

  std::vector<std::byte> pool;
  std::vector<int> page;
  std::vector<float> keys, values;  // as decoded [rows, dim]
  std::unique_ptr<int> rows;
  SlicePages pages;

  // Positions are first_position, first_position + 3, ...
  SliceRows(int num_rows, float value_size, std::mt19937& random, int first_position = 0)
      : keys(static_cast<std::size_t>(num_rows * dim)), values(keys.size()) {
    std::normal_distribution<float> normal;
    std::vector<float> k(keys.size()), v(keys.size());
    for (float& x : k) x = normal(random);
    for (float& x : v) x = value_size * normal(random);
    std::vector<std::byte> key_block(static_cast<std::size_t>(Key{}.max_block_bytes(num_rows)));
    std::vector<std::byte> value_block(static_cast<std::size_t>(Value{}.max_block_bytes(num_rows)));
    const Key key_codec{};
    const Value value_codec{};
    key_codec.encode(k.data(), num_rows, key_block.data());
    value_codec.encode(v.data(), num_rows, value_block.data());
    for (int r = 0; r < num_rows; ++r) {
      key_codec.decode(key_block.data(), num_rows, r, keys.data() + r * dim);
      value_codec.decode(value_block.data(), num_rows, r, values.data() + r * dim);
    }
    const int slices = (num_rows + slice_rows - 1) / slice_rows,
              num_pages = (num_rows + SlicePages::page_rows - 1) / SlicePages::page_rows;
    pool.assign(static_cast<std::size_t>(num_pages * page_bytes), std::byte{0xff});
    for (int p = num_pages; p-- > 0;) page.push_back(p);  // not in order
    rows = std::make_unique<int>(num_rows);
    pages = {pool.data(), page.data(), rows.get(), page_bytes};
    for (int s = 0; s < slices; ++s) {
      auto* const to = pages.at(s, Layout::bytes);
      const int first = s * slice_rows, here = std::min(slice_rows, num_rows - first);
      for (int row = 0; row < here; ++row) {
        const int position = first_position + 3 * (first + row);
        std::memcpy(pages.positions(s, Layout::bytes) + row, &position, 4);
      }
      if constexpr (Layout::fragments) {
        pack(to, key_block.data(), value_block.data(), num_rows, first, here);
      } else {
        for (int row = 0; row < here; ++row) {
          key_codec.copy_row(key_block.data(), num_rows, first + row, to + row * Key::row_bytes, 1, 0);
          value_codec.copy_row(value_block.data(), num_rows, first + row, to + Layout::values_at + row * Value::row_bytes, 1,
                               0);
        }
      }
    }
  }

 private:
  // Rows first .. first + here - 1 of blocks of n.
  static void pack(std::byte* to, const std::byte* key_block, const std::byte* value_block, int n, int first, int here) {
    const auto key = [&](int row, int d) { return row < here ? host_element(Key{}, key_block, n, first + row, d) : -1; };
    const auto value = [&](int row, int d) { return row < here ? host_element(Value{}, value_block, n, first + row, d) : -1; };
    Layout::template pack<true>(SimulatedWarp{}, to, 0, key);
    Layout::template pack<false>(SimulatedWarp{}, to, 0, value);
    for (int row = 0; row < slice_rows; ++row) {
      for (int d = 0; d < dim && row < here; ++d) {
        if (Layout::template element<true>(to, row, d) != key(row, d)) lost("keys");
        if (Layout::template element<false>(to, row, d) != value(row, d)) lost("values");
      }
      std::byte keys[Key::row_bytes], values[Value::row_bytes];
      if (row < here) {
        Key{}.copy_row(key_block, n, first + row, keys, 1, 0);
        Value{}.copy_row(value_block, n, first + row, values, 1, 0);
      }
      for (int k = 0; k < Layout::Keys::scale_bytes; ++k) {
        to[Layout::template scale_at<true>(row, k)] = row < here ? keys[FragmentsOf<Key>::scale_at(k)] : std::byte{0};
      }
      for (int k = 0; k < Layout::Values::scale_bytes; ++k) {
        to[Layout::template scale_at<false>(row, k)] = row < here ? values[FragmentsOf<Value>::scale_at(k)] : std::byte{0};
      }
    }
  }
  static void lost(const char* what) {
    std::printf("%s are not what was packed\n", what);
    std::abort();
  }
};

}  // namespace reference
