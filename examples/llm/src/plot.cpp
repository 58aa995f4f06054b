// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See plot.hpp.
#include "plot.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace kvt_llm {

namespace {

namespace fs = std::filesystem;

// A logarithm has no place for the 0 of a lossless cache; what is lower is rounding.
constexpr double lowest_kl = 1e-8;

// In gnuplot's single quotes nothing but the quote itself is special.
std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? std::string("''") : std::string(1, c);
  return out + "'";
}

std::string script(const std::string& title, const std::vector<Plot::Point>& points) {
  std::ostringstream out;
  double most_bits = 1, lowest = 1, highest = lowest_kl;
  for (const auto& p : points) {
    most_bits = std::max(most_bits, p.bits);
    lowest = std::min(lowest, std::max(p.kl, lowest_kl));
    highest = std::max(highest, p.kl);
  }
  for (const bool peer : {false, true}) {
    out << (peer ? "$peers" : "$ours") << " << END\n";
    for (const auto& p : points) {
      if (p.peer == peer) out << p.bits << ' ' << std::max(p.kl, lowest_kl) << " \"" << p.name << "\"\n";
    }
    out << "END\n";
  }
  out << "set termoption noenhanced\n"
      << "set title " << quoted(title) << "\n"
      << "set xlabel 'stored bits a key or value element of the text, positions apart'\n"
      << "set ylabel 'mean KL from the full cache, nats'\n"
      << "set logscale y\nset format y '%.0e'\nset grid xtics ytics linecolor '#dddddd'\nset key top right\n"
      << "set xrange [0:" << 1.2 * most_bits << "]\nset yrange [" << lowest / 2 << ':' << 2 * highest << "]\n";
  // Names of the one side stand left of their points and those of the other right, since both have codecs at the same bits.
  std::string separator = "plot ";
  for (const bool peer : {false, true}) {
    if (std::none_of(points.begin(), points.end(), [=](const auto& p) { return p.peer == peer; })) continue;
    const std::string data = peer ? "$peers" : "$ours", colour = peer ? "'#b2182b'" : "'#2166ac'";
    out << separator << data << " using 1:2 with points pointsize 1.2 linecolor rgb " << colour
        << (peer ? " pointtype 8 title 'llama.cpp, its own caches'" : " pointtype 7 title 'kvtailor'") << ", " << data
        << " using 1:2:3 with labels textcolor rgb " << colour << (peer ? " left offset 1,0" : " right offset -1,0")
        << " notitle";
    separator = ", ";
  }
  out << "\n";
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

void Plot::draw(const std::string& title, const std::vector<Point>& points) const {
  FILE* const gnuplot = popen("gnuplot", "w");
  if (gnuplot == nullptr) throw std::runtime_error("cannot run gnuplot");
  const std::string text =
      "set terminal " + terminal_ + "\nset output " + quoted(path_) + "\n" + script(title, points) + "unset output\n";
  const bool written = std::fputs(text.c_str(), gnuplot) >= 0;
  if (pclose(gnuplot) != 0 || !written) throw std::runtime_error("gnuplot could not draw " + path_);
}

}  // namespace kvt_llm
