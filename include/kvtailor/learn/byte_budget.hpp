// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// ByteBudget: one budget in bytes, shared out over heads as rows and as bits of each row.
//
//   ByteBudget profile;                                         // from a file, see io/policy_file.hpp
//   KVT_TRY(profile.solve(bytes, rows, tailored));              // for a text of so many rows; takes no model
//   tailored.codecs                                             // of each head, for KvCache::init() or make_cache()
//   tailored.curve                                              // the budget allocator for them
//
// Each head's options are a codec and a share of its rows, with the bytes they take and the loss that was found on texts (see
// option_losses.hpp). The lower convex hulls of all heads are gone along together (see option_hull.hpp), which is the optimum
// of the hulls; a head may be left with no rows but its sinks and its newest ones. Codecs stay as they are chosen; the curve
// says for any number of rows what each head keeps of them, so that heads give rows back as a text grows.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvtailor/budget/curve.hpp"
#include "kvtailor/learn/option_hull.hpp"

namespace kvt::inline v0 {

struct TailoredHeads {
  std::vector<int> codecs;     // [num_layers * num_kv_heads], indices of ByteBudget::codecs
  std::vector<double> kept;    // likewise: the share of a head's free rows that stays
  Curve curve;                 // what heads keep of any number of rows, with these codecs
  double loss = 0, bytes = 0;  // as predicted, of all heads
};

struct ByteBudget {
  int num_layers = 0, num_kv_heads = 0;
  std::string selector;             // whose scores rows are kept by, by its full name
  std::vector<std::string> codecs;  // "keys/values", or one name for both
  std::vector<float> shares;        // of free rows that are kept, increasing from 0 to 1
  std::vector<float> losses;        // [num_layers, num_kv_heads, codecs, shares]
  std::vector<float> row_bytes;     // [num_layers, num_kv_heads, codecs]: a free row, its index and what blocks need besides
  double zone_bytes = 0;            // a row of the dense zones of a head
  int zone_rows = 0;                // sinks and recent rows of a head, which stay

  Status check() const noexcept {
    const auto heads = static_cast<std::size_t>(num_layers) * static_cast<std::size_t>(num_kv_heads);
    if (num_layers < 1 || num_kv_heads < 1 || codecs.empty() || shares.size() < 2 ||
        row_bytes.size() != heads * codecs.size() || losses.size() != row_bytes.size() * shares.size()) {
      return error(Errc::bad_shape, "a profile of {} losses is not of {} heads and its codecs and shares",
                   static_cast<double>(losses.size()), static_cast<double>(heads));
    }
    for (std::size_t i = 0; i < shares.size(); ++i) {
      const float least = i == 0 ? 0 : shares[i - 1];
      if (!(i == 0 ? shares[i] == 0 : shares[i] > least) || !(shares[i] <= 1) || (i + 1 == shares.size() && shares[i] != 1))
        return error(Errc::bad_value, "a share of rows is {}; shares increase from 0 to 1", static_cast<double>(shares[i]));
    }
    for (const float x : losses) {
      if (!(std::isfinite(x) && x >= 0))
        return error(Errc::bad_value, "a loss is {}; it must be finite and not negative", static_cast<double>(x));
    }
    for (const float x : row_bytes) {
      if (!(std::isfinite(x) && x > 0))
        return error(Errc::bad_value, "a row takes {} bytes; it must be some", static_cast<double>(x));
    }
    if (!(zone_bytes >= 0 && std::isfinite(zone_bytes)) || zone_rows < 0)
      return error(Errc::bad_value, "{} dense rows of {} bytes", zone_rows, zone_bytes);
    return success();
  }

  // For heads with `rows` rows each. Errc::bad_budget if what stays in any case takes more bytes.
  Status solve(double bytes, double rows, TailoredHeads& out) const try {
    KVT_TRY(check());
    if (!(rows >= 1)) return error(Errc::bad_shape, "a text of {} rows", rows);
    const std::size_t heads = row_bytes.size() / codecs.size(), points = shares.size();
    const double free = std::max(0.0, rows - zone_rows), fixed = zone_bytes * std::min<double>(rows, zone_rows);
    std::vector<std::vector<Option>> options(heads);
    for (std::size_t h = 0; h < heads; ++h) {
      for (std::size_t c = 0; c < codecs.size(); ++c) {
        for (std::size_t p = 0; p < points; ++p)
          options[h].push_back(
              {fixed + free * static_cast<double>(shares[p] * row_bytes[h * codecs.size() + c]), loss(h, c, p)});
      }
    }
    std::vector<int> chosen;
    KVT_TRY(choose_options(options, bytes, chosen));
    TailoredHeads made;
    for (std::size_t h = 0; h < heads; ++h) {
      const auto option = static_cast<std::size_t>(chosen[h]);
      made.codecs.push_back(static_cast<int>(option / points));
      made.kept.push_back(static_cast<double>(shares[option % points]));
      made.bytes += options[h][option].cost;
      made.loss += options[h][option].loss;
    }
    KVT_TRY(follow(made));
    out = std::move(made);
    return success();
  } catch (const std::bad_alloc&) {
    return error(Errc::out_of_memory, "out of memory while bytes are shared out");
  }

 private:
  static constexpr int steps = 99;  // of the curve

  double loss(std::size_t head, std::size_t codec, std::size_t point) const {
    return static_cast<double>(losses[(head * codecs.size() + codec) * shares.size() + point]);
  }
  // The curve of the codecs that were chosen: along the hulls of what each head loses with its own, a step at a time.
  Status follow(TailoredHeads& made) const {
    const std::size_t heads = made.codecs.size();
    std::vector<std::vector<Option>> options(heads);
    for (std::size_t h = 0; h < heads; ++h) {
      const auto c = static_cast<std::size_t>(made.codecs[h]);
      for (std::size_t p = 0; p < shares.size(); ++p)
        options[h].push_back({static_cast<double>(shares[p] * row_bytes[h * codecs.size() + c]), loss(h, c, p)});
    }
    std::vector<std::vector<int>> hulls;
    std::vector<HullStep> along;
    KVT_TRY(hull_steps(options, hulls, along));
    // What no loss tells apart comes last, evenly.
    std::vector<double> kept(heads, 0), rest(heads);
    std::vector<std::size_t> where(heads, 0);
    Curve curve{std::vector<float>(steps * heads), num_layers, num_kv_heads, selector};
    double all = 0;
    int step = 0;  // of the curve, whose rows go from many dropped to few
    const auto write_up_to = [&](double next, auto&& at) {
      for (; step < steps; ++step) {
        const double want = static_cast<double>(heads) * (step + 1) / (steps + 1);
        if (want > next) return;
        const double part = next > all ? (want - all) / (next - all) : 1;
        float* const to = curve.dropped.data() + static_cast<std::size_t>(steps - 1 - step) * heads;
        for (std::size_t h = 0; h < heads; ++h) to[h] = static_cast<float>(std::clamp(1 - at(h, part), 0.0, 1.0));
      }
    };
    for (const HullStep& one : along) {
      const std::size_t h = one.place;
      const auto share = [&](std::size_t k) { return static_cast<double>(shares[static_cast<std::size_t>(hulls[h][k])]); };
      const double more = share(where[h] + 1) - share(where[h]);
      write_up_to(all + more, [&](std::size_t i, double part) { return kept[i] + (i == h ? part * more : 0); });
      kept[h] += more;
      all += more;
      ++where[h];
    }
    const double left = static_cast<double>(heads) - all;
    write_up_to(static_cast<double>(heads),
                [&](std::size_t i, double part) { return kept[i] + (left > 0 ? part * (1 - kept[i]) : 0); });
    made.curve = std::move(curve);
    return success();
  }
};

}  // namespace kvt::inline v0
