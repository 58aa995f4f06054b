// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See byte_profile.hpp.
#include "byte_profile.hpp"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>

#include "engine.hpp"
#include "hindsight.hpp"
#include "kvtailor/budget/any_allocator.hpp"
#include "kvtailor/io/policy_file.hpp"
#include "kvtailor/learn/option_losses.hpp"
#include "kvtailor/select/any_selector.hpp"
#include "prefill.hpp"

namespace kvt_llm {

namespace {

using nlohmann::json;

constexpr float shares[] = {0, .01f, .02f, .03f, .045f, .06f, .09f, .12f, .16f, .2f, .25f, .3f, .37f, .45f, .55f, .65f, .8f, 1};
constexpr std::size_t points = std::size(shares);

// The rows of a head, and the last queries that were seen.
struct SeenHead {
  std::vector<float> keys, values, queries;
  std::vector<int> positions, query_positions;
  kvt::HeadEvidence told;  // the options of attention, the output projection
};

// Copies what it is shown of rows and of every `stride`-th query; all rows score the same.
struct LookAtHeads {
  static constexpr kvt::EvidenceSet needs = kvt::Evidence::keys | kvt::Evidence::values | kvt::Evidence::positions |
                                            kvt::Evidence::window_queries | kvt::Evidence::output_projection;
  int window = 1;
  int stride = 1, num_kv_heads = 0;
  std::vector<SeenHead>* to = nullptr;

  kvt::Status score(const kvt::HeadEvidence& seen, std::span<float> score) const noexcept try {
    SeenHead& head = (*to)[static_cast<std::size_t>(seen.layer * num_kv_heads + seen.kv_head)];
    head.keys.assign(seen.keys.begin(), seen.keys.end());
    head.values.assign(seen.values.begin(), seen.values.end());
    head.positions.assign(seen.positions.begin(), seen.positions.end());
    head.queries.clear();
    head.query_positions.clear();
    const auto width = static_cast<std::size_t>(seen.group_size * seen.head_dim);
    // The last is among them: of a short answer it may be the only one.
    for (std::size_t w = (seen.window_positions.size() - 1) % static_cast<std::size_t>(stride);
         w < seen.window_positions.size(); w += static_cast<std::size_t>(stride)) {
      const float* const from = seen.window_queries + static_cast<std::int64_t>(w) * seen.window_stride;
      head.queries.insert(head.queries.end(), from, from + width);
      head.query_positions.push_back(seen.window_positions[w]);
    }
    head.told = seen;
    std::fill(score.begin(), score.end(), 0.f);
    return kvt::success();
  } catch (const std::bad_alloc&) {
    return kvt::error(kvt::Errc::out_of_memory, "out of memory while heads are looked at");
  }
};

struct CopyRows {
  static constexpr kvt::EvidenceSet needs = kvt::Evidence::keys | kvt::Evidence::values;
  std::vector<float>*keys = nullptr, *values = nullptr;

  kvt::Status score(const kvt::HeadEvidence& seen, std::span<float> score) const noexcept try {
    keys->insert(keys->end(), seen.keys.begin(), seen.keys.end());
    values->insert(values->end(), seen.values.begin(), seen.values.end());
    std::fill(score.begin(), score.end(), 0.f);
    return kvt::success();
  } catch (const std::bad_alloc&) {
    return kvt::error(kvt::Errc::out_of_memory, "out of memory while rows are copied");
  }
};

// So many rows of each head, whatever is asked for.
struct KnownRows {
  static constexpr kvt::EvidenceSet needs = {};
  std::vector<int> of_heads;

  kvt::Status allocate(const kvt::BudgetRequest&, std::span<int> keep) const noexcept {
    std::copy(of_heads.begin(), of_heads.end(), keep.begin());
    return kvt::success();
  }
};

void copy_rows(kvt::AnyCache& cache, std::vector<float>& keys, std::vector<float>& values) {
  std::vector<float> scores;
  check(cache.set_policies(kvt::AnyAllocator(kvt::Uniform{}), kvt::AnySelector(CopyRows{&keys, &values})));
  check(cache.scores(1, scores));
}

// f(i) for i below n, by several threads. The first failure is thrown once all are through.
template <class F>
void in_parallel(int threads, int n, const F& f) {
  std::atomic<int> next = 0;
  std::exception_ptr failure;
  std::atomic<bool> failed = false;
  const auto work = [&] {
    for (int i = next++; i < n && !failed; i = next++) {
      try {
        f(i);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
}

// Of the ranks of two lists.
double rank_correlation(const std::vector<double>& a, const std::vector<double>& b) {
  const auto ranks = [](const std::vector<double>& x) {
    std::vector<std::size_t> order(x.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t i, std::size_t j) { return x[i] < x[j]; });
    std::vector<double> rank(x.size());
    for (std::size_t i = 0; i < order.size(); ++i) rank[order[i]] = static_cast<double>(i);
    return rank;
  };
  const auto x = ranks(a), y = ranks(b);
  const double middle = (static_cast<double>(a.size()) - 1) / 2;
  double xy = 0, xx = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    xy += (x[i] - middle) * (y[i] - middle);
    xx += (x[i] - middle) * (x[i] - middle);
  }
  return xx > 0 ? xy / xx : 0;
}

class ByteProfile {
 public:
  ByteProfile(const Common& common, SampleOptions samples, const ByteProfileOptions& options, std::string selector);
  void run();
  void report(const std::string& out);

 private:
  // What was found out of one kind of samples: losses of heads, [heads, codecs, shares], before layers are weighed.
  struct Kind {
    std::vector<double> losses;
    int samples = 0;
  };
  // A sample as the full cache reads it.
  struct Read {
    std::vector<float> keys, values;           // of the context, heads one after another
    std::vector<std::vector<int>> order;       // of each head's rows that may go, best first
    std::vector<std::vector<SeenHead>> looks;  // of each head, later rows with their queries
  };

  std::size_t heads() const { return static_cast<std::size_t>(shape_.num_heads()); }
  std::size_t place(std::size_t head, std::size_t codec, std::size_t point) const {
    return (head * options_.codecs.size() + codec) * points + point;
  }
  Read read(const Sample& sample);
  void learn(const Sample& sample);
  std::vector<double> losses_of(const Sample& sample, const Read& seen);
  std::unique_ptr<kvt::AnyCache> filled(const Sample& sample, const Read& seen, const std::vector<std::string>& codecs);
  std::vector<float> continued(kvt::AnyCache& cache, const Sample& sample);
  void check_options(const Sample& sample, const Read& seen, const std::vector<double>& losses,
                     const std::vector<float>& reference);
  double layer_weight(std::size_t head) const;
  void weigh_layers(const Sample& sample, const Read& seen, const std::vector<double>& losses);
  kvt::ByteBudget pooled() const;

  Common common_;
  SampleOptions sample_options_;
  ByteProfileOptions options_;
  std::string selector_;
  std::optional<Tokenizer> tokenizer_;
  std::optional<Model> model_;
  std::optional<Engine> engine_;
  kvt::Geometry shape_;
  std::vector<Sample> samples_;
  std::map<std::string, Kind> kinds_;
  std::vector<double> row_bytes_;                // [heads, codecs], sums over samples
  std::vector<std::vector<double>> layer_logs_;  // of each layer: logarithms of measured over unweighted loss
  struct Checked {
    std::size_t head;
    double loss, kl;  // as predicted, before layers are weighed, and as measured
  };
  std::vector<Checked> checked_;
  int weighed_ = 0;
  std::optional<Progress> progress_;
};

ByteProfile::ByteProfile(const Common& common, SampleOptions samples, const ByteProfileOptions& options, std::string selector)
    : common_(common), sample_options_(std::move(samples)), options_(options), selector_(std::move(selector)) {
  sample_options_.complete({continuation, repetition, "niah_single", "niah_multikey"});
  for (std::string& codec : options_.codecs) std::replace(codec.begin(), codec.end(), '+', ',');
  tokenizer_.emplace(common_.model_path());
  const std::string& path = common_.model_path();
  model_.emplace(options_.weights == "f32" ? dequantised(path) : path, common_.engine);
  shape_ = model_->parameters().geometry();
  const kvt::Composition names{"uniform", selector_, "fp16"};
  make_cache(names, shape_, told_of(*model_, names, common_.zones));
  for (const auto& codec : options_.codecs) make_cache({"uniform", "sink_recent", codec}, shape_, common_.zones);
  samples_ = make_samples(*tokenizer_, sample_options_);
  const int zones = common_.zones.sink_rows + common_.zones.recent_rows;
  bool weighs = false;
  for (const Sample& sample : samples_) {
    weighs = weighs || !sample.reply.empty();
    const auto rows = static_cast<int>(sample.context.size());
    if (rows <= zones)
      throw std::runtime_error("a text has " + std::to_string(rows) + " tokens, all of which are sink or recent rows");
    if (rows + static_cast<int>(sample.asked.size() + sample.reply.size()) >= model_->parameters().context)
      throw std::runtime_error("a text and what comes after it are longer than the model's context");
  }
  if (!weighs) throw std::runtime_error("layers are weighed by what follows a text: --tasks needs another than " + repetition);
  if (std::find(options_.codecs.begin(), options_.codecs.end(), options_.perturbed) == options_.codecs.end())
    throw std::runtime_error("layers are weighed by " + options_.perturbed + ", which is not among the codecs");
  row_bytes_.assign(heads() * options_.codecs.size(), 0);
  layer_logs_.resize(static_cast<std::size_t>(shape_.num_layers));
  engine_.emplace(*model_, common_.threads);
}

ByteProfile::Read ByteProfile::read(const Sample& sample) {
  const kvt::Composition names{"uniform", selector_, "fp16"};
  kvt::CacheOptions told = told_of(*model_, names, common_.zones);
  told.output_projections = model_->output_projections();
  const auto cache = make_cache(names, shape_, told);
  prefill(*engine_, *cache, *tokenizer_, sample.context, common_.chunk);
  Read seen;
  std::vector<float> scores;
  check(cache->scores(0.2, scores));  // the share matters to selectors that choose in stages
  const auto rows = static_cast<int>(sample.context.size()), first = common_.zones.sink_rows,
             end = rows - common_.zones.recent_rows;
  for (std::size_t h = 0; h < heads(); ++h) {
    const float* const own = scores.data() + h * static_cast<std::size_t>(rows);
    auto& order = seen.order.emplace_back(static_cast<std::size_t>(end - first));
    std::iota(order.begin(), order.end(), first);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return own[a] > own[b]; });
  }
  copy_rows(*cache, seen.keys, seen.values);

  std::vector<SeenHead> look_at(heads());
  seen.looks.resize(heads());
  constexpr int queries = 64;  // of a chunk of a repetition, which are many
  const int stride = sample.reply.empty() ? std::max(1, common_.chunk / queries) : 1;
  check(cache->set_policies(kvt::AnyAllocator(kvt::Uniform{}),
                            kvt::AnySelector(LookAtHeads{common_.chunk, stride, shape_.num_kv_heads, &look_at})));
  cache->forget();
  const auto look = [&] {
    check(cache->scores(1, scores));
    for (std::size_t h = 0; h < heads(); ++h) {
      // The context's own rows are known.
      SeenHead& head = look_at[h];
      const auto known = static_cast<std::ptrdiff_t>(rows) * shape_.head_dim;
      head.keys.erase(head.keys.begin(), head.keys.begin() + known);
      head.values.erase(head.values.begin(), head.values.begin() + known);
      head.positions.erase(head.positions.begin(), head.positions.begin() + rows);
      seen.looks[h].push_back(std::move(head));
    }
    cache->forget();
  };
  if (sample.reply.empty()) {
    repeat_context(*engine_, *cache, *tokenizer_, sample.context, common_.chunk, look);
  } else {
    read_answer(*engine_, *cache, sample.asked, sample.reply, common_.chunk, look);
  }
  return seen;
}

// [heads, codecs, shares]: the mean over queries, but of a repetition, most of which looks at one row, the mean of the
// sixteenth that loses most.
std::vector<double> ByteProfile::losses_of(const Sample& sample, const Read& seen) {
  const auto rows = sample.context.size(), dim = static_cast<std::size_t>(shape_.head_dim), size = rows * dim;
  const kvt::Geometry alone{1, 1, shape_.group_size(), shape_.head_dim};
  kvt::CacheOptions bare;
  bare.sink_rows = bare.recent_rows = 0;
  bare.block_rows = common_.zones.block_rows;
  std::vector<int> positions(rows);
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<double> losses(heads() * options_.codecs.size() * points);
  in_parallel(common_.threads, static_cast<int>(heads()), [&](int number) {
    const auto h = static_cast<std::size_t>(number);
    const float *const own_keys = seen.keys.data() + h * size, *const own_values = seen.values.data() + h * size;
    const auto free = static_cast<double>(seen.order[h].size());
    std::vector<int> kept;
    for (const float share : shares) kept.push_back(static_cast<int>(std::lround(static_cast<double>(share) * free)));
    for (std::size_t c = 0; c < options_.codecs.size(); ++c) {
      const auto cache = make_cache({"uniform", "sink_recent", options_.codecs[c]}, alone, bare);
      check(cache->append(0, own_keys, own_values, positions));
      check(cache->flush());
      row_bytes_[h * options_.codecs.size() + c] += static_cast<double>(cache->memory().total()) / static_cast<double>(rows);
      std::vector<float> keys, values, found;
      copy_rows(*cache, keys, values);
      std::vector<std::vector<double>> of_queries(points);
      for (const SeenHead& look : seen.looks[h]) {
        std::vector<float> all_keys(own_keys, own_keys + size), all_values(own_values, own_values + size);
        all_keys.insert(all_keys.end(), look.keys.begin(), look.keys.end());
        all_values.insert(all_values.end(), look.values.begin(), look.values.end());
        std::vector<int> all_positions = positions;
        all_positions.insert(all_positions.end(), look.positions.begin(), look.positions.end());
        kvt::HeadEvidence evidence = look.told;
        evidence.keys = all_keys;
        evidence.values = all_values;
        evidence.positions = all_positions;
        evidence.window_queries = look.queries.data();
        evidence.window_stride = static_cast<std::int64_t>(evidence.group_size) * evidence.head_dim;
        evidence.window_positions = look.query_positions;
        check(kvt::option_losses(evidence, seen.order[h], {keys, values}, kept, found));
        for (std::size_t i = 0; i < found.size(); ++i)
          of_queries[i / look.query_positions.size()].push_back(static_cast<double>(found[i]));
      }
      for (std::size_t p = 0; p < points; ++p) {
        auto& each = of_queries[p];
        std::size_t count = each.size();
        if (sample.reply.empty()) {
          std::sort(each.begin(), each.end(), std::greater<>());
          count = std::max<std::size_t>(1, count / 16);
        }
        losses[place(h, c, p)] =
            std::accumulate(each.begin(), each.begin() + static_cast<std::ptrdiff_t>(count), 0.0) / static_cast<double>(count);
      }
    }
  });
  return losses;
}

// A cache with the context's rows, each head in its form.
std::unique_ptr<kvt::AnyCache> ByteProfile::filled(const Sample& sample, const Read& seen,
                                                   const std::vector<std::string>& codecs) {
  auto cache = make_cache({"uniform", "sink_recent", "fp16"}, shape_, common_.zones, codecs);
  const auto rows = sample.context.size(), dim = static_cast<std::size_t>(shape_.head_dim),
             per_layer = static_cast<std::size_t>(shape_.num_kv_heads);
  std::vector<int> positions(rows);
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<float> keys(rows * per_layer * dim), values(keys.size());
  for (int l = 0; l < shape_.num_layers; ++l) {
    for (std::size_t h = 0; h < per_layer; ++h) {
      for (std::size_t r = 0; r < rows; ++r) {
        const auto from = static_cast<std::ptrdiff_t>(((static_cast<std::size_t>(l) * per_layer + h) * rows + r) * dim);
        const auto to = static_cast<std::ptrdiff_t>((r * per_layer + h) * dim);
        std::copy_n(seen.keys.begin() + from, dim, keys.begin() + to);
        std::copy_n(seen.values.begin() + from, dim, values.begin() + to);
      }
    }
    check(cache->append(l, keys.data(), values.data(), positions));
  }
  check(cache->flush());
  return cache;
}

// The logits of what follows a text.
std::vector<float> ByteProfile::continued(kvt::AnyCache& cache, const Sample& sample) {
  std::vector<int> tokens = sample.asked;
  tokens.insert(tokens.end(), sample.reply.begin(), sample.reply.end() - 1);
  const auto first = static_cast<int>(sample.context.size());
  std::vector<float> logits;
  const auto width = static_cast<std::size_t>(model_->parameters().vocabulary);
  const std::size_t from = (sample.asked.size() - 1) * width;  // the reply's
  in_chunks(static_cast<int>(tokens.size()), common_.chunk, 0, [&](int at, int n) {
    const auto some = engine_->eval(cache, std::span(tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)),
                                    first + at, Engine::Logits::all);
    logits.insert(logits.end(), some.begin(), some.end());
  });
  logits.erase(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(from));
  return logits;
}

double mean_kl(const std::vector<float>& reference, const std::vector<float>& other, std::size_t width) {
  Fidelity fidelity;
  for (std::size_t at = 0; at < reference.size(); at += width)
    fidelity.add(compare({reference.data() + at, width}, {other.data() + at, width}));
  return fidelity.mean_kl();
}

// What a loss of each layer's heads does to the tokens that follow.
void ByteProfile::weigh_layers(const Sample& sample, const Read& seen, const std::vector<double>& losses) {
  const auto width = static_cast<std::size_t>(model_->parameters().vocabulary);
  const auto c = static_cast<std::size_t>(std::find(options_.codecs.begin(), options_.codecs.end(), options_.perturbed) -
                                          options_.codecs.begin());
  const auto full = filled(sample, seen, {});
  const std::vector<float> reference = continued(*full, sample);
  const auto per_layer = static_cast<std::size_t>(shape_.num_kv_heads);
  for (std::size_t l = 0; l < layer_logs_.size(); ++l) {
    std::vector<std::string> codecs(heads(), "fp16");
    double predicted = 0;
    for (std::size_t h = l * per_layer; h < (l + 1) * per_layer; ++h) {
      codecs[h] = options_.perturbed;
      predicted += losses[place(h, c, points - 1)];
    }
    const auto cache = filled(sample, seen, codecs);
    const double measured = mean_kl(reference, continued(*cache, sample), width);
    if (measured > 0 && predicted > 0) layer_logs_[l].push_back(std::log(measured / predicted));
    progress_->advance(1);
  }
  if (weighed_ == 0) check_options(sample, seen, losses, reference);
}

// Single options of single heads, all others dense, one after another.
void ByteProfile::check_options(const Sample& sample, const Read& seen, const std::vector<double>& losses,
                                const std::vector<float>& reference) {
  const auto width = static_cast<std::size_t>(model_->parameters().vocabulary);
  const auto rows = static_cast<int>(sample.context.size());
  std::mt19937 random(1);
  for (int i = 0; i < options_.checked; ++i) {
    const std::size_t h = random() % heads(), c = random() % options_.codecs.size(), p = random() % points;
    std::vector<std::string> codecs(heads(), "fp16");
    codecs[h] = options_.codecs[c];
    const auto cache = filled(sample, seen, codecs);
    auto scores = std::make_shared<std::vector<float>>(heads() * static_cast<std::size_t>(rows), 0.f);
    const auto& order = seen.order[h];
    for (std::size_t k = 0; k < order.size(); ++k)
      (*scores)[h * static_cast<std::size_t>(rows) + static_cast<std::size_t>(order[k])] = static_cast<float>(order.size() - k);
    KnownRows keep{std::vector<int>(heads(), rows)};
    const auto free = static_cast<int>(std::lround(static_cast<double>(shares[p]) * static_cast<double>(order.size())));
    keep.of_heads[h] = rows - static_cast<int>(order.size()) + free;
    const long long all = static_cast<long long>(rows) * shape_.num_heads(), kept = all - rows + keep.of_heads[h];
    check(cache->set_policies(kvt::AnyAllocator(keep), kvt::AnySelector(KnownScores{scores, shape_})));
    check(cache->compress(kvt::Retain::ratio(static_cast<double>(kept) / static_cast<double>(all))));
    checked_.push_back({h, losses[place(h, c, p)], mean_kl(reference, continued(*cache, sample), width)});
    progress_->advance(1);
  }
}

void ByteProfile::learn(const Sample& sample) {
  const Read seen = read(sample);
  const std::vector<double> losses = losses_of(sample, seen);
  Kind& kind = kinds_[sample.reply.empty() ? repetition : sample.task == continuation ? continuation : "answers"];
  kind.losses.resize(losses.size(), 0);
  for (std::size_t i = 0; i < losses.size(); ++i) kind.losses[i] += losses[i];
  ++kind.samples;
  progress_->advance(1);
  if (!sample.reply.empty() && weighed_ < options_.weighed) {
    weigh_layers(sample, seen, losses);
    ++weighed_;
  }
}

void ByteProfile::run() {
  int weighed = 0;
  for (const Sample& sample : samples_) weighed += sample.reply.empty() ? 0 : 1;
  progress_.emplace("profile", static_cast<long long>(samples_.size()) +
                                   static_cast<long long>(std::min(weighed, options_.weighed)) * shape_.num_layers +
                                   options_.checked);
  for (const Sample& sample : samples_) learn(sample);
  progress_.reset();
}

double ByteProfile::layer_weight(std::size_t head) const {
  const auto& logs = layer_logs_[head / static_cast<std::size_t>(shape_.num_kv_heads)];
  return logs.empty() ? 1 : std::exp(std::accumulate(logs.begin(), logs.end(), 0.0) / static_cast<double>(logs.size()));
}

// Kinds of samples count alike: each is divided by what it loses if nothing but the dense zones is kept.
kvt::ByteBudget ByteProfile::pooled() const {
  kvt::ByteBudget made;
  made.num_layers = shape_.num_layers;
  made.num_kv_heads = shape_.num_kv_heads;
  made.selector = kvt::full_name(selector_);
  made.codecs = options_.codecs;
  made.shares.assign(std::begin(shares), std::end(shares));
  made.zone_rows = common_.zones.sink_rows + common_.zones.recent_rows;
  made.zone_bytes = 2.0 * 2 * shape_.head_dim + sizeof(int);
  for (const double bytes : row_bytes_)
    made.row_bytes.push_back(static_cast<float>(bytes / static_cast<double>(samples_.size())));
  std::vector<double> losses(heads() * options_.codecs.size() * points, 0);
  for (const auto& [name, kind] : kinds_) {
    double nothing = 0;
    for (std::size_t h = 0; h < heads(); ++h) nothing += layer_weight(h) * kind.losses[place(h, 0, 0)];
    for (std::size_t i = 0; i < losses.size(); ++i)
      losses[i] += layer_weight(i / (options_.codecs.size() * points)) * kind.losses[i] / nothing;
  }
  for (const double loss : losses) made.losses.push_back(static_cast<float>(loss));
  return made;
}

void ByteProfile::report(const std::string& out) {
  const kvt::ByteBudget profile = pooled();
  std::size_t tokens = 0;
  for (const Sample& sample : samples_) tokens += sample.context.size();
  tokens /= samples_.size();
  const auto file_name = [](const std::string& path) { return std::filesystem::path(path).filename().string(); };
  check(kvt::write_byte_budget(out, profile,
                               {{"model", file_name(common_.model_path())},
                                {"head_dim", std::to_string(shape_.head_dim)},
                                {"num_q_heads", std::to_string(shape_.num_q_heads)},
                                {"data", sample_options_.data()},
                                {"part", name_of(sample_options_.part)},
                                {"tasks", sample_options_.done()},
                                {"samples", std::to_string(samples_.size()) + " of " + std::to_string(tokens) + " tokens"},
                                {"seed", std::to_string(sample_options_.make.seed)},
                                {"sink_rows", std::to_string(common_.zones.sink_rows)},
                                {"recent_rows", std::to_string(common_.zones.recent_rows)}}));
  FILE* const text = common_.text();
  std::fprintf(text, "%zu texts of %zu tokens on average; %s\n", samples_.size(), tokens, sample_options_.done().c_str());
  std::fprintf(text, "for %zu tokens, of what is lost if nothing but the dense zones is kept:\n", tokens);
  std::fprintf(text, "%8s %9s %7s %8s  %s\n", "bytes", "MiB", "lost", "rows", "heads by codec");
  json results = json::array();
  const double dense = 4.0 * shape_.head_dim * static_cast<double>(heads()) * static_cast<double>(tokens);
  for (const int part : {2, 4, 8, 16, 32}) {
    kvt::TailoredHeads tailored;
    if (const auto status = profile.solve(dense / part, static_cast<double>(tokens), tailored); !status.ok()) {
      std::fprintf(text, "   1 / %-2d  %s\n", part, status.message().c_str());
      continue;
    }
    std::map<int, int> by_codec;
    double kept = 0;
    for (std::size_t h = 0; h < heads(); ++h) {
      kept += tailored.kept[h] / static_cast<double>(heads());
      ++by_codec[tailored.kept[h] > 0 ? tailored.codecs[h] : -1];
    }
    std::string codecs;
    for (const auto& [codec, count] : by_codec)
      codecs += " " + (codec < 0 ? "none" : profile.codecs[static_cast<std::size_t>(codec)]) + " " + std::to_string(count);
    const double lost = tailored.loss / static_cast<double>(kinds_.size());
    std::fprintf(text, "   1 / %-2d %9.3f %6.2f%% %7.1f%% %s\n", part, tailored.bytes / mebibyte, 100 * lost, 100 * kept,
                 codecs.c_str());
    results.push_back({{"part", part}, {"bytes", tailored.bytes}, {"lost", lost}, {"kept", kept}, {"codecs", codecs}});
  }
  json weights = json::array();
  for (std::size_t l = 0; l < layer_logs_.size(); ++l)
    weights.push_back(layer_weight(l * static_cast<std::size_t>(shape_.num_kv_heads)));
  json result = {{"layer_weights", weights},
                 {"selector", profile.selector},
                 {"tasks", sample_options_.done()},
                 {"results", results},
                 {"file", out}};
  if (!checked_.empty()) {
    std::vector<double> predicted, measured;
    for (const Checked& one : checked_) {
      predicted.push_back(layer_weight(one.head) * one.loss);
      measured.push_back(one.kl);
      result["checked"].push_back({predicted.back(), one.kl});
    }
    result["rank_correlation"] = rank_correlation(predicted, measured);
    std::fprintf(text, "rank correlation of what is predicted of %zu single options with their KL: %.3f\n", checked_.size(),
                 result["rank_correlation"].get<double>());
  }
  common_.write(result);
}

}  // namespace

void profile_bytes(const Common& common, SampleOptions samples, const ByteProfileOptions& options, const std::string& selector,
                   const std::string& out) {
  ByteProfile profile(common, std::move(samples), options, selector);
  profile.run();
  profile.report(out);
}

}  // namespace kvt_llm
