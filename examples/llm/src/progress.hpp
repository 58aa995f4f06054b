// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Progress on stderr: a bar with rate and time left on a terminal, a plain line now and then elsewhere.
#pragma once

#include <chrono>
#include <string>

namespace kvt::llm {

class Progress {
 public:
  // `unit` is what is counted, in the plural.
  Progress(std::string title, long long total, std::string unit = "tokens");
  ~Progress();  // ends the line; the last state stays visible
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void advance(long long amount);

 private:
  void draw();

  using Clock = std::chrono::steady_clock;
  std::string title_, unit_;
  long long total_;
  long long made_ = 0;
  long long drawn_ = -1;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_ = start_;
  bool terminal_;
};

}  // namespace kvt::llm
