// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Plot: distance from the full cache against stored bits, drawn by gnuplot.
#pragma once

#include <string>
#include <vector>

namespace kvt_llm {

class Plot {
 public:
  struct Point {
    std::string name;
    double bits, kl;
    bool peer;  // another program's
  };

  // Throws std::runtime_error with one sentence if nothing could be drawn into the file, so that no work is done in vain.
  explicit Plot(const std::string& path);
  void draw(const std::string& title, const std::vector<Point>& points) const;

 private:
  std::string path_, terminal_;
};

}  // namespace kvt_llm
