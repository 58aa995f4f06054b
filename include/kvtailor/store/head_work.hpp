// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What is done to the rows of heads on a device, by one block of threads a head:
//   AppendWork     new rows of one layer, after the oldest dense ones have been encoded if there are too many
//   CutWork        rows that are not kept are dropped; the others keep their codes
//   TruncateWork   rows from a position on are dropped
//   ForkWork       all rows are copied
//
// The dense rows of a head are one run of slices: sink rows, then the newest. Encoded rows are another, in pages. Where more
// than recent_rows of the former are left after the sinks, whole blocks of 128 of the oldest are encoded behind the latter. As
// on the host, this happens before new rows are written, so that these are dense until the next append.
#pragma once

#include "kvtailor/attend/split_decode.hpp"

namespace kvt::inline v0 {

// The rows of one layer, or of all, in device memory.
struct DeviceHeads {
  const SlicePages *near, *body;  // [heads]
  int *near_rows, *body_rows;     // [heads], what near[h].rows and body[h].rows point to
  int sink_rows, recent_rows;

  // Dense rows that are to be encoded: whole blocks.
  KVT_HD int blocks_over(int dense) const {
    const int over = dense - sink_rows - recent_rows;
    return over > 0 ? over / SlicePages::page_rows * SlicePages::page_rows : 0;
  }
};

namespace detail {

struct Nothing {};

// Rows on their way from slice to slice, by their codes, in memory that the warps of a block share.
template <class Layout>
struct MovingRows {
  static constexpr int count = slice_rows, dim = Layout::dim;
  std::uint16_t key[count][dim], value[count][dim];
  std::byte key_scale[count][Layout::Keys::scale_bytes + 1], value_scale[count][Layout::Values::scale_bytes + 1];

  // A row of a slice to place k.
  template <class Lanes>
  KVT_HD void read(const Lanes& lanes, const std::byte* from, int row, int k) {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) {
        key[k][d] = static_cast<std::uint16_t>(Layout::template element<true>(from, row, d));
        value[k][d] = static_cast<std::uint16_t>(Layout::template element<false>(from, row, d));
      }
    });
    lanes.once([&] {
      for (int j = 0; j < Layout::Keys::scale_bytes; ++j) key_scale[k][j] = from[Layout::template scale_at<true>(row, j)];
      for (int j = 0; j < Layout::Values::scale_bytes; ++j) value_scale[k][j] = from[Layout::template scale_at<false>(row, j)];
    });
  }
  // The first n places to a slice, which has no other rows then.
  template <class Block>
  KVT_HD void write(const Block& block, std::byte* to, int, int n) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp == 0) Layout::template pack<true>(lanes, to, 0, [&](int r, int d) { return r < n ? key[r][d] : -1; });
      if (warp == 1) Layout::template pack<false>(lanes, to, 0, [&](int r, int d) { return r < n ? value[r][d] : -1; });
      if (warp == 2) {
        lanes.each([&](int r) {
          Layout::write_scales(
              to, r, [&](int k) { return r < n ? key_scale[r][k] : std::byte{}; },
              [&](int k) { return r < n ? value_scale[r][k] : std::byte{}; });
        });
      }
    });
  }
};
// As many as fit: writing some rows of a slice leaves the others alone.
template <class Key, class Value>
struct MovingRows<RowSlices<Key, Value>> {
  using Layout = RowSlices<Key, Value>;
  static constexpr int row_bytes = Key::row_bytes + Value::row_bytes, count = row_bytes <= 1280 ? slice_rows : slice_rows / 2;
  alignas(16) std::byte keys[count * Key::row_bytes];
  alignas(16) std::byte values[count * Value::row_bytes];

  template <class Lanes>
  KVT_HD void read(const Lanes& lanes, const std::byte* from, int row, int k) {
    Key{}.copy_row(lanes, from + row * Key::row_bytes, 1, 0, keys + k * Key::row_bytes, 1, 0);
    Value{}.copy_row(lanes, from + Layout::values_at + row * Value::row_bytes, 1, 0, values + k * Value::row_bytes, 1, 0);
  }
  // The first n places to a slice from row `first` on.
  template <class Block>
  KVT_HD void write(const Block& block, std::byte* to, int first, int n) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int k = warp; k < n; k += Block::warps) {
        Key{}.copy_row(lanes, keys + k * Key::row_bytes, 1, 0, to + (first + k) * Key::row_bytes, 1, 0);
        Value{}.copy_row(lanes, values + k * Value::row_bytes, 1, 0, to + Layout::values_at + (first + k) * Value::row_bytes, 1,
                         0);
      }
    });
  }
};

template <class Codec>
struct HeadRows {
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  using Plain = typename Codec::near_type;
  using Element = typename Plain::Element;
  using Body = LayoutOf<Key, Value>;
  using Near = DenseLayoutOf<Plain>;
  static constexpr int dim = Key::head_dim;
  static constexpr int scratch_floats =
      Key::scratch_floats > Value::scratch_floats ? Key::scratch_floats : Value::scratch_floats;
  static constexpr int warps = scratch_floats <= 1088 ? 8 : 4;  // rows that are encoded at once, in 34 KiB
  // Rows that go into fragments, encoded one by one.
  struct Encoded {
    alignas(16) std::byte keys[slice_rows][(Key::row_bytes + 15) / 16 * 16];
    alignas(16) std::byte values[slice_rows][(Value::row_bytes + 15) / 16 * 16];
  };
  struct Encoding : std::conditional_t<Body::fragments, Encoded, Nothing> {
    float row[warps][scratch_floats];
  };
  struct Moving {
    union {
      MovingRows<Near> near;
      MovingRows<Body> body;
    };
    int position[slice_rows], source[slice_rows];
  };
  struct Shared {
    union {
      Encoding encoding;
      Moving moving;
    };
    int next, count;
  };
  static_assert(sizeof(Shared) <= 48 << 10, "a block has no more unless it asks");

  const SlicePages &near, &body;
  Shared& shared;
  int sink_rows;

  // Encodes `count` dense rows, the oldest after the sinks, behind the `rows` that are encoded.
  template <class Block>
  KVT_HD void encode_oldest(const Block& block, int rows, int count) const {
    for (int done = 0; done < count;) {
      const int room = slice_rows - (rows + done) % slice_rows, left = count - done, n = room < left ? room : left;
      encode_in_slice(block, rows + done, sink_rows + done, n);
      done += n;
    }
  }
  // Packs the rows r of `rows` with kept(r) to the front, without a change to their codes; returns how many they are. Slices
  // are written from the first on: no row moves back, so what a slice takes is in it or in later ones. Sources are read before.
  template <bool dense, class Block, class Kept>
  KVT_HD int compact(const Block& block, int rows, Kept&& kept) const {
    using Lanes = typename Block::Lanes;
    using Layout = std::conditional_t<dense, Near, Body>;
    constexpr int most = MovingRows<Layout>::count;
    const SlicePages& pages = dense ? near : body;
    auto& moving = [this]() -> auto& {
      if constexpr (dense) {
        return shared.moving.near;
      } else {
        return shared.moving.body;
      }
    }
    ();
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp == 0) lanes.once([&] { shared.next = 0; });
    });
    for (int done = 0;; done += most) {
      block.each_warp([&](const Lanes& lanes, int warp) {
        if (warp == 0) find_sources<most>(lanes, rows, kept);
      });
      const int count = shared.count;
      if (count == 0) return done;
      block.each_warp([&](const Lanes& lanes, int warp) {
        for (int k = warp; k < count; k += Block::warps) {
          const int slice = shared.moving.source[k] / slice_rows, row = shared.moving.source[k] % slice_rows;
          moving.read(lanes, pages.at(slice, Layout::bytes), row, k);
          lanes.once([&] { shared.moving.position[k] = pages.positions(slice, Layout::bytes)[row]; });
        }
      });
      const int slice = done / slice_rows, first = done % slice_rows;
      block.each_warp([&](const Lanes& lanes, int warp) {
        if (warp != 3) return;
        lanes.each([&](int k) {
          if (k < count) pages.positions(slice, Layout::bytes)[first + k] = shared.moving.position[k];
        });
      });
      moving.write(block, pages.at(slice, Layout::bytes), first, count);
      if (count < most) return done + count;
    }
  }

 private:
  // The next `most` rows that are kept, or those that are left: shared.source, shared.count; shared.next goes on.
  template <int most, class Lanes, class Kept>
  KVT_HD void find_sources(const Lanes& lanes, int rows, Kept&& kept) const {
    int next = shared.next, count = 0;
    while (next < rows && count < most) {
      typename Lanes::template Reg<int> own, before;
      lanes.each([&](int lane) { own[lane] = before[lane] = next + lane < rows && kept(next + lane) ? 1 : 0; });
      lanes.exclusive_scan(before);
      // Lanes whose row finds no room any more come again.
      typename Lanes::template Reg<int> taken;
      lanes.each([&](int lane) {
        taken[lane] = count + before[lane] + own[lane] <= most ? 1 : 0;
        if (taken[lane] != 0 && own[lane] != 0) shared.moving.source[count + before[lane]] = next + lane;
        before[lane] += own[lane];
      });
      int last = Lanes::size - 1;
      while (lanes.shuffle(taken, last) == 0) --last;
      count += lanes.shuffle(before, last);
      next += last + 1;
    }
    lanes.once([&] {
      shared.next = next;
      shared.count = count;
    });
  }

  // Dense rows from `row` on to rows of the body from `to` on, all in one slice; rows before are kept.
  template <class Block>
  KVT_HD void encode_in_slice(const Block& block, int to, int row, int count) const {
    using Lanes = typename Block::Lanes;
    const int slice = to / slice_rows, begin = to % slice_rows;
    auto& encoding = shared.encoding;
    std::byte* const out = body.at(slice, Body::bytes);
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int i = warp; i < count; i += warps) {
        const int from = (row + i) / slice_rows, r = (row + i) % slice_rows;
        const std::byte* const dense = near.at(from, Near::bytes);
        float* const scratch = encoding.row[warp];
        if constexpr (Body::fragments) {
          encode_row<Key, true>(lanes, dense, r, scratch, encoding.keys[begin + i]);
          encode_row<Value, false>(lanes, dense, r, scratch, encoding.values[begin + i]);
        } else {
          encode_row<Key, true>(lanes, dense, r, scratch, out + (begin + i) * Key::row_bytes);
          encode_row<Value, false>(lanes, dense, r, scratch, out + Body::values_at + (begin + i) * Value::row_bytes);
        }
        lanes.once([&] { body.positions(slice, Body::bytes)[begin + i] = near.positions(from, Near::bytes)[r]; });
      }
    });
    if constexpr (Body::fragments) pack(block, out, begin, count);
  }
  // Encoded rows from `begin` on to their slice.
  template <class Block>
  KVT_HD void pack(const Block& block, std::byte* out, int begin, int count) const {
    using Lanes = typename Block::Lanes;
    const auto& encoding = shared.encoding;
    block.each_warp([&](const Lanes& lanes, int warp) {
      const auto is_new = [&](int r) { return r >= begin && r < begin + count; };
      if (warp == 0) {
        Body::template pack<true>(
            lanes, out, begin, [&](int r, int d) { return is_new(r) ? FragmentsOf<Key>::element(encoding.keys[r], d) : -1; });
      }
      if (warp == 1) {
        Body::template pack<false>(lanes, out, begin, [&](int r, int d) {
          return is_new(r) ? FragmentsOf<Value>::element(encoding.values[r], d) : -1;
        });
      }
      if (warp == 2) {
        lanes.each([&](int r) {
          if (r < begin) return;
          Body::write_scales(
              out, r, [&](int k) { return is_new(r) ? encoding.keys[r][FragmentsOf<Key>::scale_at(k)] : std::byte{}; },
              [&](int k) { return is_new(r) ? encoding.values[r][FragmentsOf<Value>::scale_at(k)] : std::byte{}; });
        });
      }
    });
  }
  template <class Part, bool is_key, class Lanes>
  KVT_HD static void encode_row(const Lanes& lanes, const std::byte* slice, int r, float* row, std::byte* to) {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) {
        Element x;
        std::memcpy(&x, slice + Near::template dense_at<is_key>(r, d), sizeof x);
        row[d] = to_float(x);
      }
    });
    Part{}.encode_row(lanes, row, to, 1, 0, row);
  }
};

// Sets the counts of a head, once all warps have read them.
template <class Block>
KVT_HD void set_rows(const Block& block, const DeviceHeads& heads, int h, int dense, int encoded) {
  block.each_warp([](const typename Block::Lanes&, int) {});
  block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
    if (warp != 0) return;
    lanes.once([&] {
      heads.near_rows[h] = dense;
      heads.body_rows[h] = encoded;
    });
  });
}

// Which rows of a head a cut keeps. marks: of its rows in the order of positions.
struct StayingRows {
  int dense, encoded, sinks, newest, newest_encoded;
  const unsigned char* marks;

  KVT_HD StayingRows(const DeviceHeads& heads, int h, const unsigned char* of_head)
      : dense(heads.near_rows[h]), encoded(heads.body_rows[h]), marks(of_head) {
    sinks = dense < heads.sink_rows ? dense : heads.sink_rows;
    newest = dense - heads.recent_rows > sinks ? dense - heads.recent_rows : sinks;
    newest_encoded = encoded - (heads.recent_rows - (dense - newest));  // after a truncation
  }
  KVT_HD bool encoded_row(int r) const { return r >= newest_encoded || marks[sinks + r] != 0; }
  KVT_HD bool dense_row(int r) const { return r < sinks || r >= newest || marks[encoded + r] != 0; }
  // Of a row in the order of positions.
  KVT_HD bool row(int r) const {
    return r >= sinks && r < sinks + encoded ? encoded_row(r - sinks) : dense_row(r < sinks ? r : r - encoded);
  }
  // Of the dense rows that are left, those that are encoded then.
  KVT_HD int old(int left_dense) const { return left_dense - sinks - (dense - newest); }
};
// New rows of head h, [n, num_heads, dim], behind `first` dense ones.
template <class Near, class Element, class Block, class T>
KVT_HD void write_dense(const Block& block, const SlicePages& near, int first, const T* keys, const T* values,
                        const int* positions, int n, int num_heads, int h) {
  using Lanes = typename Block::Lanes;
  constexpr int dim = Near::dim, warps = Block::warps;
  for (int slice = (first + slice_rows - 1) / slice_rows; Near::fragments && slice * slice_rows < first + n; ++slice) {
    std::byte* const at = near.at(slice, Near::bytes);
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) {
        const unsigned char zeros[16] = {};
        for (int k = warp * Lanes::size + lane; k < Near::bytes / 16; k += warps * Lanes::size)
          std::memcpy(at + 16 * k, zeros, 16);
      });
    });
  }
  block.each_warp([&](const Lanes& lanes, int warp) {
    for (int i = warp; i < n; i += warps) {
      const int slice = (first + i) / slice_rows, row = (first + i) % slice_rows;
      std::byte* const to = near.at(slice, Near::bytes);
      const long long from = (static_cast<long long>(i) * num_heads + h) * dim;
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) {
          const auto key = from_float<Element>(to_float(keys[from + d]));
          const auto value = from_float<Element>(to_float(values[from + d]));
          std::memcpy(to + Near::template dense_at<true>(row, d), &key, sizeof key);
          std::memcpy(to + Near::template dense_at<false>(row, d), &value, sizeof value);
        }
      });
      lanes.once([&] { near.positions(slice, Near::bytes)[row] = positions[i]; });
    }
  });
}
// The first row from `first` on, before `last`, whose position is not before `position`.
template <class Layout>
KVT_HD int rows_before(const SlicePages& pages, int first, int last, int position) {
  while (first < last) {
    const int middle = first + (last - first) / 2;
    if (pages.positions(middle / slice_rows, Layout::bytes)[middle % slice_rows] < position) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}
template <class Layout, class Block>
KVT_HD void copy_slices(const Block& block, const SlicePages& from, const SlicePages& to, int rows) {
  using Lanes = typename Block::Lanes;
  block.each_warp([&](const Lanes& lanes, int warp) {
    for (int slice = warp; slice * slice_rows < rows; slice += Block::warps) {
      const std::byte* const source = from.at(slice, Layout::bytes);
      std::byte* const target = to.at(slice, Layout::bytes);
      lanes.each([&](int lane) {
        for (int k = lane; k < Layout::bytes / 16; k += Lanes::size) std::memcpy(target + 16 * k, source + 16 * k, 16);
        if (slice * slice_rows + lane < rows) {
          to.positions(slice, Layout::bytes)[lane] = from.positions(slice, Layout::bytes)[lane];
        }
      });
    }
  });
}

}  // namespace detail

// One block for each KV head of a layer. T is Half, BFloat16 or float.
template <class Codec, class T>
struct AppendWork {
  using Rows = detail::HeadRows<Codec>;
  using Near = typename Rows::Near;
  using Element = typename Rows::Element;
  using Shared = typename Rows::Shared;
  static constexpr int dim = Rows::dim, warps = Rows::warps, blocks = 1, dynamic_bytes = 0;

  DeviceHeads heads;
  const T *keys, *values;  // [n, num_heads, dim]
  const int* positions;    // [n]
  int n, num_heads;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, std::byte*) const {
    const Rows rows{heads.near[h], heads.body[h], shared, heads.sink_rows};
    int dense = heads.near_rows[h], encoded = heads.body_rows[h];
    if (const int over = heads.blocks_over(dense); over > 0) {
      rows.encode_oldest(block, encoded, over);
      const int sinks = heads.sink_rows;
      rows.template compact<true>(block, dense, [=](int r) { return r < sinks || r >= sinks + over; });
      encoded += over;
      dense -= over;
    }
    detail::write_dense<Near, Element>(block, heads.near[h], dense, keys, values, positions, n, num_heads, h);
    detail::set_rows(block, heads, h, dense + n, encoded);
  }
};

// One block for each head. keep [heads, stride]: row r of head h, in the order of positions, stays if keep[h * stride + r] is
// not zero. Sink rows and the newest recent_rows stay in any case. Afterwards all but these are encoded.
template <class Codec>
struct CutWork {
  using Rows = detail::HeadRows<Codec>;
  using Shared = typename Rows::Shared;
  static constexpr int warps = Rows::warps, blocks = 1, dynamic_bytes = 0;

  DeviceHeads heads;
  const unsigned char* keep;
  long long stride;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, std::byte*) const {
    const Rows rows{heads.near[h], heads.body[h], shared, heads.sink_rows};
    const detail::StayingRows stay(heads, h, keep + h * stride);
    const int left_encoded = rows.template compact<false>(block, stay.encoded, [=](int r) { return stay.encoded_row(r); });
    const int left_dense = rows.template compact<true>(block, stay.dense, [=](int r) { return stay.dense_row(r); });
    const int old = stay.old(left_dense), sinks = stay.sinks;
    if (old > 0) {
      rows.encode_oldest(block, left_encoded, old);
      rows.template compact<true>(block, left_dense, [=](int r) { return r < sinks || r >= sinks + old; });
    }
    detail::set_rows(block, heads, h, left_dense - old, left_encoded + old);
  }
};

// One block for each head. Rows at `position` and after it are dropped.
template <class Codec>
struct TruncateWork {
  using Rows = detail::HeadRows<Codec>;
  struct Shared {};
  static constexpr int warps = 1, blocks = 1, dynamic_bytes = 0;

  DeviceHeads heads;
  int position;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared&, std::byte*) const {
    const int dense = heads.near_rows[h], encoded = heads.body_rows[h];
    // Sinks, encoded rows and the newest rows have rising positions, each and one after another.
    const int sinks = dense < heads.sink_rows ? dense : heads.sink_rows;
    const int left_sinks = detail::rows_before<typename Rows::Near>(heads.near[h], 0, sinks, position);
    const int left_encoded = detail::rows_before<typename Rows::Body>(heads.body[h], 0, encoded, position);
    const int left_newest = detail::rows_before<typename Rows::Near>(heads.near[h], sinks, dense, position) - sinks;
    detail::set_rows(block, heads, h, left_sinks + left_newest, left_encoded);
  }
};

// One block for each head: its rows to those of another cache, which has as many pages.
template <class Codec>
struct ForkWork {
  using Rows = detail::HeadRows<Codec>;
  struct Shared {};
  static constexpr int warps = Rows::warps, blocks = 1, dynamic_bytes = 0;

  DeviceHeads from, to;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared&, std::byte*) const {
    detail::copy_slices<typename Rows::Near>(block, from.near[h], to.near[h], from.near_rows[h]);
    detail::copy_slices<typename Rows::Body>(block, from.body[h], to.body[h], from.body_rows[h]);
    detail::set_rows(block, to, h, from.near_rows[h], from.body_rows[h]);
  }
};

}  // namespace kvt::inline v0
