// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// AppendWork: new rows of one layer on a device, and the encoding of the oldest that are dense, in one launch.
//
// The dense rows of a head are one run of slices: sink rows, then the newest. Where more than recent_rows of the latter are
// there, whole blocks of 128 of the oldest are encoded behind the rows that are encoded already, and the others move up. As on
// the host, this happens before the new rows are written, so that these are dense until the next append.
#pragma once

#include "kvtailor/attend/split_decode.hpp"

namespace kvt::inline v0 {

// 0 for the first sink_rows rows of a cache, afterwards the dense rows that are to be encoded: whole blocks.
KVT_HD constexpr int rows_to_encode(int near_rows, int sink_rows, int recent_rows) {
  const int over = near_rows - sink_rows - recent_rows;
  return over > 0 ? over / SlicePages::page_rows * SlicePages::page_rows : 0;
}

// One block for each head. T is Half, BFloat16 or float.
template <class Key, class Value, class T>
struct AppendWork {
  static constexpr int dim = Key::head_dim, warps = 8, blocks = 1, dynamic_bytes = 0;
  using Body = LayoutOf<Key, Value>;
  using Plain = Dense<Half, dim>;
  using Near = LayoutOf<Plain, Plain>;
  struct Shared {
    float row[warps][dim], scratch[warps][dim];
    alignas(16) std::byte keys[slice_rows][(Key::row_bytes + 15) / 16 * 16];  // encoded one by one
    alignas(16) std::byte values[slice_rows][(Value::row_bytes + 15) / 16 * 16];
  };

  const SlicePages *near, *body;  // [heads]
  int *near_rows, *body_rows;     // [heads], what near[h].rows and body[h].rows point to
  const T *keys, *values;         // [n, heads, dim]
  const int* positions;           // [n]
  int n, heads, sink_rows, recent_rows;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, std::byte*) const {
    const int before = near_rows[h], encoded = rows_to_encode(before, sink_rows, recent_rows);
    for (int row = 0; row < encoded; row += SlicePages::page_rows) {
      for (int from = 0; from < SlicePages::page_rows;) from += encode(block, h, shared, body_rows[h] + row + from, row + from);
    }
    if (encoded > 0) move_up(block, near[h], before, encoded);
    write(block, h, before - encoded);
    block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
      if (warp != 0) return;
      lanes.once([&] {
        near_rows[h] = before - encoded + n;
        body_rows[h] += encoded;
      });
    });
  }

 private:
  template <class Block>
  KVT_HD void write(const Block& block, int h, int first) const {
    using Lanes = typename Block::Lanes;
    for (int slice = (first + slice_rows - 1) / slice_rows; slice * slice_rows < first + n; ++slice) {
      block.each_warp([&](const Lanes& lanes, int warp) { clear(lanes, warp, near[h].at(slice, Near::bytes), Near::bytes); });
    }
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int i = warp; i < n; i += warps) {
        const int slice = (first + i) / slice_rows, row = (first + i) % slice_rows;
        std::byte* const to = near[h].at(slice, Near::bytes);
        const long long from = (static_cast<long long>(i) * heads + h) * dim;
        lanes.each([&](int lane) {
          for (int d = lane; d < dim; d += Lanes::size) {
            const Half key = from_float<Half>(to_float(keys[from + d])), value = from_float<Half>(to_float(values[from + d]));
            std::memcpy(to + Near::template dense_at<true>(row, d), &key, sizeof key);
            std::memcpy(to + Near::template dense_at<false>(row, d), &value, sizeof value);
          }
        });
        lanes.once([&] { near[h].positions(slice, Near::bytes)[row] = positions[i]; });
      }
    });
  }
  // Encodes dense rows from `row` after the sinks on, to row `to` of the body and what follows in its slice, but no further
  // than a block. Returns how many.
  template <class Block>
  KVT_HD int encode(const Block& block, int h, Shared& shared, int to, int row) const {
    using Lanes = typename Block::Lanes;
    const int slice = to / slice_rows, begin = to % slice_rows, left = SlicePages::page_rows - row % SlicePages::page_rows;
    const int count = slice_rows - begin < left ? slice_rows - begin : left;
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int i = warp; i < count; i += warps) {
        const int from = sink_rows + row + i;
        const std::byte* const dense = near[h].at(from / slice_rows, Near::bytes);
        one_row<Key, true>(lanes, dense, from % slice_rows, shared.row[warp], shared.scratch[warp], shared.keys[begin + i]);
        one_row<Value, false>(lanes, dense, from % slice_rows, shared.row[warp], shared.scratch[warp],
                              shared.values[begin + i]);
      }
    });
    std::byte* const out = body[h].at(slice, Body::bytes);
    block.each_warp([&](const Lanes& lanes, int warp) {
      const auto is_new = [&](int r) { return r >= begin && r < begin + count; };
      if (warp == 0) {
        Body::template pack<true>(lanes, out, begin,
                                  [&](int r, int d) { return is_new(r) ? FragmentsOf<Key>::element(shared.keys[r], d) : -1; });
      }
      if (warp == 1) {
        Body::template pack<false>(
            lanes, out, begin, [&](int r, int d) { return is_new(r) ? FragmentsOf<Value>::element(shared.values[r], d) : -1; });
      }
      if (warp == 2) {
        lanes.each([&](int lane) {
          for (int r = lane; r < slice_rows; r += Lanes::size) {
            if (r < begin) continue;
            Half scale[2] = {};
            if (is_new(r)) {
              std::memcpy(&scale[0], shared.keys[r], sizeof(Half));
              std::memcpy(&scale[1], shared.values[r], sizeof(Half));
              const int from = sink_rows + row + r - begin;
              body[h].positions(slice, Body::bytes)[r] = near[h].positions(from / slice_rows, Near::bytes)[from % slice_rows];
            }
            if constexpr (Body::Keys::scaled) std::memcpy(out + Body::key_scale_at(r), &scale[0], sizeof(Half));
            if constexpr (Body::Values::scaled) std::memcpy(out + Body::value_scale_at(r), &scale[1], sizeof(Half));
          }
        });
      }
    });
    return count;
  }
  template <class Codec, bool is_key, class Lanes>
  KVT_HD static void one_row(const Lanes& lanes, const std::byte* slice, int r, float* row, float* scratch, std::byte* to) {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) {
        Half x;
        std::memcpy(&x, slice + Near::template dense_at<is_key>(r, d), sizeof x);
        row[d] = to_float(x);
      }
    });
    Codec{}.encode_row(lanes, row, to, 1, 0, scratch);
  }
  // Rows after the sinks move up by `by`, a multiple of a page, so that whole slices do.
  template <class Block>
  KVT_HD void move_up(const Block& block, const SlicePages& pages, int rows, int by) const {
    using Lanes = typename Block::Lanes;
    const int first = sink_rows / slice_rows, sinks = sink_rows % slice_rows;
    for (int slice = first; slice * slice_rows < rows - by; ++slice) {
      std::byte* const to = pages.at(slice, Near::bytes);
      const std::byte* const from = pages.at(slice + by / slice_rows, Near::bytes);
      int* const to_position = pages.positions(slice, Near::bytes);
      const int* const from_position = pages.positions(slice + by / slice_rows, Near::bytes);
      const int kept = slice == first ? sinks : 0;
      block.each_warp([&](const Lanes& lanes, int warp) {
        lanes.each([&](int lane) {
          const int thread = warp * Lanes::size + lane;
          for (int k = thread; k < Near::bytes / 16 && kept == 0; k += warps * Lanes::size)
            std::memcpy(to + 16 * k, from + 16 * k, 16);
          for (int k = thread; k < slice_rows * dim && kept > 0; k += warps * Lanes::size) {
            const int row = k / dim, d = k % dim;
            if (row < kept) continue;
            std::memcpy(to + Near::template dense_at<true>(row, d), from + Near::template dense_at<true>(row, d), 2);
            std::memcpy(to + Near::template dense_at<false>(row, d), from + Near::template dense_at<false>(row, d), 2);
          }
          for (int row = thread; row < slice_rows; row += warps * Lanes::size) {
            if (row >= kept) to_position[row] = from_position[row];
          }
        });
      });
    }
  }
  template <class Lanes>
  KVT_HD static void clear(const Lanes& lanes, int warp, std::byte* to, int bytes) {
    lanes.each([&](int lane) {
      const unsigned char zeros[16] = {};
      for (int k = warp * Lanes::size + lane; k < bytes / 16; k += warps * Lanes::size) std::memcpy(to + 16 * k, zeros, 16);
    });
  }
};

}  // namespace kvt::inline v0
