// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Plot: distance from the full cache against stored bits, answers against rows, and the like, drawn by gnuplot.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kvtailor/io/table.hpp"
#include "kvtailor/learn/option_hull.hpp"

namespace kvt_llm {

class Plot {
 public:
  struct Point {
    std::string name;
    double bits, kl;
    bool peer;  // another program's
  };
  struct Chart {
    struct Point {
      double x, y, low, high;  // with the ends of its interval, or the point itself twice
    };
    struct Series {
      std::string name;
      std::vector<Point> points;
    };
    std::string title, x_label, y_label;
    bool log_x = false, log_y = false, bars = false;  // else percent, and lines through the points
    double bottom = 0;                                // of a logarithmic y, and what is below is drawn there
    std::vector<Series> series;
  };
  struct Line {
    std::string name;
    std::vector<std::pair<double, double>> points;  // rows kept and exact match, both in percent
  };

  // Throws std::runtime_error with one sentence if nothing could be drawn into the file, so that no work is done in vain.
  explicit Plot(const std::string& path);
  void draw(const std::string& title, const std::vector<Point>& points) const;
  // `full` is the exact match of the full cache.
  void draw(const std::string& title, std::vector<Line> lines, double full) const;
  void draw(const Chart& chart) const;
  // A budget curve: what share of its rows each head keeps where a fifth of all is kept, by layer and head, and what heads lose
  // by the rows they keep, before and after the hull is taken.
  void draw(const std::string& title, const kvt::Table& dropped, const std::vector<std::vector<kvt::Option>>& losses) const;

 private:
  void run(const std::string& script) const;
  std::string path_, terminal_;
};

}  // namespace kvt_llm
