// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See passages.hpp.
#include "passages.hpp"

#include <algorithm>
#include <stdexcept>
#include <string_view>

#include "command.hpp"

namespace kvt_llm {

const char* name_of(Part part) { return part == Part::all ? "all" : part == Part::tuning ? "tuning" : "evaluation"; }

std::string part_of(const std::string& text, Part part) {
  if (part == Part::all) return text;
  constexpr std::size_t least = 4096, most = 8192;
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = std::min(text.size(), at + most);
    if (const auto paragraph = text.find("\n\n", std::min(text.size(), at + least)); paragraph < end) end = paragraph + 2;
    // No character is cut in two.
    while (end < text.size() && end > at + least && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
    const auto passage = std::string_view(text).substr(at, end - at);
    const bool tuning = (fingerprint(passage) >> 32) % 3 == 0;  // the low bits of FNV-1a are its weakest
    if (tuning == (part == Part::tuning)) out += passage;
    at = end;
  }
  return out;
}

std::string read_part(const std::string& path, Part part) {
  const std::string text = read_file(path);
  std::string own = part_of(text, part);
  if (own.empty()) {
    throw std::runtime_error("of the " + std::to_string(text.size()) + " bytes of " + path + " no passage is for " +
                             name_of(part) + "; a longer text has some");
  }
  return own;
}

}  // namespace kvt_llm
