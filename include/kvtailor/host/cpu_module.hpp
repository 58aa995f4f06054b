// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// CpuModule: caches by name whose host kernels are chosen when the program runs.
//
// Headers compiled for several processors cannot share an image: the linker keeps one copy of each inline function, whoever
// calls it. So each instruction set has a shared module of its own, which exports one function and nothing else
// (kvt_add_cpu_modules() of cmake/cpu_modules.cmake builds them, cpu_module_source.hpp is what they are made of):
//
//   kvt::CpuModule module;
//   kvt::Status status = module.open("/usr/lib/program/caches");   // caches-x86-64-v4.so, or the best that fits
//   kvt::MadeCache made = module.make_cache({"adaptive", "snap_kv", "turbo3/turbo2"}, geometry);
//
// All that an AnyCache does, the tasks it plans too, is code of the module. Program and module share the standard library and
// the compiler's ABI, or the module is refused. No exception crosses. A module that was opened stays until the program ends,
// so caches and the text of a Status may outlive the CpuModule. Needs dlopen() and ELF.
#pragma once

#include <dlfcn.h>
#include <link.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kvtailor/any_cache.hpp"
#include "kvtailor/core/simd.hpp"
#include "kvtailor/io/file.hpp"
#include "kvtailor/version.hpp"

// Which of kvt::known_cpus this is compiled for, by what the kernels ask for themselves.
#if !defined(__x86_64__)
#define KVT_COMPILED_CPU "portable"
#elif defined(KVT_HOST_AVX512)
#define KVT_COMPILED_CPU "x86-64-v4"
#elif defined(KVT_HOST_AVX2) && defined(__F16C__)
#define KVT_COMPILED_CPU "x86-64-v3"
#else
#define KVT_COMPILED_CPU "x86-64"
#endif

namespace kvt::inline v0 {

// What modules are built for, best first. x86-64-v4 stands for what came with Ice Lake and Zen 4: VBMI, VBMI2 and VNNI as well.
inline constexpr auto known_cpus = std::to_array<std::string_view>({
#if defined(__x86_64__)
  "x86-64-v4", "x86-64-v3", "x86-64"
#else
  "portable"
#endif
});

namespace detail {

// What a module says of itself. Read from the file before any of its code runs: constructors may use all instructions too.
struct CpuModuleTag {
  char magic[24];
  std::uint32_t version;
  std::uint32_t abi;
  char cpu[16];  // a string
};

// A digest of all that the two sides must see alike: the language's and the library's ABI, and the types that cross.
constexpr std::uint32_t cpu_module_abi() {
  std::uint32_t digest = 2166136261u;
  for (const std::uint64_t fact : std::initializer_list<std::uint64_t> {
#if defined(__GXX_ABI_VERSION)
         __GXX_ABI_VERSION,
#endif
#if defined(_GLIBCXX_USE_CXX11_ABI)
             _GLIBCXX_USE_CXX11_ABI,
#elif defined(_LIBCPP_ABI_VERSION)
           1000 + _LIBCPP_ABI_VERSION,
#endif
             sizeof(std::string), sizeof(std::vector<int>), sizeof(std::shared_ptr<int>), sizeof(Status), sizeof(Geometry),
             sizeof(CacheOptions), sizeof(AttendOptions), sizeof(AttendPlan), sizeof(Memory), sizeof(Retain),
             sizeof(Composition), sizeof(MadeCache)
       }) {
    digest = (digest ^ static_cast<std::uint32_t>(fact)) * 16777619u;
  }
  return digest;
}

inline constexpr CpuModuleTag cpu_module_tag = {"kvtailor CPU module", KVT_VERSION, cpu_module_abi(), KVT_COMPILED_CPU};

struct CpuModuleTable {
  CpuModuleTag tag;
  MadeCache (*make_cache)(const Composition&, const Geometry&, const CacheOptions&, std::span<const std::string>) noexcept;
  Status (*set_policies)(AnyCache&, const Composition&, std::string& message) noexcept;
};

// Whether this processor, and the system's saving of registers, can run what is compiled for one of known_cpus.
inline bool processor_runs(std::string_view cpu) {
#if defined(__x86_64__)
  const auto all = [](unsigned bits, std::initializer_list<int> wanted) {
    for (const int bit : wanted) {
      if ((bits >> bit & 1u) == 0) return false;
    }
    return true;
  };
  if (cpu == "x86-64") return true;
  unsigned a = 0, b = 0, c = 0, d = 0;
  // SSE3, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, OSXSAVE, AVX, F16C
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !all(c, {0, 9, 12, 13, 19, 20, 22, 23, 27, 28, 29})) return false;
  unsigned saved = 0, high = 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!all(saved, {1, 2})) return false;                                                 // xmm, ymm
  if (__get_cpuid(0x80000001, &a, &b, &c, &d) == 0 || !all(c, {0, 5})) return false;     // LAHF, LZCNT
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || !all(b, {3, 5, 8})) return false;  // BMI1, AVX2, BMI2
  if (cpu == "x86-64-v3") return true;
  // Masks and zmm; AVX-512 F, DQ, CD, BW, VL; VBMI, VBMI2, VNNI
  return cpu == "x86-64-v4" && all(saved, {5, 6, 7}) && all(b, {16, 17, 28, 30, 31}) && all(c, {1, 6, 11});
#else
  return cpu == "portable";
#endif
}

// Whether all that the loader would map is in the file: to touch what is not ends the process.
inline bool is_whole_elf(std::string_view bytes) {
  const auto read = [bytes](std::uint64_t at, auto& to) {
    if (at > bytes.size() || bytes.size() - at < sizeof to) return false;
    std::memcpy(&to, bytes.data() + at, sizeof to);
    return true;
  };
  ElfW(Ehdr) head;
  if (!read(0, head) || std::memcmp(head.e_ident, ELFMAG, SELFMAG) != 0) return false;
  for (std::uint64_t i = 0; i < head.e_phnum; ++i) {
    ElfW(Phdr) part;
    if (!read(head.e_phoff + i * sizeof part, part)) return false;
    if (part.p_type == PT_LOAD && (part.p_offset > bytes.size() || part.p_filesz > bytes.size() - part.p_offset)) return false;
  }
  return true;
}

}  // namespace detail

// Copies share the module.
class CpuModule {
 public:
  // Takes the best of PREFIX-CPU.so, CPU one of known_cpus, that is there and that this processor runs; a prefix without a
  // folder is beside the program. A `cpu`, or the environment's KVT_CPU where that is empty, asks for one and no other. A file
  // that is there and is no module of this version and ABI is an error, not passed over. On failure what was open stays.
  Status open(const std::string& prefix, std::string_view cpu = {}) noexcept try {
    message_.clear();
    const char* const asked = std::getenv("KVT_CPU");
    if (cpu.empty() && asked != nullptr) cpu = asked;
    const std::string base = prefix.find('/') == prefix.npos ? program_folder() + prefix : prefix;
    bool known = false, runs = false;
    std::string names;
    for (const std::string_view each : known_cpus) {
      names += (names.empty() ? "" : ", ") + std::string(each);
      if (!cpu.empty() && cpu != each) continue;
      known = true;
      if (!detail::processor_runs(each)) continue;
      runs = true;
      const std::string path = base + '-' + std::string(each) + ".so";
      if (std::error_code ignored; std::filesystem::exists(path, ignored)) return load(path, each);
    }
    const std::string wanted = cpu.empty() ? "any of " + names : std::string(cpu);
    if (!known) {
      return refuse(error(Errc::bad_name, "there are no host kernels of this name"), wanted + "; known are " + names);
    }
    if (!runs) return refuse(error(Errc::bad_value, "this processor lacks instructions of these host kernels"), wanted);
    return refuse(error(Errc::bad_name, "there is no module of host kernels that this processor runs"),
                  base + "-CPU.so for " + wanted);
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while opening a module");
  }

  // One of known_cpus, by what the compiler was allowed to use; empty before open() succeeded.
  std::string_view cpu() const noexcept { return table_ != nullptr ? table_->tag.cpu : std::string_view(); }
  // Why open() failed, in one sentence with names.
  const std::string& message() const noexcept { return message_; }

  // make_cache() of compose.hpp, for the head dims and codecs of the module.
  MadeCache make_cache(const Composition& names, const Geometry& geometry, const CacheOptions& options = {},
                       std::span<const std::string> head_codecs = {}) const {
    if (table_ == nullptr) return {nullptr, unopened(), unopened().message()};
    return table_->make_cache(names, geometry, options, head_codecs);
  }
  // AnyCache::set_policies() with those of the module, whose scores then are its code too. The message is one about names.
  Status set_policies(AnyCache& cache, const Composition& names, std::string& message) const {
    return table_ != nullptr ? table_->set_policies(cache, names, message) : unopened();
  }

 private:
  static Status unopened() { return error(Errc::bad_name, "no module of host kernels is open"); }

  static std::string program_folder() {
    std::error_code ignored;
    const auto program = std::filesystem::read_symlink("/proc/self/exe", ignored);
    return program.has_parent_path() ? program.parent_path().string() + '/' : "./";
  }

  Status refuse(const Status& status, const std::string& what) {
    message_ = status.message() + ": " + what;
    return status;
  }

  Status load(const std::string& path, std::string_view cpu) {
    std::string bytes;
    if (const Status read = detail::read_file(path, bytes); !read.ok()) return refuse(read, path);
    detail::CpuModuleTag tag;
    const auto at = bytes.find(std::string_view(detail::cpu_module_tag.magic, sizeof tag.magic));
    if (at == bytes.npos || bytes.size() - at < sizeof tag || !detail::is_whole_elf(bytes)) {
      return refuse(error(Errc::bad_name, "the file is not a module of host kernels, or not all of one"), path);
    }
    std::memcpy(&tag, bytes.data() + at, sizeof tag);
    if (tag.version != KVT_VERSION) {
      return refuse(error(Errc::bad_value, "the module is of version {}; this program takes {}", tag.version, KVT_VERSION),
                    path);
    }
    if (tag.abi != detail::cpu_module_abi()) {
      return refuse(error(Errc::bad_value, "the module was built with another compiler or standard library"), path);
    }
    tag.cpu[sizeof tag.cpu - 1] = '\0';
    if (tag.cpu != cpu) {
      return refuse(error(Errc::bad_name, "the module is for another processor than its name says"),
                    path + " is for " + tag.cpu);
    }
    void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) return refuse(error(Errc::bad_name, "the module cannot be loaded"), dlerror());
    using Entry = const detail::CpuModuleTable*();
    const auto entry = reinterpret_cast<Entry*>(dlsym(handle, "kvt_cpu_module"));
    if (entry == nullptr) {
      dlclose(handle);
      return refuse(error(Errc::bad_name, "the module lacks its function kvt_cpu_module"), path);
    }
    table_ = entry();
    return success();
  }

  const detail::CpuModuleTable* table_ = nullptr;
  std::string message_;
};

}  // namespace kvt::inline v0
