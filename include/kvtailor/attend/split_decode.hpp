// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// SplitDecode: attention of one query, or of a chunk of queries, of each of many heads of any length, cut into equal shares of
// slices for a fixed number of blocks of threads, and joined again.
//
// The query vectors of an entry (a KV head of a sequence) are taken eight or sixteen at a time: a tile of an entry is an item
// of work, and its slices are those that one of its queries may see. The slices of all items stand in one line, and block b
// takes those from b total / blocks to (b + 1) total / blocks, whatever items they belong to. What it finds for item x goes to
// slot b + x: along the line either one grows or the other, so no two share a slot. The cut depends on lengths and positions
// alone, and partial results are joined in the order of blocks, so the output does not depend on who finishes first.
#pragma once

#include "kvtailor/attend/block_stream.hpp"
#include "kvtailor/attend/decode_warp.hpp"
#include "kvtailor/attend/group_fragments.hpp"
#include "kvtailor/attend/row_slices.hpp"
#include "kvtailor/attend/trellis_fragments.hpp"
#include "kvtailor/codec/kv_codec.hpp"
#include "kvtailor/codec/rotated.hpp"
#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

struct SplitDecode {
  int* first_slice;  // [items + 1] slices before an item, and all
  int items, blocks;

  struct Range {
    int from, to;
    KVT_HD bool empty() const { return from >= to; }
  };
  KVT_HD int total() const { return first_slice[items]; }
  KVT_HD int slots() const { return items + blocks; }
  KVT_HD int start(int block) const { return static_cast<int>(static_cast<long long>(block) * total() / blocks); }
  // The block that takes a slice.
  KVT_HD int block_of(int slice) const { return static_cast<int>((static_cast<long long>(slice + 1) * blocks - 1) / total()); }
  // The last item that begins at or before a slice and is not empty.
  KVT_HD int item_of(int slice) const {
    int low = 0, high = items - 1;
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
  // Slices of an item that a block takes, counted from the item's first.
  KVT_HD Range share(int block, int x) const {
    const int from = start(block), to = start(block + 1), own = first_slice[x], end = first_slice[x + 1];
    return {(from > own ? from : own) - own, (to < end ? to : end) - own};
  }
};

// Slices of an entry that hold a row which a query of an item may see: from `first` on. Of those from whole.from up to whole.to
// every query sees every row.
struct SeenSlices {
  int first;
  SplitDecode::Range whole;
};

// Partial results: max, sum [slots, width], rows [slots, width, elements of a sum in the basis of the values].
struct DecodePartials {
  float *max, *sum, *rows;
};

// Of a codec whose codes tensor cores read: the fragments of keys and of values (see slices.hpp), element d of a row as the
// codec encodes it alone or, on the host, all of them; byte k of its scales there; and what it stands for: scale(byte) times
// value(element, byte, d), with element(d) of any dim and byte(k) of its scales.
template <class Codec>
struct FragmentsOf;
namespace detail {
template <class Scale>
struct ScaleFirst {
  KVT_HD static constexpr int scale_at(int k) { return k; }
  template <class Bytes>
  KVT_HD static float scale(Bytes&& byte) {
    unsigned char stored[sizeof(Scale)];
    for (int k = 0; k < static_cast<int>(sizeof(Scale)); ++k) stored[k] = byte(k);
    Scale own;
    std::memcpy(&own, stored, sizeof own);
    return to_float(own);
  }
};
}  // namespace detail
template <int bits, int dim, NormCorrection correction>
struct FragmentsOf<LloydMax<bits, dim, correction, Half>> : detail::ScaleFirst<Half> {
  using Keys = CodeFragments<bits, dim>;
  using Values = Keys;
  KVT_HD static int element(const std::byte* row, int d) {
    return LloydMax<bits, dim, correction>::code_at(reinterpret_cast<const unsigned char*>(row) + sizeof(Half), d);
  }
  static void unpack(const std::byte* row, int* elements) {
    LloydMax<bits, dim, correction>::unpack(reinterpret_cast<const unsigned char*>(row) + sizeof(Half), elements);
  }
  static void pack(const int* elements, std::byte* row) {
    LloydMax<bits, dim, correction>::pack(Serial{}, elements, reinterpret_cast<unsigned char*>(row) + sizeof(Half));
  }
  template <class Element, class Bytes>
  KVT_HD static float value(Element&& element, Bytes&&, int d) {
    using Codes = LloydMax<bits, dim, correction>;
    static constexpr typename Codes::Levels levels;
    return levels.value[element(d)] * Codes::unit;
  }
};
template <class Codec>
requires requires { typename FragmentsOf<Codec>::Keys; }
struct FragmentsOf<Rotated<Codec>> : FragmentsOf<Codec> {};
template <int dim>
struct FragmentsOf<Dense<Half, dim>> {
  KVT_HD static constexpr int scale_at(int k) { return k; }
  using Keys = DenseFragments<dim>;
  using Values = Keys;
  KVT_HD static int element(const std::byte* row, int d) { return reinterpret_cast<const Half*>(row)[d].bits; }
  static void unpack(const std::byte* row, int* elements) {
    for (int d = 0; d < dim; ++d) elements[d] = element(row, d);
  }
  static void pack(const int* elements, std::byte* row) {
    for (int d = 0; d < dim; ++d) reinterpret_cast<Half*>(row)[d].bits = static_cast<std::uint16_t>(elements[d]);
  }
  template <class Bytes>
  KVT_HD static float scale(Bytes&&) {
    return 1;
  }
  template <class Element, class Bytes>
  KVT_HD static float value(Element&& element, Bytes&&, int d) {
    return to_float(Half{static_cast<std::uint16_t>(element(d))});
  }
};

template <int bits, int dim, int window, class RowScale>
requires(dim % 16 == 0 && dim * bits / 8 >= window - bits &&
         window > bits) struct FragmentsOf<Trellis<bits, dim, window, RowScale>> : detail::ScaleFirst<RowScale> {
  using Codec = Trellis<bits, dim, window, RowScale>;
  using Keys = TrellisFragments<Codec, true>;
  using Values = TrellisFragments<Codec, false>;
  KVT_HD static int element(const std::byte* row, int d) {
    return Codec::code_at(reinterpret_cast<const unsigned char*>(row) + Codec::scale_bytes, d);
  }
  static void unpack(const std::byte* row, int* elements) {
    for (int d = 0; d < dim; ++d) elements[d] = element(row, d);
  }
  static void pack(const int* elements, std::byte* row) {
    auto* const codes = reinterpret_cast<unsigned char*>(row) + Codec::scale_bytes;
    std::memset(codes, 0, Codec::code_bytes);
    for (int d = 0; d < dim; ++d) Codec::add_code(codes, d, elements[d]);
  }
  template <class Element, class Bytes>
  KVT_HD static float value(Element&& element, Bytes&&, int d) {
    static constexpr typename Codec::Values values;
    return values.of[Codec::state_of(element, d)];
  }
};

template <int bits, int dim, IntRange range>
struct FragmentsOf<GroupInt<bits, dim, range>> {
  using Codec = GroupInt<bits, dim, range>;
  using Keys = GroupFragments<Codec, true>;
  using Values = GroupFragments<Codec, false>;
  KVT_HD static int element(const std::byte* row, int d) {
    return Codec::code_at(reinterpret_cast<const unsigned char*>(row), d);
  }
  static void unpack(const std::byte* row, int* elements) {
    for (int d = 0; d < dim; ++d) elements[d] = element(row, d);
  }
  static void pack(const int* elements, std::byte* row) { Codec::set_codes(elements, reinterpret_cast<unsigned char*>(row)); }
  KVT_HD static constexpr int scale_at(int k) { return Codec::scale_at(k); }
  template <class Bytes>
  KVT_HD static float scale(Bytes&&) {
    return 1;
  }
  template <class Element, class Bytes>
  KVT_HD static float value(Element&& element, Bytes&& byte, int d) {
    return Codec::value_of(element(d), byte, d);
  }
};

template <class Codec>
concept HasFragments = Codec::head_dim % 16 == 0 && requires {
  typename FragmentsOf<Codec>::Keys;
};

namespace detail {

template <class Key, class Value>
struct LayoutFor {
  using type = BlockLayout<Key, Value>;
};
template <LaneRowCodec Key, LaneRowCodec Value>
struct LayoutFor<Key, Value> {
  using type = RowSlices<Key, Value>;
};
template <LaneRowCodec Key, LaneRowCodec Value>
requires HasFragments<Key> && HasFragments<Value>
struct LayoutFor<Key, Value> {
  using type = SliceLayout<typename FragmentsOf<Key>::Keys, typename FragmentsOf<Value>::Values>;
};

// What a warp attends to a layout with.
template <class Layout>
struct WarpFor {
  template <class Lanes, bool limited, int width>
  using type = BlockWarp<Layout, Lanes, limited>;
};
template <class Key, class Value>
struct WarpFor<RowSlices<Key, Value>> {
  template <class Lanes, bool limited, int width>
  using type = RowWarp<RowSlices<Key, Value>, Lanes, limited, width>;
};
template <class Keys, class Values>
struct WarpFor<SliceLayout<Keys, Values>> {
  template <class Lanes, bool limited, int width>
  using type = DecodeWarp<SliceLayout<Keys, Values>, Lanes, limited, width>;
};

// The codec of the rows of an entry: a stream of blocks knows its own.
template <class Codec, class Pages>
KVT_HD Codec key_codec(const Pages& pages) {
  if constexpr (requires { pages.keys; }) {
    return pages.keys;
  } else {
    return {};
  }
}
template <class Codec, class Pages>
KVT_HD Codec value_codec(const Pages& pages) {
  if constexpr (requires { pages.values; }) {
    return pages.values;
  } else {
    return {};
  }
}

}  // namespace detail

// Fragments where keys and values have them, slices of rows where these decode one by one, and elsewhere blocks.
template <class Key, class Value>
using LayoutOf = typename detail::LayoutFor<Key, Value>::type;
template <class Plain>
using DenseLayoutOf = LayoutOf<Plain, Plain>;

// Query vectors at a time at most, where registers allow.
template <class Key, class Value>
inline constexpr int widest_decode =
    LaneRowCodec<Key>&& LaneRowCodec<Value>&& max_basis_dim<Key> <= 128 && max_basis_dim<Value> <= 128 ? 16 : 8;

// `n` queries of each sequence, of `group` query heads for each entry: vector v of an entry is of query v / group. Those are
// taken `width` at a time.
template <class T, class Pages = SlicePages>
struct DecodeStep {
  const Pages* entry;     // [entries]
  int entries, kv_heads;  // kv_heads: entries of a sequence
  SplitDecode split;
  SeenSlices* seen;  // [items]
  DecodePartials partials;
  const T* queries;          // [sequences, n, kv_heads, group, dim]
  const int* position;       // [sequences, n] of the queries, or null
  const int* query_start;    // [sequences + 1] where the queries of a sequence begin, if they are not n each; or null
  int n, group, window;      // n: queries of a sequence at most
  float scale, cap;          // of logits, as AttendOptions; scale is not 0
  const float* sink_logits;  // [kv_heads, group] as AttendOptions, or null
  int width;

  KVT_HD int tiles() const { return (n * group + width - 1) / width; }
  KVT_HD int first_query(int sequence) const { return query_start != nullptr ? query_start[sequence] : sequence * n; }
  // Vectors of an item.
  KVT_HD int vectors(int x) const {
    const int sequence = x / tiles() / kv_heads, all = (first_query(sequence + 1) - first_query(sequence)) * group;
    const int left = all - x % tiles() * width;
    return left < width ? left : width;
  }
  // The query of an item's vector, counted over all sequences, and the vector, over all query heads of all queries.
  KVT_HD int query(int x, int vector) const {
    return first_query(x / tiles() / kv_heads) + (x % tiles() * width + vector) / group;
  }
  KVT_HD long long row(int x, int vector) const {
    return (static_cast<long long>(query(x, vector)) * kv_heads + head(x)) * group + (x % tiles() * width + vector) % group;
  }
  KVT_HD int head(int x) const { return x / tiles() % kv_heads; }
};

// What the warps of a block share, beside the tables.
template <class Key, class Value, int warps, int width>
struct DecodeShared {
  using Layout = LayoutOf<Key, Value>;

  std::conditional_t<Layout::packs_queries, QueryFragments<Key::head_dim>, std::byte> queries[width / 8];
  float prepared[width * max_basis_dim<Key>];  // queries in the basis of the keys
  float rows[width * max_basis_dim<Value>];    // queries as they come, then weighted rows
  float max[warps][width], sum[warps][width], factor[warps][width];
  int position[width];

  // What warps attend with.
  KVT_HD const auto* vectors() const {
    if constexpr (Layout::fragments) {
      return queries;
    } else {
      return prepared;
    }
  }
};

// Attention to slices, of `width` vectors at a time. Warps of a block, and blocks of a multiprocessor that registers are shared
// out among: 128, 168 or 255 a thread. Tables of codes are shared by the warps of a block, so there is one block where there
// are tables. ptxas reads entries far ahead, and spills where it has less room than here.
template <class Key, class Value, bool limited, int width, class T>
struct DecodeWork {
  using Layout = LayoutOf<Key, Value>;
  using Pages = typename Layout::Pages;
  static constexpr int dim = Key::head_dim, dynamic_bytes = Layout::table_bytes;
  static constexpr int key_basis = max_basis_dim<Key>, basis = max_basis_dim<Value>;
  static constexpr bool light = Layout::fragments ? dim <= 128 && dynamic_bytes == 0 && !Layout::grouped && !limited
                                                  : key_basis <= 64 && basis <= 64 && width == 8;
  static constexpr bool middling = Layout::fragments ? dim <= 64 && (dynamic_bytes > 0 || Layout::grouped) && width == 8
                                                     : !light && key_basis <= 128 && basis <= 128 && width == 8;
  static constexpr bool in_blocks = !std::is_same_v<Pages, SlicePages>;
  static constexpr int warps = [] {
    if constexpr (in_blocks) return Layout::warps;
    return middling ? 12 : 8;
  }();
  static constexpr int blocks = light && !in_blocks ? 2 : 1;
  using Shared = DecodeShared<Key, Value, warps, width>;

  DecodeStep<T, Pages> step;

  template <class Block>
  KVT_HD void operator()(const Block& block, int index, Shared& shared, std::byte* table) const {
    using Lanes = typename Block::Lanes;
    constexpr float log2e = 1.44269504f, none = -std::numeric_limits<float>::infinity();
    const SplitDecode& split = step.split;
    const int from = split.start(index), to = split.start(index + 1);
    if (from >= to) return;
    if constexpr (Layout::tables_bytes > 0) {
      block.each_warp([&](const Lanes& lanes, int warp) {
        lanes.each([&](int lane) { Layout::fill_tables(table, warp * Lanes::size + lane, warps * Lanes::size); });
      });
    }
    for (int x = split.item_of(from); x < split.items && split.first_slice[x] < to; ++x) {
      const SplitDecode::Range share = split.share(index, x);
      if (share.empty()) continue;
      const int m = step.vectors(x);
      const Pages& pages = step.entry[x / step.tiles()];
      block.each_warp([&](const Lanes& lanes, int warp) {
        const Key key = detail::key_codec<Key>(pages);
        for (int j = warp; j < m; j += warps) {
          const T* const query = step.queries + step.row(x, j) * dim;
          float* const plain = shared.rows + j * dim;
          lanes.each([&](int lane) {
            for (int d = lane; d < dim; d += Lanes::size) plain[d] = to_float(query[d]);
          });
          key.prepare(lanes, plain, step.scale * log2e, shared.prepared + j * basis_dim(key));
          if constexpr (limited)
            lanes.once([&] {
              shared.position[j] = step.position != nullptr ? step.position[step.query(x, j)] : std::numeric_limits<int>::max();
            });
        }
      });
      if constexpr (Layout::packs_queries) {
        block.each_warp([&](const Lanes& lanes, int warp) {
          for (int v = 0; v < width / 8; ++v) {
            shared.queries[v].template pack<typename Layout::Keys>(lanes, shared.prepared + 8 * v * dim, m - 8 * v, warp,
                                                                   warps);
          }
        });
      }
      using WarpWork = typename detail::WarpFor<Layout>::template type<Lanes, limited, width>;
      typename Block::template PerWarp<WarpWork> work;
      block.each_warp([&](const Lanes& lanes, int warp) {
        const auto [skipped, whole] = step.seen[x];
        const typename WarpWork::Queries query{shared.vectors(), shared.position, m,       step.cap * log2e,
                                               step.window,      whole.from,      whole.to};
        const int first = skipped + share.from + warp, last = skipped + share.to;
        if constexpr (in_blocks) {
          const QueryFragments<dim>* fragments = nullptr;
          if constexpr (Layout::packs_queries) fragments = shared.queries;
          work[warp].run(lanes, pages, query, table, first, last, warps, warp, fragments);
        } else {
          work[warp].run(lanes, pages, query, table, first, last, warps);
        }
        work[warp].store_state(lanes, shared.max[warp], shared.sum[warp]);
      });
      // The warps' results at one maximum. Each adds its rows in turn, so that sums are always the same.
      const long long slot = static_cast<long long>(index + x) * width;
      block.each_warp([&](const Lanes& lanes, int warp) {
        if (warp != 0) return;
        lanes.each([&](int lane) {
          if (lane >= width) return;
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
          for (int d = warp * Lanes::size + lane; d < m * basis; d += warps * Lanes::size) {
            step.partials.rows[slot * basis + d] = shared.rows[d];
          }
        });
      });
    }
  }
};

// The softmax state of one vector of one item over all blocks, and its weighted rows [size], which all lanes see. No visible
// row: a maximum of -infinity, and zeros.
struct DecodeState {
  float max, sum;
};
template <int size, class Lanes, class T, class Pages>
KVT_HD DecodeState join_blocks(const Lanes& lanes, const DecodeStep<T, Pages>& step, int x, int vector, float* rows) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  const SplitDecode& split = step.split;
  const int from = split.first_slice[x], to = split.first_slice[x + 1];
  const int first = from < to ? split.block_of(from) : 0, last = from < to ? split.block_of(to - 1) : -1;
  DecodeState state{none, 0};
  for (int b = first; b <= last; ++b) {
    if (!split.share(b, x).empty()) {
      state.max = std::fmax(state.max, step.partials.max[static_cast<long long>(b + x) * step.width + vector]);
    }
  }
  lanes.each([&](int lane) {
    for (int d = lane; d < size; d += Lanes::size) rows[d] = 0;
  });
  for (int b = first; b <= last && state.max != none; ++b) {
    if (split.share(b, x).empty()) continue;
    const long long slot = static_cast<long long>(b + x) * step.width + vector;
    const float factor = fast_exp2(step.partials.max[slot] - state.max);
    state.sum += factor * step.partials.sum[slot];
    lanes.each([&](int lane) {
      for (int d = lane; d < size; d += Lanes::size) rows[d] += factor * step.partials.rows[slot * size + d];
    });
  }
  return state;
}

// Joins what the blocks of DecodeWork found, of encoded rows and of dense ones: a warp for each vector, items * width blocks.
template <class Value, class T, class Pages = SlicePages>
struct FinishWork {
  static constexpr int dim = Value::head_dim, basis = max_basis_dim<Value>, warps = 1, blocks = 1, dynamic_bytes = 0;
  struct Shared {
    float scratch[basis], row[dim];
  };
  DecodeStep<T, Pages> body;
  DecodeStep<T> near;
  T* out;  // as queries

  template <class Block>
  KVT_HD void operator()(const Block& block, int index, Shared& shared, std::byte*) const {
    const int x = index / body.width, vector = index % body.width;
    if (vector >= body.vectors(x)) return;
    block.each_warp([&](const typename Block::Lanes& lanes, int) {
      finish(lanes, x, vector, shared.scratch, shared.row, out + body.row(x, vector) * dim);
    });
  }

 private:
  // scratch [basis], row [dim]: memory that all lanes see.
  template <class Lanes>
  KVT_HD void finish(const Lanes& lanes, int x, int vector, float* scratch, float* row, T* to) const {
    constexpr float none = -std::numeric_limits<float>::infinity();
    const DecodeState dense = join_blocks<dim>(lanes, near, x, vector, row);
    const DecodeState coded = join_blocks<basis>(lanes, body, x, vector, scratch);
    float top = std::fmax(dense.max, coded.max), sink = none;
    if (body.sink_logits != nullptr && top != none) {
      constexpr float log2e = 1.44269504f;
      sink = body.sink_logits[body.row(x, vector) % (body.kv_heads * body.group)] * log2e;
      top = std::fmax(top, sink);
    }
    const float of_dense = dense.max == none ? 0.f : fast_exp2(dense.max - top);
    const float of_coded = coded.max == none ? 0.f : fast_exp2(coded.max - top);
    const float of_sink = sink == none ? 0.f : fast_exp2(sink - top);
    const float sum = of_dense * dense.sum + of_coded * coded.sum + of_sink, inverse = sum > 0 ? 1 / sum : sum == 0 ? 0.f : sum;
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) row[d] *= of_dense * inverse;
      for (int d = lane; d < basis; d += Lanes::size) scratch[d] *= of_coded * inverse;
    });
    detail::value_codec<Value>(body.entry[x / body.tiles()]).finish(lanes, scratch, row);
    lanes.each([&](int lane) {
      for (int d = lane; d < dim; d += Lanes::size) to[d] = from_float<T>(row[d]);
    });
  }
};

// Counts the slices of items before a step: those that hold a row which one of the item's queries may see. Two blocks: one for
// encoded rows, one for dense ones. Positions of either rise.
template <class T, class Pages = SlicePages>
struct CountWork {
  static constexpr int warps = 8, blocks = 1, dynamic_bytes = 0;
  struct Shared {
    int total[warps];
  };
  DecodeStep<T, Pages> body;
  DecodeStep<T> near;
  int body_bytes, near_bytes;  // of a slice

  template <class Block>
  KVT_HD void operator()(const Block& block, int index, Shared& shared, std::byte*) const {
    if (index == 0) {
      count_items(block, body, body_bytes, shared);
    } else {
      count_items(block, near, near_bytes, shared);
    }
  }

 private:
  template <class Block, class Step>
  KVT_HD static void count_items(const Block& block, const Step& step, int slice_bytes, Shared& shared) {
    using Lanes = typename Block::Lanes;
    const int items = step.split.items;
    int* const count = step.split.first_slice + 1;
    typename Block::template PerWarp<int> before;
    block.each_warp([&](const Lanes& lanes, int warp) {
      before[warp] = 0;
      lanes.once([&] {
        if (warp == 0) count[-1] = 0;
      });
    });
    for (int first = 0; first < items; first += warps * Lanes::size) {
      block.each_warp([&](const Lanes& lanes, int warp) {
        typename Lanes::template Reg<int> own, sum;
        lanes.each([&](int lane) {
          const int x = first + warp * Lanes::size + lane;
          own[lane] = sum[lane] = x < items ? look(step, x, slice_bytes) : 0;
        });
        lanes.exclusive_scan(sum);
        lanes.each([&](int lane) {
          const int x = first + warp * Lanes::size + lane;
          sum[lane] += own[lane];
          if (x < items) count[x] = sum[lane];
        });
        const int all = lanes.shuffle(sum, Lanes::size - 1);
        lanes.once([&] { shared.total[warp] = all; });
      });
      block.each_warp([&](const Lanes& lanes, int warp) {
        int own = before[warp];
        for (int w = 0; w < warps; ++w) {
          if (w < warp) own += shared.total[w];
          before[warp] += shared.total[w];
        }
        lanes.each([&](int lane) {
          const int x = first + warp * Lanes::size + lane;
          if (x < items) count[x] += own;
        });
      });
    }
  }

  // Returns how many pages of blocks there are; a record that nobody sees is skipped when it is met.
  template <class Key, class Value>
  KVT_HD static int look(const DecodeStep<T, BlockStream<Key, Value>>& step, int x, int) {
    const BlockStream<Key, Value>& stream = step.entry[x / step.tiles()];
    step.seen[x] = {0, {0, 0}};
    return step.vectors(x) > 0 ? stream.pages_of(*stream.bytes) : 0;
  }
  // Returns how many slices there are.
  KVT_HD static int look(const DecodeStep<T>& step, int x, int slice_bytes) {
    const SlicePages& pages = step.entry[x / step.tiles()];
    const int vectors = step.vectors(x), rows = *pages.rows, all = vectors > 0 ? (rows + slice_rows - 1) / slice_rows : 0;
    SeenSlices& seen = step.seen[x] = {0, {0, all}};
    if (all == 0 || step.position == nullptr) return all;
    long long least = std::numeric_limits<long long>::max(), most = std::numeric_limits<long long>::min();
    for (int q = step.query(x, 0); q <= step.query(x, vectors - 1); ++q) {
      least = step.position[q] < least ? step.position[q] : least;
      most = step.position[q] > most ? step.position[q] : most;
    }
    const Rising in{pages, rows, slice_bytes};
    const int end = in.begun(most);
    seen.whole.to = in.ended(least);
    if (step.window > 0) {
      seen.first = in.ended(least - step.window);
      seen.whole.from = in.begun(most - step.window);
    }
    return end > seen.first ? end - seen.first : 0;
  }
  // Rows whose positions rise.
  struct Rising {
    const SlicePages& pages;
    int rows, slice_bytes;

    KVT_HD long long position(int row) const { return pages.positions(row / slice_rows, slice_bytes)[row % slice_rows]; }
    // Slices whose first row is not behind p. There are no more rows behind p than positions from p to the last row's: where
    // none was dropped, the least that may have begun are those that have.
    KVT_HD int begun(long long p) const {
      const long long behind = position(rows - 1) - p;
      int low = 0, high = (rows + slice_rows - 1) / slice_rows;
      if (behind <= 0) return high;
      if (behind < rows) low = (rows - static_cast<int>(behind) + slice_rows - 1) / slice_rows;
      for (int probe = low; low < high; probe = low + (high - low) / 2) {
        if (position(probe * slice_rows) <= p) {
          low = probe + 1;
        } else {
          high = probe;
        }
      }
      return low;
    }
    // Slices none of whose rows is behind p, or one less.
    KVT_HD int ended(long long p) const {
      const int count = begun(p);
      return count > 0 && position(rows - 1) > p ? count - 1 : count;
    }
  };
};

// Launches a step: near is that of the dense rows. width, items and what is counted are set here.
template <class Codec, bool limited, int width = 8, class Device, class T, class Pages>
Status launch_decode(Device& device, DecodeStep<T, Pages> body, DecodeStep<T> near, T* out) {
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  using Plain = typename Codec::near_type;
  const auto set_width = [](auto& step) {
    step.width = width;
    step.split.items = step.entries * step.tiles();
  };
  set_width(body);
  set_width(near);
  const int items = body.split.items;
  if (items == 0) return success();
  int slice_bytes = 0;
  if constexpr (std::is_same_v<Pages, SlicePages>) slice_bytes = LayoutOf<Key, Value>::bytes;
  KVT_TRY(device.launch(CountWork<T, Pages>{body, near, slice_bytes, DenseLayoutOf<Plain>::bytes}, 2));
  KVT_TRY(device.launch(DecodeWork<Key, Value, limited, width, T>{body}, body.split.blocks));
  KVT_TRY(device.launch(DecodeWork<Plain, Plain, limited, width, T>{near}, near.split.blocks));
  return device.launch(FinishWork<Value, T, Pages>{body, near, out}, items * width);
}

}  // namespace kvt::inline v0
