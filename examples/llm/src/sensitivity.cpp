// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// kvt-llm sensitivity: measures them on a text; fidelity and generate choose by them with --cache mixed:FILE@BITS.
#include "sensitivity.hpp"

#include <cmath>
#include <cstdio>
#include <fstream>
#include <stdexcept>

#include "command.hpp"
#include "engine.hpp"
#include "kvtailor/learn/option_hull.hpp"

namespace kvt_llm {

using nlohmann::json;

namespace {

constexpr const char* format = "kvtailor codec sensitivities";

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
  throw std::runtime_error("the sensitivities in " + path + " " + why);
}

json shape_of(const kvt::Geometry& g) {
  return {
      {"num_layers", g.num_layers}, {"num_kv_heads", g.num_kv_heads}, {"num_q_heads", g.num_q_heads}, {"head_dim", g.head_dim}};
}

}  // namespace

Sensitivities Sensitivities::read(const std::string& path) try {
  std::ifstream stream(path);
  if (!stream) throw std::runtime_error("cannot read the sensitivities " + path);
  const json file = json::parse(stream);
  if (file.at("format") != format || file.at("version") != 1)
    refuse(path, "are not of the format \"" + std::string(format) + "\", version 1");
  Sensitivities s;
  const json& shape = file.at("geometry");
  s.geometry = {shape.at("num_layers"), shape.at("num_kv_heads"), shape.at("num_q_heads"), shape.at("head_dim")};
  s.codecs = file.at("codecs").get<std::vector<std::string>>();
  for (const json& place : file.at("places")) {
    auto& entries = s.places.emplace_back();
    for (const json& entry : place) entries.push_back({entry.at(0), entry.at(1)});
    if (entries.empty() || entries.size() != s.codecs.size()) refuse(path, "have a place that does not list every codec");
  }
  if (!s.geometry.validate().ok() || s.places.size() != 2 * static_cast<std::size_t>(s.geometry.num_heads())) {
    refuse(path, "have " + std::to_string(s.places.size()) + " places, which is not two for each head of their geometry");
  }
  return s;
} catch (const json::exception& e) {
  refuse(path, std::string("cannot be read: ") + e.what());
}

void Sensitivities::write(const std::string& path, const std::string& text, int tokens) const {
  json all = json::array();
  for (const auto& place : places) {
    json entries = json::array();
    for (const Entry& entry : place) entries.push_back({entry.bits, entry.kl});
    all.push_back(entries);
  }
  const json file = {{"format", format}, {"version", 1}, {"text", text}, {"tokens", tokens}, {"geometry", shape_of(geometry)},
                     {"codecs", codecs}, {"places", all}};
  if (!(std::ofstream(path) << file.dump(1) << '\n')) throw std::runtime_error("cannot write " + path);
}

std::vector<std::string> Sensitivities::choose(double bits, const kvt::Geometry& wanted) const {
  if (shape_of(wanted) != shape_of(geometry)) {
    throw std::runtime_error("the sensitivities are of a model with the shape " + shape_of(geometry).dump() +
                             "; this one has " + shape_of(wanted).dump());
  }
  // Keys lose in other proportions than values.
  std::vector<std::vector<kvt::Option>> part[2];
  for (std::size_t p = 0; p < places.size(); ++p) {
    auto& of_place = part[p % 2].emplace_back();
    for (const Entry& entry : places[p]) of_place.push_back({entry.bits, entry.kl});
  }
  for (auto& each : part) check(kvt::pool_losses(each, geometry.num_kv_heads));
  std::vector<std::vector<kvt::Option>> options;
  for (std::size_t p = 0; p < places.size(); ++p) options.push_back(part[p % 2][p / 2]);
  std::vector<int> chosen;
  const kvt::Status status = kvt::choose_options(options, bits * static_cast<double>(places.size()), chosen);
  if (!status.ok()) {
    double least = 0;
    for (const auto& place : places) {
      least +=
          std::min_element(place.begin(), place.end(), [](const Entry& a, const Entry& b) { return a.bits < b.bits; })->bits;
    }
    throw std::runtime_error(std::to_string(bits) +
                             " bits on average cannot be met; the cheapest of the measured codecs take " +
                             std::to_string(least / static_cast<double>(places.size())));
  }
  std::vector<std::string> names;
  for (std::size_t head = 0; head < chosen.size() / 2; ++head) {
    const auto name = [&](std::size_t place) { return codecs[static_cast<std::size_t>(chosen[place])]; };
    names.push_back(name(2 * head) + "/" + name(2 * head + 1));
  }
  return names;
}

namespace {

struct Options {
  Common common;
  std::string text, out;
  int tokens = 384;
  long long offset = 0;
  std::vector<std::string> codecs;
};

int sensitivity(const Options& o) {
  if (std::ofstream probe(o.out, std::ios::app); !probe) throw std::runtime_error("cannot write " + o.out);
  const Tokenizer tokenizer(o.common.model_path());
  const auto tokens = tokens_of(tokenizer, o.text, o.offset, o.tokens);
  const Model model(dequantised(o.common.model_path()));
  const int skip = o.common.chunk + o.common.zones.sink_rows;  // the first chunk attends to dense rows only
  if (o.tokens <= skip) {
    throw std::runtime_error("--tokens " + std::to_string(o.tokens) + " must be above the first chunk, " +
                             std::to_string(skip));
  }
  Engine engine(model, o.common.threads);
  Sensitivities s;
  s.geometry = model.parameters().geometry();
  for (std::string codec : o.codecs) {
    std::replace(codec.begin(), codec.end(), '+', ',');
    s.codecs.push_back(codec);
    make_cache({"uniform", "sink_recent", codec}, s.geometry, o.common.zones);  // a wrong name costs no minutes
  }
  const auto width = static_cast<std::size_t>(model.parameters().vocabulary);
  const auto heads = static_cast<std::size_t>(s.geometry.num_heads());
  Progress progress("sensitivity", static_cast<long long>(1 + 2 * heads * s.codecs.size()));

  std::vector<float> reference;
  double dense_payload = 0;
  const auto run = [&](kvt::AnyCache& cache) {
    Fidelity f;
    const bool first = reference.empty();
    in_chunks(o.tokens, o.common.chunk, o.common.zones.sink_rows, [&](int at, int n) {
      const auto logits =
          engine.eval(cache, std::span(tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), at,
                      at == 0 ? Engine::Logits::last : Engine::Logits::all);
      check(cache.flush());
      if (at == 0) return;
      if (first) {
        reference.insert(reference.end(), logits.begin(), logits.end());
        return;
      }
      for (int i = 0; i < n; ++i) {
        const auto row = static_cast<std::size_t>(i) * width;
        f.add(
            compare({reference.data() + static_cast<std::size_t>(at - skip) * width + row, width}, logits.subspan(row, width)));
      }
    });
    progress.advance(1);
    return f;
  };
  const std::string dense = "fp16/fp16";
  const auto full = make_cache({"uniform", "sink_recent", "fp16"}, s.geometry, o.common.zones);
  run(*full);
  dense_payload = static_cast<double>(full->memory().payload_bytes);
  // Of the rows that are encoded; sink rows are dense whatever the codec.
  const double elements = static_cast<double>(o.tokens - o.common.zones.sink_rows) * s.geometry.head_dim;
  for (std::size_t place = 0; place < 2 * heads; ++place) {
    auto& entries = s.places.emplace_back();
    for (const std::string& codec : s.codecs) {
      std::vector<std::string> codecs(heads, dense);
      codecs[place / 2] = place % 2 == 0 ? codec + "/fp16" : "fp16/" + codec;
      const auto cache = make_cache({"uniform", "sink_recent", "fp16"}, s.geometry, o.common.zones, codecs);
      const double kl = run(*cache).mean_kl();
      entries.push_back({16 - 8 * (dense_payload - static_cast<double>(cache->memory().payload_bytes)) / elements, kl});
    }
  }
  s.write(o.out, o.text, o.tokens);
  FILE* const out = o.common.text();
  for (std::size_t k = 0; k < s.codecs.size(); ++k) {
    for (const std::size_t part : {0, 1}) {
      std::vector<double> kl;
      double bits = 0;
      for (std::size_t place = part; place < s.places.size(); place += 2) {
        kl.push_back(s.places[place][k].kl);
        bits += s.places[place][k].bits / static_cast<double>(heads);
      }
      std::sort(kl.begin(), kl.end());
      std::fprintf(out, "%-36s %-6s %6.3f bits, KL of one head: least %.1e, median %.1e, most %.1e\n", s.codecs[k].c_str(),
                   part == 0 ? "keys" : "values", bits, kl.front(), median(kl), kl.back());
    }
  }
  std::fprintf(out, "use it: kvt-llm fidelity --cache mixed:%s@2.5\n", o.out.c_str());
  return 0;
}

}  // namespace

void add_sensitivity(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* const command =
      app.add_subcommand("sensitivity", "what codecs lose on the keys and values of each head, for mixed:FILE@BITS");
  o->common.zones.recent_rows = 0;
  o->common.add(*command, 128);
  command->add_option("--text", o->text, "text file")->required();
  command
      ->add_option("--codec", o->codecs,
                   "codec to measure; repeat for more of one family, whose losses are pooled. Join parameters by +")
      ->required();
  command->add_option("--out", o->out, "file for the result, JSON")->required();
  command->add_option("--tokens", o->tokens, "length of the text; tokens after the first chunk are scored")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--offset", o->offset, "byte of the file to begin at")->capture_default_str();
  command->callback([o] { sensitivity(*o); });
}

}  // namespace kvt_llm
