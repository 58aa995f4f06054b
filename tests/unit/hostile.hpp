// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What readers of files are met with: damaged files, and memory that is counted and runs out. For one source of a program.
#pragma once

#include <cstdlib>
#include <iterator>
#include <new>
#include <random>
#include <string>
#include <vector>

inline long long allocated = 0;  // bytes that were ever asked for
inline int until_failure = -1;   // allocations that still succeed; -1: all

// Not inlined: GCC takes malloc and delete for a mismatch otherwise.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  allocated += static_cast<long long>(bytes);
  if (until_failure == 0) throw std::bad_alloc();
  if (until_failure > 0) --until_failure;
  void* const p = std::malloc(bytes > 0 ? bytes : 1);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }

// One of the files with parts moved, doubled, cut out and made up.
template <std::size_t num_pieces>
std::string damaged(const std::vector<std::string>& files, const std::string (&pieces)[num_pieces], std::mt19937& random) {
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  std::string file = files[below(files.size())];
  for (std::size_t k = 1 + below(4); k > 0; --k) {
    const std::size_t at = below(file.size() + 1), n = below(file.size() - at + 1) % 24;
    switch (random() % 6) {
      case 0:
        file.erase(at, n);
        break;
      case 1:
        file.insert(below(file.size() + 1), file.substr(at, n));
        break;
      case 2:
        file.insert(at, pieces[below(num_pieces)]);
        break;
      case 3:
        file.replace(at, n, pieces[below(num_pieces)]);
        break;
      case 4:
        if (at < file.size()) file[at] = static_cast<char>(random());
        break;
      default: {
        const std::string& other = files[below(files.size())];
        file = file.substr(0, at) + other.substr(below(other.size()));
      }
    }
  }
  return file;
}
