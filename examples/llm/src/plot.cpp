// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See plot.hpp.
#include "plot.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace kvt_llm {

namespace {

namespace fs = std::filesystem;

// In gnuplot's single quotes nothing but the quote itself is special.
std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? std::string("''") : std::string(1, c);
  return out + "'";
}

const char* colour(bool peer) { return peer ? "'#b2182b'" : "'#2166ac'"; }

// A part of the drawing, its width and height being 1.
struct Box {
  double left, right, bottom, top;

  bool meets(const Box& b) const { return left < b.right && b.left < right && bottom < b.top && b.bottom < top; }
};

std::string script(const std::string& title, std::vector<Plot::Point> points) {
  // A logarithm has no place for the 0 of a lossless cache; what is lower than this is rounding.
  for (auto& p : points) p.kl = std::max(p.kl, 1e-8);
  const auto [few, many] = std::minmax_element(points.begin(), points.end(), [](auto& a, auto& b) { return a.bits < b.bits; });
  const auto [good, bad] = std::minmax_element(points.begin(), points.end(), [](auto& a, auto& b) { return a.kl < b.kl; });
  const double left = few->bits / 1.5, right = many->bits * 1.5, bottom = good->kl / 3, top = bad->kl * 3;
  const auto x = [=](const auto& p) { return std::log(p.bits / left) / std::log(right / left); };
  const auto y = [=](const auto& p) { return std::log(p.kl / bottom) / std::log(top / bottom); };
  std::ostringstream out;
  out << "set termoption noenhanced\n"
      << "set title " << quoted(title) << "\n"
      << "set xlabel 'stored bits a key or value element of the text, positions apart'\n"
      << "set ylabel 'mean KL from the full cache, nats'\n"
      << "set logscale xy\nset xrange [" << left << ':' << right << "]\nset yrange [" << bottom << ':' << top << "]\n"
      << "set xtics (.25, .5, 1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)\nset format y '%.0e'\n"
      << "set grid xtics ytics linetype 1 linecolor rgb '#dddddd'\nset key top right\n";

  std::vector<Box> taken;
  for (const auto& p : points) taken.push_back({x(p) - .008, x(p) + .008, y(p) - .01, y(p) + .01});
  // A name stands beside its point where nothing else is: ours rather to the left and the peers' to the right, since both have
  // codecs of about the same bits; else as little above or below as will do.
  for (const auto& p : points) {
    const double width = .01 + .01 * static_cast<double>(p.name.size());
    const auto on_right = [&](int trial) { return p.peer == (trial % 2 == 0); };
    const auto box = [&](int trial) {
      const int step = trial / 2;
      const double middle = y(p) + .015 * (step % 2 == 0 ? step / 2 : -(step + 1) / 2);
      const double from = on_right(trial) ? x(p) + .01 : x(p) - .01 - width;
      return Box{from, from + width, middle - .014, middle + .014};
    };
    const auto free = [&](const Box& b) {
      return b.left > 0 && b.right < 1 && std::none_of(taken.begin(), taken.end(), [&](auto& t) { return t.meets(b); });
    };
    int trial = 0;
    while (trial < 40 && !free(box(trial))) ++trial;
    trial %= 40;
    taken.push_back(box(trial));
    out << "set label " << quoted(p.name) << " at " << p.bits << ", graph " << (taken.back().bottom + taken.back().top) / 2
        << (on_right(trial) ? " left offset 1,0" : " right offset -1,0") << " textcolor rgb " << colour(p.peer) << '\n';
  }
  std::string plot = "plot ";
  for (const bool peer : {false, true}) {
    std::ostringstream data;
    for (const auto& p : points) {
      if (p.peer == peer) data << p.bits << ' ' << p.kl << '\n';
    }
    if (data.str().empty()) continue;
    const std::string block = peer ? "$peers" : "$ours";
    out << block << " << END\n" << data.str() << "END\n";
    plot += (plot == "plot " ? "" : ", ") + block + " with points pointsize 1.2 linecolor rgb " + colour(peer) +
            (peer ? " pointtype 8 title 'llama.cpp, its own caches'" : " pointtype 7 title 'kvtailor'");
  }
  out << plot << '\n';
  return out.str();
}

std::string script(const std::string& title, std::vector<Plot::Line> lines, double full) {
  std::ostringstream out, plot;
  out << "set termoption noenhanced\n"
      << "set title " << quoted(title) << "\n"
      << "set xlabel 'rows kept, %'\n"
      << "set ylabel 'exact match, %, mean of the tasks that the full cache solves'\n"
      << "set xrange [0:100]\nset yrange [0:105]\n"
      << "set grid xtics ytics linetype 1 linecolor rgb '#dddddd'\nset key bottom right\n";
  plot << "plot " << full << " with lines dashtype 2 linecolor rgb '#888888' title 'full cache'";
  for (std::size_t i = 0; i < lines.size(); ++i) {
    std::sort(lines[i].points.begin(), lines[i].points.end());
    out << "$line" << i << " << END\n";
    for (const auto& [rows, exact] : lines[i].points) out << rows << ' ' << exact << '\n';
    out << "END\n";
    plot << ", $line" << i << " with linespoints linewidth 1.5 pointsize 1 title " << quoted(lines[i].name);
  }
  out << plot.str() << '\n';
  return out.str();
}

// Series differ by shape and dashes, so that they can be told apart in black and white.
std::string script(const Plot::Chart& chart) {
  constexpr const char* colours[] = {"#2166ac", "#b2182b", "#1b7837", "#762a83", "#e08214", "#4d4d4d", "#01665e", "#c51b7d"};
  constexpr int shapes[] = {7, 9, 5, 13, 4, 6, 8, 12};
  std::ostringstream out, plot;
  out << "set termoption noenhanced\n"
      << "set title " << quoted(chart.title) << "\nset xlabel " << quoted(chart.x_label) << "\nset ylabel "
      << quoted(chart.y_label)
      << "\nset grid xtics ytics linetype 1 linecolor rgb '#dddddd'\nset key tmargin center horizontal\n";
  double left = HUGE_VAL, right = 0, top = 0;
  for (const auto& series : chart.series) {
    for (const auto& p : series.points) {
      left = std::min(left, p.x);
      right = std::max(right, p.x);
      top = std::max({top, p.y, std::min(p.high, 3 * p.y)});
    }
  }
  if (chart.log_x) {
    out << "set logscale x 2\nset xrange [" << left / 1.2 << ':' << right * 1.2
        << "]\nset xtics (3, 4, 6, 8, 12, 16, 25, 35, 50, 70, 100)\n";
  } else {
    out << "set xrange [" << (chart.bars ? left - 1 : 0) << ':' << (chart.bars ? right + 1 : 100) << "]\n";
  }
  if (chart.log_y) {
    out << "set logscale y\nset format y '%g'\nset yrange [" << chart.bottom << ':' << 1.5 * std::max(top, 2 * chart.bottom)
        << "]\n";
  } else {
    out << "set yrange [0:105]\n";
  }
  for (std::size_t i = 0; i < chart.series.size(); ++i) {
    const auto& series = chart.series[i];
    auto points = series.points;
    std::sort(points.begin(), points.end(), [](auto& a, auto& b) { return a.x < b.x; });
    out << "$data" << i << " << END\n";
    for (const auto& p : points) {
      out << p.x << ' ' << std::max(p.y, chart.bottom) << ' ' << std::max(p.low, chart.bottom) << ' '
          << std::max(std::min(p.high, 10 * top), chart.bottom) << '\n';
    }
    out << "END\n";
    const std::string colour = " linecolor rgb '" + std::string(colours[i % std::size(colours)]) + "'";
    const std::string name = " title " + quoted(series.name), data = "$data" + std::to_string(i);
    plot << (i == 0 ? "plot " : ", ");
    if (chart.bars) {
      plot << data << " using 1:2 with boxes fill solid .5 border" << colour << name;
    } else {
      plot << data << " using 1:2:3:4 with yerrorbars pointsize 0 linewidth 1" << colour << " notitle, " << data
           << " using 1:2 with linespoints linewidth 2 pointsize 1 dashtype " << 1 + i / 2 % 5 << " pointtype "
           << shapes[i % std::size(shapes)] << colour << name;
    }
  }
  out << (chart.bars ? "set boxwidth .8\n" : "") << plot.str() << '\n';
  return out.str();
}

std::string script(const std::string& title, const kvt::Table& dropped, const std::vector<std::vector<kvt::Option>>& losses) {
  const std::size_t steps = dropped.shape[0], layers = dropped.shape[1], heads = dropped.shape[2];
  const float* const row = dropped.numbers.data() + (steps * 4 / 5) * layers * heads;
  std::ostringstream out, plot;
  out << "set termoption noenhanced\nset multiplot layout 1,2 title " << quoted(title) << "\n"
      << "$kept << END\n";
  for (std::size_t l = 0; l < layers; ++l) {
    for (std::size_t h = 0; h < heads; ++h) out << h << ' ' << l << ' ' << 100 * (1 - row[l * heads + h]) << '\n';
  }
  // Grey, so that it can be printed.
  out << "END\nset title 'rows kept, %, of 20 % on average'\nset xlabel 'KV head'\nset ylabel 'layer'\n"
      << "set xrange [-.5:" << heads << "-.5]\nset yrange [" << layers << "-.5:-.5]\nset xtics 1\nset cbrange [0:100]\n"
      << "set palette gray negative\nplot $kept with image notitle\n";
  // Heads with the most to lose, the least, and those between.
  std::vector<std::size_t> order(losses.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return losses[a].front().loss > losses[b].front().loss; });
  out << "set title 'importance lost (points) and its lower hull (lines)'\nset xlabel 'rows kept, %'\nset ylabel ''\n"
      << "set xrange [0:100]\nset autoscale y\nset xtics 20\nset logscale y\nset format y '%.0e'\n"
      << "set grid xtics ytics linetype 1 linecolor rgb '#dddddd'\nset key bottom left\n";
  for (std::size_t k = 0; k < 5; ++k) {
    const std::size_t h = order[k * (order.size() - 1) / 4];
    const auto& own = losses[h];
    const double part = 100 / own.back().cost;
    out << "$loss" << k << " << END\n";
    for (std::size_t i = 0; i + 1 < own.size(); i += 10) out << own[i].cost * part << ' ' << own[i].loss << '\n';
    out << "END\n$hull" << k << " << END\n";
    for (const int i : kvt::lower_hull(own)) {
      const auto& at = own[static_cast<std::size_t>(i)];
      if (at.loss > 0) out << at.cost * part << ' ' << at.loss << '\n';
    }
    out << "END\n";
    plot << (k == 0 ? "plot " : ", ") << "$loss" << k << " with points pointtype " << k + 4 << " pointsize .5 linecolor "
         << k + 1 << " notitle, $hull" << k << " with lines linecolor " << k + 1 << " title 'layer " << h / heads << ", head "
         << h % heads << "'";
  }
  out << plot.str() << "\nunset multiplot\n";
  return out.str();
}

}  // namespace

Plot::Plot(const std::string& path) : path_(fs::absolute(path).string()) {
  const auto extension = fs::path(path).extension();
  if (extension != ".svg" && extension != ".png") throw std::runtime_error("--plot " + path + " must end in .svg or .png");
  terminal_ =
      extension == ".svg" ? "svg size 900,600 font 'sans,12' background '#ffffff'" : "pngcairo size 900,600 font 'sans,10'";
  const bool there = fs::exists(path);
  if (!std::ofstream(path, std::ios::app)) throw std::runtime_error("cannot write the plot " + path);
  if (!there) fs::remove(path);
  const std::string name = terminal_.substr(0, terminal_.find(' '));
  if (std::system(("gnuplot -e 'set terminal " + name + "' > /dev/null 2>&1").c_str()) != 0) {
    throw std::runtime_error("--plot needs gnuplot with its terminal " + name + " (tools/bootstrap installs it)");
  }
}

void Plot::draw(const std::string& title, const std::vector<Point>& points) const { run(script(title, points)); }

void Plot::draw(const std::string& title, std::vector<Line> lines, double full) const {
  run(script(title, std::move(lines), full));
}

void Plot::draw(const Chart& chart) const { run(script(chart)); }

void Plot::draw(const std::string& title, const kvt::Table& dropped,
                const std::vector<std::vector<kvt::Option>>& losses) const {
  run(script(title, dropped, losses));
}

void Plot::run(const std::string& script) const {
  FILE* const gnuplot = popen("gnuplot", "w");
  if (gnuplot == nullptr) throw std::runtime_error("cannot run gnuplot");
  const std::string text = "set terminal " + terminal_ + "\nset output " + quoted(path_) + "\n" + script + "unset output\n";
  const bool written = std::fputs(text.c_str(), gnuplot) >= 0;
  if (pclose(gnuplot) != 0 || !written) throw std::runtime_error("gnuplot could not draw " + path_);
}

}  // namespace kvt_llm
