// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// SplitDecode: one decode step of many heads of any length, cut into equal shares of slices for a fixed number of blocks of
// threads, and joined again.
//
// The slices of all entries (a KV head of a sequence each) stand in one line, and block b takes those from b total / blocks to
// (b + 1) total / blocks, whatever entries they belong to. What it finds for entry e goes to slot b + e: along the line either
// one grows or the other, so no two share a slot. The cut depends on lengths alone, and partial results are joined in the order
// of blocks, so the output does not depend on who finishes first.
#pragma once

#include "kvtailor/attend/decode_warp.hpp"
#include "kvtailor/codec/dense.hpp"
#include "kvtailor/codec/rotated.hpp"
#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

struct SplitDecode {
  const SlicePages* entry;  // [entries]
  int* first_slice;         // [entries + 1] slices before an entry, and all
  int entries, blocks;

  struct Range {
    int from, to;
    KVT_HD bool empty() const { return from >= to; }
  };
  KVT_HD int total() const { return first_slice[entries]; }
  KVT_HD int slots() const { return entries + blocks; }
  KVT_HD int start(int block) const { return static_cast<int>(static_cast<long long>(block) * total() / blocks); }
  // The block that takes a slice.
  KVT_HD int block_of(int slice) const { return static_cast<int>((static_cast<long long>(slice + 1) * blocks - 1) / total()); }
  // The last entry that begins at or before a slice and is not empty.
  KVT_HD int entry_of(int slice) const {
    int low = 0, high = entries - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_slice[middle] <= slice) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
  // Slices of an entry that a block takes, counted from the entry's first.
  KVT_HD Range share(int block, int e) const {
    const int from = start(block), to = start(block + 1), own = first_slice[e], end = first_slice[e + 1];
    return {(from > own ? from : own) - own, (to < end ? to : end) - own};
  }
};

// Partial results: max, sum [slots, 8], rows [slots, 8, dim].
struct DecodePartials {
  float *max, *sum, *rows;
};

// Codes that tensor cores read, of a codec (see slices.hpp), element d of a row as the codec encodes it alone or, on the host,
// all of them, and what an element stands for without the row's scale.
template <class Codec>
struct FragmentsOf;
template <int bits, int dim, NormCorrection correction>
struct FragmentsOf<LloydMax<bits, dim, correction, Half>> {
  using type = CodeFragments<bits, dim>;
  KVT_HD static int element(const std::byte* row, int d) {
    return LloydMax<bits, dim, correction>::code_at(reinterpret_cast<const unsigned char*>(row) + sizeof(Half), d);
  }
  static void unpack(const std::byte* row, int* elements) {
    LloydMax<bits, dim, correction>::unpack(reinterpret_cast<const unsigned char*>(row) + sizeof(Half), elements);
  }
  static void pack(const int* elements, std::byte* row) {
    LloydMax<bits, dim, correction>::pack(Serial{}, elements, reinterpret_cast<unsigned char*>(row) + sizeof(Half));
  }
  KVT_HD static float value(int element) {
    using Codes = LloydMax<bits, dim, correction>;
    static constexpr typename Codes::Levels levels;
    return levels.value[element] * Codes::unit;
  }
};
template <class Codec>
struct FragmentsOf<Rotated<Codec>> : FragmentsOf<Codec> {};
template <int dim>
struct FragmentsOf<Dense<Half, dim>> {
  using type = DenseFragments<dim>;
  KVT_HD static int element(const std::byte* row, int d) { return reinterpret_cast<const Half*>(row)[d].bits; }
  static void unpack(const std::byte* row, int* elements) {
    for (int d = 0; d < dim; ++d) elements[d] = element(row, d);
  }
  static void pack(const int* elements, std::byte* row) {
    for (int d = 0; d < dim; ++d) reinterpret_cast<Half*>(row)[d].bits = static_cast<std::uint16_t>(elements[d]);
  }
  KVT_HD static float value(int element) { return to_float(Half{static_cast<std::uint16_t>(element)}); }
};

template <class Key, class Value>
using LayoutOf = SliceLayout<typename FragmentsOf<Key>::type, typename FragmentsOf<Value>::type>;

// One decode step: `group` query heads of each entry, of which a block takes eight from `first_vector` on.
template <class T>
struct DecodeStep {
  SplitDecode split;
  DecodePartials partials;  // of these eight
  const T* queries;         // [entries, group, dim]
  const int* position;      // [sequences] of the query, or null; looked at where attention is limited
  int kv_heads;             // entries of a sequence
  int group, first_vector, window;
  float scale, cap;                    // of logits, as AttendOptions; scale is not 0
  const float* sink_logits = nullptr;  // [kv_heads, group] as AttendOptions, or null

  KVT_HD int vectors() const { return group - first_vector < 8 ? group - first_vector : 8; }
};

// What the warps of a block share, beside the tables.
template <int dim, int warps>
struct DecodeShared {
  QueryFragments<dim> queries;
  float prepared[8 * dim];  // queries in the basis of the keys
  float rows[8 * dim];      // queries as they come, then weighted rows
  float max[warps][8], sum[warps][8], factor[warps][8];
  int position[8];
};

// Attention to slices. Warps of a block, and blocks of a multiprocessor that registers are shared out among: 128, 168 or 255 a
// thread. Tables of codes are shared by the warps of a block, so there is one block where there are tables. ptxas reads entries
// far ahead, and spills where it has less room than here.
template <class Key, class Value, bool limited, class T>
struct DecodeWork {
  using Layout = LayoutOf<Key, Value>;
  static constexpr int dim = Key::head_dim, dynamic_bytes = Layout::table_bytes;
  static constexpr bool light = dim <= 128 && dynamic_bytes == 0 && !limited;
  static constexpr int warps = dim <= 64 && dynamic_bytes > 0 ? 12 : 8, blocks = light ? 2 : 1;
  using Shared = DecodeShared<dim, warps>;

  DecodeStep<T> step;

  template <class Block>
  KVT_HD void operator()(const Block& block, int index, Shared& shared, std::byte* table) const {
    using Lanes = typename Block::Lanes;
    constexpr float log2e = 1.44269504f, none = -std::numeric_limits<float>::infinity();
    const SplitDecode& split = step.split;
    const int m = step.vectors(), from = split.start(index), to = split.start(index + 1);
    if (from >= to) return;
    block.each_warp([&](const Lanes& lanes, int warp) {
      lanes.each([&](int lane) { Layout::fill_tables(table, warp * Lanes::size + lane, warps * Lanes::size); });
    });
    for (int e = split.entry_of(from); e < split.entries && split.first_slice[e] < to; ++e) {
      const SplitDecode::Range share = split.share(index, e);
      if (share.empty()) continue;
      block.each_warp([&](const Lanes& lanes, int warp) {
        for (int j = warp; j < m; j += warps) {
          const T* const query = step.queries + (static_cast<long long>(e) * step.group + step.first_vector + j) * dim;
          float* const plain = shared.rows + j * dim;
          lanes.each([&](int lane) {
            for (int d = lane; d < dim; d += Lanes::size) plain[d] = to_float(query[d]);
          });
          Key{}.prepare(lanes, plain, step.scale * log2e, shared.prepared + j * dim);
          if constexpr (limited)
            lanes.once([&] {
              shared.position[j] =
                  step.position != nullptr ? step.position[e / step.kv_heads] : std::numeric_limits<int>::max();
            });
        }
      });
      block.each_warp([&](const Lanes& lanes, int warp) { shared.queries.pack(lanes, shared.prepared, m, warp, warps); });
      typename Block::template PerWarp<DecodeWarp<Layout, Lanes, limited>> work;
      block.each_warp([&](const Lanes& lanes, int warp) {
        const DecodeQueries<dim> query{&shared.queries, shared.position, m, step.cap * log2e, step.window};
        work[warp].run(lanes, split.entry[e], query, table, share.from + warp, share.to, warps);
        work[warp].store_state(lanes, shared.max[warp], shared.sum[warp]);
      });
      // The warps' results at one maximum. Each adds its rows in turn, so that sums are always the same.
      const long long slot = static_cast<long long>(index + e) * 8;
      block.each_warp([&](const Lanes& lanes, int warp) {
        if (warp != 0) return;
        lanes.each([&](int lane) {
          if (lane >= 8) return;
          float top = none, total = 0;
          for (int w = 0; w < warps; ++w) top = std::fmax(top, shared.max[w][lane]);
          for (int w = 0; w < warps; ++w) {
            const float own = shared.max[w][lane], factor = own == none ? 0.f : fast_exp2(own - top);
            shared.factor[w][lane] = factor;
            total += factor * shared.sum[w][lane];
          }
          step.partials.max[slot + lane] = top;
          step.partials.sum[slot + lane] = total;
        });
      });
      for (int turn = 0; turn < warps; ++turn) {
        block.each_warp([&](const Lanes& lanes, int warp) {
          if (warp == turn) work[warp].store_rows(lanes, shared.factor[warp], turn > 0, shared.rows);
        });
      }
      block.each_warp([&](const Lanes& lanes, int warp) {
        lanes.each([&](int lane) {
          for (int d = warp * Lanes::size + lane; d < m * dim; d += warps * Lanes::size) {
            step.partials.rows[slot * dim + d] = shared.rows[d];
          }
        });
      });
    }
  }
};

// The softmax state of one vector of one entry over all blocks, and its weighted rows [dim], which all lanes see. No visible
// row: a maximum of -infinity, and zeros.
struct DecodeState {
  float max, sum;
};
template <int dim, class Lanes, class T>
KVT_HD DecodeState join_blocks(const Lanes& lanes, const DecodeStep<T>& step, int e, int vector, float* rows) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  const SplitDecode& split = step.split;
  const int from = split.first_slice[e], to = split.first_slice[e + 1];
  const int first = from < to ? split.block_of(from) : 0, last = from < to ? split.block_of(to - 1) : -1;
  DecodeState state{none, 0};
  for (int b = first; b <= last; ++b) {
    if (!split.share(b, e).empty()) state.max = std::fmax(state.max, step.partials.max[(b + e) * 8 + vector]);
  }
  lanes.each([&](int lane) {
    for (int d = lane; d < dim; d += Lanes::size) rows[d] = 0;
  });
  for (int b = first; b <= last && state.max != none; ++b) {
    if (split.share(b, e).empty()) continue;
    const long long slot = static_cast<long long>(b + e) * 8 + vector;
    const float factor = fast_exp2(step.partials.max[slot] - state.max);
    state.sum += factor * step.partials.sum[slot];
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) rows[d] += factor * step.partials.rows[slot * dim + d];
    });
  }
  return state;
}

// The output of one vector from the rows that are encoded and the dense ones. scratch, out_row: [dim] that all lanes see.
template <class Value, class Lanes, class T>
KVT_HD void finish_vector(const Lanes& lanes, const DecodeStep<T>& body, const DecodeStep<T>& near, int e, int vector,
                          float* scratch, float* out_row, T* out) {
  constexpr int dim = Value::head_dim;
  constexpr float none = -std::numeric_limits<float>::infinity();
  const DecodeState dense = join_blocks<dim>(lanes, near, e, vector, out_row);
  const DecodeState coded = join_blocks<dim>(lanes, body, e, vector, scratch);
  float top = std::fmax(dense.max, coded.max), sink = none;
  if (body.sink_logits != nullptr && top != none) {
    constexpr float log2e = 1.44269504f;
    sink = body.sink_logits[e % body.kv_heads * body.group + body.first_vector + vector] * log2e;
    top = std::fmax(top, sink);
  }
  const float of_dense = dense.max == none ? 0.f : fast_exp2(dense.max - top);
  const float of_coded = coded.max == none ? 0.f : fast_exp2(coded.max - top);
  const float of_sink = sink == none ? 0.f : fast_exp2(sink - top);
  const float sum = of_dense * dense.sum + of_coded * coded.sum + of_sink, inverse = sum > 0 ? 1 / sum : sum == 0 ? 0.f : sum;
  lanes.each([&](int lane) {
    for (int d = lane; d < dim; d += Lanes::size) {
      out_row[d] *= of_dense * inverse;
      scratch[d] *= of_coded * inverse;
    }
  });
  Value{}.finish(lanes, scratch, out_row);
  lanes.each([&](int lane) {
    for (int d = lane; d < dim; d += Lanes::size) out[d] = from_float<T>(out_row[d]);
  });
}

// Joins what the blocks of DecodeWork found: a warp for each vector of each entry, entries * vectors blocks.
template <class Value, class T>
struct FinishWork {
  static constexpr int warps = 1, blocks = 1, dynamic_bytes = 0;
  struct Shared {
    float scratch[Value::head_dim], row[Value::head_dim];
  };
  DecodeStep<T> body, near;
  T* out;  // [entries, group, dim]

  template <class Block>
  KVT_HD void operator()(const Block& block, int index, Shared& shared, std::byte*) const {
    const int e = index / body.vectors(), vector = index % body.vectors();
    T* const to = out + (static_cast<long long>(e) * body.group + body.first_vector + vector) * Value::head_dim;
    block.each_warp([&](const typename Block::Lanes& lanes, int) {
      finish_vector<Value>(lanes, body, near, e, vector, shared.scratch, shared.row, to);
    });
  }
};

// Counts slices before a step: first_slice[e + 1] = those of entries up to e. One block.
struct CountWork {
  static constexpr int warps = 1, blocks = 1, dynamic_bytes = 0;
  struct Shared {};
  const SlicePages* entry;  // [entries]
  int* first_slice;         // [entries + 1]
  int entries;

  template <class Block>
  KVT_HD void operator()(const Block& block, int, Shared&, std::byte*) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int) {
      int before = 0;
      lanes.once([&] { first_slice[0] = 0; });
      for (int e = 0; e < entries; e += Lanes::size) {
        typename Lanes::template Reg<int> own, scanned;
        lanes.each([&](int lane) {
          own[lane] = e + lane < entries ? (*entry[e + lane].rows + slice_rows - 1) / slice_rows : 0;
          scanned[lane] = own[lane];
        });
        lanes.exclusive_scan(scanned);
        typename Lanes::template Reg<int> sum;
        lanes.each([&](int lane) {
          sum[lane] = before + scanned[lane] + own[lane];
          if (e + lane < entries) first_slice[e + lane + 1] = sum[lane];
        });
        before = lanes.shuffle(sum, Lanes::size - 1);
      }
    });
  }
};

// Launches a step. Query heads of an entry are taken eight at a time, and use the same partial results one after another;
// first_vector is set here. near: the dense rows. first_slice of both is written before it is read.
template <class Key, class Value, bool limited, class Device, class T>
Status launch_decode(Device& device, DecodeStep<T> body, DecodeStep<T> near, T* out) {
  using Plain = Dense<Half, Key::head_dim>;
  if (body.split.entries == 0) return success();
  for (const DecodeStep<T>* step : {&body, &near}) {
    KVT_TRY(device.launch(CountWork{step->split.entry, step->split.first_slice, step->split.entries}, 1));
  }
  for (int first = 0; first < body.group; first += 8) {
    body.first_vector = near.first_vector = first;
    KVT_TRY(device.launch(DecodeWork<Key, Value, limited, T>{body}, body.split.blocks));
    KVT_TRY(device.launch(DecodeWork<Plain, Plain, limited, T>{near}, near.split.blocks));
    KVT_TRY(device.launch(FinishWork<Value, T>{body, near, out}, body.split.entries * body.vectors()));
  }
  return success();
}

}  // namespace kvt::inline v0
