// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What was learned of a model, in a file.
// read_curve, write_curve: a safetensors file with
//   tensor    dropped [steps, num_layers, num_kv_heads], see budget/curve.hpp
//   metadata  format "kvtailor curve 1", selector (see full_name() in select/any_selector.hpp), and what its maker says of
//             model, data and method
// or a table as others publish it (.npy, or lines of text), which says nothing of what it was made for.
// read_learned, write_learned: a safetensors file with
//   tensors   scores.*, shares.*: see detail::each_learned_tensor(), learn/token_scorer.hpp and learn/budget_head.hpp
//   metadata  format "kvtailor learned 1", and what its maker says
// read_byte_budget, write_byte_budget: a safetensors file with
//   tensors   losses [num_layers, num_kv_heads, codecs, shares], row_bytes [num_layers, num_kv_heads, codecs], shares [shares]
//             and zones [2]: bytes of a dense row and how many there are of a head; see learn/byte_budget.hpp
//   metadata  format "kvtailor bytes 1", codecs (names with a space between them), selector, and what its maker says
#pragma once

#include <map>
#include <string>

#include "kvtailor/budget/curve.hpp"
#include "kvtailor/core/spec.hpp"
#include "kvtailor/io/file.hpp"
#include "kvtailor/io/table.hpp"
#include "kvtailor/learn/budget_head.hpp"
#include "kvtailor/learn/byte_budget.hpp"
#include "kvtailor/learn/token_scorer.hpp"
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

// What `kvt-llm train` finds out: scores of rows, and shares of heads.
struct LearnedPolicy {
  int num_layers = 0, num_kv_heads = 0;
  TokenScorer<float> scores;
  BudgetHead<float> shares;
};

inline constexpr const char* learned_format = "kvtailor learned 1";

namespace detail {

// f(name, shape, numbers) of each tensor of a policy in turn; numbers is a function of an index, since those of heads lie
// apart.
template <class Policy, class F>
Status each_learned_tensor(Policy& policy, F&& f) {
  using Shape = std::vector<std::size_t>;
  const auto size = [](int n) { return static_cast<std::size_t>(n); };
  const std::size_t layers = size(policy.num_layers), heads = size(policy.num_kv_heads);
  const TokenScorerLayout at = policy.scores.layout();
  const std::size_t features = size(at.features()), hidden = size(at.hidden), stride = size(at.size());
  const auto of_heads = [&](const char* name, int first, Shape shape) -> Status {
    std::size_t own = 1;
    for (const std::size_t extent : shape) own *= extent;
    shape.insert(shape.begin(), {layers, heads});
    auto* const numbers = policy.scores.numbers().data() + first;
    return f(
        name, shape, [=](std::size_t i) -> auto& { return numbers[i / own * stride + i % own]; });
  };
  KVT_TRY(of_heads("scores.mean", at.mean(), {features}));
  KVT_TRY(of_heads("scores.scale", at.scale(), {features}));
  KVT_TRY(of_heads("scores.inner", at.matrix(), {hidden, features}));
  KVT_TRY(of_heads("scores.linear", at.matrix() + at.hidden * at.features(), {features}));
  KVT_TRY(of_heads("scores.inner_bias", at.bias(), {hidden}));
  KVT_TRY(of_heads("scores.bias", at.bias() + at.hidden, {}));
  KVT_TRY(of_heads("scores.outer", at.outer(), {hidden}));
  auto* own = policy.shares.parameters().data();
  const auto of_all = [&](const char* name, Shape shape) -> Status {
    auto* const numbers = own;
    std::size_t count = 1;
    for (const std::size_t extent : shape) count *= extent;
    own += count;
    return f(
        name, shape, [=](std::size_t i) -> auto& { return numbers[i]; });
  };
  const std::size_t width = size(policy.shares.width()), inner = size(policy.shares.hidden());
  KVT_TRY(of_all("shares.embedding", {layers, heads, width}));
  KVT_TRY(of_all("shares.slope", {layers, heads}));
  KVT_TRY(of_all("shares.start", {layers, heads}));
  KVT_TRY(of_all("shares.inner", {inner, width + 1}));
  KVT_TRY(of_all("shares.bias", {inner}));
  return of_all("shares.outer", {inner});
}

}  // namespace detail

#if defined(KVT_HAVE_SAFETENSORS)
// On failure the policy is as it was. bad_value: not of this format, or a number that is not finite; bad_shape: tensors that
// are missing, too many or do not fit one another.
inline Status read_learned(const std::string& path, LearnedPolicy& out) noexcept try {
  TensorFile file;
  KVT_TRY(read_safetensors(path, file));
  if (file.metadata["format"] != learned_format) {
    return error(Errc::bad_value, "the file does not say that it is a learned policy of this format: kvtailor learned 1");
  }
  // Sizes are those of three tensors, and all others have to fit.
  const auto shape_of = [&](const char* name, std::size_t dims) {
    const auto found = file.tensors.find(name);
    return found != file.tensors.end() && found->second.shape.size() == dims ? found->second.shape
                                                                             : std::vector<std::size_t>(dims, 0);
  };
  const auto inner = shape_of("scores.inner", 4), embedding = shape_of("shares.embedding", 3),
             outer = shape_of("shares.outer", 1);
  constexpr std::size_t most = 1 << 20;
  for (const std::size_t extent : {inner[0], inner[1], inner[2], inner[3], embedding[2], outer[0]}) {
    if (extent < 1 || extent > most) {
      return error(Errc::bad_shape,
                   "scores.inner, shares.embedding and shares.outer of a learned policy have 4, 3 and 1 "
                   "dimensions, each of 1 to {}",
                   static_cast<double>(most));
    }
  }
  if (inner[3] % 2 != 0 || inner[3] < 4) {
    return error(Errc::bad_shape, "a learned policy has {} features; they are two rows and two lengths",
                 static_cast<double>(inner[3]));
  }
  // What the file holds bounds what is allocated.
  const auto count_of = [&](const char* name) { return file.tensors[name].numbers.size(); };
  if (inner[0] * inner[1] > count_of("scores.bias") || embedding[2] + 1 > count_of("shares.inner")) {
    return error(Errc::bad_shape, "the tensors of a learned policy do not fit one another");
  }
  const auto whole = [](std::size_t n) { return static_cast<int>(n); };
  const int heads = whole(inner[0] * inner[1]);
  LearnedPolicy made{whole(inner[0]), whole(inner[1]), TokenScorer<float>(heads, whole(inner[3] / 2 - 1), whole(inner[2])),
                     BudgetHead<float>(heads, whole(embedding[2]), whole(outer[0]))};
  std::size_t met = 0;
  KVT_TRY(detail::each_learned_tensor(made, [&](const char* name, const std::vector<std::size_t>& shape, auto&& number) {
    const Table& table = file.tensors[name];
    if (table.shape != shape) {
      return error(Errc::bad_shape, "tensor {} of a learned policy is missing, or does not fit the others",
                   static_cast<double>(met + 1));
    }
    for (std::size_t i = 0; i < table.numbers.size(); ++i) {
      if (!std::isfinite(table.numbers[i])) {
        return error(Errc::bad_value, "tensor {} of a learned policy has {}", static_cast<double>(met + 1),
                     static_cast<double>(table.numbers[i]));
      }
      number(i) = table.numbers[i];
    }
    ++met;
    return success();
  }));
  if (file.tensors.size() != met) {
    return error(Errc::bad_shape, "a learned policy has {} tensors; this file has {}", static_cast<double>(met),
                 static_cast<double>(file.tensors.size()));
  }
  out = std::move(made);
  return success();
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while reading a learned policy");
}

// `told`: what else the file is to say.
inline Status write_learned(const std::string& path, const LearnedPolicy& policy, std::map<std::string, std::string> told,
                            FloatType type = FloatType::fp16) noexcept try {
  TensorFile file;
  file.metadata = std::move(told);
  file.metadata["format"] = learned_format;
  KVT_TRY(detail::each_learned_tensor(policy, [&](const char* name, const std::vector<std::size_t>& shape, auto&& number) {
    Table& table = file.tensors[name];
    table.shape = shape;
    std::size_t count = 1;
    for (const std::size_t extent : shape) count *= extent;
    for (std::size_t i = 0; i < count; ++i) table.numbers.push_back(number(i));
    return success();
  }));
  return write_safetensors(path, file, type);
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while writing a learned policy");
}

inline constexpr const char* bytes_format = "kvtailor bytes 1";

// On failure the profile is as it was. bad_value: not of this format, or numbers that make no sense; bad_shape: tensors that
// are missing, too many or do not fit one another.
inline Status read_byte_budget(const std::string& path, ByteBudget& out) noexcept try {
  TensorFile file;
  KVT_TRY(read_safetensors(path, file));
  if (file.metadata["format"] != bytes_format)
    return error(Errc::bad_value, "the file does not say that it is a profile of this format: kvtailor bytes 1");
  const auto shape_of = [&](const char* name, std::size_t dims) {
    const auto found = file.tensors.find(name);
    return found != file.tensors.end() && found->second.shape.size() == dims ? found->second.shape
                                                                             : std::vector<std::size_t>(dims, 0);
  };
  const auto losses = shape_of("losses", 4), bytes = shape_of("row_bytes", 3), shares = shape_of("shares", 1);
  ByteBudget made;
  const std::string& names = file.metadata["codecs"];
  for (std::size_t at = 0; at < names.size();) {
    const std::size_t end = std::min(names.find(' ', at), names.size());
    made.codecs.push_back(names.substr(at, end - at));
    at = end + 1;
  }
  const bool fit = losses[0] == bytes[0] && losses[1] == bytes[1] && losses[2] == bytes[2] && losses[2] == made.codecs.size() &&
                   losses[3] == shares[0] && losses[0] <= 4096 && losses[1] <= 4096;
  if (!fit || shape_of("zones", 1)[0] != 2 || file.tensors.size() != 4) {
    return error(Errc::bad_shape, "a profile has the tensors losses, row_bytes, shares and zones, of one model and {} codecs",
                 static_cast<double>(made.codecs.size()));
  }
  made.num_layers = static_cast<int>(losses[0]);
  made.num_kv_heads = static_cast<int>(losses[1]);
  made.selector = file.metadata["selector"];
  made.losses = std::move(file.tensors["losses"].numbers);
  made.row_bytes = std::move(file.tensors["row_bytes"].numbers);
  made.shares = std::move(file.tensors["shares"].numbers);
  const float rows = file.tensors["zones"].numbers[1];
  if (!(rows >= 0 && rows <= 1 << 21)) return error(Errc::bad_value, "{} dense rows of a head", static_cast<double>(rows));
  made.zone_bytes = static_cast<double>(file.tensors["zones"].numbers[0]);
  made.zone_rows = static_cast<int>(rows);
  KVT_TRY(made.check());
  out = std::move(made);
  return success();
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while reading a profile");
}

// `told`: what else the file is to say.
inline Status write_byte_budget(const std::string& path, const ByteBudget& profile,
                                std::map<std::string, std::string> told) noexcept try {
  KVT_TRY(profile.check());
  const auto layers = static_cast<std::size_t>(profile.num_layers), heads = static_cast<std::size_t>(profile.num_kv_heads);
  const std::size_t codecs = profile.codecs.size(), shares = profile.shares.size();
  TensorFile file;
  file.tensors["losses"] = {{layers, heads, codecs, shares}, profile.losses};
  file.tensors["row_bytes"] = {{layers, heads, codecs}, profile.row_bytes};
  file.tensors["shares"] = {{shares}, profile.shares};
  file.tensors["zones"] = {{2}, {static_cast<float>(profile.zone_bytes), static_cast<float>(profile.zone_rows)}};
  file.metadata = std::move(told);
  file.metadata["format"] = bytes_format;
  file.metadata["selector"] = profile.selector;
  std::string& names = file.metadata["codecs"];
  names.clear();
  for (const auto& codec : profile.codecs) names += (names.empty() ? "" : " ") + codec;
  return write_safetensors(path, file, FloatType::fp32);
} catch (const std::bad_alloc&) {
  return error(Errc::out_of_memory, "out of memory while writing a profile");
}
#endif

namespace detail {

// An empty message is success.
template <class Read>
std::string from_file(std::string_view policy, const std::string& path, Read&& read) {
  if (path.empty()) return std::string(policy) + " needs a file: " + std::string(policy) + ":file=PATH";
  const Status status = read();
  return status.ok() ? std::string() : path + ": " + status.message();
}

// What "learned:file=PATH" names; an empty message is success.
inline std::string learned_from_file(Spec& spec, LearnedPolicy& policy) {
  std::string path;
  std::string wrong = read_parameters(spec, "file=PATH", [&](auto key, auto value) {
    if (key == "file") path = value;
    return key == "file";
  });
  if (!wrong.empty()) return wrong;
  return from_file(spec.name, path, [&]() -> Status {
#if defined(KVT_HAVE_SAFETENSORS)
    return read_learned(path, policy);
#else
    return error(Errc::bad_value, "this program was compiled without nlohmann-json, and reads no safetensors");
#endif
  });
}

}  // namespace detail

}  // namespace kvt::inline v0
