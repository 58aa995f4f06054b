// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// read_table: numbers from a file, a .npy array or lines of text. Files are not trusted: what does not fit is refused, and no
// more than a few times the bytes of the file is allocated. write_npy: numbers to one.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "kvtailor/core/half.hpp"
#include "kvtailor/core/status.hpp"
#include "kvtailor/io/file.hpp"

namespace kvt::inline v0 {

struct Table {
  std::vector<std::size_t> shape;
  std::vector<float> numbers;  // in the order of the shape, the last index fastest
};

namespace detail {

// How many numbers a shape has, unless that is more than `most`.
inline std::optional<std::size_t> count_of(const std::vector<std::size_t>& shape, std::size_t most) {
  std::size_t count = 1;
  for (const std::size_t extent : shape) {
    if (extent != 0 && count > most / extent) return std::nullopt;
    count *= extent;
  }
  return count;
}

// Numbers of type T as fp32: the nearest, or infinity.
template <class T>
std::vector<float> numbers_of(std::string_view bytes) {
  std::vector<float> numbers(bytes.size() / sizeof(T));
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    T x;  // may lie anywhere in the file
    std::memcpy(&x, bytes.data() + i * sizeof x, sizeof x);
    if constexpr (std::is_arithmetic_v<T>) {
      numbers[i] = static_cast<float>(x);
    } else {
      numbers[i] = to_float(x);
    }
  }
  return numbers;
}

// The numbers of a table as type T, float or Half, behind what is there. What T does not hold is refused.
template <class T>
Status append_numbers(const Table& table, std::string& bytes) {
  const std::vector<float>& numbers = table.numbers;
  if (count_of(table.shape, numbers.size()) != numbers.size()) {
    return error(Errc::bad_shape, "a table of {} numbers has a shape of another count", double(numbers.size()));
  }
  const std::size_t start = bytes.size();
  bytes.resize(start + numbers.size() * sizeof(T));
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const T x = from_float<T>(numbers[i]);
    if (!std::isfinite(to_float(x))) {
      const float most = sizeof(T) == 2 ? Half::max : std::numeric_limits<float>::max();
      return error(Errc::bad_value, "a table has the number {}; to be written it must be within {}", numbers[i], most);
    }
    std::memcpy(bytes.data() + start + i * sizeof x, &x, sizeof x);
  }
  return success();
}

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
  const auto unfit = error(Errc::bad_shape, "the .npy file's shape does not fit its {} bytes of data", double(data.size()));
  for (skip(shape); !shape.empty() && shape[0] != ')'; skip(shape)) {
    std::size_t extent = 0;
    const auto [end, failure] = std::from_chars(shape.data(), shape.data() + shape.size(), extent);
    if (failure != std::errc()) return unfit;
    made.shape.push_back(extent);
    shape.remove_prefix(static_cast<std::size_t>(end - shape.data()));
    skip(shape);
    if (!shape.empty() && shape[0] == ',') shape.remove_prefix(1);
  }
  const std::optional<std::size_t> count = count_of(made.shape, data.size());
  if (!count) return unfit;
  if (*count > data.size() / width || *count * width != data.size()) {
    return error(Errc::bad_shape, "the .npy file has {} numbers by its shape; it has {} bytes of data", double(*count),
                 double(data.size()));
  }
  made.numbers = width == 2 ? numbers_of<Half>(data) : width == 4 ? numbers_of<float>(data) : numbers_of<double>(data);
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
inline Status read_table(const std::string& path, Table& table) noexcept {
  std::string file;
  KVT_TRY(detail::read_file(path, file));
  return parse_table(file, table);
}

// A .npy file of version 1, fp32 in C order, in place of what was at the path; see io/file.hpp. Numbers that are not finite are
// refused, and so is a shape that has another count.
inline Status write_npy(const std::string& path, const Table& table) noexcept try {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  for (const std::size_t extent : table.shape) header += std::to_string(extent) + ", ";
  if (!table.shape.empty()) header.resize(header.size() - (table.shape.size() > 1 ? 2 : 1));  // (2, 3), but (2,)
  header += "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');
  header += '\n';
  if (header.size() > 0xffff) {
    return error(Errc::bad_shape, "a shape of {} extents is too long for a .npy file", double(table.shape.size()));
  }
  std::string file = "\x93NUMPY\x01";
  for (const std::size_t byte : {std::size_t{0}, header.size() % 256, header.size() / 256}) file += static_cast<char>(byte);
  file += header;
  KVT_TRY(detail::append_numbers<float>(table, file));
  return detail::write_file(path, file);
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while writing a table");
}

}  // namespace kvt::inline v0
