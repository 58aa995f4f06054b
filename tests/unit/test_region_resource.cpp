// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "kvtailor/host/region_resource.hpp"
#include "kvtailor/kvtailor.hpp"

namespace {

constexpr std::size_t region = std::size_t{1} << 18;

struct Piece {
  unsigned char* at;
  std::size_t bytes, alignment;
  unsigned char filled;

  bool intact() const {
    return std::all_of(at, at + bytes, [this](unsigned char x) { return x == filled; });
  }
};

Piece take(kvt::RegionResource& memory, std::size_t bytes, std::size_t alignment, unsigned char fill) {
  const Piece piece{static_cast<unsigned char*>(memory.allocate(bytes, alignment)), bytes, alignment, fill};
  std::memset(piece.at, fill, bytes);
  return piece;
}

bool give_back(kvt::RegionResource& memory, const Piece& piece) {
  const bool intact = piece.intact() && reinterpret_cast<std::uintptr_t>(piece.at) % piece.alignment == 0;
  memory.deallocate(piece.at, piece.bytes, piece.alignment);
  return intact;
}

// Pieces of every size come and go.
bool take_and_give(kvt::RegionResource& memory, unsigned seed, int steps) {
  std::mt19937 random(seed);
  std::vector<Piece> pieces;
  bool fine = true;
  for (int i = 0; i < steps; ++i) {
    if (!pieces.empty() && random() % 2 == 0) {
      std::swap(pieces[random() % pieces.size()], pieces.back());
      fine = give_back(memory, pieces.back()) && fine;
      pieces.pop_back();
    } else {
      const std::size_t most = i % 50 == 0 ? 300'000 : i % 7 == 0 ? 40'000 : 900;
      pieces.push_back(
          take(memory, 1 + random() % most, std::size_t{1} << random() % 8, static_cast<unsigned char>(random() % 256)));
    }
  }
  for (const Piece& piece : pieces) fine = give_back(memory, piece) && fine;
  return fine;
}

}  // namespace

TEST_CASE("pieces of every size and alignment keep what is in them, and all goes back") {
  kvt::RegionResource memory;
  CHECK(take_and_give(memory, 1, 20000));
  for (const std::size_t alignment : {std::size_t{4096}, std::size_t{8192}, region}) {
    CHECK(give_back(memory, take(memory, 100, alignment, 7)));
    CHECK(give_back(memory, take(memory, 200'000, alignment, 7)));
  }
  CHECK(memory.held() <= 2 * region);  // which are being filled
}

TEST_CASE("what is made together goes back together, whatever was made before and after") {
  kvt::RegionResource memory;
  std::vector<Piece> old, made, stay;
  for (int generation = 0; generation < 20; ++generation) {
    for (int i = 0; i < 400; ++i) made.push_back(take(memory, 8704, 64, static_cast<unsigned char>(generation)));
    stay.push_back(take(memory, 512, 64, 1));
    for (const Piece& piece : old) CHECK(give_back(memory, piece));
    old.swap(made);
    made.clear();
    CHECK(memory.held() <= 17 * region);  // 400 pieces fill 14, of which the first and the last have others too
  }
  for (const Piece& piece : old) CHECK(give_back(memory, piece));
  for (const Piece& piece : stay) CHECK(give_back(memory, piece));
}

TEST_CASE("threads take from it at once") {
  kvt::RegionResource memory;
  bool fine = false;
  std::thread other([&] { fine = take_and_give(memory, 1, 3000); });
  CHECK(take_and_give(memory, 2, 3000));
  other.join();
  CHECK(fine);
  CHECK(memory.held() <= 2 * region);
}

TEST_CASE("a cache that is cut as it grows holds little more than it says, and is the same cache") {
  constexpr int dim = 64, layers = 8, heads = 4, part = 256;
  kvt::RegionResource memory;
  std::vector<float> outputs[2];
  for (const bool regions : {true, false}) {
    kvt::KvCache<kvt::Adaptive, kvt::KeyDiff, kvt::KvCodec<kvt::TurboQuant<4, dim>>> cache;
    kvt::CacheOptions options;
    if (regions) options.memory = &memory;
    REQUIRE(cache.init({layers, heads, heads, dim}, options).ok());
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    std::vector<float> rows(std::size_t{part} * heads * dim);
    std::vector<int> positions(part);
    for (int at = 0; at < 16 * part; at += part) {
      for (int i = 0; i < part; ++i) positions[static_cast<std::size_t>(i)] = at + i;
      for (int l = 0; l < layers; ++l) {
        // Keys of the first head are unlike one another: it keeps all its rows, in blocks between those of heads that do not.
        for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = i / dim % heads == 0 ? normal(random) : 1 + normal(random) / 20;
        REQUIRE(cache.append(l, rows.data(), rows.data(), positions).ok());
      }
      REQUIRE(cache.compress(kvt::Retain::rows((at + part) / 4 + 100)).ok());
    }
    if (regions) CHECK(static_cast<double>(memory.held()) < 1.15 * static_cast<double>(cache.memory().total()) + 3.0 * region);
    auto& out = outputs[regions ? 0 : 1];
    out.resize(std::size_t{heads} * dim);
    const std::vector<int> last = {16 * part - 1};
    REQUIRE(cache.attend(1, rows.data(), last, {}, out.data()).ok());
  }
  CHECK(memory.held() <= 2 * region);
  CHECK(outputs[0] == outputs[1]);
}
