// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Whole files: what is written is read; a write that fails leaves what was there, and nothing beside it.
#include <doctest/doctest.h>
#include <sys/resource.h>

#include <atomic>
#include <csignal>
#include <thread>

#include "kvtailor/io/file.hpp"
#include "unit/files.hpp"

using namespace kvt;
using detail::read_file;
using detail::write_file;

namespace {

using Names = std::set<std::string>;

void refused(const Status& status, const std::string& part) {
  const std::string message = status.message();
  CAPTURE(message);
  CHECK(status.code == Errc::bad_name);
  CHECK(message.find(part) != std::string::npos);
}

}  // namespace

TEST_CASE("what is written is read, in place of what was there") {
  const Folder folder;
  const std::string path = (folder.path / "x").string();
  for (const std::size_t size : {0, 1, 16383, 16384, 16385, 1000000, 3}) {
    std::string bytes(size, '\0'), read = "old";
    for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(i * i >> 3);
    REQUIRE(write_file(path, bytes).ok());
    REQUIRE(read_file(path, read).ok());
    CHECK(read == bytes);
    CHECK(folder.names() == Names{"x"});
  }
}

TEST_CASE("what cannot be read leaves the bytes as they were") {
  const Folder folder;
  std::string bytes = "old";
  for (const std::string& path :
       {folder.path.string(), (folder.path / "none").string(), (folder.path / "none" / "x").string(), std::string()}) {
    refused(read_file(path, bytes), "cannot be read");
    CHECK(bytes == "old");
  }
}

TEST_CASE("neither folders nor devices are written to, and no folder is made") {
  const Folder folder;
  std::filesystem::create_directory(folder.path / "inner");
  std::filesystem::create_symlink("/dev/null", folder.path / "device");
  const Names before = folder.names();
  refused(write_file((folder.path / "inner").string(), "new"), "is no file's");
  refused(write_file((folder.path / "device").string(), "new"), "is no file's");
  refused(write_file((folder.path / "").string(), "new"), "is no file's");
  refused(write_file((folder.path / "none" / "x").string(), "new"), "no file can be made");
  refused(write_file("", "new"), "is no file's");
  CHECK(folder.names() == before);
  CHECK(std::filesystem::is_symlink(folder.path / "device"));
}

TEST_CASE("a link is replaced, not followed") {
  const Folder folder;
  folder.write("far", "old");
  std::filesystem::create_symlink("far", folder.path / "link");
  std::filesystem::create_symlink("nowhere", folder.path / "dangling");
  for (const char* name : {"link", "dangling"}) {
    REQUIRE(write_file((folder.path / name).string(), "new").ok());
    CHECK_FALSE(std::filesystem::is_symlink(folder.path / name));
    CHECK(folder.read(name) == "new");
  }
  CHECK(folder.read("far") == "old");
  CHECK(folder.names() == Names{"dangling", "far", "link"});
}

TEST_CASE("what another left beside a file stays, and is in nobody's way") {
  const Folder folder;
  folder.write("x.part0", "of another");
  REQUIRE(write_file((folder.path / "x").string(), "new").ok());
  CHECK(folder.read("x") == "new");
  CHECK(folder.read("x.part0") == "of another");
  CHECK(folder.names() == Names{"x", "x.part0"});
  for (int i = 1; i < 100; ++i) folder.write("x.part" + std::to_string(i), "");
  refused(write_file((folder.path / "x").string(), "newer"), "no file can be made");
  CHECK(folder.read("x") == "new");
}

TEST_CASE("a disk that is full leaves the old file, and no part of the new one") {
  const Folder folder;
  const std::string path = folder.write("x", "old");
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);  // a write beyond the limit then fails
  for (const std::size_t size : {100, 100000}) {       // of the smaller, closing fails
    for (const std::size_t most : {std::size_t{0}, size / 2, size - 1}) {
      rlimit limit = before;
      limit.rlim_cur = most;
      REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
      const Status status = write_file(path, std::string(size, 'x'));
      REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);
      refused(status, "the file of " + std::to_string(size) + " bytes cannot be written whole");
      CHECK(folder.names() == Names{"x"});
      CHECK(folder.read("x") == "old");
    }
  }
  std::signal(SIGXFSZ, handler);
  REQUIRE(write_file(path, "new").ok());
  CHECK(folder.read("x") == "new");
}

TEST_CASE("whoever reads a file that many write sees one of theirs, whole") {
  const Folder folder;
  const std::string path = folder.write("x", std::string(20000, 'a'));
  std::atomic<int> torn = 0, failed = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) failed += write_file(path, std::string(20000, static_cast<char>('a' + t))).ok() ? 0 : 1;
    });
  }
  threads.emplace_back([&] {
    for (int i = 0; i < 400; ++i) {
      std::string bytes;
      failed += read_file(path, bytes).ok() ? 0 : 1;
      torn += bytes == std::string(20000, bytes.empty() ? 'a' : bytes[0]) ? 0 : 1;
    }
  });
  for (std::thread& thread : threads) thread.join();
  CHECK(torn == 0);
  CHECK(failed == 0);
  CHECK(folder.names() == Names{"x"});
}
