// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What head_work.hpp does, where encoded rows are a stream of blocks: one block of threads a head, which goes through the
// records in order. What is kept of a record is erased by its codec and moves up, so that the stream has no gaps; a record is
// read as a whole before any of it is written, and never becomes longer.
#pragma once

#include "kvtailor/codec/block_encode.hpp"
#include "kvtailor/store/head_work.hpp"

namespace kvt::inline v0 {

// Memory of the device for what is done to a head: rows that are to be encoded, and a record before and after.
template <class Codec>
struct StreamScratch {
  static constexpr int most_rows = BlockRecord::most_rows;
  static constexpr int part_bytes = BlockStream<typename Codec::key_type, typename Codec::value_type>::most_part_bytes;

  alignas(64) std::byte from[2][part_bytes];  // keys, values
  alignas(64) std::byte to[2][part_bytes];
  float rows[most_rows * Codec::head_dim];
  int position[2][most_rows];  // before and after
};

// Whether rows lie in a stream of blocks.
template <class Codec>
inline constexpr bool lies_in_blocks =
    !std::is_same_v<typename LayoutOf<typename Codec::key_type, typename Codec::value_type>::Pages, SlicePages>;

// The heads of a layer, or those from one on.
template <class Codec>
struct StreamHeads : DeviceHeads {
  const BlockStream<typename Codec::key_type, typename Codec::value_type>* stream;  // [heads]
  StreamScratch<Codec>* scratch;                                                    // for as many as are launched at once
};

template <class Codec>
using HeadsOf = std::conditional_t<lies_in_blocks<Codec>, StreamHeads<Codec>, DeviceHeads>;

// A block of keys that a warp looks at, and logits of eight vectors; as many warps do as have room beside queries.
template <class Codec>
struct WarpBlock {
  alignas(64) std::byte block[StreamScratch<Codec>::part_bytes];
  float logit[8][BlockRecord::most_rows];

  static constexpr int bytes = static_cast<int>(sizeof(StreamScratch<Codec>::from[0])) + 8 * BlockRecord::most_rows * 4;
  static constexpr int warps = std::clamp((64 << 10) / bytes, 1, 8);
  KVT_HD static WarpBlock& of(std::byte* memory, int warp) { return reinterpret_cast<WarpBlock*>(memory)[warp]; }
};

namespace detail {

template <class Codec>
struct StreamRows {
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  using Plain = typename Codec::near_type;
  using Stream = BlockStream<Key, Value>;
  using Dense = HeadRows<KvCodec<Plain, Plain, typename Plain::Element>>;
  using Near = typename Dense::Near;
  using Scratch = StreamScratch<Codec>;
  using KeyEncoder = BlockEncoder<Key, BlockRecord::most_rows>;
  using ValueEncoder = BlockEncoder<Value, BlockRecord::most_rows>;
  static constexpr int dim = Codec::head_dim, warps = most_encoder_warps;
  static constexpr int encoder_bytes =
      static_cast<int>(std::max(sizeof(typename KeyEncoder::Memory), sizeof(typename ValueEncoder::Memory)));
  struct Shared {
    union {
      typename Dense::Shared dense;
      typename KeyEncoder::Shared keys;
      typename ValueEncoder::Shared values;
    };
    unsigned char keep[BlockRecord::most_rows];
    int kept, bytes[2];
  };

  const Stream& stream;
  const SlicePages& near;
  Shared& shared;
  Scratch& scratch;

  // Encodes dense rows row .. row + n - 1 behind the `encoded` ones. memory [encoder_bytes].
  template <class Block>
  KVT_HD KVT_INLINE void encode(const Block& block, int row, int n, int encoded, std::byte* memory) const {
    using Lanes = typename Block::Lanes;
    load<true>(block, row, n);
    const int key_bytes = KeyEncoder::encode(block, stream.keys, scratch.rows, n, scratch.to[0], shared.keys,
                                             *reinterpret_cast<typename KeyEncoder::Memory*>(memory));
    load<false>(block, row, n);
    const int value_bytes = ValueEncoder::encode(block, stream.values, scratch.rows, n, scratch.to[1], shared.values,
                                                 *reinterpret_cast<typename ValueEncoder::Memory*>(memory));
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp != 0) return;
      lanes.each([&](int lane) {
        for (int r = lane; r < n; r += Lanes::size) {
          scratch.position[1][r] = near.positions((row + r) / slice_rows, Near::bytes)[(row + r) % slice_rows];
        }
      });
    });
    const int offset = *stream.bytes;
    const BlockRecord record{n, key_bytes, value_bytes, encoded};
    write(block, offset, record, scratch.to, scratch.position[1]);
    set_bytes(block, offset + record.bytes());
  }
  // Keeps row r of the encoded ones, at a position, if kept(r, position); the bytes of what stays do not change. Returns how
  // many rows stay.
  template <class Block, class Kept>
  KVT_HD int filter(const Block& block, Kept&& kept) const {
    using Lanes = typename Block::Lanes;
    const int end = *stream.bytes;
    int left = 0, offset = 0;
    for (int from = 0; from < end;) {
      BlockRecord record = stream.record(from);
      const int row = record.first_row;
      block.each_warp([&](const Lanes& lanes, int warp) {
        if (warp != 0) return;
        typename Lanes::template Reg<int> own;
        lanes.each([&](int lane) {
          own[lane] = 0;
          for (int r = lane; r < record.rows; r += Lanes::size) {
            const int position = scratch.position[0][r] = stream.position(from, r);
            shared.keep[r] = kept(row + r, position) ? 1 : 0;
            own[lane] += shared.keep[r];
          }
        });
        const int all = lanes.sum(own);
        lanes.once([&] { shared.kept = all; });
      });
      const int stay = shared.kept, next = from + record.bytes();
      record.first_row = left;
      if (stay == record.rows && from == offset) {
        block.each_warp([&](const Lanes& lanes, int warp) {
          if (warp == 0) lanes.once([&] { std::memcpy(stream.at(offset), &record, sizeof record); });
        });
        offset = next;
      } else if (stay > 0) {
        offset += move(block, from, record, stay, offset);
      }
      from = next;
      left += stay;
      block.each_warp([](const Lanes&, int) {});  // all have read what is shared
    }
    set_bytes(block, offset);
    return left;
  }

 private:
  template <bool is_key, class Block>
  KVT_HD void load(const Block& block, int row, int n) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      for (int r = warp; r < n; r += Block::warps) {
        const std::byte* const slice = near.at((row + r) / slice_rows, Near::bytes);
        lanes.each([&](int lane) {
          for (int d = lane; d < dim; d += Lanes::size) {
            typename Plain::Element x;
            std::memcpy(&x, slice + Near::template dense_at<is_key>((row + r) % slice_rows, d), sizeof x);
            scratch.rows[r * dim + d] = to_float(x);
          }
        });
      }
    });
  }
  // The rows that stay of a record, to where the stream is complete so far. Returns what they take.
  template <class Block>
  KVT_HD int move(const Block& block, int from, const BlockRecord& record, int stay, int to) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      stream.read(lanes, from + record.keys_at(), record.key_bytes, scratch.from[0], warp, Block::warps);
      stream.read(lanes, from + record.values_at(), record.value_bytes, scratch.from[1], warp, Block::warps);
    });
    if (stay == record.rows) {
      write(block, to, record, scratch.from, scratch.position[0]);
      return record.bytes();
    }
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp == 0) {
        const int bytes = stream.keys.erase(lanes, scratch.from[0], record.rows, shared.keep, scratch.to[0]);
        lanes.once([&] { shared.bytes[0] = bytes; });
      }
      if (warp == 1) {
        const int bytes = stream.values.erase(lanes, scratch.from[1], record.rows, shared.keep, scratch.to[1]);
        lanes.once([&] { shared.bytes[1] = bytes; });
      }
      if (warp == 2) {
        int next = 0;
        for (int first = 0; first < record.rows; first += Lanes::size) {
          typename Lanes::template Reg<int> own, before;
          lanes.each([&](int lane) {
            own[lane] = before[lane] = first + lane < record.rows && shared.keep[first + lane] != 0 ? 1 : 0;
          });
          lanes.exclusive_scan(before);
          lanes.each([&](int lane) {
            if (own[lane] != 0) scratch.position[1][next + before[lane]] = scratch.position[0][first + lane];
          });
          next += lanes.shuffle(before, Lanes::size - 1) + lanes.shuffle(own, Lanes::size - 1);
        }
      }
    });
    const BlockRecord less{stay, shared.bytes[0], shared.bytes[1], record.first_row};
    write(block, to, less, scratch.to, scratch.position[1]);
    return less.bytes();
  }
  template <class Block>
  KVT_HD void write(const Block& block, int offset, const BlockRecord& record, std::byte (*parts)[Scratch::part_bytes],
                    const int* position) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int warp) {
      if (warp == 0) stream.mark(lanes, offset, record.bytes());
      if (warp == 1) {
        lanes.once([&] { std::memcpy(stream.at(offset), &record, sizeof record); });
        lanes.each([&](int lane) {
          for (int r = lane; r < BlockRecord::padded(4 * record.rows) / 4; r += Lanes::size) {
            const int own = r < record.rows ? position[r] : 0;
            std::memcpy(stream.at(offset + BlockRecord::positions_at() + 4 * r), &own, sizeof own);
          }
        });
      }
      if (warp == 2) {  // what is copied beside the bytes of a part has some value
        lanes.each([&](int lane) {
          const int part = lane % 2, bytes = part == 0 ? record.key_bytes : record.value_bytes;
          const int k = bytes + lane / 2;
          if (k < BlockRecord::padded(bytes)) parts[part][k] = std::byte{0};
        });
      }
    });
    block.each_warp([&](const Lanes& lanes, int warp) {
      stream.write(lanes, offset + record.keys_at(), record.key_bytes, parts[0], warp, Block::warps);
      stream.write(lanes, offset + record.values_at(), record.value_bytes, parts[1], warp, Block::warps);
    });
  }
  template <class Block>
  KVT_HD void set_bytes(const Block& block, int bytes) const {
    block.each_warp([](const typename Block::Lanes&, int) {});  // all have read how many there were
    block.each_warp([&](const typename Block::Lanes& lanes, int warp) {
      if (warp == 0) lanes.once([&] { *stream.bytes = bytes; });
    });
  }
};

}  // namespace detail

// As AppendWork.
template <class Codec, class T>
struct AppendBlocksWork {
  using Rows = detail::StreamRows<Codec>;
  using Shared = typename Rows::Shared;
  static constexpr int warps = Rows::warps, blocks = 1, dynamic_bytes = Rows::encoder_bytes;

  StreamHeads<Codec> heads;
  const T *keys, *values;  // [n, num_heads, dim]
  const int* positions;    // [n]
  int n, num_heads;

  template <class Block>
  KVT_HD KVT_INLINE void operator()(const Block& block, int h, Shared& shared, std::byte* memory) const {
    const Rows rows{heads.stream[h], heads.near[h], shared, heads.scratch[h]};
    int dense = heads.near_rows[h], encoded = heads.body_rows[h];
    if (const int over = heads.blocks_over(dense); over > 0) {
      const int sinks = heads.sink_rows;
      for (int done = 0; done < over; done += BlockRecord::most_rows) {
        rows.encode(block, sinks + done, BlockRecord::most_rows, encoded + done, memory);
      }
      const typename Rows::Dense near{heads.near[h], heads.near[h], shared.dense, sinks};
      near.template compact<true>(block, dense, [=](int r) { return r < sinks || r >= sinks + over; });
      encoded += over;
      dense -= over;
    }
    detail::write_dense<typename Rows::Near, typename Rows::Plain::Element>(block, heads.near[h], dense, keys, values,
                                                                            positions, n, num_heads, h);
    detail::set_rows(block, heads, h, dense + n, encoded);
  }
};

// As CutWork.
template <class Codec>
struct CutBlocksWork {
  using Rows = detail::StreamRows<Codec>;
  using Shared = typename Rows::Shared;
  static constexpr int warps = Rows::warps, blocks = 1, dynamic_bytes = Rows::encoder_bytes;

  StreamHeads<Codec> heads;
  const unsigned char* keep;
  long long stride;

  template <class Block>
  KVT_HD KVT_INLINE void operator()(const Block& block, int h, Shared& shared, std::byte* memory) const {
    const Rows rows{heads.stream[h], heads.near[h], shared, heads.scratch[h]};
    const typename Rows::Dense near{heads.near[h], heads.near[h], shared.dense, heads.sink_rows};
    const detail::StayingRows stay(heads, h, keep + h * stride);
    int left_encoded = rows.filter(block, [=](int r, int) { return stay.encoded_row(r); });
    int left_dense = near.template compact<true>(block, stay.dense, [=](int r) { return stay.dense_row(r); });
    const int sinks = stay.sinks;
    if (const int old = stay.old(left_dense); old > 0) {
      for (int done = 0; done < old; done += BlockRecord::most_rows) {
        const int n = old - done < BlockRecord::most_rows ? old - done : BlockRecord::most_rows;
        rows.encode(block, sinks + done, n, left_encoded + done, memory);
      }
      near.template compact<true>(block, left_dense, [=](int r) { return r < sinks || r >= sinks + old; });
      left_encoded += old;
      left_dense -= old;
    }
    detail::set_rows(block, heads, h, left_dense, left_encoded);
  }
};

// The most bytes that the stream of a head takes after such a cut: bytes [heads].
template <class Codec>
struct MeasureBlocksWork {
  static constexpr int warps = 1, blocks = 1, dynamic_bytes = 0, head_bytes = 192;
  struct Shared {
    alignas(64) std::byte keys[head_bytes];
    alignas(64) std::byte values[head_bytes];
  };

  StreamHeads<Codec> heads;
  const unsigned char* keep;
  long long stride;
  int* bytes;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, std::byte*) const {
    using Lanes = typename Block::Lanes;
    block.each_warp([&](const Lanes& lanes, int) {
      const auto& stream = heads.stream[h];
      const detail::StayingRows stay(heads, h, keep + h * stride);
      const auto count = [&](int n, auto&& stays) {
        typename Lanes::template Reg<int> own;
        lanes.each([&](int lane) {
          own[lane] = 0;
          for (int r = lane; r < n; r += Lanes::size) own[lane] += stays(r) ? 1 : 0;
        });
        return lanes.sum(own);
      };
      int all = 0;
      for (int offset = 0; offset < *stream.bytes;) {
        const BlockRecord record = stream.record(offset);
        const auto least = [](int a, int b) { return a < b ? a : b; };
        const int left = count(record.rows, [&](int r) { return stay.encoded_row(record.first_row + r); });
        stream.read(lanes, offset + record.keys_at(), least(record.key_bytes, head_bytes), shared.keys);
        stream.read(lanes, offset + record.values_at(), least(record.value_bytes, head_bytes), shared.values);
        if (left > 0) {
          all += BlockRecord{left, least(record.key_bytes, erased_bytes_bound(stream.keys, shared.keys, record.rows, left)),
                             least(record.value_bytes, erased_bytes_bound(stream.values, shared.values, record.rows, left)), 0}
                     .bytes();
        }
        offset += record.bytes();
        lanes.each([](int) {});  // all have read what is shared
      }
      const int old = stay.old(count(stay.dense, [&](int r) { return stay.dense_row(r); }));
      for (int done = 0; done < old; done += BlockRecord::most_rows) {
        const int n = old - done < BlockRecord::most_rows ? old - done : BlockRecord::most_rows;
        all += BlockRecord{n, stream.keys.max_block_bytes(n), stream.values.max_block_bytes(n), 0}.bytes();
      }
      lanes.once([&] { bytes[h] = all; });
    });
  }
};

// As TruncateWork.
template <class Codec>
struct TruncateBlocksWork {
  using Rows = detail::StreamRows<Codec>;
  using Shared = typename Rows::Shared;
  static constexpr int warps = Rows::warps, blocks = 1, dynamic_bytes = 0;

  StreamHeads<Codec> heads;
  int position;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared& shared, std::byte*) const {
    using Near = typename Rows::Near;
    const Rows rows{heads.stream[h], heads.near[h], shared, heads.scratch[h]};
    const int dense = heads.near_rows[h], sinks = dense < heads.sink_rows ? dense : heads.sink_rows;
    const int left_sinks = detail::rows_before<Near>(heads.near[h], 0, sinks, position);
    const int left_encoded = rows.filter(block, [end = position](int, int p) { return p < end; });
    const int left_newest = detail::rows_before<Near>(heads.near[h], sinks, dense, position) - sinks;
    detail::set_rows(block, heads, h, left_sinks + left_newest, left_encoded);
  }
};

// As ForkWork.
template <class Codec>
struct ForkBlocksWork {
  using Rows = detail::StreamRows<Codec>;
  struct Shared {};
  static constexpr int warps = Rows::warps, blocks = 1, dynamic_bytes = 0;

  StreamHeads<Codec> from, to;

  template <class Block>
  KVT_HD void operator()(const Block& block, int h, Shared&, std::byte*) const {
    using Lanes = typename Block::Lanes;
    const auto &source = from.stream[h], &target = to.stream[h];
    detail::copy_slices<typename Rows::Near>(block, from.near[h], to.near[h], from.near_rows[h]);
    block.each_warp([&](const Lanes& lanes, int warp) {
      const int bytes = *source.bytes;
      for (int p = 0; p < source.pages_of(bytes); ++p) source.copy_page(lanes, p, target, warp, Block::warps);
      if (warp == 0) lanes.once([&] { *target.bytes = bytes; });
    });
    detail::set_rows(block, to, h, from.near_rows[h], from.body_rows[h]);
  }
};

}  // namespace kvt::inline v0
