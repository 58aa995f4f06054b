// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// read_table: numbers from a file, a .npy array or lines of text. Files are not trusted: what does not fit is refused, and no
// more than a few times the bytes of the file is allocated.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "kvtailor/core/half.hpp"
#include "kvtailor/core/status.hpp"

namespace kvt::inline v0 {

struct Table {
  std::vector<std::size_t> shape;
  std::vector<float> numbers;  // in the order of the shape, the last index fastest
};

namespace detail {

// A .npy file, versions 1 to 3: fp16, fp32 or fp64, little-endian, C order. See NumPy's documentation, numpy.lib.format.
inline Status parse_npy(std::string_view file, Table& table) {
  const auto byte = [&](std::size_t i) { return static_cast<std::size_t>(static_cast<unsigned char>(file[i])); };
  if (file.size() < 12) return error(Errc::bad_shape, "the .npy file ends after {} bytes, in its header", double(file.size()));
  if (byte(6) < 1 || byte(6) > 3) {
    return error(Errc::bad_value, "the .npy file is of version {}; it must be 1, 2 or 3", double(byte(6)));
  }
  const bool first = byte(6) == 1;
  const std::size_t start = first ? 10 : 12;
  const std::size_t length = first ? byte(8) + 256 * byte(9) : byte(8) + 256 * (byte(9) + 256 * (byte(10) + 256 * byte(11)));
  if (length > file.size() - start) {
    return error(Errc::bad_shape, "the .npy file has a header of {} bytes; {} are left", double(length),
                 double(file.size() - start));
  }
  const std::string_view header = file.substr(start, length), data = file.substr(start + length);
  const auto after = [&](std::string_view key) {
    const auto at = header.find(key);
    return at == header.npos ? std::string_view() : header.substr(at + key.size());
  };
  std::string_view type = after("'descr':"), order = after("'fortran_order':"), shape = after("'shape':");
  const auto skip = [](std::string_view& text) { text.remove_prefix(std::min(text.find_first_not_of(' '), text.size())); };
  skip(type);
  skip(order);
  skip(shape);
  const std::size_t width = type.starts_with("'<f2'") ? 2 : type.starts_with("'<f4'") ? 4 : type.starts_with("'<f8'") ? 8 : 0;
  if (width == 0) return error(Errc::bad_value, "the .npy file must hold little-endian fp16, fp32 or fp64 numbers");
  if (!order.starts_with("False")) return error(Errc::bad_value, "the .npy file must be in C order");
  if (!shape.starts_with("(")) return error(Errc::bad_shape, "the .npy file's header has no shape");
  shape.remove_prefix(1);
  Table made;
  std::size_t count = 1;
  for (skip(shape); !shape.empty() && shape[0] != ')'; skip(shape)) {
    std::size_t extent = 0;
    const auto [end, failure] = std::from_chars(shape.data(), shape.data() + shape.size(), extent);
    if (failure != std::errc() || (extent != 0 && count > data.size() / extent)) {
      return error(Errc::bad_shape, "the .npy file's shape does not fit its {} bytes of data", double(data.size()));
    }
    made.shape.push_back(extent);
    count *= extent;
    shape.remove_prefix(static_cast<std::size_t>(end - shape.data()));
    skip(shape);
    if (!shape.empty() && shape[0] == ',') shape.remove_prefix(1);
  }
  if (count > data.size() / width || count * width != data.size()) {
    return error(Errc::bad_shape, "the .npy file has {} numbers by its shape; it has {} bytes of data", double(count),
                 double(data.size()));
  }
  made.numbers.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    const char* const at = data.data() + i * width;
    if (width == 2) {
      Half x;
      std::memcpy(&x, at, 2);
      made.numbers[i] = to_float(x);
    } else if (width == 4) {
      std::memcpy(&made.numbers[i], at, 4);
    } else {
      double x;
      std::memcpy(&x, at, 8);
      made.numbers[i] = static_cast<float>(x);
    }
  }
  table = std::move(made);
  return success();
}

// Lines of numbers between spaces, tabs or commas, the same count in each; lines that begin with # say nothing.
inline Status parse_text(std::string_view file, Table& table) {
  Table made;
  std::size_t rows = 0, columns = 0;
  for (std::size_t line = 1; !file.empty(); ++line) {
    std::string_view rest = file.substr(0, file.find('\n'));
    file.remove_prefix(std::min(rest.size() + 1, file.size()));
    std::size_t own = 0;
    while (true) {
      rest.remove_prefix(std::min(rest.find_first_not_of(" \t\r,"), rest.size()));
      if (rest.empty() || rest[0] == '#') break;
      double x = 0;  // numbers below those of fp32 are zero, not an error
      const auto [end, failure] = std::from_chars(rest.data(), rest.data() + rest.size(), x);
      rest.remove_prefix(static_cast<std::size_t>(end - rest.data()));
      const auto number = static_cast<float>(x);
      const bool ends = rest.empty() || std::string_view(" \t\r,#").find(rest[0]) != rest.npos;
      if (failure != std::errc() || !ends || !std::isfinite(number)) {
        return error(Errc::bad_value, "line {} of the table has something that is no number", double(line));
      }
      made.numbers.push_back(number);
      ++own;
    }
    if (own == 0) continue;
    if (rows > 0 && own != columns) {
      return error(Errc::bad_shape, "line {} of the table does not have {} numbers as those before", double(line),
                   double(columns));
    }
    columns = own;
    ++rows;
  }
  if (rows == 0) return error(Errc::bad_shape, "the table has {} numbers", 0);
  made.shape = {rows, columns};
  table = std::move(made);
  return success();
}

}  // namespace detail

// What a file holds, by what it begins with. On failure the table is as it was.
inline Status parse_table(std::string_view file, Table& table) noexcept try {
  return file.starts_with("\x93NUMPY") ? detail::parse_npy(file, table) : detail::parse_text(file, table);
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while reading a table");
}
inline Status read_table(const std::string& path, Table& table) noexcept try {
  std::ifstream stream(path, std::ios::binary);
  const std::string file{std::istreambuf_iterator<char>(stream), {}};
  if (!stream.is_open() || stream.bad()) return error(Errc::bad_name, "the file of a table cannot be read");
  return parse_table(file, table);
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while reading a table");
} catch (...) {  // of the stream: a folder, say
  return error(Errc::bad_name, "the file of a table cannot be read");
}

}  // namespace kvt::inline v0
