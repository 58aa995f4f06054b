// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See report_page.hpp.
#include "report_page.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <sstream>

#include "command.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string number(double x, const char* format = "%.2g") {
  char digits[32];
  std::snprintf(digits, sizeof digits, format, x);
  return digits;
}

std::string percent(double share) { return number(100 * share, "%.3g"); }

// An interval as "0.017 [0.011, 0.023]"; a dash for what was not measured.
std::string interval(const json& row, const char* name, bool share = false) {
  if (!row.contains(name)) return "–";
  const json& x = row.at(name);
  const auto part = [&](std::size_t i) {
    if (x.at(i).is_null()) return std::string("?");
    return share ? number(100 * x.at(i).get<double>(), "%.0f") : number(x.at(i));
  };
  return part(0) + " <small>[" + part(1) + ", " + part(2) + "]</small>";
}

std::string in_percent(const json& row, const char* name) { return row.contains(name) ? percent(row.at(name)) : "–"; }

class Table {
 public:
  explicit Table(const std::vector<std::string>& names) {
    html_ << "<div class=wide><table><thead><tr>";
    for (const auto& name : names) html_ << "<th scope=col>" << name << "</th>";
    html_ << "</tr></thead><tbody>\n";
  }
  void row(const std::vector<std::string>& cells, const char* kind = "") {
    html_ << "<tr" << (*kind == '\0' ? "" : " class=") << kind << ">";
    for (const auto& cell : cells) html_ << "<td>" << cell << "</td>";
    html_ << "</tr>\n";
  }
  std::string end() { return html_.str() + "</tbody></table></div>\n"; }

 private:
  std::ostringstream html_;
};

constexpr std::array<std::array<const char*, 2>, 3> kinds = {
    {{"rows", "fewer rows"}, {"bits", "fewer bits"}, {"both", "both"}}};

Plot::Chart::Point point(double x, const json& y, double scale = 1) {
  const auto end = [&](std::size_t i) { return scale * (y.at(i).is_null() ? y.at(0) : y.at(i)).get<double>(); };
  return {x, scale * y.at(0).get<double>(), end(1), end(2)};
}

// What was chosen of each kind at each budget, all codecs of all rows, and llama.cpp's caches, by the bytes they take.
std::vector<Plot::Chart::Series> by_bytes(const json& report, const char* field, double scale) {
  const json& results = report.at("results");
  std::vector<Plot::Chart::Series> series;
  const auto add = [&](Plot::Chart::Series& to, const json& row) {
    if (row.contains(field)) to.points.push_back(point(100 * row.at("bytes_share").get<double>(), row.at(field), scale));
  };
  for (const char* const kind : {"rows", "both"}) {
    Plot::Chart::Series own{std::string(kind) == "rows" ? "fewer rows alone" : "fewer rows of fewer bits", {}};
    for (const json& chosen : report.at("chosen")) {
      if (chosen.contains(kind)) add(own, results.at(chosen.at(kind).get<std::size_t>()));
    }
    series.push_back(own);
  }
  Plot::Chart::Series bits{"fewer bits alone", {}}, peers{"llama.cpp's caches", {}};
  for (const json& row : results) {
    if (row.at("kind") == "bits") add(bits, row);
  }
  for (const json& row : report.value("peers", json::array())) add(peers, row);
  series.push_back(bits);
  series.push_back(peers);
  std::erase_if(series, [](const auto& s) { return s.points.empty(); });
  return series;
}

// Of a logarithmic axis: a little below the least.
double bottom_of(const std::vector<Plot::Chart::Series>& series) {
  double least = HUGE_VAL;
  for (const auto& s : series) {
    for (const auto& p : s.points) least = std::min(least, p.y);
  }
  return std::max(1e-8, least / 3);
}

class Page {
 public:
  Page(const json& report, const Plot& plot, const std::string& drawing) : r_(report), plot_(plot), drawing_(drawing) {}

  std::string html() {
    const std::string model = escaped(r_.at("model"));
    out_ << "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>\n"
         << "<meta name=viewport content=\"width=device-width, initial-scale=1\">\n<title>KV cache of " << model
         << "</title>\n<style>\n"
         << "body{font:16px/1.5 system-ui,sans-serif;color:#111;background:#fff;margin:0 auto;max-width:70rem;padding:1rem}\n"
         << "h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.2rem;margin:2rem 0 .5rem}\n"
         << ".wide{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem}\n"
         << "th,td{padding:.25rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid #ccc}\n"
         << "td{font-variant-numeric:tabular-nums}small{color:#444;white-space:nowrap}\n"
         << "tr.next td{border-top:2px solid #111}\n"
         << "figure{margin:1.5rem 0}figure img{width:100%;min-width:40rem;max-width:56rem;border:1px solid #ccc}\n"
         << "code{font:.8125rem/1.4 ui-monospace,monospace;overflow-wrap:anywhere}pre{white-space:pre-wrap}\n"
         << "@media print{.wide{overflow:visible}figure{break-inside:avoid}figure img{min-width:0}}\n"
         << "</style></head><body>\n<h1>Which KV cache for " << model << "</h1>\n";
    introduction();
    recommended();
    compared();
    figures();
    everything();
    method();
    out_ << "</body></html>\n";
    return out_.str();
  }

 private:
  const json& result(const json& place) const { return r_.at("results").at(place.get<std::size_t>()); }
  std::string code(const json& row) const { return "<code>" + escaped(row.at("composition")) + "</code>"; }

  void introduction() {
    const json& measured = r_.at("items_of").at("evaluation");
    out_ << "<p>A cache may keep fewer rows, keep them in fewer bits, or both. Budgets are shares of the bytes that dense fp16 "
         << "rows of the same text take; sink and recent rows, which stay dense, indices and unused space are counted. "
            "Measured: "
         << "<b>KL</b>, how far predictions of the " << r_.at("continuation") << " tokens behind a text of "
         << r_.at("tokens").get<int>() - r_.at("continuation").get<int>()
         << " are from those of the full cache (nats a token, mean of " << measured.at("texts") << " texts); <b>answered</b>, "
         << "how many of " << measured.at("questions")
         << " questions, asked after the cut, have every token of the answer right"
         << (r_.at("full").contains("exact") ? " (full cache: " + interval(r_.at("full"), "exact", true) + " %)" : "")
         << "; <b>answer KL</b>, the distance at the answer’s tokens. In brackets: 95 % confidence over texts or questions. "
         << "Compositions were chosen on other passages than these.</p>\n";
  }

  void recommended() {
    out_ << "<h2>What to use</h2>\n";
    Table table({"bytes, %", "use", "took, %", "rows, %", "bits", "KL", "answered, %", "answer KL"});
    std::vector<std::string> named;  // compositions, each once
    for (const json& chosen : r_.at("chosen")) {
      const std::string budget = percent(chosen.at("budget"));
      if (!chosen.contains("recommended")) {
        table.row({budget, "nothing fits"});
        continue;
      }
      const json& row = result(chosen.at("recommended"));
      table.row({budget, escaped(row.at("name")), in_percent(row, "bytes_share"), in_percent(row, "rows_share"),
                 number(row.at("bits"), "%.2f"), interval(row, "kl"), interval(row, "exact", true),
                 interval(row, "answer_kl")});
      const std::string item = "<li>" + escaped(row.at("name")) + ": " + code(row) + "</li>\n";
      if (std::find(named.begin(), named.end(), item) == named.end()) named.push_back(item);
    }
    out_ << table.end() << "<ul>\n";
    for (const auto& item : named) out_ << item;
    out_ << "</ul>\n";
  }

  void compared() {
    out_ << "<h2>Fewer rows, fewer bits, or both</h2>\n<p>The best of each kind at each budget, chosen by the sum of both "
         << "distances on passages for tuning. Differences are to the recommended one, text by text and question by "
         << "question.</p>\n";
    Table table(
        {"bytes, %", "what", "took, %", "rows, %", "KL", "difference", "answered, %", "difference", "answer KL", "difference"});
    for (const json& chosen : r_.at("chosen")) {
      bool first = true;
      for (const auto& [kind, words] : kinds) {
        const std::string budget = first ? percent(chosen.at("budget")) : "";
        const char* const style = first ? "next" : "";
        first = false;
        if (!chosen.contains(kind)) {
          table.row({budget, std::string(words) + ": nothing fits", "–", "–", "–", "–", "–", "–", "–", "–"}, style);
          continue;
        }
        const json& row = result(chosen.at(kind));
        const bool best = chosen.at(kind) == chosen.at("recommended");
        const bool all_fit = std::string(kind) == "both" && row.at("rows_share") == 1;
        const json to_best = chosen.value("differences", json::object()).value(kind, json::object());
        const auto difference = [&](const char* name, bool share = false) {
          return best || all_fit ? "" : interval(to_best, name, share);
        };
        const std::string name = escaped(row.at("name"));
        table.row(
            {budget, std::string(words) + ": " + (best ? "<b>" + name + "</b>" : name) + (all_fit ? ", all rows fit" : ""),
             in_percent(row, "bytes_share"), in_percent(row, "rows_share"), interval(row, "kl"), difference("kl"),
             interval(row, "exact", true), difference("exact", true), interval(row, "answer_kl"), difference("answer_kl")},
            style);
      }
    }
    out_ << table.end();
  }

  void figure(const std::string& caption) {
    out_ << "<figure><div class=wide><img alt=\"" << escaped(caption) << "\" src=\"data:image/svg+xml,";
    for (const char c : read_file(drawing_)) {
      if (c == '%' || c == '#' || c == '<' || c == '>' || c == '"' || c == '&' || static_cast<unsigned char>(c) < 0x20) {
        char code[4];
        std::snprintf(code, sizeof code, "%%%02X", static_cast<unsigned>(static_cast<unsigned char>(c)));
        out_ << code;
      } else {
        out_ << c;
      }
    }
    out_ << "\"></div><figcaption>" << escaped(caption) << "</figcaption></figure>\n";
  }

  void bytes_figure(const char* field, const std::string& y_label, bool log_y, const std::string& caption) {
    Plot::Chart chart;
    chart.x_label = "bytes, % of dense fp16 rows";
    chart.y_label = y_label;
    chart.log_x = true;
    chart.log_y = log_y;
    chart.series = by_bytes(r_, field, log_y ? 1 : 100);
    if (chart.series.empty()) return;
    if (log_y) chart.bottom = bottom_of(chart.series);
    plot_.draw(chart);
    figure(caption);
  }

  void figures() {
    out_ << "<h2>At equal bytes</h2>\n";
    bytes_figure("kl", "KL of continuations, nats a token", true,
                 "Distance of continuations from the full cache, by bytes. Bars: 95 % confidence over texts.");
    bytes_figure("answer_kl", "KL of answers, nats a token", true,
                 "Distance of answers from the full cache, by bytes. Bars: 95 % confidence over questions.");
    bytes_figure("exact", "questions answered, %", false, "Questions answered, by bytes. Bars: 95 % confidence (Wilson).");
    rows_figure();
    bits_figure();
    layers_figure();
  }

  // Dense rows: what selectors are worth.
  void rows_figure() {
    Plot::Chart chart;
    chart.x_label = "rows kept, %";
    chart.y_label = "questions answered, %";
    for (const json& row : r_.at("results")) {
      if (row.at("kind") != "rows" || !row.contains("exact")) continue;
      const std::string name = row.at("name");
      if (chart.series.empty() || chart.series.back().name != name) chart.series.push_back({name, {}});
      chart.series.back().points.push_back(point(100 * row.at("rows_share").get<double>(), row.at("exact"), 100));
    }
    if (chart.series.empty()) return;
    const double full = 100 * r_.at("full").at("exact").at(0).get<double>();
    chart.series.push_back({"full cache", {{0, full, full, full}, {100, full, full, full}}});
    out_ << "<h2>By rows kept</h2>\n";
    plot_.draw(chart);
    figure("Questions answered where rows are dense and some are dropped. Bars: 95 % confidence (Wilson).");
  }

  // All rows: what codecs are worth.
  void bits_figure() {
    std::vector<Plot::Point> points;
    for (const json& row : r_.at("results")) {
      if (row.at("kind") == "bits" && row.contains("kl")) {
        points.push_back({row.at("name"), row.at("bits").get<double>(), row.at("kl").at(0), false});
      }
    }
    if (points.empty()) return;
    for (const json& row : r_.value("peers", json::array())) {
      if (row.contains("kl")) points.push_back({row.at("name"), row.at("bits").get<double>(), row.at("kl").at(0), true});
    }
    out_ << "<h2>By bits an element</h2>\n";
    plot_.draw("", points);
    figure(
        "Distance of continuations where all rows are kept in fewer bits, beside llama.cpp’s own caches. Sink and recent rows "
        "stay dense here and not there.");
  }

  void layers_figure() {
    if (!r_.contains("layers")) return;
    Plot::Chart chart;
    chart.x_label = "layer";
    chart.y_label = "KL of a continuation, nats a token";
    chart.bars = chart.log_y = true;
    const std::string codec = r_.at("layers").at("codec");
    Plot::Chart::Series series{codec + " in this layer alone", {}};
    for (const json& kl : r_.at("layers").at("kl")) {
      const double x = static_cast<double>(series.points.size()), y = kl;
      series.points.push_back({x, y, y, y});
    }
    chart.series.push_back(series);
    chart.bottom = bottom_of(chart.series);
    out_ << "<h2>By layer</h2>\n";
    plot_.draw(chart);
    figure("What a layer loses if its rows alone are kept as " + codec + ", on one text for tuning.");
  }

  void everything() {
    out_ << "<h2>All that was tried</h2>\n";
    Table table({"bytes, %", "what", "took, %", "rows, %", "bits", "KL", "same top token, %", "answered, %", "answer KL"});
    std::vector<const json*> rows;
    for (const json& row : r_.at("results")) rows.push_back(&row);
    std::stable_sort(rows.begin(), rows.end(), [](const json* a, const json* b) {
      const auto budget = [](const json* row) { return row->at("budget").is_null() ? 2.0 : row->at("budget").get<double>(); };
      return budget(a) > budget(b);
    });
    const auto add = [&](const std::string& budget, const std::string& name, const json& row, const char* style) {
      table.row({budget, name, in_percent(row, "bytes_share"), in_percent(row, "rows_share"),
                 row.contains("bits") ? number(row.at("bits"), "%.2f") : "–", interval(row, "kl"), in_percent(row, "same_top"),
                 interval(row, "exact", true), interval(row, "answer_kl")},
                style);
    };
    add("–",
        "noise floor: dense fp32 rows, chunks of " + r_.at("other_chunk").dump() + " tokens instead of " +
            r_.at("chunk").dump(),
        r_.at("noise_floor"), "");
    for (const json& row : r_.value("peers", json::array())) add("–", "llama.cpp " + escaped(row.at("name")), row, "");
    json last = "none";
    for (const json* const row : rows) {
      const bool next = row->at("budget") != last;
      last = row->at("budget");
      add(last.is_null() ? "–" : percent(last), escaped(row->at("name")) + "<br>" + code(*row), *row, next ? "next" : "");
    }
    out_ << table.end();
  }

  void method() {
    out_ << "<h2>How it was measured</h2>\n<ul>\n<li>Texts: ";
    bool first = true;
    for (const json& text : r_.at("texts")) {
      out_ << (first ? "" : "; ") << escaped(text.at("file")) << ", " << text.at("bytes") << " bytes (" << text.at("for_tuning")
           << " for tuning), FNV-1a " << escaped(text.at("hash"));
      first = false;
    }
    const json& tuning = r_.at("items_of").at("tuning");
    std::string tasks;
    for (const json& task : r_.at("tasks")) tasks += (tasks.empty() ? "" : ", ") + task.get<std::string>();
    out_ << ". A third of their passages, by hash, is for tuning: " << tuning.at("texts") << " pieces and "
         << tuning.at("questions")
         << " questions by which compositions are chosen here. Policy files are made by other commands; whether they saw these "
         << "texts is theirs to say.</li>\n<li>Questions: " << escaped(tasks) << " in the wording " << escaped(r_.at("wording"))
         << ", hidden in " << r_.at("question_tokens") << " tokens, seed " << r_.at("seed")
         << "; the same for all, asked after the cut.</li>\n<li>" << r_.at("sink") << " sink and " << r_.at("recent")
         << " recent rows a head stay dense, and chunks of " << r_.at("chunk")
         << " tokens are read; llama.cpp reads the same chunks. "
         << "What rows of ours take is what the allocator gave out; llama.cpp’s buffers are sized for the whole context, "
         << "so the rows in use are counted.</li>\n<li>Weights: "
         << (r_.at("weights") == "f32" ? "dequantised to F32, so that rounding does not hide what caches do" : "as in the file")
         << "; engine " << escaped(r_.at("engine")) << "; host kernels for " << escaped(r_.at("cpu")) << ".</li>\n";
    for (const json& one : r_.at("left_out")) {
      out_ << "<li>Left out, since this model cannot have it: " << escaped(one.at("name")) << " (" << escaped(one.at("why"))
           << ").</li>\n";
    }
    out_ << "<li>Intervals: Student’s t for means, Wilson for shares, Agresti and Min for differences of "
         << "shares.</li>\n</ul>\n<p>Again:</p>\n<pre><code>" << escaped(r_.at("command")) << "</code></pre>\n";
  }

  const json& r_;
  const Plot& plot_;
  const std::string& drawing_;
  std::ostringstream out_;
};

std::string plain(const json& row, const char* name, double scale, const char* format) {
  if (!row.contains(name)) return "-";
  const json& x = row.at(name);
  return number(scale * (x.is_array() ? x.at(0) : x).get<double>(), format);
}

}  // namespace

std::string report_page(const json& report, const Plot& plot, const std::string& drawing) {
  return Page(report, plot, drawing).html();
}

std::string report_text(const json& report) {
  std::string out;
  char line[512];
  std::snprintf(line, sizeof line, "%8s %-5s %-44s %7s %7s %9s %9s %10s\n", "bytes", "", "best of its kind", "took", "rows",
                "KL", "answered", "answer KL");
  out += line;
  for (const json& chosen : report.at("chosen")) {
    std::string budget = percent(chosen.at("budget")) + " %";
    for (const auto& [kind, words] : kinds) {
      const bool there = chosen.contains(kind);
      const json row = there ? report.at("results").at(chosen.at(kind).get<std::size_t>()) : json::object();
      const bool best = there && chosen.at(kind) == chosen.at("recommended");
      std::snprintf(line, sizeof line, "%8s %-5s %-44s %6s%% %6s%% %9s %8s%% %10s\n", budget.c_str(), kind,
                    ((best ? "* " : "  ") + row.value("name", std::string("nothing fits"))).c_str(),
                    plain(row, "bytes_share", 100, "%.3g").c_str(), plain(row, "rows_share", 100, "%.3g").c_str(),
                    plain(row, "kl", 1, "%.2e").c_str(), plain(row, "exact", 100, "%.0f").c_str(),
                    plain(row, "answer_kl", 1, "%.2e").c_str());
      out += line;
      budget.clear();
    }
  }
  out += "noise floor: KL " + plain(report.at("noise_floor"), "kl", 1, "%.1e") + ", answer KL " +
         plain(report.at("noise_floor"), "answer_kl", 1, "%.1e") + "\n";
  return out;
}

}  // namespace kvt_llm
