// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Modules of host kernels, opened by a program that is compiled for the least processor. That each holds the instructions of
// its own and shows one symbol is for cmake/check_modules.cmake; here it is code of the opened one that runs.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "files.hpp"
#include "kvtailor/host/cpu_module.hpp"
#include "kvtailor/kvtailor.hpp"
#include "kvtailor/policies.hpp"
#include "reference/plain.hpp"

using namespace kvt;

namespace {

constexpr int dim = 64;
constexpr Geometry shape{1, 2, 6, dim};
const std::string prefix = KVT_TEST_MODULES;  // modules/module.cpp

std::string path_of(std::string_view cpu) { return prefix + '-' + std::string(cpu) + ".so"; }

// Those that this processor runs; what it lacks is told.
std::vector<std::string_view> runnable() {
  std::vector<std::string_view> out;
  for (const std::string_view cpu : known_cpus) {
    if (detail::processor_runs(cpu)) {
      out.push_back(cpu);
    } else {
      MESSAGE("skipped: this processor lacks instructions of " << cpu);
    }
  }
  return out;
}

// The file whose code a cache is.
std::string file_of(const AnyCache& cache) {
  Dl_info info{};
  void* table = nullptr;
  std::memcpy(&table, static_cast<const void*>(&cache), sizeof table);
  REQUIRE(dladdr(table, &info) != 0);
  return std::filesystem::canonical(info.dli_fname).string();
}

struct Rows {
  std::vector<float> keys, values, queries;
  std::vector<int> positions;

  explicit Rows(int n) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int size) {
      x.resize(static_cast<std::size_t>(size));
      for (float& v : x) v = normal(random);
    };
    fill(keys, n * shape.num_kv_heads * dim);
    fill(values, n * shape.num_kv_heads * dim);
    fill(queries, shape.num_q_heads * dim);
    for (int i = 0; i < n; ++i) positions.push_back(i);
  }
  std::span<const int> last() const { return std::span(positions).last(1); }
};

// The zones around the blocks are small, so that most rows are codes.
const CacheOptions zones{.sink_rows = 2, .recent_rows = 8, .block_rows = 64};

Status fill(AnyCache& cache, const Rows& rows) {
  KVT_TRY(cache.append(0, rows.keys.data(), rows.values.data(), rows.positions));
  return cache.flush();
}

std::vector<float> attend(const AnyCache& cache, const Rows& rows) {
  std::vector<float> out(rows.queries.size(), std::nanf(""));
  AttendPlan plan;
  REQUIRE(cache.plan(0, rows.queries.data(), rows.last(), {}, out.data(), plan).ok());
  run_tasks(plan, 2);
  return out;
}

// Largest distance of what a module gives from double precision on the rows that the codec, compiled here, decodes to.
template <class Codec>
double error_of(const CpuModule& module, const char* codec, const Rows& rows, std::vector<float>& out) {
  KvCache<Uniform, SinkRecent, Codec> plain;
  REQUIRE(plain.init(shape, zones).ok());
  REQUIRE(plain.append(0, rows.keys.data(), rows.values.data(), rows.positions).ok());
  REQUIRE(plain.flush().ok());
  const MadeCache made = module.make_cache({"uniform", "sink_recent", codec}, shape, zones);
  CAPTURE(made.message);
  REQUIRE(made.status.ok());
  CHECK(file_of(*made.cache) == std::filesystem::canonical(path_of(module.cpu())).string());
  REQUIRE(fill(*made.cache, rows).ok());
  out = attend(*made.cache, rows);
  double worst = 0;
  for (int h = 0; h < shape.num_q_heads; ++h) {
    const int kv_head = h / shape.group_size();
    const auto n = static_cast<std::size_t>(plain.num_rows(0, kv_head));
    REQUIRE(made.cache->num_rows(0, kv_head) == static_cast<int>(n));
    std::vector<float> keys(n * dim), values(n * dim);
    plain.decode(0, kv_head, keys.data(), values.data());
    const auto want =
        reference::attend(rows.queries.data() + h * dim, rows.positions.back(), keys, values, rows.positions, dim, {});
    for (int d = 0; d < dim; ++d) {
      const double e = std::fabs(want[static_cast<std::size_t>(d)] - double(out[static_cast<std::size_t>(h * dim + d)]));
      worst = e <= worst ? worst : e;  // a NaN stays
    }
  }
  return worst;
}

// A file of a module with one thing changed wherever it says what it is.
template <class Change>
std::string altered(std::string bytes, Change change) {
  const std::string_view magic(detail::cpu_module_tag.magic, sizeof detail::cpu_module_tag.magic);
  int tags = 0;
  for (auto at = bytes.find(magic); at != bytes.npos; at = bytes.find(magic, at + 1), ++tags) {
    detail::CpuModuleTag tag;
    std::memcpy(&tag, bytes.data() + at, sizeof tag);
    change(tag);
    std::memcpy(bytes.data() + at, &tag, sizeof tag);
  }
  REQUIRE(tags > 0);
  return bytes;
}

// Memory of the program that a module is given, and that runs out.
struct Limited : std::pmr::memory_resource {
  struct Failure {};  // nothing that a module has heard of
  int left = -1;
  long long outstanding = 0;
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (left == 0) throw Failure{};
    if (left > 0) --left;
    outstanding += static_cast<long long>(bytes);
    return std::pmr::new_delete_resource()->allocate(bytes, alignment);
  }
  void do_deallocate(void* p, std::size_t bytes, std::size_t alignment) override {
    outstanding -= static_cast<long long>(bytes);
    std::pmr::new_delete_resource()->deallocate(p, bytes, alignment);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

}  // namespace

TEST_CASE("each module attends with its own kernels") {
  const Rows rows(300);
  std::vector<std::vector<float>> outputs;
  for (const std::string_view cpu : runnable()) {
    CAPTURE(cpu);
    CpuModule module;
    const Status opened = module.open(prefix, cpu);
    CAPTURE(module.message());
    REQUIRE(opened.ok());
    CHECK(module.cpu() == cpu);
    std::vector<float> out;
    CHECK(error_of<KvCodec<Dense<Half, dim>>>(module, "fp16", rows, out) <= 2e-5);  // as in test_attend.cpp
    // What kernels round gives them away: with AVX2 queries and weights are bytes, with AVX-512 weights alone, elsewhere
    // nothing.
    const double coded = error_of<KvCodec<TurboQuant<2, dim>>>(module, "turbo2", rows, out);
    MESSAGE(cpu << ", turbo2: " << coded << " from double precision");
    const bool x86_64_v3 = cpu == "x86-64-v3", x86_64_v4 = cpu == "x86-64-v4";
    CHECK(coded <= 1e-4 + (x86_64_v3 ? 4 / 127.0 : 0) + (x86_64_v3 || x86_64_v4 ? 6 / 255.0 : 0));
    CHECK((coded > 2e-4) == (x86_64_v3 || x86_64_v4));
    for (const auto& other : outputs) CHECK(other != out);
    outputs.push_back(out);
  }
}

TEST_CASE("the best module that is there is taken, or the one that is asked for") {
  const auto runs = runnable();
  CpuModule module;
  CHECK(module.cpu().empty());
  const MadeCache early = module.make_cache({}, shape);
  CHECK(early.status.code == Errc::bad_name);
  CHECK(early.cache == nullptr);
  REQUIRE(module.open(prefix).ok());
  CHECK(module.cpu() == runs.front());
  REQUIRE(setenv("KVT_CPU", std::string(runs.back()).c_str(), 1) == 0);
  REQUIRE(module.open(prefix).ok());
  CHECK(module.cpu() == runs.back());
  REQUIRE(module.open(prefix, runs.front()).ok());
  CHECK(module.cpu() == runs.front());
  REQUIRE(unsetenv("KVT_CPU") == 0);

  const Folder folder;
  const std::string some = (folder.path / "some").string();
  std::filesystem::copy_file(path_of(runs.back()), some + '-' + std::string(runs.back()) + ".so");
  REQUIRE(module.open(some).ok());
  CHECK(module.cpu() == runs.back());
  // Both copies of the file are images of their own.
  const MadeCache made = module.make_cache({"uniform", "sink_recent", "fp16"}, shape);
  REQUIRE(made.status.ok());
  CHECK(file_of(*made.cache).starts_with(std::filesystem::canonical(folder.path).string()));
}

TEST_CASE("what is no module for this program is refused with a sentence, and what was open stays") {
  const auto runs = runnable();
  const std::string cpu(runs.back());
  const Folder folder;
  const std::string whole = [&] {
    std::string bytes;
    REQUIRE(detail::read_file(path_of(cpu), bytes).ok());
    return bytes;
  }();
  CpuModule module;
  REQUIRE(module.open(prefix, cpu).ok());
  int files = 0;
  const auto refused = [&](const std::string& bytes, Errc code, const std::string& words) {
    const std::string name = "file" + std::to_string(files++);
    folder.write(name + '-' + cpu + ".so", bytes);
    const Status status = module.open((folder.path / name).string(), cpu);
    CAPTURE(words);
    CAPTURE(module.message());
    CHECK(status.code == code);
    CHECK(module.message().find(words) != std::string::npos);
    CHECK(module.message().find(name) != std::string::npos);
    CHECK(module.cpu() == cpu);
  };
  refused(altered(whole, [](auto& tag) { tag.version += 1; }), Errc::bad_value,
          "is of version " + std::to_string(KVT_VERSION + 1));
  refused(altered(whole, [](auto& tag) { tag.abi ^= 1; }), Errc::bad_value, "another compiler or standard library");
  refused(altered(whole, [](auto& tag) { std::strcpy(tag.cpu, "z80"); }), Errc::bad_name,
          "for another processor than its name");
  refused(altered(whole, [](auto& tag) { std::memset(tag.cpu, 'x', sizeof tag.cpu); }), Errc::bad_name, "xxx");
  const std::string none = "is not a module of host kernels";
  refused("", Errc::bad_name, none);
  refused("no module", Errc::bad_name, none);
  refused(std::string(4096, '\x7f'), Errc::bad_name, none);
  refused(altered(whole, [](auto& tag) { tag.magic[0] = 'K'; }), Errc::bad_name, none);
  // As a copy that was cut short, or that the tag was pasted into.
  for (std::size_t n = 1; n < whole.size() / 2; n = n * 3 / 2 + 1) refused(whole.substr(0, n), Errc::bad_name, none);
  const auto at = whole.find(std::string_view(detail::cpu_module_tag.magic, sizeof detail::cpu_module_tag.magic));
  const std::string tag = whole.substr(at, sizeof(detail::CpuModuleTag));
  refused(tag, Errc::bad_name, none);
  refused(whole.substr(0, 64) + tag, Errc::bad_name, none);
  refused(whole.substr(0, 200) + tag.substr(0, tag.size() - 1), Errc::bad_name, none);

  const auto fails = [&](const std::string& from, std::string_view name, Errc code, const std::string& words) {
    CHECK(module.open(from, name).code == code);
    CAPTURE(module.message());
    CHECK(module.message().find(words) != std::string::npos);
    CHECK(module.cpu() == cpu);
  };
  const std::string nowhere = (folder.path / "nowhere").string();
  fails(nowhere, "", Errc::bad_name, "no module of host kernels that this processor runs: " + nowhere);
  fails(nowhere, cpu, Errc::bad_name, nowhere);
  fails("beside_the_program", "", Errc::bad_name, "/beside_the_program-CPU.so");
  fails("", "", Errc::bad_name, "-CPU.so");
  fails(prefix, "x86-64-v9", Errc::bad_name, "x86-64-v9; known are");
  std::filesystem::create_directory(nowhere + '-' + cpu + ".so");
  fails(nowhere, cpu, Errc::bad_name, "cannot be read");
  for (const std::string_view known : known_cpus) {
    if (!detail::processor_runs(known)) fails(prefix, known, Errc::bad_value, "this processor lacks");
  }
}

TEST_CASE("what crosses: names, policies, copies and memory that runs out") {
  for (const std::string_view cpu : runnable()) {
    CAPTURE(cpu);
    Limited memory;
    MadeCache made;
    const Rows rows(300);
    std::vector<float> before;
    {
      CpuModule module;
      REQUIRE(module.open(prefix, cpu).ok());
      MadeCache wrong = module.make_cache({"uniform", "sink", "fp16"}, shape);
      CHECK(wrong.status.code == Errc::bad_name);
      CHECK(wrong.message.find("unknown token selector \"sink\"") != std::string::npos);
      CHECK(module.make_cache({"uniform", "sink_recent", "fp32"}, shape).status.message() ==
            "this module has fp16 and turbo2 alone");
      CHECK(module.make_cache({"uniform", "sink_recent", "fp16"}, {1, 2, 6, 80}).status.code == Errc::bad_shape);
      CacheOptions options = zones;
      options.memory = &memory;
      made = module.make_cache({"uniform", "sink_recent", "turbo2"}, shape, options);
      REQUIRE(made.status.ok());
      std::string message;
      CHECK(module.set_policies(*made.cache, {"uniform", "key", ""}, message).code == Errc::bad_name);
      CHECK(message.find("unknown token selector \"key\"") != std::string::npos);
      REQUIRE(module.set_policies(*made.cache, {"adaptive", "key_diff", ""}, message).ok());
      CHECK(message.empty());
    }
    // The module stays while caches are there.
    AnyCache& cache = *made.cache;
    CHECK(cache.needs() == EvidenceSet(Adaptive::needs | KeyDiff::needs));
    int left = 0;
    const auto append = [&] {
      memory.left = left++;
      return cache.append(0, rows.keys.data(), rows.values.data(), rows.positions);
    };
    for (Status status = append(); !status.ok(); status = append()) {
      REQUIRE(status.code == Errc::out_of_memory);
      REQUIRE(left < 1000);
    }
    CHECK(left > 2);
    memory.left = -1;
    REQUIRE(cache.flush().ok());
    before = attend(cache, rows);
    std::unique_ptr<AnyCache> child;
    memory.left = 0;
    const Status failed = cache.fork(child);
    CHECK(failed.code == Errc::out_of_memory);
    CHECK(failed.message().starts_with("out of memory"));
    memory.left = -1;
    REQUIRE(cache.fork(child).ok());
    REQUIRE(cache.compress(Retain::ratio(0.25)).ok());
    CHECK(cache.num_rows(0, 0) + cache.num_rows(0, 1) == 150);
    CHECK(cache.memory().total() + child->memory().total() == memory.outstanding);
    CHECK(attend(*child, rows) == before);
    CHECK(attend(cache, rows) != before);
    // A selector of the program's own code.
    REQUIRE(cache.set_policies(AnyAllocator(Uniform{}), AnySelector(SinkRecent{})).ok());
    REQUIRE(cache.compress(Retain::rows(20)).ok());
    child.reset();
    made.cache.reset();
    CHECK(memory.outstanding == 0);
  }
}
