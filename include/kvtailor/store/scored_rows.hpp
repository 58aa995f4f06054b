// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// ScoredRows: the rows of a head on a device as a token selector sees them, in the order of their positions, wherever they are
// stored. DeviceEvidence: what else it may ask for.
#pragma once

#include "kvtailor/core/device_rope.hpp"
#include "kvtailor/core/geometry.hpp"
#include "kvtailor/core/half.hpp"
#include "kvtailor/store/device_moments.hpp"
#include "kvtailor/store/stream_work.hpp"

namespace kvt::inline v0 {

// Of a layer: where the newest recent_rows rows of its heads begin, and one past the last position of any.
struct LayerEnds {
  int recent, end;
};

// What queries gave each row of a head: see store/device_attention.hpp.
struct DeviceAttention {
  float* weight;  // [heads, max_rows]: sums over queries and query heads, or the largest weights
  int* queries;   // [heads, max_rows] that could see the row
  int* given;     // [heads]: rows after the first so many have nothing
  long long max_rows;

  KVT_HD float* weight_of(int h) const { return weight + h * max_rows; }
  KVT_HD int* queries_of(int h) const { return queries + h * max_rows; }
  KVT_HD DeviceAttention from_head(int h) const { return {weight_of(h), queries_of(h), given + h, max_rows}; }
};

// Of all heads; what no policy needs is null. Pointers are of the device.
struct DeviceEvidence {
  int group = 0;                                  // query heads of a KV head
  const DeviceRope* ropes = nullptr;              // [layers]
  const OutputProjection* projections = nullptr;  // [layers]
  DeviceMoments moments = {};                     // of all query heads
  DeviceAttention attention = {};
  const int* chosen_before = nullptr;  // [layers], see HeadEvidence
  const LayerEnds* ends = nullptr;     // [layers]
  double share = 1;                    // likewise
  const float* table = nullptr;        // what device_table() of the selector gave
  int* refused = nullptr;              // [heads] not 0 where rows cannot be scored
  std::byte* space = nullptr;          // [heads, space_bytes], aligned to 16
  long long space_bytes = 0;
};

// Rows are visited by warps: f(r) of a warp's share, with the row at a place that the warp alone has. What is written for a row
// is seen by others after the each_warp() it is in.
template <class KvCodec>
struct ScoredRows {
  using Codec = KvCodec;
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  using Plain = typename Codec::near_type;
  using Body = LayoutOf<Key, Value>;
  using Near = DenseLayoutOf<Plain>;
  static constexpr bool in_blocks = lies_in_blocks<Codec>;
  static constexpr int dim = Key::head_dim, warps = 8;
  static constexpr int basis = max_basis_dim<Key> > max_basis_dim<Value> ? max_basis_dim<Key> : max_basis_dim<Value>;

  int num_kv_heads, layer, kv_head;
  const SlicePages& near;
  const typename Body::Pages& body;
  std::byte* memory;  // where rows lie in blocks: WarpBlock [WarpBlock::warps]
  const DeviceEvidence& evidence;
  int sinks, encoded, count;

  KVT_HD ScoredRows(const HeadsOf<Codec>& heads, int kv_heads, int h, std::byte* dynamic, const DeviceEvidence& known)
      : num_kv_heads(kv_heads),
        layer(h / kv_heads),
        kv_head(h % kv_heads),
        near(heads.near[h]),
        body([&]() -> const auto& {
          if constexpr (in_blocks) {
            return heads.stream[h];
          } else {
            return heads.body[h];
          }
        }()),
        memory(dynamic),
        evidence(known),
        sinks(heads.near_rows[h] < heads.sink_rows ? heads.near_rows[h] : heads.sink_rows),
        encoded(heads.body_rows[h]),
        count(heads.near_rows[h] + heads.body_rows[h]) {}

  KVT_HD int head() const { return layer * num_kv_heads + kv_head; }
  // The head's part of the memory that the selector asked for by device_space().
  template <class T>
  KVT_HD T* space() const {
    return reinterpret_cast<T*>(evidence.space + head() * evidence.space_bytes);
  }
  KVT_HD bool is_encoded(int r) const { return r >= sinks && r < sinks + encoded; }
  KVT_HD int place(int r) const { return is_encoded(r) ? r - sinks : r < sinks ? r : r - encoded; }
  KVT_HD int position(int r) const {
    const int at = place(r), slice = at / slice_rows;
    if (!is_encoded(r)) return near.positions(slice, Near::bytes)[at % slice_rows];
    if constexpr (in_blocks) {
      const int offset = body.find(at);
      return body.position(offset, at - body.record(offset).first_row);
    } else {
      return body.positions(slice, Body::bytes)[at % slice_rows];
    }
  }
  // How many rows come before a position.
  KVT_HD int rows_before(int at) const {
    int first = 0, last = count;
    while (first < last) {
      const int middle = first + (last - first) / 2;
      if (position(middle) < at) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }

  // With key r at `to` [dim], and more that has no meaning up to [basis], as the key codec turns rows: angles and lengths are
  // those of keys as they came.
  template <class Lanes, class F>
  KVT_HD void each_key(const Lanes& lanes, int warp, float* to, F&& f) const {
    each<true, false>(lanes, warp, 0, count, to, nullptr, f);
  }
  template <class Lanes, class F>
  KVT_HD void each_value(const Lanes& lanes, int warp, float* to, F&& f) const {
    each<false, false>(lanes, warp, 0, count, to, nullptr, f);
  }
  // With key (or value) r of first .. last - 1 at `to` [dim] as its codec decodes it. scratch [basis], of the warp too.
  template <bool keys, class Lanes, class F>
  KVT_HD void each_decoded(const Lanes& lanes, int warp, int first, int last, float* scratch, float* to, F&& f) const {
    each<keys, true>(lanes, warp, first, last, to, scratch, f);
  }
  // f(rows, n) of the same a few at a time: rows[0 .. n - 1] at to[0 .. n - 1].
  template <bool keys, int most, int size, class Lanes, class F>
  KVT_HD void each_few(const Lanes& lanes, int warp, int first, int last, float* scratch, float (&to)[most][size],
                       int (&rows)[most], F&& f) const {
    int n = 0;
    each<keys, true>(
        lanes, warp, first, last, [&] { return to[n]; }, scratch,
        [&](int r) {
          lanes.once([&] { rows[n] = r; });
          if (++n < most) return;
          f(rows, n);
          n = 0;
        });
    if (n > 0) f(rows, n);
  }

 private:
  template <bool keys>
  using Part = std::conditional_t<keys, Key, Value>;
  template <bool keys>
  KVT_HD Part<keys> codec() const {
    if constexpr (keys) {
      return detail::key_codec<Key>(body);
    } else {
      return detail::value_codec<Value>(body);
    }
  }
  KVT_HD static float* place_at(float* to) { return to; }
  template <class To>
  KVT_HD static float* place_at(To&& to) {
    return to();
  }

  // to: where a row goes, or a function that says so before each.
  template <bool keys, bool decoded, class Lanes, class To, class F>
  KVT_HD void each(const Lanes& lanes, int warp, int first, int last, To&& to, float* scratch, F&& f) const {
    for (int r = first + warp; r < last; r += warps) {
      const int slice = place(r) / slice_rows, row = place(r) % slice_rows;
      if (!is_encoded(r)) {
        dense_row<keys, decoded>(lanes, near.at(slice, Near::bytes), row, place_at(to));
      } else if constexpr (in_blocks) {
        continue;
      } else {
        float* const at = place_at(to);
        encoded_row<keys>(lanes, body.at(slice, Body::bytes), row, decoded ? scratch : at);
        if constexpr (decoded) decode<keys>(lanes, scratch, at);
      }
      f(r);
    }
    if constexpr (in_blocks) {
      const int begin = first > sinks ? first - sinks : 0, end = last - sinks < encoded ? last - sinks : encoded;
      if (warp >= WarpBlock<Codec>::warps || begin >= end) return;
      std::byte* const block = WarpBlock<Codec>::of(memory, warp).block;
      const int last_page = body.find(end - 1) / Body::Pages::room;
      for (int p = body.find(begin) / Body::Pages::room + warp; p <= last_page; p += WarpBlock<Codec>::warps) {
        body.each_record(p, [&](int offset, const BlockRecord& record) {
          const int from = begin > record.first_row ? begin - record.first_row : 0;
          const int until = end - record.first_row < record.rows ? end - record.first_row : record.rows;
          if (from >= until) return;
          body.read(lanes, offset + (keys ? record.keys_at() : record.values_at()),
                    keys ? record.key_bytes : record.value_bytes, block);
          for (int i = from; i < until; ++i) {
            float* const at = place_at(to);
            codec<keys>().row_of(lanes, block, record.rows, i, decoded ? scratch : at);
            if constexpr (decoded) decode<keys>(lanes, scratch, at);
            f(sinks + record.first_row + i);
          }
        });
      }
    }
  }
  template <bool keys, bool decoded, class Lanes>
  KVT_HD void dense_row(const Lanes& lanes, const std::byte* slice, int row, float* to) const {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) {
        typename Plain::Element x;
        std::memcpy(&x, slice + Near::template dense_at<keys>(row, d), sizeof x);
        to[d] = to_float(x);
      }
    });
    if constexpr (!decoded) codec<keys>().prepare(lanes, to, 1.f, to);
  }
  template <bool keys, class Lanes>
  KVT_HD static void encoded_row(const Lanes& lanes, const std::byte* slice, int row, float* to) {
    if constexpr (Body::fragments) {
      using Fragments = FragmentsOf<Part<keys>>;
      const auto byte = [&](int k) { return std::to_integer<unsigned char>(slice[Body::template scale_at<keys>(row, k)]); };
      const float scale = Fragments::scale(byte);
      lanes.each([&](int lane) {
        for (int d = lane; d < dim; d += Lanes::size) {
          to[d] = scale * Fragments::value([&](int e) { return Body::template element<keys>(slice, row, e); }, byte, d);
        }
      });
    } else if constexpr (keys) {
      Key{}.row_of(lanes, slice + row * Key::row_bytes, 1, 0, to);
    } else {
      Value{}.row_of(lanes, slice + Body::values_at + row * Value::row_bytes, 1, 0, to);
    }
  }
  // A row out of the codec's basis; it is used up. What a sum would have beyond its first elements is in these already.
  template <bool keys, class Lanes>
  KVT_HD void decode(const Lanes& lanes, float* row, float* to) const {
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) to[d] = 0;
      for (int d = dim + lane; d < max_basis_dim<Part<keys>>; d += Lanes::size) row[d] = 0;
    });
    codec<keys>().finish(lanes, row, to);
  }
};

}  // namespace kvt::inline v0
