// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Tables from files: what is read is what was written, and a file that is damaged or made to do harm is refused, or read as
// a table that holds together, with little memory and without a change to what was there before.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "kvtailor/io/table.hpp"
#include "unit/files.hpp"
#include "unit/hostile.hpp"

using namespace kvt;

namespace {

using Shape = std::vector<std::size_t>;

// A .npy file as NumPy writes it, but for the padding, which is to 64 bytes where the header's length is left open.
std::string npy(int version, const std::string& header, const std::string& data, long long length = -1) {
  std::string text = header;
  const std::size_t start = version == 1 ? 10 : 12;
  if (length < 0) {
    text.append(63 - (start + text.size()) % 64, ' ');
    text += '\n';
  }
  const auto said = static_cast<unsigned long long>(length < 0 ? static_cast<long long>(text.size()) : length);
  std::string out = "\x93NUMPY";
  out += static_cast<char>(version);
  out += '\0';
  for (std::size_t i = 0; i < start - 8; ++i) out += static_cast<char>(said >> 8 * i & 255);
  return out + text + data;
}
std::string header(const std::string& type, const std::string& shape, const std::string& order = "False") {
  return "{'descr': '" + type + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }";
}
std::string extents(const Shape& shape) {
  std::string out = "(";
  for (const std::size_t n : shape) out += std::to_string(n) + (shape.size() == 1 ? "," : ", ");
  if (shape.size() > 1) out.resize(out.size() - 2);
  return out + ")";
}

std::size_t count_of(const Shape& shape) {
  std::size_t n = 1;
  for (const std::size_t extent : shape) n *= extent;
  return n;
}

Table marked() { return {{2, 1}, {41, 42}}; }
bool is_marked(const Table& table) { return table.shape == Shape{2, 1} && table.numbers == std::vector<float>{41, 42}; }

// What holds for every file. Memory, in all that is ever asked for: numbers of fp16 take twice their bytes; a number of text
// takes two bytes at least and four as fp32, an extent of a shape likewise and eight; vectors that double have asked for less
// than twice their capacity, which is less than twice what they hold: 16 bytes for one of a file at most. Vectors begin small.
Status read_any(std::string_view file, Table& table) {
  table = marked();
  const long long before = allocated;
  const Status status = parse_table(file, table);
  const long long taken = allocated - before;
  if (!(taken <= 16 * static_cast<long long>(file.size()) + 64)) {
    FAIL(taken << " bytes were allocated for a file of " << file.size());
  }
  if (!status.ok()) {
    if (!is_marked(table)) FAIL("the table was changed by a failure: " << status.message());
    if (status.message().empty()) FAIL("a failure says nothing");
  } else {
    std::size_t n = 1;
    for (const std::size_t extent : table.shape) n *= extent;
    if (n != table.numbers.size()) FAIL("a table of " << table.numbers.size() << " numbers has a shape of " << n);
    if (!(table.numbers.size() <= file.size())) FAIL("more numbers than bytes");
  }
  return status;
}

void reads(std::string_view file, const Shape& shape, const std::vector<float>& numbers) {
  Table table;
  const Status status = read_any(file, table);
  CHECK_MESSAGE(status.ok(), status.message());
  CHECK(table.shape == shape);
  CHECK(table.numbers == numbers);
}
void refuses(std::string_view file, Errc code, const std::string& part) {
  Table table;
  const Status status = read_any(file, table);
  const std::string message = status.message();
  CAPTURE(message);
  CHECK(status.code == code);
  CHECK_MESSAGE(message.find(part) != std::string::npos, "not in the message: " << part);
}

// Valid files, small.
std::vector<std::string> valid_files() {
  return {
      npy(1, header("<f4", "(2, 3)"), bytes_of<float>({1, -2, 3.5f, 1e-30f, 5, 6})),
      npy(2, header("<f8", "(3,)"), bytes_of<double>({1, 0.25, -1e300})),
      npy(3, header("<f2", "(2, 1, 2)"), bytes_of<std::uint16_t>({0x3c00, 0xc000, 0x0001, 0x7bff})),
      npy(1, header("<f4", "()"), bytes_of<float>({7})),
      "# gates\n0.5\t1\n0.25\t-3e-2\n",
      "1,2,3\r\n4,5,6\r\n",
      "1 2\n\n# end\n3 4",
  };
}

}  // namespace

TEST_CASE("a .npy array is read as it was written, of every version, type and shape") {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const int version : {1, 2, 3}) {
    for (const Shape& shape :
         {Shape{}, Shape{3}, Shape{1}, Shape{2, 3}, Shape{1, 1, 1, 1, 1}, Shape{99, 30, 3}, Shape{0}, Shape{0, 7}}) {
      std::vector<float> numbers;
      for (std::size_t i = 0; i < count_of(shape); ++i) numbers.push_back(normal(random));
      const std::vector<double> wide(numbers.begin(), numbers.end());
      reads(npy(version, header("<f4", extents(shape)), bytes_of(numbers)), shape, numbers);
      reads(npy(version, header("<f8", extents(shape)), bytes_of(wide)), shape, numbers);
      // Sums of three powers of two, which fp16 holds.
      std::vector<std::uint16_t> half;
      for (float& x : numbers) {
        const unsigned exponent = 1 + random() % 30, fraction = random() % 1024;
        half.push_back(static_cast<std::uint16_t>(random() % 2 << 15 | exponent << 10 | fraction));
        x = std::ldexp(static_cast<float>(1024 + fraction), static_cast<int>(exponent) - 25) *
            (half.back() >> 15 != 0 ? -1.f : 1.f);
      }
      reads(npy(version, header("<f2", extents(shape)), bytes_of(half)), shape, numbers);
    }
  }
}

TEST_CASE("the last index of a .npy array is the fastest") {
  Table table;
  REQUIRE(read_any(npy(1, header("<f4", "(2, 3)"), bytes_of<float>({0, 1, 2, 10, 11, 12})), table).ok());
  for (std::size_t i = 0; i < 2; ++i) {
    for (std::size_t j = 0; j < 3; ++j) CHECK(table.numbers[i * 3 + j] == static_cast<float>(10 * i + j));
  }
}

TEST_CASE("numbers of a .npy array that fp32 does not hold are the nearest, or infinity") {
  const float infinity = std::numeric_limits<float>::infinity();
  reads(npy(1, header("<f8", "(4,)"), bytes_of<double>({1 + 0x1p-30, 1e300, -1e300, 1e-300})), {4},
        {1, infinity, -infinity, 0});
  reads(npy(1, header("<f2", "(3,)"), bytes_of<std::uint16_t>({0x7c00, 0xfc00, 0x0001})), {3}, {infinity, -infinity, 0x1p-24f});
  Table table;
  REQUIRE(read_any(npy(1, header("<f4", "(1,)"), bytes_of<float>({std::nanf("")})), table).ok());
  CHECK(std::isnan(table.numbers[0]));
}

TEST_CASE("a .npy header may be written in other ways") {
  const std::string data = bytes_of<float>({1, 2, 3, 4, 5, 6});
  const std::vector<float> numbers = {1, 2, 3, 4, 5, 6};
  reads(npy(1, "{'shape': (2, 3), 'fortran_order': False, 'descr': '<f4'}", data), {2, 3}, numbers);
  reads(npy(1, "{'descr':'<f4','fortran_order':False,'shape':(2,3)}", data), {2, 3}, numbers);
  reads(npy(1, "{'descr':   '<f4',  'fortran_order':   False, 'shape':   ( 2 , 3 , ) }", data), {2, 3}, numbers);
  const std::string bare = header("<f4", "(6,)");  // no padding at all
  reads(npy(1, bare, data, static_cast<long long>(bare.size())), {6}, numbers);
}

TEST_CASE("a .npy array of another kind is refused") {
  const std::string data = bytes_of<float>({1, 2, 3, 4, 5, 6});
  for (const char* type : {">f4", "=f4", "|f4", "<i4", "<f16", "<f", "<c8", "f4", "", "<f44"}) {
    refuses(npy(1, header(type, "(2, 3)"), data), Errc::bad_value, "little-endian fp16, fp32 or fp64");
  }
  refuses(npy(1, "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (6,)}", data), Errc::bad_value, "fp32");
  refuses(npy(1, header("<f4", "(2, 3)", "True"), data), Errc::bad_value, "C order");
  refuses(npy(1, header("<f4", "(2, 3)", "false"), data), Errc::bad_value, "C order");
  refuses(npy(1, "{'descr': '<f4', 'fortran_order': False}", data), Errc::bad_shape, "no shape");
  refuses(npy(1, "{'descr': '<f4', 'shape': (2, 3)}", data), Errc::bad_value, "C order");
  refuses(npy(1, "{'fortran_order': False, 'shape': (2, 3)}", data), Errc::bad_value, "fp32");
  refuses(npy(1, "", data), Errc::bad_value, "fp32");
  for (const int version : {0, 4, 9, 255}) {
    refuses(npy(version, header("<f4", "(2, 3)"), data), Errc::bad_value,
            "version " + std::to_string(version) + "; it must be 1, 2 or 3");
  }
}

TEST_CASE("a .npy shape that does not fit its data is refused, whatever its product") {
  const std::string data = bytes_of<float>({1, 2, 3, 4, 5, 6});
  for (const char* shape : {"(7,)",
                            "(5,)",
                            "(1,)",
                            "()",
                            "(2, 2)",
                            "(2, 4)",
                            "(0,)",
                            "(6, 0)",
                            "(24,)",
                            "(23,)",
                            "(1, 2, 3, 4)",
                            "(-6,)",
                            "(-2, -3)",
                            "(2, -3)",
                            "(6.0,)",
                            "(1e1,)",
                            "(six,)",
                            "('6',)",
                            "(,)",
                            "(6,,)",
                            "(6;)",
                            "6",
                            "[6]",
                            "None",
                            "(18446744073709551616,)",
                            "(18446744073709551615,)",
                            "(4611686018427387905,)",
                            "(4294967296, 4294967296)",
                            "(4294967296, 4294967297)",
                            "(3, 6148914691236517207)",
                            "(6148914691236517207, 3)",
                            "(2, 9223372036854775811)",
                            "(9223372036854775808, 2, 3)",
                            "(0, 18446744073709551615)",
                            "(65536, 65536, 65536, 65536)",
                            "(6, 4611686018427387904, 4)"}) {
    CAPTURE(shape);
    refuses(npy(1, header("<f4", shape), data), Errc::bad_shape, ".npy");
  }
  refuses(npy(1, header("<f4", "(6,)"), data + '\0'), Errc::bad_shape, "6 numbers by its shape; it has 25 bytes");
  refuses(npy(1, header("<f4", "(6,)"), data + data), Errc::bad_shape, "6 numbers by its shape; it has 48 bytes");
  refuses(npy(1, header("<f4", "(6,)"), data.substr(0, 23)), Errc::bad_shape, "6 numbers by its shape; it has 23 bytes");
  refuses(npy(1, header("<f8", "(6,)"), data), Errc::bad_shape, "6 numbers by its shape; it has 24 bytes");
  refuses(npy(1, header("<f4", "()"), ""), Errc::bad_shape, ".npy");
  // A shape of very many extents takes no more memory than others.
  std::string ones = "(";
  for (int i = 0; i < 30000; ++i) ones += "1,";
  Shape shape(30000, 1);
  shape.push_back(6);
  reads(npy(1, header("<f4", ones + "6)"), data), shape, {1, 2, 3, 4, 5, 6});
}

TEST_CASE("a .npy header that is longer than the file is refused") {
  const std::string head = header("<f4", "(1,)"), data = bytes_of<float>({1});
  const auto whole = static_cast<long long>(head.size());
  reads(npy(1, head, data, whole), {1}, {1});
  for (const long long length : {whole + 5, whole + 100, 65535LL}) {
    refuses(npy(1, head, data, length), Errc::bad_shape, "has a header of " + std::to_string(length) + " bytes");
  }
  for (const long long length : {whole + 5, 65536LL, 0x7fffffffLL, 0xffffffffLL}) {
    refuses(npy(2, head, data, length), Errc::bad_shape, "has a header of " + std::to_string(length) + " bytes");
  }
  refuses(npy(1, head, data, 0), Errc::bad_value, "fp32");
  refuses(npy(1, head, data, whole + 4), Errc::bad_shape, "0 bytes");  // the data is part of it
  for (std::size_t n = 6; n < 12; ++n) refuses(npy(1, head, data).substr(0, n), Errc::bad_shape, "in its header");
}

TEST_CASE("lines of numbers are read, between whatever they may stand") {
  const std::vector<float> six = {1, 2, 3, 4, 5, 6};
  for (const char* text :
       {"1 2 3\n4 5 6\n", "1\t2\t3\n4\t5\t6\n", "1,2,3\n4,5,6\n", "1, 2, 3\n4, 5, 6", "1 2 3\r\n4 5 6\r\n",
        "# a\n1 2 3\n#b 7\n4 5 6\n#", "\n\n1 2 3\n\n4 5 6\n\n", "  1 2 3  \n\t4 5 6\t\n", "1 2 3 # first\n4 5 6#second\n",
        "1,,2,3,\n,4,5,6\n", "1.0 2e0 3.\n.4e1 500e-2 0.06e+2", "\r\n1 2 3\n  # \n4 5 6"}) {
    CAPTURE(text);
    reads(text, {2, 3}, six);
  }
  reads("7", {1, 1}, {7});
  reads("-0.5 1e-3\n", {1, 2}, {-0.5f, 1e-3f});
  reads("1\n2\n3\n", {3, 1}, {1, 2, 3});
  reads("3.4028234e38 -3.4028234e38 1.17549435e-38 1.4e-45 1e-60 -1e-300", {1, 6},
        {std::numeric_limits<float>::max(), -std::numeric_limits<float>::max(), std::numeric_limits<float>::min(),
         std::numeric_limits<float>::denorm_min(), 0, 0});
  // As NumPy's savetxt writes them.
  reads("1.000000000000000000e+00\t0.000000000000000000e+00\n9.980000000000000426e-01\t1.192092895507812500e-07\n", {2, 2},
        {1, 0, 0.998f, 0x1p-23f});
}

TEST_CASE("lines that are no table are refused, and the line is named") {
  for (const char* bad : {"nan", "inf", "-inf", "infinity",   "NaN",   "1e99",  "-1e39",    "1e400",         "word", "0x10",
                          "+1",  "--1", "1-2",  "2024-01-02", "1.5.5", "1e5e",  "1e",       "1;2",           "1:2",  "\"1\"",
                          "(1",  "1f",  "-",    ".",          "e5",    "1_000", "\xc2\xa0", "\xef\xbb\xbf 1"}) {
    CAPTURE(bad);
    refuses(std::string(bad), Errc::bad_value, "line 1 of the table");
    refuses("1 2\n\n3 " + std::string(bad) + "\n", Errc::bad_value, "line 3 of the table");
    refuses(std::string(bad) + " 1", Errc::bad_value, "line 1 of the table");
  }
  refuses(std::string("1 2\0 3", 6), Errc::bad_value, "line 1");
  refuses(std::string(1, '\0'), Errc::bad_value, "line 1");
  refuses("1 2 3\n4 5\n", Errc::bad_shape, "line 2 of the table does not have 3 numbers");
  refuses("1\n2\n# c\n\n3 4\n", Errc::bad_shape, "line 5 of the table does not have 1 numbers");
  for (const char* none : {"", "\n", "# only this", "\r\n \t,\n", "#1 2 3\n#\n"}) {
    refuses(none, Errc::bad_shape, "0 numbers");
  }
}

TEST_CASE("every beginning of a file is refused or a table of its own") {
  for (const std::string& file : valid_files()) {
    Table whole;
    REQUIRE(read_any(file, whole).ok());
    const bool binary = file[0] == '\x93';
    for (std::size_t n = 0; n < file.size(); ++n) {
      Table table;
      const Status status = read_any(std::string_view(file).substr(0, n), table);
      if (binary && status.ok()) FAIL("the first " << n << " of " << file.size() << " bytes are a table");
    }
  }
}

TEST_CASE("a file with any byte changed is refused or a table that holds together") {
  long long read = 0, refused = 0;
  for (const std::string& file : valid_files()) {
    for (std::size_t at = 0; at < file.size(); ++at) {
      const auto own = static_cast<unsigned char>(file[at]);
      for (const unsigned value :
           {0u,  1u,  2u,  9u,   10u,  32u,  35u,  39u,      40u,      41u,      44u,       45u,       46u,
            48u, 57u, 62u, 101u, 127u, 128u, 255u, own ^ 1u, own ^ 2u, own ^ 4u, own ^ 16u, own ^ 64u, own ^ 128u}) {
        std::string changed = file;
        changed[at] = static_cast<char>(value);
        Table table;
        ++(read_any(changed, table).ok() ? read : refused);
      }
    }
  }
  CHECK(read > 1000);
  CHECK(refused > 1000);
}

TEST_CASE("files with parts moved, doubled, cut out and made up are refused or tables that hold together") {
  std::mt19937 random(7);
  const std::vector<std::string> files = valid_files();
  const std::string pieces[] = {"(",
                                ")",
                                ",",
                                "'",
                                "\n",
                                "#",
                                "9999999999",
                                "-1",
                                "1e39",
                                "'shape': ",
                                "'descr': '<f8'",
                                "\x93NUMPY",
                                "\xff\xff\xff\xff",
                                " ",
                                "0, "};
  for (int round = 0; round < 300000; ++round) {
    const std::string file = damaged(files, pieces, random);
    Table table;
    (void)read_any(file, table);
  }
}

TEST_CASE("a large file takes no more than a few times its bytes") {
  std::string text;
  for (int line = 0; line < 20000; ++line) text += "1 2 3 4 5 6 7 8\n";
  Table table;
  REQUIRE(read_any(text, table).ok());
  CHECK(table.shape == Shape{20000, 8});
  REQUIRE(read_any(npy(2, header("<f2", "(500000,)"), std::string(1000000, '\0')), table).ok());
  CHECK(table.numbers.size() == 500000);
}

TEST_CASE("memory that runs out at any allocation leaves the table as it was") {
  std::string lines;
  for (int i = 0; i < 50; ++i) lines += "1 2 3\n";
  std::vector<std::string> files = valid_files();
  files.push_back(lines);
  for (const std::string& file : files) {
    int failures = 0;
    for (bool done = false; !done; ++failures) {
      Table table = marked();
      until_failure = failures;
      const Status status = parse_table(file, table);
      until_failure = -1;
      done = status.ok();
      if (!done) {
        REQUIRE(status.code == Errc::out_of_memory);
        REQUIRE(is_marked(table));
      }
    }
    CHECK(failures > 1);
  }
}

TEST_CASE("files on disk are read, and what cannot be read is named") {
  const Folder folder;
  int number = 0;
  for (const std::string& file : valid_files()) {
    Table here, there;
    REQUIRE(read_any(file, here).ok());
    REQUIRE(read_table(folder.write(std::to_string(number++), file), there).ok());
    CHECK(here.shape == there.shape);
    CHECK(here.numbers == there.numbers);
  }
  const auto refused = [&](const std::string& path, Errc code, const std::string& part) {
    Table table = marked();
    const Status status = read_table(path, table);
    const std::string message = status.message();
    CAPTURE(message);
    CHECK(status.code == code);
    CHECK(message.find(part) != std::string::npos);
    CHECK(is_marked(table));
  };
  refused(folder.path.string(), Errc::bad_name, "cannot be read");
  refused((folder.path / "none").string(), Errc::bad_name, "cannot be read");
  refused((folder.path / "0" / "x").string(), Errc::bad_name, "cannot be read");
  refused("", Errc::bad_name, "cannot be read");
  refused(folder.write("empty", ""), Errc::bad_shape, "0 numbers");
  refused(folder.write("words", "some words\n"), Errc::bad_value, "line 1");
  const std::string path = folder.write("lines", "1 2\n3 4\n");
  int failures = 0;
  for (bool done = false; !done; ++failures) {
    Table table = marked();
    until_failure = failures;
    const Status status = read_table(path, table);
    until_failure = -1;
    done = status.ok();
    if (!done) REQUIRE(status.code == Errc::out_of_memory);
    if (!done) REQUIRE(is_marked(table));
    REQUIRE(failures < 1000);
  }
}

TEST_CASE("a table that was written as .npy is read as it was, and NumPy's own bytes are") {
  const Folder folder;
  const std::string path = (folder.path / "x.npy").string();
  for (const Shape& shape : {Shape{}, Shape{3}, Shape{2, 3}, Shape{0, 7}, Shape{1, 1, 1, 1, 1}, Shape(30, 1)}) {
    Table table{shape, {}}, read = marked();
    for (std::size_t i = 0; i < count_of(shape); ++i) table.numbers.push_back(1.5f - static_cast<float>(i));
    REQUIRE(write_npy(path, table).ok());
    REQUIRE(read_table(path, read).ok());
    CHECK(read.shape == table.shape);
    CHECK(read.numbers == table.numbers);
    CHECK(folder.read("x.npy") == npy(1, header("<f4", extents(shape)), bytes_of(table.numbers)));
  }
  // numpy.save of NumPy 2.4.6.
  REQUIRE(write_npy(path, {{2, 1}, {1, -2}}).ok());
  CHECK(folder.read("x.npy") == "\x93NUMPY\x01" + std::string(1, '\0') + "v" + std::string(1, '\0') +
                                    "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1), }" + std::string(58, ' ') +
                                    "\n" + std::string("\0\0\x80\x3f\0\0\0\xc0", 8));
}

TEST_CASE("a table that cannot be written as .npy leaves what was there") {
  const Folder folder;
  const std::string path = folder.write("x.npy", "old");
  const auto refused = [&](const Table& table, const std::string& to, Errc code, const std::string& part) {
    const Status status = write_npy(to, table);
    const std::string message = status.message();
    CAPTURE(message);
    CHECK(status.code == code);
    CHECK(message.find(part) != std::string::npos);
    CHECK(folder.names() == std::set<std::string>{"x.npy"});
    CHECK(folder.read("x.npy") == "old");
  };
  const float infinity = std::numeric_limits<float>::infinity();
  refused({{2}, {1, std::nanf("")}}, path, Errc::bad_value, "the number nan");
  refused({{2}, {infinity, 1}}, path, Errc::bad_value, "the number inf; to be written it must be within 3.40282e+38");
  refused({{2}, {1}}, path, Errc::bad_shape, "a table of 1 numbers");
  refused({{}, {}}, path, Errc::bad_shape, "a table of 0 numbers");
  refused({{1, 0}, {1}}, path, Errc::bad_shape, "a table of 1 numbers");
  refused({{std::size_t{1} << 32, std::size_t{1} << 32}, {}}, path, Errc::bad_shape, "a table of 0 numbers");
  refused({Shape(30000, 1), {1}}, path, Errc::bad_shape, "30000 extents");
  refused({{1}, {1}}, (folder.path / "none" / "x.npy").string(), Errc::bad_name, "no file can be made");
  refused({{1}, {1}}, folder.path.string(), Errc::bad_name, "is no file");
  const Table table{{3}, {1, 2, 3}};
  int failures = 0;
  for (bool done = false; !done; ++failures) {
    until_failure = failures;
    const Status status = write_npy(path, table);
    until_failure = -1;
    done = status.ok();
    if (!done) REQUIRE(status.code == Errc::out_of_memory);
    REQUIRE(folder.names() == std::set<std::string>{"x.npy"});
    REQUIRE((folder.read("x.npy") == "old") == !done);
    REQUIRE(failures < 1000);
  }
  CHECK(failures > 1);
}
