// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include "progress.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace kvt::llm {
namespace {

using namespace std::chrono_literals;

constexpr int bar_width = 30;

std::string as_time(double seconds) {
  const auto whole = static_cast<long long>(seconds + 0.5);
  char text[32];
  std::snprintf(text, sizeof text, "%lld:%02lld", whole / 60, whole % 60);
  return text;
}

}  // namespace

Progress::Progress(std::string title, long long total, std::string unit)
    : title_(std::move(title)), unit_(std::move(unit)), total_(total), terminal_(isatty(STDERR_FILENO) != 0) {
  if (terminal_) draw();
}

Progress::~Progress() {
  if (drawn_ != made_) draw();
  if (terminal_) std::fputc('\n', stderr);
}

void Progress::advance(long long amount) {
  made_ += amount;
  const auto pause = terminal_ ? 100ms : 10s;
  if (const auto now = Clock::now(); now - last_ >= pause) {
    last_ = now;
    draw();
  }
}

void Progress::draw() {
  drawn_ = made_;
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  const double rate = seconds > 0 ? static_cast<double>(made_) / seconds : 0;
  std::string line = title_;
  if (terminal_) {
    const auto filled = total_ > 0 ? static_cast<int>(std::min(made_, total_) * bar_width / total_) : 0;
    line += " [" + std::string(static_cast<std::size_t>(filled), '#') +
            std::string(static_cast<std::size_t>(bar_width - filled), '.') + "]";
  } else {
    line += ":";
  }
  char numbers[128];
  std::snprintf(numbers, sizeof numbers, " %lld/%lld %s", made_, total_, unit_.c_str());
  line += numbers;
  if (made_ > 0) {
    std::snprintf(numbers, sizeof numbers, ", %.1f/s", rate);
    line += numbers;
  }
  if (made_ > 0 && made_ < total_ && rate > 0) line += ", " + as_time(static_cast<double>(total_ - made_) / rate) + " left";
  std::fprintf(stderr, terminal_ ? "\r%s\x1b[K" : "%s\n", line.c_str());
  std::fflush(stderr);
}

}  // namespace kvt::llm
