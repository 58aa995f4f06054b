// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "kvtailor/codec/group_int.hpp"
#include "kvtailor/codec/trellis.hpp"
#include "kvtailor/codec/turbo_quant_unbiased.hpp"
#include "reference/split_decode.hpp"

using namespace kvt;
using reference::DecodeCase;

TEST_CASE("every slice of every entry belongs to one block, and no two results share a slot") {
  std::mt19937 random(1);
  for (int repeat = 0; repeat < 300; ++repeat) {
    const int entries = 1 + static_cast<int>(random() % 9), blocks = 1 + static_cast<int>(random() % 40);
    std::vector<int> first(1, 0);
    for (int e = 0; e < entries; ++e) {
      first.push_back(first.back() + (random() % 3 == 0 ? 0 : static_cast<int>(random() % (repeat % 2 == 0 ? 4 : 90))));
    }
    const SplitDecode split{first.data(), entries, blocks};
    std::vector<int> taken(static_cast<std::size_t>(first.back()), 0), slot(static_cast<std::size_t>(split.slots()), 0);
    int least = first.back(), most = 0;
    for (int b = 0; b < blocks; ++b) {
      int own = 0;
      for (int e = 0; e < entries; ++e) {
        const auto share = split.share(b, e);
        if (share.empty()) continue;
        ++slot[static_cast<std::size_t>(b + e)];
        own += share.to - share.from;
        for (int s = share.from; s < share.to; ++s) {
          const int at = first[static_cast<std::size_t>(e)] + s;
          ++taken[static_cast<std::size_t>(at)];
          CHECK(split.block_of(at) == b);
          CHECK(split.item_of(at) == e);
        }
      }
      least = std::min(least, own);
      most = std::max(most, own);
    }
    for (const int n : taken) CHECK(n == 1);
    for (const int n : slot) CHECK(n <= 1);
    CHECK(most - least <= 1);
  }
}

TEST_CASE("the slices of an item are those that hold a row its queries may see") {
  constexpr int slice_bytes = 128, page_bytes = static_cast<int>(SlicePages::bytes_of_page(slice_bytes));
  std::mt19937 random(2);
  const auto up_to = [&](int most) { return static_cast<int>(random() % static_cast<unsigned>(most + 1)); };
  int saved = 0, extra = 0;
  for (int repeat = 0; repeat < 400; ++repeat) {
    const int sequences = 1 + up_to(2), kv_heads = 1 + up_to(1), entries = sequences * kv_heads, group = 1 + up_to(8);
    const int n = 1 + up_to(repeat % 10 == 0 ? 300 : 20), window = repeat % 3 == 0 ? 0 : 1 + up_to(700), gap = repeat % 4;
    std::vector<std::vector<int>> pool, rows(static_cast<std::size_t>(entries));  // rows: their positions
    std::vector<int> count(static_cast<std::size_t>(entries)), position;
    std::vector<SlicePages> pages;
    for (std::size_t e = 0; e < rows.size(); ++e) {
      count[e] = repeat % 7 == 0 ? up_to(2) : up_to(600);
      pool.emplace_back(static_cast<std::size_t>((count[e] / SlicePages::page_rows + 1) * page_bytes / 4), -1);
      pages.push_back({reinterpret_cast<std::byte*>(pool.back().data()), nullptr, &count[e], page_bytes});
      int last = up_to(3) - 1;
      for (int r = 0; r < count[e]; ++r) {
        rows[e].push_back(pages[e].positions(r / slice_rows, slice_bytes)[r % slice_rows] = last += 1 + up_to(gap));
      }
    }
    for (int q = 0; q < sequences * n; ++q) position.push_back(up_to(900) + (q % n) / 2);
    for (const bool null : {false, true}) {
      DecodeStep<float> step{};
      step.entry = pages.data();
      step.entries = entries;
      step.kv_heads = kv_heads;
      step.position = null ? nullptr : position.data();
      step.n = n;
      step.group = group;
      step.window = null ? 0 : window;
      step.width = repeat % 2 == 0 ? 8 : 16;
      step.split.items = entries * step.tiles();
      const auto items = static_cast<std::size_t>(step.split.items);
      std::vector<int> first(items + 1, -1);
      std::vector<SeenSlices> seen(items);
      step.split.first_slice = first.data();
      step.seen = seen.data();
      SimulatedDevice device;
      REQUIRE(device.launch(CountWork<float>{step, step, slice_bytes, slice_bytes}, 1).ok());
      CHECK(first[0] == 0);
      for (std::size_t x = 0; x < items; ++x) {
        const auto e = x / static_cast<std::size_t>(step.tiles());
        const int* const own = position.data() + e / static_cast<std::size_t>(kv_heads) * static_cast<std::size_t>(n);
        const int vector = static_cast<int>(x) % step.tiles() * step.width, end = std::min(n * group, vector + step.width);
        const int counted = first[x + 1] - first[x], all = (count[e] + slice_rows - 1) / slice_rows;
        CHECK(counted >= 0);
        CHECK(seen[x].first + counted <= all);
        int needed = 0, whole = 0, marked = 0;  // slices that hold a row in reach; that all see; that are said to be so
        for (int slice = 0; slice < all; ++slice) {
          bool any = false, each = true, in_reach = false;
          for (int r = slice * slice_rows; r < std::min(count[e], (slice + 1) * slice_rows); ++r) {
            bool after = true, before = true;  // of all queries
            for (int v = vector; v < end; ++v) {
              const int q = own[v / group], row = rows[e][static_cast<std::size_t>(r)];
              const bool late = !null && row > q, early = !null && window > 0 && row <= q - window;
              any |= !late && !early;
              each &= !late && !early;
              after &= late;
              before &= early;
            }
            in_reach |= !after && !before;
          }
          const bool taken = slice >= seen[x].first && slice < seen[x].first + counted;
          const bool said = slice >= seen[x].whole.from && slice < seen[x].whole.to;
          if (any) CHECK(taken);
          if (said) CHECK(each);
          needed += in_reach;
          whole += each;
          marked += said;
        }
        CHECK(counted <= needed + (step.window > 0 ? 1 : 0));
        CHECK(marked >= whole - 2);
        saved += all - counted;
        extra += counted - needed;
      }
    }
  }
  CHECK(saved > 10000);
  CHECK(extra < saved / 50);
}

TEST_CASE("a decode step over ragged heads") {
  // Encoded rows, dense rows; no rows at all in one entry and in another only dense ones.
  const DecodeCase ragged{{700, 0, 33, 1, 0, 129}, {36, 0, 4, 40, 17, 0}, 3, 5};
  CHECK(reference::decode_error<4, 4, 64>(ragged) <= 1);
  CHECK(reference::decode_error<3, 2, 128>(ragged) <= 1);
  CHECK(reference::decode_error<16, 16, 64>(ragged) <= 1);
  CHECK(reference::decode_error<4, 4, 64, true>({{700, 0, 33, 1, 0, 129}, {36, 0, 4, 40, 17, 0}, 3, 5, 60}) <= 1);
  // More query heads than a fragment has columns, more blocks than slices.
  CHECK(reference::decode_error<2, 2, 64>({{40, 65}, {4, 4}, 12, 50}) <= 1);
  CHECK(reference::decode_error<2, 2, 64>({{3000}, {1}, 1, 7}) <= 1);
}

TEST_CASE("chunks of queries over ragged heads, each up to its own position") {
  // Three sequences of two KV heads, of which one is shorter; one sequence is empty, and of some queries no row is seen.
  const auto check = [](int n, int group, int window, bool wide) {
    CAPTURE(n);
    CAPTURE(group);
    CAPTURE(window);
    CAPTURE(wide);
    DecodeCase c{{300, 129, 0, 0, 0, 33}, {37, 36, 0, 0, 17, 4}, group, 5, window, n, 2};
    c.cap = n % 2 == 0 ? 5.f : 0.f;
    c.sinks = n % 3 == 0;
    if (n == 8) c.own = {8, 0, 5};
    CHECK((wide ? reference::decode_error<3, 2, 64, true, 16>(c) : reference::decode_error<4, 4, 64, true>(c)) <= 1);
  };
  for (const int n : {1, 2, 7, 8, 9, 33}) {
    for (const int group : {1, 3, 4, 8, 9}) check(n, group, n * group % 2 == 0 ? 0 : 60, (n + group) % 3 != 0);
  }
  for (const int window : {1, 3, 96, 97, 98, 500}) check(9, 4, window, true);
}

TEST_CASE("sixteen vectors at a time for every head dim and width that decoding has them for") {
  const DecodeCase c{{300, 40}, {37, 33}, 4, 7, 250, 5};
  CHECK(reference::decode_error<1, 1, 64, true, 16>(c) <= 1);
  CHECK(reference::decode_error<5, 6, 80, true, 16>(c) <= 1);
  CHECK(reference::decode_error<4, 3, 96, true, 16>(c) <= 1);
  CHECK(reference::decode_error<16, 16, 112, true, 16>(c) <= 1);
  CHECK(reference::decode_error<2, 2, 128, true, 16>(c) <= 1);
  CHECK(reference::decode_error<6, 5, 128, true, 16>(c) <= 1);
  CHECK(reference::decode_error<3, 4, 192, true>(c) <= 1);
  CHECK(reference::decode_error<4, 4, 256, true>(c) <= 1);
}

namespace {

// Steps and chunks of ragged heads, all in fp32: lengths that are no multiples of four, 32 or 128, and none at all.
template <class Key, class Value = Key, class Near = float>
void check_rows() {
  using Codec = KvCodec<Key, Value, Near>;
  constexpr int widest = widest_decode<Key, Value>;
  CAPTURE(Codec::head_dim);
  const DecodeCase ragged{{301, 0, 33, 1, 0, 129}, {36, 0, 4, 39, 17, 0}, 3, 5};
  CHECK(reference::decode_error<Codec>(ragged) <= 1);
  DecodeCase limited = ragged;
  limited.window = 70;
  limited.sinks = true;
  CHECK(reference::decode_error<Codec, true>(limited) <= 1);
  DecodeCase chunk{{300, 131, 0, 0, 0, 33}, {37, 36, 0, 0, 17, 4}, 4, 5, 250, 5, 2};
  chunk.own = {5, 0, 3};
  CHECK(reference::decode_error<Codec, true, widest>(chunk) <= 1);
  chunk.cap = 5;
  CHECK(reference::decode_error<Codec, true, widest>(chunk) <= 1);
}

}  // namespace

TEST_CASE("rows of every codec that decodes them one by one, in fp32") {
  check_rows<Dense<float, 64>>();
  check_rows<Dense<BFloat16, 256>, Dense<float, 256>>();
  check_rows<Dense<Half, 40>, Dense<Half, 40>, Half>();
  check_rows<Q8_0<128>, Q4_0<128>>();
  check_rows<Q5_0<40>, Q8_0<40>, Half>();
  check_rows<Rotated<Q4_1<96>>, GroupInt<2, 96, IntRange::asymmetric>>();
  check_rows<Rotated<Trellis<3, 80>>, Rotated<Trellis<2, 80>>>();
  check_rows<TurboQuantUnbiased<3, 64>>();
  check_rows<TurboQuantUnbiased<1, 40>, TurboQuantUnbiased<2, 40, Sketch::gaussian>>();
  check_rows<TurboQuantUnbiased<4, 256>>();
  check_rows<TurboQuant<3, 40>, TurboQuant<6, 40>, Half>();
  check_rows<TurboQuant<2, 192, NormCorrection::least_squares, LogScale>, TurboQuant<4, 192>>();
}
