// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The one file that instantiates the cache of every name.
#include <filesystem>
#include <fstream>
#include <iterator>

#include "commands.hpp"

namespace kvt::llm {

Result<std::unique_ptr<AnyCache>> compose(const Composition& composition, const Geometry& geometry,
                                          const CacheShape& shape, std::pmr::memory_resource* memory) {
  CacheOptions options;
  options.sink_rows = shape.sink;
  options.recent_rows = shape.recent;
  options.block_rows = shape.block;
  options.memory = memory;
  MadeCache made = make_cache(composition, geometry, options);
  if (!made.cache) return failure(made.message);
  return std::move(made.cache);
}

Result<std::string> read_text(const std::string& path) {
  std::error_code code;
  if (!std::filesystem::is_regular_file(path, code)) {
    return failure("text file \"", path, "\" does not exist");
  }
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file) return failure("text file \"", path, "\" cannot be read");
  if (text.empty()) return failure("text file \"", path, "\" is empty");
  return text;
}

}  // namespace kvt::llm
