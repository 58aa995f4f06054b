// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Decode attention of one query token, beside ggml's own in one process: time for each cached row of a layer.
//
// ggml's attention is built as llama.cpp builds it, with its layouts: flash attention on a row of all heads after another, or
// products and a softmax with the values transposed, which it keeps as fp16 then. Ours runs as custom nodes of a ggml graph, so
// that both are run by the same threads and pay for the same barriers: one node plans, one attends, as engine/ggml.hpp has them
// (neither side stores a row). A graph holds as many layers as it takes to leave the last-level cache, each with its own copy.
//
// Methods take turns, each round runs every one of them on every number of threads, and ratios are medians of those within a
// round. Outputs are poisoned before each run and compared with double precision on the decoded rows after it. The time of one
// thread is its own, as in Google Benchmark, so that other work on the machine counts less; that of several is the wall
// clock's.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <CLI/CLI.hpp>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>

#include "common.hpp"
#include "kvtailor/codec/low_rank.hpp"
#include "reference/plain.hpp"

namespace {

using nlohmann::json;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

double nanoseconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return 1e9 * static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec);
}

// What all methods of a shape are given, and how many rows of it.
struct Rows {
  kvt::Geometry shape;
  int n;
  std::vector<float> queries, keys, values;  // [num_q_heads, head_dim], [n, num_kv_heads, head_dim]

  Rows(const kvt::Geometry& of, int rows)
      : shape(of),
        n(rows),
        queries(bench::random_floats(outputs())),
        keys(bench::random_rows(rows, of.num_kv_heads, of.head_dim)),
        values(bench::random_rows(rows, of.num_kv_heads, of.head_dim)) {}
  std::size_t outputs() const { return static_cast<std::size_t>(shape.num_q_heads * shape.head_dim); }
  std::int64_t width() const { return shape.num_kv_heads * shape.head_dim; }

  // The answer for keys and values [n, head_dim] of each KV head.
  template <class Decode>
  std::vector<double> exact(const Decode& decode) const {
    return exact(decode, [&](int) { return n; });
  }
  // The same where KV heads have `count(head)` rows.
  template <class Decode, class Count>
  std::vector<double> exact(const Decode& decode, const Count& count) const {
    const auto dim = static_cast<std::size_t>(shape.head_dim);
    std::vector<double> out;
    std::vector<float> k, v;
    std::vector<int> positions;
    for (int h = 0; h < shape.num_q_heads; ++h) {
      const auto rows = static_cast<std::size_t>(count(h / shape.group_size()));
      if (h % shape.group_size() == 0) {
        k.resize(rows * dim);
        v.resize(rows * dim);
        positions.resize(rows);
        std::iota(positions.begin(), positions.end(), 0);
        decode(h / shape.group_size(), k.data(), v.data());
      }
      const float* const query = queries.data() + static_cast<std::size_t>(h) * dim;
      const auto head = reference::attend(query, static_cast<int>(rows) - 1, k, v, positions, shape.head_dim, {});
      out.insert(out.end(), head.begin(), head.end());
    }
    return out;
  }
};

// Layers of attention in a ggml graph.
class Method {
 public:
  virtual ~Method() {
    if (allocator_ != nullptr) ggml_gallocr_free(allocator_);
    if (cache_memory_ != nullptr) ggml_backend_buffer_free(cache_memory_);
    ggml_free(graph_context_);
    ggml_free(cache_context_);
  }
  Method(const Method&) = delete;
  Method& operator=(const Method&) = delete;

  double bytes_per_row() const { return bytes_ / n_; }
  std::size_t layers() const { return outputs_.size(); }
  double error() const { return error_; }  // the largest so far: rms, as a share of the answer's

  // Nanoseconds a row and layer.
  double run(int threads) {
    for (ggml_tensor* out : outputs_) std::fill_n(static_cast<float*>(out->data), exact_.size(), NAN);
    ggml_cplan plan = ggml_graph_plan(graph_, threads, nullptr);
    work_.resize(std::max(work_.size(), plan.work_size));
    plan.work_data = work_.data();
    const clockid_t clock = threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    const double start = nanoseconds(clock);
    const bool done = ggml_graph_compute(graph_, &plan) == GGML_STATUS_SUCCESS;
    const double time = nanoseconds(clock) - start;
    if (!done) fail("the graph was not computed");
    check();
    return time / static_cast<double>(layers()) / n_;
  }

 protected:
  // `bytes` of a layer; an error above `bound` ends the program.
  Method(const Rows& rows, double bytes, double bound) : n_(rows.n), bytes_(bytes), bound_(bound) {
    wanted_ = static_cast<std::size_t>(2 * static_cast<double>(bench::last_level_cache_bytes()) / bytes) + 1;
    const std::size_t nodes = 16 * wanted_ + 64;
    const ggml_init_params only_names = {nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr,
                                         true};
    cache_context_ = ggml_init(only_names);
    graph_context_ = ggml_init(only_names);
    graph_ = ggml_new_graph_custom(graph_context_, nodes, false);
    queries_ = ggml_new_tensor_3d(cache_context_, GGML_TYPE_F32, rows.shape.head_dim, rows.shape.num_q_heads, 1);
  }

  // build(i) gives the output of layer i, once what it reads is in cache_context().
  template <class Build>
  void build(const Rows& rows, std::vector<double> exact, const Build& build) {
    exact_ = std::move(exact);
    for (std::size_t i = 0; i < wanted_; ++i) {
      outputs_.push_back(build(i));
      ggml_set_output(outputs_.back());  // so that none takes the place of another
      ggml_build_forward_expand(graph_, outputs_.back());
    }
    cache_memory_ = ggml_backend_alloc_ctx_tensors_from_buft(cache_context_, ggml_backend_cpu_buffer_type());
    allocator_ = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
    if (cache_memory_ == nullptr || !ggml_gallocr_alloc_graph(allocator_, graph_)) fail("there is not enough memory");
    std::copy(rows.queries.begin(), rows.queries.end(), static_cast<float*>(queries_->data));
  }

  std::size_t wanted() const { return wanted_; }  // layers
  ggml_context* graph() const { return graph_context_; }
  ggml_context* cache_context() const { return cache_context_; }
  ggml_tensor* queries() const { return queries_; }

 private:
  void check() {
    double whole = 0;
    for (const double x : exact_) whole += x * x;
    for (const ggml_tensor* out : outputs_) {
      const float* const own = static_cast<const float*>(out->data);
      double wrong = 0;
      for (std::size_t i = 0; i < exact_.size(); ++i) wrong += std::pow(static_cast<double>(own[i]) - exact_[i], 2);
      const double error = std::sqrt(wrong / whole);
      if (!(error <= bound_)) fail("an answer is wrong by " + std::to_string(error) + " of its size");
      error_ = std::max(error_, error);
    }
  }

  int n_;
  double bytes_, bound_, error_ = 0;
  std::size_t wanted_;
  std::vector<double> exact_;
  std::vector<std::uint8_t> work_;
  ggml_context *cache_context_ = nullptr, *graph_context_ = nullptr;
  ggml_cgraph* graph_ = nullptr;
  ggml_backend_buffer_t cache_memory_ = nullptr;
  ggml_gallocr_t allocator_ = nullptr;
  ggml_tensor* queries_ = nullptr;
  std::vector<ggml_tensor*> outputs_;
};

// ggml's own, with a row of all heads after another, or values the other way round.
class Stock final : public Method {
 public:
  Stock(const Rows& rows, ggml_type key_type, ggml_type value_type, bool flash)
      : Method(rows, static_cast<double>(rows.n) * static_cast<double>(row_bytes(rows, key_type) + row_bytes(rows, value_type)),
               0.1) {
    const std::int64_t dim = rows.shape.head_dim, heads = rows.shape.num_kv_heads, n = rows.n;
    const auto keys = encoded(rows, rows.keys, key_type);
    auto values = encoded(rows, rows.values, value_type);
    auto exact = rows.exact([&](int head, float* k, float* v) {
      decode(rows, keys, key_type, head, k);
      decode(rows, values, value_type, head, v);
    });
    if (!flash) values = transposed(values, static_cast<std::size_t>(n), static_cast<std::size_t>(rows.width()));

    ggml_tensor* const mask = ggml_new_tensor_2d(cache_context(), flash ? GGML_TYPE_F16 : GGML_TYPE_F32, n, 1);
    std::vector<ggml_tensor*> stored;
    const float scale = 1.f / std::sqrt(static_cast<float>(dim));
    ggml_context* const g = graph();
    build(rows, std::move(exact), [&](std::size_t) {
      ggml_tensor* const k_rows = ggml_new_tensor_2d(cache_context(), key_type, rows.width(), n);
      ggml_tensor* const v_rows = flash ? ggml_new_tensor_2d(cache_context(), value_type, rows.width(), n)
                                        : ggml_new_tensor_2d(cache_context(), value_type, n, rows.width());
      stored.insert(stored.end(), {k_rows, v_rows});
      const auto by_heads = [&](ggml_tensor* x) {
        return ggml_permute(g,
                            ggml_view_4d(g, x, dim, heads, n, 1, ggml_row_size(x->type, dim), x->nb[1],
                                         x->nb[1] * static_cast<std::size_t>(n), 0),
                            0, 2, 1, 3);
      };
      ggml_tensor* const q = ggml_permute(g, queries(), 0, 2, 1, 3);
      ggml_tensor* const k = by_heads(k_rows);
      if (flash) {
        ggml_tensor* const out = ggml_flash_attn_ext(g, q, k, by_heads(v_rows), mask, scale, 0.f, 0.f);
        ggml_prec_set_acc(out, GGML_PREC_F32);
        return out;
      }
      ggml_tensor* const v =
          ggml_view_4d(g, v_rows, n, dim, heads, 1, v_rows->nb[1], v_rows->nb[1] * static_cast<std::size_t>(dim),
                       v_rows->nb[1] * static_cast<std::size_t>(rows.width()), 0);
      ggml_tensor* const logits = ggml_mul_mat(g, k, q);
      ggml_prec_set_acc(logits, GGML_PREC_F32);
      ggml_tensor* const out = ggml_mul_mat(g, v, ggml_soft_max_ext(g, logits, mask, scale, 0.f));
      return ggml_cont_2d(g, ggml_permute(g, out, 0, 2, 1, 3), dim * rows.shape.num_q_heads, 1);
    });
    std::memset(mask->data, 0, ggml_nbytes(mask));
    for (std::size_t i = 0; i < stored.size(); i += 2) {
      std::memcpy(stored[i]->data, keys.data(), keys.size());
      std::memcpy(stored[i + 1]->data, values.data(), values.size());
    }
  }

 private:
  using Bytes = std::vector<std::uint8_t>;
  static std::size_t row_bytes(const Rows& rows, ggml_type type) { return ggml_row_size(type, rows.width()); }
  static Bytes encoded(const Rows& rows, const std::vector<float>& from, ggml_type type) {
    Bytes to(static_cast<std::size_t>(rows.n) * row_bytes(rows, type));
    ggml_quantize_chunk(type, from.data(), to.data(), 0, rows.n, rows.width(), nullptr);
    return to;
  }
  static void decode(const Rows& rows, const Bytes& from, ggml_type type, int head, float* to) {
    const std::size_t own = ggml_row_size(type, rows.shape.head_dim);
    for (int r = 0; r < rows.n; ++r, to += rows.shape.head_dim) {
      const auto at = static_cast<std::size_t>(r) * row_bytes(rows, type) + static_cast<std::size_t>(head) * own;
      ggml_get_type_traits(type)->to_float(from.data() + at, to, rows.shape.head_dim);
    }
  }
  static Bytes transposed(const Bytes& from, std::size_t rows, std::size_t columns) {
    constexpr std::size_t size = sizeof(ggml_fp16_t);
    Bytes to(from.size());
    for (std::size_t c = 0; c < columns; ++c) {
      for (std::size_t r = 0; r < rows; ++r) std::memcpy(&to[(c * rows + r) * size], &from[(r * columns + c) * size], size);
    }
    return to;
  }
};

// Shares of heads from eight down to one.
struct Ragged {
  static constexpr kvt::EvidenceSet needs = {};
  kvt::Status allocate(const kvt::BudgetRequest& want, std::span<int> keep) const noexcept {
    std::vector<double> share;
    for (std::size_t h = 0; h < keep.size(); ++h) {
      share.push_back(8 - 7 * static_cast<double>(h) / static_cast<double>(std::max<std::size_t>(1, keep.size() - 1)));
    }
    kvt::apportion(want, share, keep);
    return kvt::success();
  }
};

template <class Codec, class Budget>
using BudgetCache = kvt::KvCache<Budget, kvt::SinkRecent, Codec>;

template <class Codec, class Budget>
std::unique_ptr<BudgetCache<Codec, Budget>> filled(const Rows& rows, kvt::Precision precision) {
  Codec codec;
  kvt::set_precision(codec, precision);
  auto cache = std::make_unique<BudgetCache<Codec, Budget>>(Budget{}, kvt::SinkRecent{}, codec);
  const bool equal = std::is_same_v<Budget, kvt::Uniform>;
  const Rows more(rows.shape, equal ? 0 : 2 * rows.n);  // so that the longest head has enough
  auto status = bench::fill(*cache, rows.shape, equal ? rows.keys : more.keys, equal ? rows.values : more.values);
  if (status.ok() && !equal) status = cache->compress(kvt::Retain::rows(rows.n));
  if (status.ok() && !equal) status = cache->flush();
  if (!status.ok()) fail("a cache was not filled: " + status.message());
  return cache;
}

template <class Codec, class Budget>
class Ours final : public Method {
 public:
  Ours(const Rows& rows, kvt::Precision precision)
      : Ours(rows, filled<Codec, Budget>(rows, precision),
             precision == kvt::Precision::accurate ? 1.5e-4 : bench::error_bound(dense)) {}

 private:
  static constexpr bool dense = std::is_same_v<typename Codec::key_type, typename Codec::near_type>;
  using Cache = BudgetCache<Codec, Budget>;
  struct Layer {
    std::unique_ptr<Cache> cache;
    ggml_tensor *queries, *out;
    int position;
    kvt::AttendPlan plan;
  };

  Ours(const Rows& rows, std::unique_ptr<Cache> first, double bound)
      : Method(rows, static_cast<double>(first->memory().payload_bytes), bound), layers_(wanted()) {
    auto exact = rows.exact([&](int head, float* keys, float* values) { first->decode(0, head, keys, values); },
                            [&](int head) { return first->num_rows(0, head); });
    for (std::size_t i = 1; i < wanted(); ++i) {
      layers_[i].cache = std::make_unique<Cache>();
      if (!first->fork(*layers_[i].cache).ok()) fail("a cache was not copied");
    }
    const int position = first->end_position(0) - 1;
    layers_[0].cache = std::move(first);
    build(rows, std::move(exact), [&](std::size_t i) {
      Layer& layer = layers_[i];
      ggml_tensor* inputs[] = {queries(), nullptr};
      inputs[1] = ggml_custom_4d(graph(), GGML_TYPE_F32, 1, 1, 1, 1, inputs, 1, &plan, 1, &layer);
      layer.queries = queries();
      layer.position = position;
      return layer.out = ggml_custom_4d(graph(), GGML_TYPE_F32, static_cast<std::int64_t>(rows.outputs()), 1, 1, 1, inputs, 2,
                                        &attend, GGML_N_TASKS_MAX, &layer);
    });
  }

  static void plan(ggml_tensor*, int ith, int, void* data) {
    if (ith != 0) return;
    Layer& layer = *static_cast<Layer*>(data);
    const auto status = layer.cache->plan(0, static_cast<const float*>(layer.queries->data), std::span(&layer.position, 1), {},
                                          static_cast<float*>(layer.out->data), layer.plan);
    if (!status.ok()) layer.plan.clear();  // the poison stays
  }
  static void attend(ggml_tensor*, int, int, void* data) {
    kvt::AttendPlan& own = static_cast<Layer*>(data)->plan;
    for (int task = own.take(); task >= 0; task = own.take()) own.run(task);
  }

  std::vector<Layer> layers_;
};

struct Named {
  std::string name;
  bool stock, fp16;
  std::function<std::unique_ptr<Method>(const Rows&)> make;
};

template <template <int> class Keys, template <int> class Values = Keys, class Budget = kvt::Uniform>
Named ours(const std::string& name, kvt::Precision precision = kvt::Precision::fast) {
  return {name, false, false, [=](const Rows& rows) -> std::unique_ptr<Method> {
            using Small = Ours<kvt::KvCodec<Keys<64>, Values<64>>, Budget>;
            using Large = Ours<kvt::KvCodec<Keys<128>, Values<128>>, Budget>;
            if (rows.shape.head_dim == 64) return std::make_unique<Small>(rows, precision);
            return std::make_unique<Large>(rows, precision);
          }};
}
Named stock(const std::string& name, ggml_type keys, ggml_type values, bool flash) {
  return {name, true, keys == GGML_TYPE_F16 && values == GGML_TYPE_F16,
          [=](const Rows& rows) { return std::make_unique<Stock>(rows, keys, values, flash); }};
}

template <int dim>
using Fp16 = kvt::Dense<kvt::Half, dim>;
template <int dim>
using Turbo2 = kvt::TurboQuant<2, dim>;
template <int dim>
using Turbo3 = kvt::TurboQuant<3, dim>;
template <int dim>
using Turbo4 = kvt::TurboQuant<4, dim>;
template <int dim>
using Trellis2 = kvt::Rotated<kvt::Trellis<2, dim>>;
template <int dim>
using LowRankTrellis2 = kvt::Rotated<kvt::LowRank<kvt::Trellis<2, dim>>>;
template <int dim>
using LowRankTurbo2 = kvt::Rotated<kvt::LowRank<kvt::detail::ShortLloydMax<2, dim>>>;

const std::vector<Named> all = {
    stock("ggml f16", GGML_TYPE_F16, GGML_TYPE_F16, false),
    stock("ggml f16 flash", GGML_TYPE_F16, GGML_TYPE_F16, true),
    stock("ggml q8_0/f16", GGML_TYPE_Q8_0, GGML_TYPE_F16, false),
    stock("ggml q4_0/f16", GGML_TYPE_Q4_0, GGML_TYPE_F16, false),
    stock("ggml q8_0 flash", GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, true),
    stock("ggml q4_0 flash", GGML_TYPE_Q4_0, GGML_TYPE_Q4_0, true),
    ours<Fp16>("fp16"),
    ours<kvt::Q8_0>("q8_0"),
    ours<kvt::Q4_0>("q4_0"),
    ours<Turbo4>("turbo4"),
    ours<Turbo4>("turbo4 accurate", kvt::Precision::accurate),
    ours<Turbo3, Turbo2>("turbo3/turbo2"),
    ours<Turbo2>("turbo2"),
    ours<Turbo2>("turbo2 accurate", kvt::Precision::accurate),
    ours<Turbo2, Turbo2, Ragged>("turbo2 8:1"),
    ours<Trellis2>("trellis2"),
    ours<Trellis2>("trellis2 accurate", kvt::Precision::accurate),
    ours<LowRankTurbo2>("low_rank_turbo2"),
    ours<LowRankTrellis2>("low_rank_trellis2"),
    ours<LowRankTrellis2>("low_rank_trellis2 accurate", kvt::Precision::accurate),
};

double quantile(std::vector<double> x, double share) {
  std::sort(x.begin(), x.end());
  return x[static_cast<std::size_t>(share * static_cast<double>(x.size() - 1) + 0.5)];
}
double median(std::vector<double> x) { return quantile(std::move(x), 0.5); }

struct Options {
  std::vector<std::string> shapes = {"9/3/64", "32/8/128"};
  std::vector<int> rows = {4096, 32768}, threads = {1, 2};
  int rounds = 15;
  std::string only, json_path, plot_path;
};

// times[i] of method i, a number for each round: the index of the method with the least median among those `fits` accepts.
template <class Fits>
int best(const std::vector<std::vector<double>>& times, const Fits& fits) {
  int found = -1;
  for (std::size_t i = 0; i < times.size(); ++i) {
    if (fits(i) && (found < 0 || median(times[i]) < median(times[static_cast<std::size_t>(found)])))
      found = static_cast<int>(i);
  }
  return found;
}

// How many times as long a takes as b, round by round.
json ratio(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> each;
  for (std::size_t r = 0; r < a.size(); ++r) each.push_back(a[r] / b[r]);
  return median(each);
}

void measure(const Options& o, const std::string& shape_name, int n, json& results) {
  const Rows rows(shape_name == "9/3/64" ? bench::shape_a : bench::shape_b, n);
  std::vector<const Named*> names;
  std::vector<std::unique_ptr<Method>> methods;
  for (const Named& each : all) {
    if (!std::regex_match(each.name, std::regex(o.only.empty() ? ".*" : o.only))) continue;
    names.push_back(&each);
    methods.push_back(each.make(rows));
  }
  // [threads][method][round]
  std::vector<std::vector<std::vector<double>>> times(o.threads.size(), std::vector<std::vector<double>>(methods.size()));
  for (int round = -1; round < o.rounds; ++round) {
    for (std::size_t i = 0; i < methods.size(); ++i) {
      for (std::size_t t = 0; t < o.threads.size(); ++t) {
        const double time = methods[i]->run(o.threads[t]);
        if (round >= 0) times[t][i].push_back(time);  // the first warms up
      }
    }
  }
  for (std::size_t t = 0; t < o.threads.size(); ++t) {
    const auto& own = times[t];
    const int f16 = best(own, [&](std::size_t i) { return names[i]->fp16; });
    const int any = best(own, [&](std::size_t i) { return names[i]->stock; });
    std::printf("\n%s, %d rows, %d thread%s\n%-26s %9s %21s %8s %6s %9s %9s %9s %9s\n", shape_name.c_str(), n, o.threads[t],
                o.threads[t] == 1 ? "" : "s", "", "ns/row", "quartiles", "B/row", "GB/s", "rms error", "x f16", "x stock",
                "x 1 thread");
    for (std::size_t i = 0; i < methods.size(); ++i) {
      const double middle = median(own[i]), bytes = methods[i]->bytes_per_row();
      json line = {{"shape", shape_name},
                   {"rows", n},
                   {"threads", o.threads[t]},
                   {"name", names[i]->name},
                   {"ns_per_row", middle},
                   {"quartiles", {quantile(own[i], 0.25), quantile(own[i], 0.75)}},
                   {"bytes_per_row", bytes},
                   {"gb_per_s", bytes / middle},
                   {"rms_error", methods[i]->error()},
                   {"layers", methods[i]->layers()}};
      if (f16 >= 0) line["over_stock_f16"] = ratio(own[static_cast<std::size_t>(f16)], own[i]);
      if (any >= 0) line["over_stock"] = ratio(own[static_cast<std::size_t>(any)], own[i]);
      if (t > 0 && o.threads[0] == 1) line["over_one_thread"] = ratio(times[0][i], own[i]);
      const auto text = [&](const char* name) {
        char buffer[32];
        std::snprintf(buffer, sizeof buffer, "%.2f", line.value(name, 0.0));
        return std::string(line.contains(name) ? buffer : "");
      };
      std::printf("%-26s %9.2f %10.2f %10.2f %8.0f %6.1f %9.1e %9s %9s %9s\n", names[i]->name.c_str(), middle,
                  line["quartiles"][0].get<double>(), line["quartiles"][1].get<double>(), bytes, bytes / middle,
                  methods[i]->error(), text("over_stock_f16").c_str(), text("over_stock").c_str(),
                  text("over_one_thread").c_str());
      results.push_back(std::move(line));
    }
    std::fflush(stdout);
  }
}

json machine() {
  std::string model;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line) && model.empty();) {
    if (line.starts_with("model name")) model = line.substr(line.find(':') + 2);
  }
  return {{"cpu", model}, {"last_level_cache_bytes", bench::last_level_cache_bytes()}};
}

std::string today() {
  char text[16];
  const std::time_t now = std::time(nullptr);
  std::strftime(text, sizeof text, "%F", std::gmtime(&now));
  return text;
}

// Time a row against rows, on the first number of threads: a panel for each shape, and the better of ggml's f16 as one line.
void plot(const Options& o, const json& results) {
  std::string script =
      "set terminal svg size 900,450 font 'sans,12' background '#ffffff'\nset output '" + o.plot_path +
      "'\nset multiplot layout 1," + std::to_string(o.shapes.size()) +
      "\nset termoption noenhanced\nset logscale xy\nset xlabel 'cached rows'\nset ylabel 'ns a row and layer'\nset xtics "
      "1024,2\n"
      "set grid linetype 1 linecolor rgb '#dddddd'\nset key below\nset linetype 5 linecolor rgb '#b2182b'\n"
      "set autoscale xfix\n";
  for (const auto& shape : o.shapes) {
    std::map<std::string, std::map<int, double>> lines;
    for (const json& r : results) {
      if (r["shape"] != shape || r["threads"] != o.threads[0]) continue;
      std::string name = r["name"];
      if (name.starts_with("ggml f16")) name = "ggml f16, the better path";
      double& least = lines[name].try_emplace(r["rows"], r["ns_per_row"]).first->second;
      least = std::min(least, r["ns_per_row"].get<double>());
    }
    std::string draw;
    for (const auto& [name, points] : lines) {
      const std::string data = "$line" + std::to_string(std::distance(lines.begin(), lines.find(name)));
      script += data + " << END\n";
      for (const auto& [rows, time] : points) script += std::to_string(rows) + ' ' + std::to_string(time) + '\n';
      script += "END\n";
      draw += (draw.empty() ? "plot " : ", ") + data + " with linespoints linewidth 1.5 pointtype 7 pointsize .5 title '" +
              name + "'";
    }
    script += "set title '" + shape + " (query heads/KV heads/head dim)'\n" + draw + '\n';
  }
  FILE* const gnuplot = popen("gnuplot", "w");
  if (gnuplot == nullptr) fail("cannot run gnuplot");
  const bool written = std::fputs((script + "unset multiplot\n").c_str(), gnuplot) >= 0;
  if (pclose(gnuplot) != 0 || !written) fail("gnuplot could not draw " + o.plot_path);
}

int run(const Options& o) {
  std::ofstream file;
  if (!o.json_path.empty()) file.open(o.json_path);
  if (!o.json_path.empty() && !file) fail("cannot write " + o.json_path);
  json results = json::array();
  for (const auto& shape : o.shapes) {
    for (const int n : o.rows) measure(o, shape, n, results);
  }
  const auto variable = [](const char* name) {
    const char* const value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  if (file.is_open()) {
    file << json{{"date", today()},
                 {"machine", machine()},
                 {"compiler", KVT_BENCH_COMPILER},
                 {"flags", KVT_BENCH_FLAGS},
                 {"ggml", ggml_version()},
                 {"wait_policy", variable("OMP_WAIT_POLICY")},
                 {"spin_count", variable("GOMP_SPINCOUNT")},
                 {"rounds", o.rounds},
                 {"results", results}}
                .dump(1)
         << '\n';
    if (!file.flush()) fail("cannot write " + o.json_path);
  }
  if (!o.plot_path.empty()) plot(o, results);
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  Options o;
  CLI::App app("Decode attention alone, beside ggml's own, interleaved");
  app.add_option("--shape", o.shapes, "query heads/KV heads/head dim")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::IsMember({"9/3/64", "32/8/128"}));
  app.add_option("--rows", o.rows, "cached rows")->delimiter(',')->capture_default_str()->check(CLI::Range(64, 1 << 20));
  app.add_option("--threads", o.threads, "numbers of threads")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--rounds", o.rounds, "rounds")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--only", o.only, "methods whose whole name this regular expression matches");
  app.add_option("--json", o.json_path, "file for the results");
  app.add_option("--plot", o.plot_path, "file for a drawing (svg) of time a row against rows");
  CLI11_PARSE(app, argc, argv);
  return run(o);
} catch (const std::exception& e) {
  std::fprintf(stderr, "bench_attend_ggml: %s\n", e.what());
  return 1;
}
