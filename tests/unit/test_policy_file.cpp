// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Curves in files, and whether they fit what they are used for.
#include <doctest/doctest.h>

#include <filesystem>

#include "kvtailor/io/policy_file.hpp"
#include "kvtailor/policies.hpp"
#include "unit/files.hpp"

using namespace kvt;

namespace {

Curve some_curve() {
  Curve curve{{}, 3, 2, "key_diff"};
  for (int i = 0; i < 99 * 6; ++i) curve.dropped.push_back(static_cast<float>(i % 101) / 101);
  return curve;
}

TensorFile some_file() {
  TensorFile file;
  file.tensors["dropped"] = {{99, 3, 2}, some_curve().dropped};
  file.metadata = {{"format", curve_format}, {"selector", "key_diff"}};
  return file;
}

}  // namespace

TEST_CASE("a curve comes back from its file, with what it was made for") {
  const Folder folder;
  const std::string path = (folder.path / "curve.safetensors").string();
  const Curve curve = some_curve();
  REQUIRE(write_curve(path, curve, {{"model", "a model"}}).ok());
  Curve read;
  REQUIRE(read_curve(path, read).ok());
  CHECK(read.dropped == curve.dropped);
  CHECK(read.num_layers == 3);
  CHECK(read.num_kv_heads == 2);
  CHECK(read.selector == "key_diff");
  CHECK(read.check({3, 2, 6, 64}).ok());
  CHECK(read.check({2, 3, 6, 64}).code == Errc::bad_shape);
  TensorFile file;
  REQUIRE(read_safetensors(path, file).ok());
  CHECK(file.metadata["model"] == "a model");
  CHECK(write_curve(path, Curve{{0.5f}}, {}).code == Errc::bad_shape);
  Curve bad = curve;
  bad.dropped[7] = std::nanf("");
  CHECK(write_curve(path, bad, {}).code == Errc::bad_value);
  REQUIRE(read_curve(path, read).ok());  // the old file
}

TEST_CASE("a published table has the model's shape, and nothing else") {
  const Folder folder;
  const std::string path = (folder.path / "curve.npy").string();
  REQUIRE(write_curve(path, some_curve(), {}).ok());
  Table table;
  REQUIRE(read_table(path, table).ok());
  CHECK(table.shape == std::vector<std::size_t>{99, 3, 2});
  Curve read;
  REQUIRE(read_curve(path, read).ok());
  CHECK(read.num_layers == 3);
  CHECK(read.num_kv_heads == 2);
  CHECK(read.selector.empty());
  REQUIRE(write_npy(path, {{99, 6}, some_curve().dropped}).ok());
  REQUIRE(read_curve(path, read).ok());
  CHECK(read.num_layers == 0);
  CHECK(read.check({2, 3, 6, 64}).ok());
}

TEST_CASE("what is no curve is refused, and the curve stays as it was") {
  const Folder folder;
  const std::string path = (folder.path / "curve.safetensors").string();
  Curve read = some_curve();
  const auto refused = [&](const TensorFile& file, Errc code) {
    REQUIRE(write_safetensors(path, file, FloatType::fp32).ok());
    CHECK(read_curve(path, read).code == code);
    CHECK(read.dropped == some_curve().dropped);
    CHECK(read.selector == "key_diff");
  };
  TensorFile file = some_file();
  file.metadata["format"] = "another";
  refused(file, Errc::bad_value);
  file = some_file();
  file.metadata.clear();
  refused(file, Errc::bad_value);
  file = some_file();
  file.tensors["more"] = {{1}, {1}};
  refused(file, Errc::bad_shape);
  file = some_file();
  file.tensors["Dropped"] = std::move(file.tensors["dropped"]);
  file.tensors.erase("dropped");
  refused(file, Errc::bad_shape);
  file = some_file();
  file.tensors["dropped"].shape = {99, 6};
  refused(file, Errc::bad_shape);
  CHECK(read_curve((folder.path / "nothing").string(), read).code == Errc::bad_name);
  // A file that ends early.
  REQUIRE(write_safetensors(path, some_file(), FloatType::fp32).ok());
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
  CHECK(read_curve(path, read).code == Errc::bad_shape);
  CHECK(read.dropped == some_curve().dropped);
}

TEST_CASE("a curve is refused beside another selector than it was made for, and both are named") {
  const Folder folder;
  const std::string path = (folder.path / "curve.safetensors").string();
  Curve curve = some_curve();
  curve.selector = full_name("snap_kv:kernel=7");
  REQUIRE(write_curve(path, curve, {}).ok());
  const std::string name = "curve:file=" + path;
  CHECK(ParsedPolicies({name, "snap_kv:kernel=7", "fp16"}).message == "");
  CHECK(ParsedPolicies({name, "snap_kv:pool=avg,kernel=7,window=64", "fp16"}).message == "");
  CHECK(ParsedPolicies({name, "snap_kv", "fp16"}).message ==
        name +
            " was made for the token selector snap_kv:window=64,kernel=7,pool=avg; this one is "
            "snap_kv:window=64,kernel=5,pool=avg");
  CHECK(ParsedPolicies({name, "key_diff", "fp16"}).message.find("this one is key_diff") != std::string::npos);
  CHECK(ParsedPolicies({name, "nonsense", "fp16"}).message.find("unknown token selector") != std::string::npos);
}

TEST_CASE("a selector's full name has every parameter once, in one order, and numbers in one form") {
  CHECK(full_name("snap_kv") == "snap_kv:window=64,kernel=5,pool=avg");
  CHECK(full_name("expected_attention:epsilon=2e-2") == full_name("expected_attention:covariance=on,epsilon=0.02"));
  CHECK(full_name("expected_attention:epsilon=0.02") != full_name("expected_attention"));
  CHECK(full_name("chunk_kv(value_norm:through=output(snap_kv:window=8))") ==
        "chunk_kv:length=20(value_norm:epsilon=0,through=output(snap_kv:window=8,kernel=5,pool=avg))");
  CHECK(full_name("random:seed=18446744073709551615") == "random:seed=18446744073709551615");
  for (const char* const plain : {"key_diff", "tova", "last_query", "reconstruction", "caote(tova)", "nonsense", ""}) {
    CHECK(full_name(plain) == plain);
  }
}

TEST_CASE("a profile for bytes comes back from its file, and what is none is refused") {
  const Folder folder;
  const std::string path = (folder.path / "bytes.safetensors").string(), other = (folder.path / "other").string();
  ByteBudget profile;
  profile.num_layers = 2;
  profile.num_kv_heads = 1;
  profile.selector = "key_diff";
  profile.codecs = {"fp16", "turbo3/turbo2"};
  profile.shares = {0, .5f, 1};
  profile.losses = {3, 1, 0, 3, 2, 1, 6, 2, 0, 6, 4, 2};
  profile.row_bytes = {260, 50, 260, 50};
  profile.zone_bytes = 260;
  profile.zone_rows = 12;
  REQUIRE(write_byte_budget(path, profile, {{"data", "some"}, {"codecs", "of others"}}).ok());
  ByteBudget read;
  REQUIRE(read_byte_budget(path, read).ok());
  CHECK(read.codecs == profile.codecs);
  CHECK(read.selector == profile.selector);
  CHECK(read.shares == profile.shares);
  CHECK(read.losses == profile.losses);
  CHECK(read.row_bytes == profile.row_bytes);
  CHECK(read.zone_bytes == profile.zone_bytes);
  CHECK(read.zone_rows == 12);

  TensorFile file;
  const auto refused = [&](auto&& change, Errc code) {
    REQUIRE(read_safetensors(path, file).ok());
    change(file);
    REQUIRE(write_safetensors(other, file, FloatType::fp32).ok());
    ByteBudget kept = profile;
    CHECK(read_byte_budget(other, kept).code == code);
    CHECK(kept.losses == profile.losses);
  };
  refused([](TensorFile& f) { f.metadata["format"] = "kvtailor curve 1"; }, Errc::bad_value);
  refused([](TensorFile& f) { f.metadata["codecs"] = "fp16"; }, Errc::bad_shape);
  refused([](TensorFile& f) { f.tensors.erase("zones"); }, Errc::bad_shape);
  refused([](TensorFile& f) { f.tensors["more"] = {{1}, {1}}; }, Errc::bad_shape);
  refused([](TensorFile& f) { f.tensors["zones"].numbers[1] = -1; }, Errc::bad_value);
  refused([](TensorFile& f) { f.tensors["zones"].numbers[0] = -1; }, Errc::bad_value);
  refused([](TensorFile& f) { f.tensors["losses"].numbers[2] = -1; }, Errc::bad_value);
  refused([](TensorFile& f) { f.tensors["shares"].numbers[0] = .1f; }, Errc::bad_value);
  refused([](TensorFile& f) { f.tensors["row_bytes"] = {{2, 1, 1}, {260, 260}}; }, Errc::bad_shape);
}
