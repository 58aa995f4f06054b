// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// read_safetensors, write_safetensors: named tensors and texts about them. Files are not trusted: what does not fit is refused,
// and no more than a few times the bytes of the file is allocated. The one header that needs nlohmann-json.
//
// Format:   8 bytes, little-endian: the length of the header. The header, JSON:
//           {"__metadata__": {"word": "text"}, "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
//           The numbers, in C order, one tensor behind the other without gaps; offsets count from here.
// Source:   https://github.com/huggingface/safetensors. Stricter: no name may be there twice, and a tensor has three fields.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <new>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "kvtailor/core/half.hpp"
#include "kvtailor/core/status.hpp"
#include "kvtailor/io/file.hpp"
#include "kvtailor/io/table.hpp"

namespace kvt::inline v0 {

struct TensorFile {
  std::map<std::string, Table> tensors;
  std::map<std::string, std::string> metadata;
};

enum class FloatType { fp32, fp16 };

namespace detail {

inline constexpr std::size_t most_header_bytes = 100'000'000;  // of the format's own reader
inline constexpr const char* metadata_key = "__metadata__";

struct TensorType {
  std::string_view name;
  std::size_t width;  // bytes
  std::vector<float> (*numbers)(std::string_view bytes);
};
inline constexpr TensorType tensor_types[] = {
    {"F16", 2, numbers_of<Half>},   {"BF16", 2, numbers_of<BFloat16>},    {"F32", 4, numbers_of<float>},
    {"F64", 8, numbers_of<double>}, {"I32", 4, numbers_of<std::int32_t>}, {"I64", 8, numbers_of<std::int64_t>},
};

// What a JSON parser meets in a header, put into a file whose tensors have no numbers yet. A function that gives false ends the
// parsing: nothing is nested deeper than a header is.
class TensorHeader {
 public:
  struct Entry {
    Table* table = nullptr;
    const TensorType* type = nullptr;
    std::size_t offset[2] = {};  // where its bytes begin and end
  };
  std::vector<Entry> entries;
  Status status;

  explicit TensorHeader(TensorFile& file) : file_(file) {}

  bool start_object(std::size_t) {
    if (place_ != Place::outside && place_ != Place::header) return misplaced();
    place_ = place_ == Place::outside ? Place::header : inner_;
    return true;
  }
  bool key(std::string& name) {
    if (place_ == Place::tensor) return field(name);
    bool fresh = false;
    if (place_ == Place::metadata) {
      const auto [at, added] = file_.metadata.try_emplace(std::move(name));
      text_ = &at->second;
      fresh = added;
    } else if (name == metadata_key) {
      fresh = !has_metadata_;
      has_metadata_ = true;
      inner_ = Place::metadata;
    } else {
      const auto [at, added] = file_.tensors.try_emplace(std::move(name));
      entries.push_back({.table = &at->second});
      fresh = added;
      inner_ = Place::tensor;
      seen_ = 0;
    }
    return fresh || refuse(Errc::bad_name, "the .safetensors header has a name twice, behind tensor {}");
  }
  bool end_object() {
    if (place_ == Place::tensor && seen_ != 7) return misplaced();
    place_ = place_ == Place::header ? Place::outside : Place::header;
    return true;
  }

  bool start_array(std::size_t) {
    if (place_ != Place::tensor || field_ == dtype) return misplaced();
    place_ = Place::numbers;
    count_ = 0;
    return true;
  }
  bool number_unsigned(std::uint64_t x) {
    if (place_ != Place::numbers || (field_ == data_offsets && count_ == 2)) return misplaced();
    if (field_ == shape) {
      entries.back().table->shape.push_back(x);
    } else {
      entries.back().offset[count_++] = x;
    }
    return true;
  }
  bool end_array() {
    if (field_ == data_offsets && count_ != 2) return misplaced();
    place_ = Place::tensor;
    return true;
  }

  bool string(std::string& text) {
    if (place_ == Place::metadata) {
      *text_ = std::move(text);
      return true;
    }
    if (place_ != Place::tensor || field_ != dtype) return misplaced();
    const auto* const type = std::ranges::find(tensor_types, text, &TensorType::name);
    if (type == std::end(tensor_types)) {
      return refuse(Errc::bad_value, "tensor {} of the .safetensors file is not of type F16, BF16, F32, F64, I32 or I64");
    }
    entries.back().type = type;
    return true;
  }

  bool null() { return misplaced(); }
  bool boolean(bool) { return misplaced(); }
  bool number_integer(std::int64_t) { return misplaced(); }  // below zero
  bool number_float(double, const std::string&) { return misplaced(); }
  bool binary(std::vector<std::uint8_t>&) { return misplaced(); }
  bool parse_error(std::size_t position, const std::string&, const std::exception&) {
    status = error(Errc::bad_value, "the .safetensors header is no JSON from byte {} on", double(position));
    return false;
  }

 private:
  enum class Place { outside, header, metadata, tensor, numbers };
  enum Field { dtype, shape, data_offsets };

  bool field(std::string_view name) {
    constexpr std::string_view names[] = {"dtype", "shape", "data_offsets"};
    const auto at = static_cast<std::size_t>(std::ranges::find(names, name) - names);
    if (at == std::size(names) || (seen_ >> at & 1u) != 0) return misplaced();
    seen_ |= 1u << at;
    field_ = static_cast<Field>(at);
    return true;
  }
  bool refuse(Errc code, const char* text) {
    status = error(code, text, double(entries.size()));
    return false;
  }
  bool misplaced() {
    return inner_ == Place::metadata
               ? refuse(Errc::bad_value, "__metadata__ of the .safetensors file must be texts by name, and nothing else")
               : refuse(Errc::bad_value,
                        "tensor {} of the .safetensors file must have a dtype, a shape and two data_offsets, "
                        "once each, of whole numbers, and nothing else");
  }

  TensorFile& file_;
  Place place_ = Place::outside, inner_ = Place::tensor;  // inner_: of what the last name of the header names
  bool has_metadata_ = false;
  std::string* text_ = nullptr;  // where a text of the metadata goes
  Field field_ = dtype;
  unsigned seen_ = 0;  // a bit for each field of this tensor
  int count_ = 0;      // offsets so far
};

}  // namespace detail

// Tensors of fp16, bf16, fp32, fp64 and integers of 32 and 64 bits, as fp32: the nearest, or infinity. On failure `out` is as
// it was. bad_value: the header is not what it must be; bad_name: a name is there twice; bad_shape: the bytes are not those of
// it.
inline Status parse_safetensors(std::string_view file, TensorFile& out) noexcept try {
  std::uint64_t length = 0;
  if (file.size() < sizeof length) {
    return error(Errc::bad_shape, "the .safetensors file ends after {} bytes, before its header", double(file.size()));
  }
  std::memcpy(&length, file.data(), sizeof length);
  const std::size_t most = std::min(file.size() - sizeof length, detail::most_header_bytes);
  if (length > most) {
    return error(Errc::bad_shape, "the .safetensors file has a header of {} bytes; {} would be the most", double(length),
                 double(most));
  }
  const std::string_view header = file.substr(sizeof length, length), data = file.substr(sizeof length + length);
  // The parser takes a zero for the end.
  if (!header.starts_with('{') || header.find('\0') != header.npos) {
    return error(Errc::bad_value, "the .safetensors header must begin with a brace and have no zero byte");
  }
  TensorFile made;
  detail::TensorHeader met(made);
  if (!nlohmann::json::sax_parse(header.begin(), header.end(), &met)) return met.status;

  std::ranges::sort(met.entries, {}, [](const auto& entry) { return std::pair(entry.offset[0], entry.offset[1]); });
  std::size_t at = 0;
  for (const auto& [table, type, offset] : met.entries) {
    if (offset[0] != at || offset[1] < at || offset[1] > data.size()) {
      return error(Errc::bad_shape, "no tensor of the .safetensors file begins at byte {} and ends within its {} bytes",
                   double(at), double(data.size()));
    }
    const std::size_t bytes = offset[1] - at;
    const auto count = detail::count_of(table->shape, bytes / type->width);
    if (!count || *count * type->width != bytes) {
      return error(Errc::bad_shape, "the .safetensors tensor at byte {} has {} bytes, which its shape does not take",
                   double(at), double(bytes));
    }
    at = offset[1];
  }
  if (at != data.size()) {
    return error(Errc::bad_shape, "the .safetensors tensors end at byte {} of {}", double(at), double(data.size()));
  }
  for (const auto& [table, type, offset] : met.entries) {
    table->numbers = type->numbers(data.substr(offset[0], offset[1] - offset[0]));
  }
  out = std::move(made);
  return success();
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while reading tensors");
}
inline Status read_safetensors(const std::string& path, TensorFile& out) noexcept {
  std::string file;
  KVT_TRY(detail::read_file(path, file));
  return parse_safetensors(file, out);
}

// In place of what was at the path; see io/file.hpp. The same tensors and texts give the same bytes. Numbers that the type does
// not hold, infinities and NaN are refused (bad_value), and so are shapes of another count (bad_shape) and names and texts that
// are not UTF-8 (bad_name).
inline Status write_safetensors(const std::string& path, const TensorFile& file, FloatType type = FloatType::fp32) noexcept
    try {
  const bool half = type == FloatType::fp16;
  const auto quoted = [](const std::string& text) { return nlohmann::json(text).dump(); };
  std::string header, texts;
  for (const auto& [name, text] : file.metadata) texts += (texts.empty() ? "" : ",") + quoted(name) + ':' + quoted(text);
  if (!texts.empty()) header = quoted(detail::metadata_key) + ":{" + texts + '}';
  std::size_t at = 0;
  for (const auto& [name, table] : file.tensors) {
    if (name == detail::metadata_key)
      return error(Errc::bad_name, "no tensor of a .safetensors file can be named __metadata__");
    std::string shape;
    for (const std::size_t extent : table.shape) shape += (shape.empty() ? "" : ",") + std::to_string(extent);
    const std::size_t end = at + table.numbers.size() * (half ? sizeof(Half) : sizeof(float));
    header += (header.empty() ? "" : ",") + quoted(name) + R"(:{"dtype":")" + (half ? "F16" : "F32") + R"(","shape":[)" +
              shape + R"(],"data_offsets":[)" + std::to_string(at) + ',' + std::to_string(end) + "]}";
    at = end;
  }
  header = '{' + header + '}';
  header.append((8 - header.size() % 8) % 8, ' ');
  if (header.size() > detail::most_header_bytes) {
    return error(Errc::bad_shape, "a .safetensors header of {} bytes is longer than {}", double(header.size()),
                 double(detail::most_header_bytes));
  }
  const std::uint64_t length = header.size();
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  bytes += header;
  for (const auto& [name, table] : file.tensors) {
    KVT_TRY(half ? detail::append_numbers<Half>(table, bytes) : detail::append_numbers<float>(table, bytes));
  }
  return detail::write_file(path, bytes);
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while writing tensors");
} catch (const nlohmann::json::exception&) {
  return error(Errc::bad_name, "a name or a text of a .safetensors file is not UTF-8");
}

}  // namespace kvt::inline v0
