// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cmath>
#include <random>

#include "kvtailor/attend/split_decode.hpp"
#include "kvtailor/codec/kivi.hpp"
#include "kvtailor/codec/low_rank.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant.hpp"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"
#include "kvtailor/core/device.hpp"
#include "reference/plain.hpp"

using namespace kvt;

namespace {

template <int dim>
using Short2 = LloydMax<2, dim, NormCorrection::least_squares, LogScale>;

// A head's blocks, and what they stand for.
template <class Key, class Value>
struct Head {
  static constexpr int dim = Key::head_dim;
  using Stream = BlockStream<Key, Value>;

  std::vector<std::byte> pool;
  std::vector<int> page;
  int bytes = 0;
  std::vector<int> position;
  std::vector<float> keys, values;  // decoded, [rows, dim]
  Key key;
  Value value;

  Head(std::span<const int> blocks, std::mt19937& random, Key own_key = {}, Value own_value = {})
      : key(own_key), value(own_value) {
    std::normal_distribution<float> normal;
    std::vector<BlockRecord> records;
    std::vector<std::vector<std::byte>> coded;  // keys, values, keys, ...
    int at = 3;
    for (const int n : blocks) {
      std::vector<float> rows(static_cast<std::size_t>(n * dim));
      BlockRecord record{n, 0, 0, static_cast<int>(position.size())};
      for (const bool is_key : {true, false}) {
        const float shared = normal(random);
        for (std::size_t i = 0; i < rows.size(); ++i) {
          rows[i] = normal(random) + shared * std::sin(static_cast<float>(i % dim)) * static_cast<float>(i / dim % 5);
        }
        const auto encode = [&](const auto& codec, int& size, std::vector<float>& decoded) {
          std::vector<std::byte> own(static_cast<std::size_t>(codec.max_block_bytes(n) + 64));
          size = codec.encode(rows.data(), n, own.data());
          float row[dim];
          for (int r = 0; r < n; ++r) {
            codec.decode(own.data(), n, r, row);
            decoded.insert(decoded.end(), row, row + dim);
          }
          coded.push_back(std::move(own));
        };
        is_key ? encode(key, record.key_bytes, keys) : encode(value, record.value_bytes, values);
      }
      records.push_back(record);
      for (int r = 0; r < n; ++r) position.push_back(at += 1 + static_cast<int>(random() % 3));
    }
    int total = 0;
    for (const BlockRecord& record : records) total += record.bytes();
    // Pages lie in any order.
    for (int p = 0; p < Stream::pages_of(total); ++p) page.push_back(p);
    std::shuffle(page.begin(), page.end(), random);
    pool.assign(page.size() * Stream::page_bytes + 16, std::byte{0xff});
    const Stream out = stream();
    const SimulatedWarp lanes;
    int first = 0;
    for (std::size_t b = 0; b < records.size(); ++b) {
      const BlockRecord& record = records[b];
      alignas(16) BlockRecord header = record;
      out.write(lanes, bytes, static_cast<int>(sizeof header), reinterpret_cast<const std::byte*>(&header));
      for (int r = 0; r < record.rows; ++r) {
        std::memcpy(out.at(bytes + BlockRecord::positions_at() + 4 * r), &position[static_cast<std::size_t>(first + r)], 4);
      }
      out.write(lanes, bytes + record.keys_at(), record.key_bytes, coded[2 * b].data());
      out.write(lanes, bytes + record.values_at(), record.value_bytes, coded[2 * b + 1].data());
      out.mark(lanes, bytes, record.bytes());
      bytes += record.bytes();
      first += record.rows;
    }
  }
  // Once it lies where it stays.
  Stream stream() {
    auto* const aligned = reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(pool.data()) + 15) / 16 * 16);
    return {aligned, page.data(), &bytes, key, value};
  }
};

struct Limits {
  int window = 0;
  float cap = 0;
};

// Queries at the last position and before, of heads of any length, beside the same in double precision.
template <class Codec, bool limited>
double worst_error(std::vector<Head<typename Codec::key_type, typename Codec::value_type>>& heads, int group, int n,
                   const Limits& limits) {
  using Key = typename Codec::key_type;
  using Value = typename Codec::value_type;
  using Stream = BlockStream<Key, Value>;
  using Near = DenseLayoutOf<typename Codec::near_type>;
  constexpr int dim = Codec::head_dim, blocks = 5, width = 8;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const auto entries = heads.size();
  std::vector<Stream> streams;
  for (auto& head : heads) streams.push_back(head.stream());
  int no_rows = 0;
  std::vector<std::byte> nothing(static_cast<std::size_t>(SlicePages::bytes_of_page(Near::bytes)));
  const std::vector<SlicePages> near(entries, {nothing.data(), nullptr, &no_rows, static_cast<int>(nothing.size())});
  std::vector<float> queries(entries * static_cast<std::size_t>(n * group * dim)), out(queries.size(), NAN);
  for (float& x : queries) x = normal(random);
  std::vector<int> position;
  for (auto& head : heads) {
    const int last = head.position.empty() ? 0 : head.position.back();
    for (int i = 0; i < n; ++i) position.push_back(last - 2 * (n - 1 - i));
  }
  const auto items = entries * static_cast<std::size_t>((n * group + width - 1) / width);
  struct Side {
    std::vector<int> first;
    std::vector<SeenSlices> seen;
    std::vector<float> max, sum, rows;
  } side[2];
  for (Side& s : side) {
    s.first.assign(items + 1, -1);
    s.seen.assign(items, {-1, {-1, -1}});
    s.max.assign((items + blocks) * width, NAN);
    s.sum.assign((items + blocks) * width, NAN);
    s.rows.assign((items + blocks) * width * max_basis_dim<Value>, NAN);
  }
  const auto fill = [&](auto& step, Side& s) {
    step.entries = static_cast<int>(entries);
    step.kv_heads = 1;
    step.split = {s.first.data(), 0, blocks};
    step.seen = s.seen.data();
    step.partials = {s.max.data(), s.sum.data(), s.rows.data()};
    step.queries = queries.data();
    step.position = limited ? position.data() : nullptr;
    step.n = n;
    step.group = group;
    step.window = limits.window;
    step.scale = 1 / std::sqrt(static_cast<float>(dim));
    step.cap = limits.cap;
  };
  DecodeStep<float, Stream> body{};
  DecodeStep<float> dense{};
  body.entry = streams.data();
  dense.entry = near.data();
  fill(body, side[0]);
  fill(dense, side[1]);
  SimulatedDevice device;
  REQUIRE(launch_decode<Codec, limited>(device, body, dense, out.data()).ok());
  double worst = 0;
  for (std::size_t e = 0; e < entries; ++e) {
    for (int v = 0; v < n * group; ++v) {
      const auto at = (e * static_cast<std::size_t>(n * group) + static_cast<std::size_t>(v)) * dim;
      const int own = limited ? position[e * static_cast<std::size_t>(n) + static_cast<std::size_t>(v / group)] : 1 << 30;
      reference::Attend options;
      options.window = limits.window;
      options.soft_cap = limits.cap;
      const auto exact =
          reference::attend(queries.data() + at, own, heads[e].keys, heads[e].values, heads[e].position, dim, options);
      double wrong = 0, whole = 0;
      for (std::size_t d = 0; d < dim; ++d) {
        wrong += std::pow(static_cast<double>(out[at + d]) - exact[d], 2);
        whole += exact[d] * exact[d];
      }
      worst = std::max(worst, std::sqrt(wrong / std::max(whole, 1e-30)));
    }
  }
  return worst;
}

template <class Key, class Value = Key>
void check_attention(Key key = {}, Value value = {}) {
  using Codec = KvCodec<Key, Value, Half>;
  std::mt19937 random(7);
  std::vector<Head<Key, Value>> heads;
  for (const std::vector<int>& blocks :
       {std::vector<int>{128, 128, 128, 128, 5, 128, 77}, {}, {1}, {33, 128, 128, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}}) {
    heads.emplace_back(std::span<const int>(blocks), random, key, value);
  }
  // In fp32, or by tensor cores: queries, or weights, are rounded to fp16, by 2^-12.2 on average. The largest of a hundred
  // outputs is off by seven times that at most; a row that is lost or misread is off by a hundredth or more.
  const bool fp32 = std::is_void_v<TensorRowsOf<Key>> && std::is_void_v<TensorRowsOf<Value>>;
  const double bound = fp32 ? 1e-5 : 7 * std::exp2(-12.2);
  CHECK(worst_error<Codec, false>(heads, 3, 1, {}) < bound);
  CHECK(worst_error<Codec, true>(heads, 3, 1, {}) < bound);
  CHECK(worst_error<Codec, true>(heads, 4, 5, {200, 0}) < bound);
  CHECK(worst_error<Codec, true>(heads, 1, 2, {0, 5}) < bound);
}

}  // namespace

TEST_CASE("records begin where their pages say, whatever their sizes") {
  std::mt19937 random(1);
  for (int repeat = 0; repeat < 20; ++repeat) {
    std::vector<int> blocks(1 + random() % 40);
    for (int& n : blocks) n = 1 + static_cast<int>(random() % 128);
    // 496 bytes a row of keys and values beside 16 of the header and padding: some records end with a page.
    Head<Dense<Half, 64>, Dense<Half, 64>> head(blocks, random);
    const auto stream = head.stream();
    std::size_t met = 0, row = 0;
    int end = 0;
    for (int p = 0; p < stream.pages_of(head.bytes); ++p) {
      stream.each_record(p, [&](int offset, const BlockRecord& record) {
        CHECK(offset == end);
        REQUIRE(met < blocks.size());
        CHECK(record.rows == blocks[met++]);
        CHECK(record.first_row == static_cast<int>(row));
        for (int r = 0; r < record.rows; ++r) {
          CHECK(stream.find(static_cast<int>(row)) == offset);
          CHECK(stream.position(offset, r) == head.position[row++]);
        }
        end = offset + record.bytes();
      });
    }
    CHECK(met == blocks.size());
    CHECK(end == head.bytes);
  }
}

TEST_CASE("attention to blocks is that of the decoded rows") {
  check_attention<Rotated<LowRank<Trellis<2, 64>>>>();
  check_attention<Rotated<LowRank<Trellis<3, 128>>>, Rotated<Shifted<Trellis<2, 128, 6>>>>();
  check_attention<Rotated<LowRank<Trellis<1, 64>>>, Rotated<Trellis<3, 64>>>();
  check_attention<Rotated<LowRank<Trellis<4, 256, 8, Half>>>, KiviValues<2, 256>>();
  check_attention<Rotated<Shifted<Short2<128>>>, TurboQuant<2, 128>>();
  check_attention<Rotated<LowRank<LloydMax<1, 64>>>, Rotated<LowRank<LloydMax<4, 64>>>>();
  check_attention<KiviKeys<2, 40>, KiviValues<2, 40>>();
}

TEST_CASE("each head reads its blocks by its own codec") {
  using Some = OneOf<TurboQuant<3, 64>, Rotated<LowRank<Short2<64>>>, KiviKeys<4, 64>, TurboQuantUnbiased<2, 64>>;
  for (int i = 0; i < Some::size; ++i) {
    Some keys, values;
    keys.index = i;
    values.index = Some::size - 1 - i;
    check_attention(keys, values);
  }
}
