// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Tensors from .safetensors files: what is read is what was written, by the format's own library too, and a file that is
// damaged or made to do harm is refused, or read as tensors that hold together, with little memory and without a change to what
// was there before.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>

#include "kvtailor/io/safetensors.hpp"
#include "unit/files.hpp"
#include "unit/hostile.hpp"

using namespace kvt;
using namespace std::string_literals;

namespace {

using Shape = std::vector<std::size_t>;
constexpr float infinity = std::numeric_limits<float>::infinity();

// A file of a header, with the length that it has or says it has, and data.
std::string safetensors(const std::string& header, const std::string& data = "", long long length = -1) {
  const auto said = static_cast<std::uint64_t>(length < 0 ? static_cast<long long>(header.size()) : length);
  return bytes_of<std::uint64_t>({said}) + header + data;
}
std::string entry(const std::string& name, const std::string& dtype, const std::string& shape, std::size_t begin,
                  std::size_t end) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":[)" + std::to_string(begin) +
         "," + std::to_string(end) + "]}";
}
// One tensor "x".
std::string one(const std::string& dtype, const std::string& shape, const std::string& data) {
  return safetensors("{" + entry("x", dtype, shape, 0, data.size()) + "}", data);
}

// safetensors 0.8.0 with NumPy 2.4.6: save({"b": float32 [2, 3], "a": float16 [3]}, metadata={"n": "1", "format": "kvtailor"}).
const std::string mixed_of_python =
    "\xa0\0\0\0\0\0\0\0"
    R"({"__metadata__":{"n":"1","format":"kvtailor"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
    R"("a":{"dtype":"F16","shape":[3],"data_offsets":[24,30]}}   )"
    "\0\0\x80\x3f\0\0\0\xc0\0\0\x60\x40\0\0\x80\x3e\0\0\xa0\x40\0\0\xc0\x40\0\x38\0\xbc\xff\x7b"s;
// The same: save({"b": float32 [2, 3], 'a "quoted" ä\n\x01': float32 [2], "none": float32 [0, 3]}, metadata={"kind": "gates"}).
const std::string floats_of_python =
    "\xe0\0\0\0\0\0\0\0"
    R"({"__metadata__":{"kind":"gates"},"a \"quoted\" )"
    "\xc3\xa4"
    R"(\n\u0001":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},)"
    R"("none":{"dtype":"F32","shape":[0,3],"data_offsets":[32,32]}})"
    "\0\0\0\x3f\0\0\x80\xbf\0\0\x80\x3f\0\0\0\xc0\0\0\x60\x40\0\0\x80\x3e\0\0\xa0\x40\0\0\xc0\x40"s;
const TensorFile floats = {
    {{"b", {{2, 3}, {1, -2, 3.5f, 0.25f, 5, 6}}}, {"a \"quoted\" \xc3\xa4\n\x01", {{2}, {0.5f, -1}}}, {"none", {{0, 3}, {}}}},
    {{"kind", "gates"}}};

bool equal(const TensorFile& a, const TensorFile& b) {
  if (a.metadata != b.metadata || a.tensors.size() != b.tensors.size()) return false;
  for (const auto& [name, table] : a.tensors) {
    const auto other = b.tensors.find(name);
    if (other == b.tensors.end() || other->second.shape != table.shape || other->second.numbers != table.numbers) return false;
  }
  return true;
}

TensorFile marked() { return {{{"old", {{2, 1}, {41, 42}}}}, {{"old", "text"}}}; }
bool is_marked(const TensorFile& file) {
  static const TensorFile old = marked();
  return equal(file, old);
}

// What holds for every file. Memory, in all that is ever asked for: a text of the metadata takes 8 bytes at least and 96 as a
// node of a map; an extent of a shape 2 and, in vectors that double, less than 32; numbers of fp16 twice their bytes. A name
// that does not end is in two buffers of the parser that double, and in the copies of which it makes a message: 20 times its
// bytes.
Status read_any(std::string_view bytes, TensorFile& file) {
  file = marked();
  const long long before = allocated;
  const Status status = parse_safetensors(bytes, file);
  const long long taken = allocated - before;
  if (!(taken <= 24 * static_cast<long long>(bytes.size()) + 2048)) {
    FAIL(taken << " bytes were allocated for a file of " << bytes.size());
  }
  if (!status.ok()) {
    if (!is_marked(file)) FAIL("the tensors were changed by a failure: " << status.message());
    if (status.message().empty()) FAIL("a failure says nothing");
  } else {
    if (is_marked(file)) FAIL("nothing was read, and nothing refused");
    std::size_t all = 0;
    for (const auto& [name, table] : file.tensors) {
      std::size_t n = 1;
      for (const std::size_t extent : table.shape) n *= extent;
      if (n != table.numbers.size()) FAIL("a tensor of " << table.numbers.size() << " numbers has a shape of " << n);
      all += n;
    }
    if (!(2 * all <= bytes.size())) FAIL("more numbers than bytes");
  }
  return status;
}

void reads(std::string_view bytes, const TensorFile& want) {
  TensorFile file;
  const Status status = read_any(bytes, file);
  CHECK_MESSAGE(status.ok(), status.message());
  CHECK(equal(file, want));
}
void refuses(std::string_view bytes, Errc code, const std::string& part) {
  TensorFile file;
  const Status status = read_any(bytes, file);
  const std::string message = status.message();
  CAPTURE(message);
  CHECK(status.code == code);
  CHECK_MESSAGE(message.find(part) != std::string::npos, "not in the message: " << part);
}

std::vector<std::string> valid_files() {
  return {
      mixed_of_python,
      floats_of_python,
      safetensors("{}"),
      one("F64", "[2,1]", bytes_of<double>({1, -1e300})),
      one("BF16", "[2]", bytes_of<std::uint16_t>({0x3f80, 0xc000})),
      safetensors("{" + entry("z", "I64", "[]", 4, 12) + "," + entry("y", "I32", "[1,1]", 0, 4) + R"(,"__metadata__":{}}  )",
                  bytes_of<std::int32_t>({7, -8, -1})),
  };
}

}  // namespace

TEST_CASE("what the format's own library writes is read") {
  reads(mixed_of_python,
        {{{"b", {{2, 3}, {1, -2, 3.5f, 0.25f, 5, 6}}}, {"a", {{3}, {0.5f, -1, 65504}}}}, {{"n", "1"}, {"format", "kvtailor"}}});
  reads(floats_of_python, floats);
}

TEST_CASE("what is written is what the format's own library writes") {
  const Folder folder;
  const std::string path = (folder.path / "x").string();
  REQUIRE(write_safetensors(path, floats).ok());
  CHECK(folder.read("x") == floats_of_python);
}

TEST_CASE("tensors that were written are read as they were") {
  const Folder folder;
  const std::string path = (folder.path / "x").string();
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const FloatType type : {FloatType::fp32, FloatType::fp16}) {
    TensorFile made{{}, {{"format", "x"}, {"", "text"}, {"word", ""}, {"zero", std::string(2, '\0')}}};
    int names = 0;
    for (const Shape& shape : {Shape{}, Shape{3}, Shape{2, 3}, Shape{0, 7}, Shape{1, 1, 1, 1, 1}, Shape{99, 30, 3}}) {
      Table table{shape, {}};
      std::size_t n = 1;
      for (const std::size_t extent : shape) n *= extent;
      for (std::size_t i = 0; i < n; ++i) {
        const float x = normal(random);
        table.numbers.push_back(type == FloatType::fp16 ? to_float(from_float<Half>(x)) : x);
      }
      made.tensors["tensor " + std::to_string(names++)] = table;
      TensorFile file = marked();
      REQUIRE(write_safetensors(path, made, type).ok());
      REQUIRE(read_safetensors(path, file).ok());
      CHECK(equal(file, made));
      const std::string bytes = folder.read("x");
      std::uint64_t length = 0;
      std::memcpy(&length, bytes.data(), sizeof length);
      CHECK(length % 8 == 0);
    }
    REQUIRE(write_safetensors(path, {}, type).ok());
    CHECK(folder.read("x") == safetensors("{}      "));
  }
}

TEST_CASE("fp16 numbers are rounded to the nearest on writing") {
  const Folder folder;
  const std::string path = (folder.path / "x").string();
  REQUIRE(write_safetensors(path, {{{"x", {{4}, {1 + 0x1p-12f, 65519, -0x1p-24f, 0x1p-26f}}}}, {}}, FloatType::fp16).ok());
  TensorFile file;
  REQUIRE(read_safetensors(path, file).ok());
  CHECK(file.tensors["x"].numbers == std::vector<float>{1, 65504, -0x1p-24f, 0});
}

TEST_CASE("numbers of every type are read as the nearest of fp32") {
  const auto numbers = [](const std::string& dtype, const std::string& data, const std::vector<float>& want) {
    CAPTURE(dtype);
    reads(one(dtype, "[" + std::to_string(want.size()) + "]", data), {{{"x", {{want.size()}, want}}}, {}});
  };
  numbers("F16", bytes_of<std::uint16_t>({0x3c00, 0x7c00, 0xfc00, 0x0001}), {1, infinity, -infinity, 0x1p-24f});
  numbers("BF16", bytes_of<std::uint16_t>({0x3f80, 0xff80, 0x4049}), {1, -infinity, 3.140625f});
  numbers("F32", bytes_of<float>({1.5f, -infinity, 1e-45f}), {1.5f, -infinity, 1e-45f});
  numbers("F64", bytes_of<double>({1 + 0x1p-30, 1e300, -1e300, 1e-300}), {1, infinity, -infinity, 0});
  numbers("I32", bytes_of<std::int32_t>({-1, 1 << 24, (1 << 24) + 1, 2147483647}), {-1, 0x1p24f, 0x1p24f, 0x1p31f});
  numbers("I64", bytes_of<std::int64_t>({-3, (1ll << 62) + 1}), {-3, 0x1p62f});
  TensorFile file;
  REQUIRE(read_any(one("F32", "[1]", bytes_of<float>({std::nanf("")})), file).ok());
  CHECK(std::isnan(file.tensors["x"].numbers[0]));
}

TEST_CASE("a header may be written in other ways") {
  const std::string data = bytes_of<float>({1, 2, 3});
  const TensorFile want = {{{"x", {{1, 3}, {1, 2, 3}}}}, {}};
  reads(safetensors("{ \"x\" :\t{\n\"data_offsets\" : [ 0 , 12 ],\r\"shape\":[1, 3], \"dtype\": \"F32\" } }", data), want);
  reads(safetensors(R"({"\u0078":{"dtype":"\u004632","shape":[1,3],"data_offsets":[0,12]}} )" + std::string("\n\t "), data),
        want);
  reads(safetensors("{" + entry("x", "F32", "[1,3]", 0, 12) + R"(,"__metadata__":{"__metadata__":"x","x":""}})", data),
        {want.tensors, {{"__metadata__", "x"}, {"x", ""}}});
  // Tensors that have no numbers may share a place, in any order.
  reads(
      safetensors("{" + entry("d", "F32", "[0]", 12, 12) + "," + entry("a", "F16", "[0,9]", 0, 0) + "," +
                      entry("x", "F32", "[1,3]", 0, 12) + "," +
                      entry("b", "F64", "[0,18446744073709551615,18446744073709551615]", 0, 0) + "}",
                  data),
      {{{"a", {{0, 9}, {}}}, {"b", {{0, std::size_t(-1), std::size_t(-1)}, {}}}, {"d", {{0}, {}}}, {"x", {{1, 3}, {1, 2, 3}}}},
       {}});
}

TEST_CASE("a length of the header that the file does not have is refused") {
  const std::string whole = one("F32", "[1]", bytes_of<float>({1}));
  for (std::size_t n = 0; n < 8; ++n)
    refuses(whole.substr(0, n), Errc::bad_shape, "ends after " + std::to_string(n) + " bytes");
  const std::string header = "{" + entry("x", "F32", "[1]", 0, 4) + "}", data = bytes_of<float>({1});
  for (const long long length : {header.size() + 5, std::size_t{1} << 20, std::size_t{1} << 53, std::size_t(-1) >> 1}) {
    refuses(safetensors(header, data, length), Errc::bad_shape, "bytes; " + std::to_string(header.size() + 4) + " would be");
  }
  refuses(std::string(8, '\xff') + header + data, Errc::bad_shape, "would be the most");
  refuses(safetensors(header, data, 0), Errc::bad_value, "begin with a brace");
  refuses(safetensors(header, data, 1), Errc::bad_value, "no JSON");
  refuses(safetensors(header, data, static_cast<long long>(header.size()) - 1), Errc::bad_value, "no JSON");
  const std::string long_header(100'000'000, ' ');
  refuses(safetensors("{}" + long_header), Errc::bad_shape, "a header of 100000002 bytes; 100000000 would be the most");
  reads(safetensors("{}" + long_header.substr(2)), {});
}

TEST_CASE("a header that is no JSON is refused, and the byte is named") {
  refuses(safetensors(""), Errc::bad_value, "begin with a brace");
  refuses(safetensors(" {}"), Errc::bad_value, "begin with a brace");
  refuses(safetensors("\xef\xbb\xbf{}"), Errc::bad_value, "begin with a brace");
  refuses(safetensors("[]"), Errc::bad_value, "begin with a brace");
  refuses(safetensors("{}\0"s), Errc::bad_value, "no zero byte");
  refuses(safetensors("{}\0and more"s), Errc::bad_value, "no zero byte");
  refuses(safetensors("{} x"), Errc::bad_value, "no JSON from byte 4 on");
  for (const std::string header : {"{",
                                   "{}{}",
                                   "{}}",
                                   "{]",
                                   "{,}",
                                   "{\"x\"}",
                                   "{\"x\":}",
                                   "{x:{}}",
                                   "{'x':{}}",
                                   "{} // end",
                                   "{/**/}",
                                   "{\"__metadata__\":{}",
                                   "{\"\\x\":{}}",
                                   "{\"\n\":{}}",
                                   "{\"\xff\":{}}",
                                   "{\"\xc3\":{}}",
                                   "{\"\xed\xa0\x80\":{}}",
                                   "{\"\\ud800\":{}}",
                                   "{\"x\":nan}",
                                   "{\"x\":1e999}",
                                   "{\"__metadata__\":{\"a\":\"b\",}}"}) {
    CAPTURE(header);
    refuses(safetensors(header), Errc::bad_value, "no JSON from byte");
  }
}

TEST_CASE("tensors that are not described as the format has it are refused") {
  const std::string data = bytes_of<float>({1});
  const auto x = [](const std::string& of) { return "{\"x\":" + of + "}"; };
  for (const std::string& of : {
           R"({})"s,
           R"(1)"s,
           R"(-1)"s,
           R"(1.5)"s,
           R"("F32")"s,
           R"(null)"s,
           R"(true)"s,
           R"([])"s,
           R"([{}])"s,
           R"({"dtype":"F32","shape":[1]})"s,
           R"({"dtype":"F32","data_offsets":[0,4]})"s,
           R"({"shape":[1],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"dtype":"F32"})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"shape":[1]})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]})"s,
           R"({"dtype":["F32"],"shape":[1],"data_offsets":[0,4]})"s,
           R"({"dtype":32,"shape":[1],"data_offsets":[0,4]})"s,
           R"({"dtype":null,"shape":[1],"data_offsets":[0,4]})"s,
           R"({"dtype":{},"shape":[1],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":1,"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":"1","data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":["1"],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[[1]],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[{}],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[null],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[true],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":{},"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[1.0],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[1e0],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[-0],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[18446744073709551617],"data_offsets":[0,4]})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":[]})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":[0]})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,4]})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":[-0,4]})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":4})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":[[0,4]]})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":[0.0,4]})"s,
           R"({"dtype":"F32","shape":[1],"data_offsets":["0","4"]})"s,
       }) {
    CAPTURE(of);
    refuses(safetensors(x(of), data), Errc::bad_value, "tensor 1 of the .safetensors file must have a dtype, a shape and two");
  }
  for (const char* type :
       {"", "f32", "F32 ", "F8_E4M3", "BOOL", "U8", "I8", "I16", "U32", "F", "F3", "F322", "C64", "\\u0000"}) {
    refuses(one(type, "[1]", data), Errc::bad_value, "tensor 1 of the .safetensors file is not of type F16, BF16, F32");
  }
}

TEST_CASE("metadata that are not texts by name are refused") {
  for (const char* of : {"1", "null", "[]", "\"text\"", "{\"a\":1}", "{\"a\":null}", "{\"a\":[\"b\"]}", "{\"a\":{}}",
                         "{\"a\":true}", "{\"a\":-1}", "{\"a\":0.5}", R"({"a":"b","c":2})"}) {
    CAPTURE(of);
    refuses(safetensors("{\"__metadata__\":"s + of + "}"), Errc::bad_value, "must be texts by name");
  }
  refuses(safetensors("{" + entry("__metadata__", "F32", "[1]", 0, 4) + "}", bytes_of<float>({1})), Errc::bad_value,
          "must be texts");
}

TEST_CASE("names that are there twice are refused") {
  const std::string data = bytes_of<float>({1, 2});
  refuses(safetensors("{" + entry("x", "F32", "[1]", 0, 4) + "," + entry("x", "F32", "[1]", 4, 8) + "}", data), Errc::bad_name,
          "a name twice");
  refuses(safetensors("{" + entry("x", "F32", "[2]", 0, 8) + "," + entry("\\u0078", "F32", "[2]", 0, 8) + "}", data),
          Errc::bad_name, "a name twice");
  refuses(safetensors(R"({"__metadata__":{"a":"b","a":"b"}})"), Errc::bad_name, "a name twice");
  refuses(safetensors(R"({"__metadata__":{"a":"b"},"__metadata__":{"c":"d"}})"), Errc::bad_name, "a name twice");
  refuses(safetensors(R"({"__metadata__":{},)" + entry("x", "F32", "[2]", 0, 8) + R"(,"__metadata__":{}})", data),
          Errc::bad_name, "a name twice, behind tensor 1");
}

TEST_CASE("tensors that overlap, leave gaps or leave the file are refused") {
  const std::string data = bytes_of<float>({1, 2, 3, 4});
  const auto two = [&](std::size_t a, std::size_t b, std::size_t c, std::size_t d) {
    const auto shape = [](std::size_t from, std::size_t to) { return "[" + std::to_string((to - from) / 4) + "]"; };
    return safetensors("{" + entry("x", "F32", shape(a, b), a, b) + "," + entry("y", "F32", shape(c, d), c, d) + "}", data);
  };
  reads(two(8, 16, 0, 8), {{{"x", {{2}, {3, 4}}}, {"y", {{2}, {1, 2}}}}, {}});
  refuses(two(0, 8, 4, 16), Errc::bad_shape, "begins at byte 8");
  refuses(two(0, 16, 0, 16), Errc::bad_shape, "begins at byte 16");
  refuses(two(0, 4, 8, 16), Errc::bad_shape, "begins at byte 4");
  refuses(two(4, 8, 8, 16), Errc::bad_shape, "begins at byte 0");
  refuses(two(0, 8, 8, 20), Errc::bad_shape, "ends within its 16 bytes");
  refuses(two(0, 8, 16, 16), Errc::bad_shape, "begins at byte 8");
  refuses(two(0, 4, 4, 12), Errc::bad_shape, "end at byte 12 of 16");
  refuses(two(0, 16, 16, 0), Errc::bad_shape, "begins at byte 16");
  refuses(two(0, 8, 8, std::size_t(-1)), Errc::bad_shape, "ends within its 16 bytes");
  refuses(two(0, std::size_t(-8), std::size_t(-8), 16), Errc::bad_shape, "begins at byte 0 and ends within its 16 bytes");
  refuses(safetensors("{}", data), Errc::bad_shape, "end at byte 0 of 16");
}

TEST_CASE("a shape that does not fit its bytes is refused, whatever its product") {
  const std::string data = bytes_of<float>({1, 2, 3, 4, 5, 6});
  for (const char* shape : {"[7]",
                            "[5]",
                            "[]",
                            "[2,2]",
                            "[0]",
                            "[6,0]",
                            "[24]",
                            "[1,2,3,4]",
                            "[18446744073709551615]",
                            "[4611686018427387910]",
                            "[4294967296,4294967296]",
                            "[4294967296,4294967297,6]",
                            "[3,6148914691236517207]",
                            "[6148914691236517207,3]",
                            "[2,9223372036854775811]",
                            "[9223372036854775808,2,3]",
                            "[65536,65536,65536,65536]",
                            "[6,4611686018427387904,4]",
                            "[0,18446744073709551615]",
                            "[18446744073709551615,0]"}) {
    CAPTURE(shape);
    refuses(one("F32", shape, data), Errc::bad_shape, "at byte 0 has 24 bytes, which its shape does not take");
  }
  refuses(one("F64", "[6]", data), Errc::bad_shape, "has 24 bytes");
  refuses(one("F16", "[6]", data), Errc::bad_shape, "has 24 bytes");
  refuses(one("F64", "[3]", data.substr(1)), Errc::bad_shape, "has 23 bytes");
  refuses(one("F32", "[]", ""), Errc::bad_shape, "has 0 bytes");
  refuses(one("F32", "[9223372036854775808,4,0]", ""), Errc::bad_shape, "has 0 bytes");
  // A shape of very many extents takes no more memory than others.
  std::string ones = "[";
  for (int i = 0; i < 30000; ++i) ones += "1,";
  Shape shape(30000, 1);
  shape.push_back(6);
  reads(one("F32", ones + "6]", data), {{{"x", {shape, {1, 2, 3, 4, 5, 6}}}}, {}});
}

TEST_CASE("what is nested deep, or much, takes neither the stack nor more memory than others") {
  for (const char* const open : {"{\"x\":", "["}) {
    std::string deep;
    for (int i = 0; i < 1000000; ++i) deep += open;
    refuses(safetensors("{\"x\":" + deep), Errc::bad_value, "tensor 1");
    refuses(safetensors("{\"__metadata__\":" + deep), Errc::bad_value, "must be texts");
    refuses(safetensors(R"({"x":{"shape":)" + deep), Errc::bad_value, "tensor 1");
    refuses(safetensors(R"({"x":{"more":)" + deep), Errc::bad_value, "tensor 1");
  }
  std::string header = "{\"__metadata__\":{";
  TensorFile want;
  for (int i = 0; i < 20000; ++i) {
    const std::string name{static_cast<char>('0' + i % 40), static_cast<char>('0' + i / 40 % 40),
                           static_cast<char>('0' + i / 1600)};
    if (name.find('\\') != name.npos) continue;
    header += (want.metadata.empty() ? "\"" : ",\"") + name + "\":\"\"";
    want.metadata[name] = "";
  }
  reads(safetensors(header + "}}"), want);
  reads(safetensors(R"({"__metadata__":{"a":")" + std::string(1000000, 'x') + "\"}}"),
        {{}, {{"a", std::string(1000000, 'x')}}});
  refuses(safetensors("{\"" + std::string(1000000, 'x')), Errc::bad_value, "no JSON");
  refuses(safetensors("{\"x\":" + std::string(1000000, '1') + "}"), Errc::bad_value, "no JSON");
}

TEST_CASE("no beginning of a file is a file") {
  for (const std::string& file : valid_files()) {
    TensorFile read;
    REQUIRE(read_any(file, read).ok());
    for (std::size_t n = 0; n < file.size(); ++n) {
      if (read_any(std::string_view(file).substr(0, n), read).ok())
        FAIL("the first " << n << " of " << file.size() << " bytes are");
    }
    refuses(file + '\0', Errc::bad_shape, "end at byte");
  }
}

TEST_CASE("a file with any byte changed is refused or tensors that hold together") {
  long long read = 0, refused = 0;
  for (const std::string& file : valid_files()) {
    for (std::size_t at = 0; at < file.size(); ++at) {
      const auto own = static_cast<unsigned char>(file[at]);
      for (const unsigned value :
           {0u,  1u,  9u,  10u,  32u,  34u,  44u,  45u,      46u,      48u,      57u,       58u,       65u,
            91u, 92u, 93u, 123u, 125u, 127u, 255u, own ^ 1u, own ^ 2u, own ^ 4u, own ^ 16u, own ^ 64u, own ^ 128u}) {
        std::string changed = file;
        changed[at] = static_cast<char>(value);
        TensorFile tensors;
        ++(read_any(changed, tensors).ok() ? read : refused);
      }
    }
  }
  CHECK(read > 1000);
  CHECK(refused > 1000);
}

TEST_CASE("files with parts moved, doubled, cut out and made up are refused or tensors that hold together") {
  std::mt19937 random(7);
  const std::vector<std::string> files = valid_files();
  const std::string pieces[] = {"{",
                                "}",
                                "[",
                                "]",
                                ",",
                                ":",
                                "\"",
                                "\\",
                                "\\u00",
                                "0",
                                "18446744073709551615",
                                "-1",
                                "1e39",
                                "null",
                                "\"__metadata__\":{",
                                "\"x\":{",
                                "\"dtype\":\"F16\"",
                                "\"shape\":[",
                                "\"data_offsets\":[0,",
                                "\0"s,
                                "\xff\xff\xff\xff",
                                " ",
                                entry("y", "F32", "[0]", 0, 0) + ","};
  long long read = 0;
  for (int round = 0; round < 300000; ++round) {
    std::string file = damaged(files, pieces, random);
    // Else few get past the length.
    if (file.size() >= 8 && random() % 2 == 0) {
      const std::size_t end = file.rfind('}');
      const std::uint64_t length = end == file.npos || end < 8 ? 0 : end - 7;
      std::memcpy(file.data(), &length, sizeof length);
    }
    TensorFile tensors;
    read += read_any(file, tensors).ok() ? 1 : 0;
  }
  CHECK(read > 5000);
}

TEST_CASE("memory that runs out at any allocation leaves the tensors as they were") {
  const Folder folder;
  std::vector<std::string> files = valid_files();
  files.push_back(safetensors("{\"x\":1}"));
  files.push_back(safetensors("{\"x\""));
  for (const std::string& bytes : files) {
    const std::string path = folder.write("x", bytes);
    int failures = 0;
    for (bool done = false; !done; ++failures) {
      TensorFile file = marked();
      const bool fits = is_marked(file);
      until_failure = failures;
      const Status status = read_safetensors(path, file);
      until_failure = -1;
      done = status.code != Errc::out_of_memory;
      if (!status.ok()) REQUIRE((fits && is_marked(file)));
      REQUIRE(failures < 1000);
    }
    CHECK(failures > 1);
  }
}

TEST_CASE("tensors that cannot be written leave what was there") {
  const Folder folder;
  const std::string path = folder.write("x", "old");
  const auto refused = [&](const TensorFile& file, FloatType type, Errc code, const std::string& part) {
    const Status status = write_safetensors(path, file, type);
    const std::string message = status.message();
    CAPTURE(message);
    CHECK(status.code == code);
    CHECK(message.find(part) != std::string::npos);
    CHECK(folder.names() == std::set<std::string>{"x"});
    CHECK(folder.read("x") == "old");
  };
  const auto of = [](std::vector<float> numbers) {
    return TensorFile{{{"a", {{1}, {1}}}, {"x", {{numbers.size()}, numbers}}}, {}};
  };
  for (const FloatType type : {FloatType::fp32, FloatType::fp16}) {
    refused(of({1, std::nanf("")}), type, Errc::bad_value, "the number nan");
    refused(of({-infinity}), type, Errc::bad_value, "the number -inf");
    refused({{{"x", {{3}, {1, 2}}}}, {}}, type, Errc::bad_shape, "a table of 2 numbers");
    refused({{{"x", {{}, {}}}}, {}}, type, Errc::bad_shape, "a table of 0 numbers");
    refused({{{"x", {{std::size_t{1} << 32, std::size_t{1} << 32}, {}}}}, {}}, type, Errc::bad_shape, "a table of 0 numbers");
    refused({{{"__metadata__", {{1}, {1}}}}, {}}, type, Errc::bad_name, "named __metadata__");
    refused({{{"\xff", {{1}, {1}}}}, {}}, type, Errc::bad_name, "not UTF-8");
    refused({{}, {{"\xc3", ""}}}, type, Errc::bad_name, "not UTF-8");
    refused({{}, {{"", "\xed\xa0\x80"}}}, type, Errc::bad_name, "not UTF-8");
    refused({{}, {{"", std::string(100'000'000, 'x')}}}, type, Errc::bad_shape, "is longer than 100000000");
  }
  refused(of({65520}), FloatType::fp16, Errc::bad_value, "the number 65520; to be written it must be within 65504");
  refused(of({1, -1e30f}), FloatType::fp16, Errc::bad_value, "must be within 65504");
  CHECK(write_safetensors((folder.path / "none" / "x").string(), floats).code == Errc::bad_name);
  CHECK(write_safetensors(folder.path.string(), floats).code == Errc::bad_name);
  CHECK(folder.names() == std::set<std::string>{"x"});

  int failures = 0;
  for (bool done = false; !done; ++failures) {
    until_failure = failures;
    const Status status = write_safetensors(path, floats);
    until_failure = -1;
    done = status.ok();
    if (!done) REQUIRE(status.code == Errc::out_of_memory);
    REQUIRE(folder.names() == std::set<std::string>{"x"});
    REQUIRE((folder.read("x") == "old") == !done);
    REQUIRE(failures < 1000);
  }
  CHECK(failures > 1);
}

TEST_CASE("a file that cannot be read is named so") {
  const Folder folder;
  for (const std::string& path : {folder.path.string(), (folder.path / "none").string(), ""s}) {
    TensorFile file = marked();
    const Status status = read_safetensors(path, file);
    CHECK(status.code == Errc::bad_name);
    CHECK(status.message() == "the file cannot be read");
    CHECK(is_marked(file));
  }
}
