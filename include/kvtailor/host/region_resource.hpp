// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// RegionResource: memory for caches that are cut again and again, of which the system gets back what cuts give back.
//
//   kvt::RegionResource memory;
//   kvt::Status status = cache.init(geometry, {.memory = &memory});
//
// What a cut gives back lies scattered, and a heap keeps a page as long as a part of it is in use: blocks of 4 KiB of which one
// in four is left can hold three times their size. But a cut makes anew what is left, so that what was given out in one order
// comes back in nearly the same. Regions of 256 KiB are filled from the front and go back when nothing in them is in use; holes
// are not filled. Small pieces, which may stay for long, have regions of their own, and large ones pages of their own.
//
// Any thread may use it. It must outlive what it gave out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kvt::inline v0 {

class RegionResource : public std::pmr::memory_resource {
 public:
  RegionResource() = default;
  RegionResource(const RegionResource&) = delete;
  RegionResource& operator=(const RegionResource&) = delete;
  ~RegionResource() override {
    for (Region* const region : filling_) leave(region);
  }

  // Bytes that are held of the system.
  std::size_t held() const {
    const std::lock_guard lock(mutex_);
    return held_;
  }

 private:
  static constexpr std::size_t region_bytes = std::size_t{1} << 18, page = 4096, small_bytes = 1024;
  struct alignas(std::max_align_t) Region {
    std::size_t live = 0, used = sizeof(Region);  // bytes in use, and those given out from the front on
  };

  static bool large(std::size_t bytes, std::size_t alignment) { return bytes + alignment > region_bytes / 4; }
  static std::size_t round_up(std::size_t at, std::size_t to) { return (at + to - 1) / to * to; }

  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    const std::lock_guard lock(mutex_);
    if (large(bytes, alignment)) return map(round_up(bytes, page), alignment);
    Region*& filling = filling_[bytes <= small_bytes ? 0 : 1];
    std::size_t at = filling == nullptr ? region_bytes : round_up(filling->used, alignment);
    if (at + bytes > region_bytes) {
      auto* const next = new (map(region_bytes, region_bytes)) Region;
      leave(filling);
      filling = next;
      at = round_up(next->used, alignment);
    }
    filling->used = at + bytes;
    filling->live += bytes;
    return reinterpret_cast<char*>(filling) + at;
  }

  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override {
    const std::lock_guard lock(mutex_);
    if (large(bytes, alignment)) return unmap(p, round_up(bytes, page), alignment);
    auto* const region = reinterpret_cast<Region*>(reinterpret_cast<std::uintptr_t>(p) & ~(region_bytes - 1));
    region->live -= bytes;
    if (region != filling_[0] && region != filling_[1]) return leave(region);
    // The last piece, or the only one, can be given out again.
    const auto at = static_cast<std::size_t>(static_cast<char*>(p) - reinterpret_cast<char*>(region));
    if (region->live == 0) {
      region->used = sizeof(Region);
    } else if (at + bytes == region->used) {
      region->used = at;
    }
  }

  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

  void leave(Region* region) {
    if (region != nullptr && region->live == 0) unmap(region, region_bytes, region_bytes);
  }

  // Pages at a multiple of `alignment`, a power of two.
  void* map(std::size_t bytes, std::size_t alignment) {
#if defined(__linux__)
    const std::size_t more = alignment > page ? alignment : 0;
    void* const got = mmap(nullptr, bytes + more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    auto* const from = static_cast<char*>(got);
    char* at = from;
    if (more != 0) {
      at += round_up(reinterpret_cast<std::uintptr_t>(from), alignment) - reinterpret_cast<std::uintptr_t>(from);
      if (at != from) munmap(from, static_cast<std::size_t>(at - from));
      if (at != from + more) munmap(at + bytes, static_cast<std::size_t>(from + more - at));
    }
#else
    void* const at = ::operator new(bytes, std::align_val_t(alignment > page ? alignment : page));
#endif
    held_ += bytes;
    return at;
  }

  void unmap(void* p, std::size_t bytes, [[maybe_unused]] std::size_t alignment) {
    held_ -= bytes;
#if defined(__linux__)
    munmap(p, bytes);
#else
    ::operator delete(p, std::align_val_t(alignment > page ? alignment : page));
#endif
  }

  mutable std::mutex mutex_;
  Region* filling_[2] = {};  // with small pieces, and with others
  std::size_t held_ = 0;
};

}  // namespace kvt::inline v0
