// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Whole files: read, and written so that no one ever sees half of one.
#pragma once

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <system_error>

#include "kvtailor/core/status.hpp"

namespace kvt::inline v0::detail {

// On failure the bytes are as they were.
inline Status read_file(const std::string& path, std::string& bytes) noexcept try {
  const auto close = [](std::FILE* stream) { std::fclose(stream); };
  const std::unique_ptr<std::FILE, decltype(close)> stream(std::fopen(path.c_str(), "rb"), close);
  if (!stream) return error(Errc::bad_name, "the file cannot be read");
  std::string made;
  char part[1 << 14];
  for (std::size_t n = 1; n > 0; made.append(part, n)) n = std::fread(part, 1, sizeof part, stream.get());
  if (std::ferror(stream.get()) != 0) return error(Errc::bad_name, "the file cannot be read");  // a folder, say
  bytes = std::move(made);
  return success();
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while reading a file");
}

// Puts a file in the place of the one at the path, if there is one. A link is replaced, not followed; folders and devices are
// refused. On failure, that of a full disk too, what was there is there, and nothing beside it.
inline Status write_file(const std::string& path, std::string_view bytes) noexcept try {
  const std::filesystem::path target(path);
  std::error_code failure;
  const std::filesystem::file_status there = std::filesystem::status(target, failure);
  if (!target.has_filename() || (std::filesystem::exists(there) && !std::filesystem::is_regular_file(there))) {
    return error(Errc::bad_name, "the path to write to is no file's");
  }
  // Beside it: names across disks cannot be exchanged. Others may be writing the same file.
  std::filesystem::path part;
  std::FILE* stream = nullptr;
  for (int i = 0; stream == nullptr && i < 100; ++i) {
    part = target;
    part += ".part" + std::to_string(i);
    stream = std::fopen(part.c_str(), "wbx");
    if (stream == nullptr && errno != EEXIST) break;
  }
  if (stream == nullptr) return error(Errc::bad_name, "no file can be made in the folder to write to");
  // From here on nothing needs memory.
  bool whole = std::fwrite(bytes.data(), 1, bytes.size(), stream) == bytes.size();
  whole = std::fclose(stream) == 0 && whole;
  if (whole) std::filesystem::rename(part, target, failure);
  if (whole && !failure) return success();
  std::filesystem::remove(part, failure);
  return error(Errc::bad_name, "the file of {} bytes cannot be written whole", double(bytes.size()));
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while writing a file");
}

}  // namespace kvt::inline v0::detail
