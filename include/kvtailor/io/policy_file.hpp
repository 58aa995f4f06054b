// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// read_curve, write_curve: what was learned of a model, in a file. A safetensors file with
//   tensor    dropped [steps, num_layers, num_kv_heads], see budget/curve.hpp
//   metadata  format "kvtailor curve 1", selector (see full_name() in select/any_selector.hpp), and what its maker says of
//             model, data and method
// or a table as others publish it (.npy, or lines of text), which says nothing of what it was made for.
#pragma once

#include <map>
#include <string>

#include "kvtailor/budget/curve.hpp"
#include "kvtailor/io/file.hpp"
#include "kvtailor/io/table.hpp"
#if __has_include(<nlohmann/json.hpp>)
#include "kvtailor/io/safetensors.hpp"
#define KVT_HAVE_SAFETENSORS
#endif

namespace kvt::inline v0 {

inline constexpr const char* curve_format = "kvtailor curve 1";

// On failure the curve is as it was. What the table holds is for Curve::check() to judge. Without nlohmann-json only tables are
// read.
inline Status read_curve(const std::string& path, Curve& out) noexcept try {
  std::string file;
  KVT_TRY(detail::read_file(path, file));
  Table table;
  std::string selector;
  // A safetensors file begins with the length of its header, below 2^48: no text or .npy file has zeros there.
  if (file.size() > 8 && file[6] == '\0' && file[7] == '\0') {
#if defined(KVT_HAVE_SAFETENSORS)
    TensorFile tensors;
    KVT_TRY(parse_safetensors(file, tensors));
    if (tensors.metadata["format"] != curve_format) {
      return error(Errc::bad_value, "the file does not say that it is a curve of this format: kvtailor curve 1");
    }
    if (tensors.tensors.size() != 1 || !tensors.tensors.contains("dropped")) {
      return error(Errc::bad_shape, "a curve's file has one tensor, dropped; this one has {}, or another",
                   static_cast<double>(tensors.tensors.size()));
    }
    table = std::move(tensors.tensors["dropped"]);
    if (table.shape.size() != 3) {
      return error(Errc::bad_shape, "a curve has 3 dimensions; this one has {}", static_cast<double>(table.shape.size()));
    }
    selector = std::move(tensors.metadata["selector"]);
#else
    return error(Errc::bad_value, "this program was compiled without nlohmann-json, and reads no safetensors");
#endif
  } else {
    KVT_TRY(parse_table(file, table));
  }
  const bool known = table.shape.size() == 3;
  out = {std::move(table.numbers), known ? static_cast<int>(table.shape[1]) : 0, known ? static_cast<int>(table.shape[2]) : 0,
         std::move(selector)};
  return success();
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while reading a curve");
}

// A path that ends in .npy gets the bare table. `told`: what else a safetensors file, written to any other, is to say.
inline Status write_curve(const std::string& path, const Curve& curve,
                          [[maybe_unused]] std::map<std::string, std::string> told) noexcept try {
  const auto layers = static_cast<std::size_t>(curve.num_layers), heads = static_cast<std::size_t>(curve.num_kv_heads);
  if (layers == 0 || heads == 0 || curve.dropped.empty() || curve.dropped.size() % (layers * heads) != 0) {
    return error(Errc::bad_shape, "a curve of {} numbers is not of {} heads", static_cast<double>(curve.dropped.size()),
                 static_cast<double>(layers * heads));
  }
  Table table{{curve.dropped.size() / (layers * heads), layers, heads}, curve.dropped};
  if (path.ends_with(".npy")) return write_npy(path, table);
#if defined(KVT_HAVE_SAFETENSORS)
  TensorFile file;
  file.tensors["dropped"] = std::move(table);
  file.metadata = std::move(told);
  file.metadata["format"] = curve_format;
  file.metadata["selector"] = curve.selector;
  return write_safetensors(path, file, FloatType::fp32);
#else
  return error(Errc::bad_value, "this program was compiled without nlohmann-json, and writes no safetensors");
#endif
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while writing a curve");
}

}  // namespace kvt::inline v0
