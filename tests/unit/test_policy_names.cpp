// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Policies by name: every name with every parameter is the policy it says, the help texts tell all of them and nothing else,
// and whatever is wrong is named in one sentence that leaves the policy as it was.
#include <doctest/doctest.h>

#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>

#define KVT_EXTERN_HEAD_DIMS
#include "kvtailor/budget/any_allocator.hpp"
#include "kvtailor/compose.hpp"
#include "kvtailor/select/any_selector.hpp"
#include "unit/files.hpp"

using namespace kvt;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

std::vector<float> normals(std::mt19937& random, std::size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(random);
  return x;
}

// A request that every allocator answers in its own way.
struct Request {
  std::vector<int> seen = {60, 50, 40, 60, 60, 60, 30, 60}, floor = std::vector<int>(8, 3);
  std::vector<float> scores, similarity = {0.3f, 0.95f, 0.9f, 0.5f};
  BudgetRequest want;

  Request() {
    std::mt19937 random(1);
    for (std::size_t h = 0; h < seen.size(); ++h) {
      for (const float x : normals(random, static_cast<std::size_t>(seen[h])))
        scores.push_back(std::exp(static_cast<float>(h) * x));
      std::fill(scores.end() - 3, scores.end(), infinity);
    }
    want = {170, 4, 2, seen, floor, scores, similarity};
  }
  std::vector<int> kept(const AnyAllocator& budget) const {
    std::vector<int> keep(seen.size());
    const Status status = budget.allocate(want, keep);
    REQUIRE_MESSAGE(status.ok(), status.message());
    return keep;
  }
};

// Evidence of one head that every selector can score.
struct Evidences {
  static constexpr int dim = 40, rows = 400, group = 2, window = 100, width = 24;
  std::vector<float> keys, values, queries, projection, mean, covariance, scratch;
  std::vector<int> positions, window_positions;
  std::vector<RowAttention> attention;
  Rope rope{.rotary_dim = dim};
  HeadEvidence seen;

  Evidences() : scratch(4 * (rows + dim)) {
    std::mt19937 random(2);
    keys = normals(random, rows * dim);
    values = normals(random, rows * dim);
    queries = normals(random, window * group * dim);
    projection = normals(random, width * group * dim);
    mean = normals(random, group * dim);
    covariance.assign(group * dim * dim, 0.f);
    for (int i = 0; i < group * dim; ++i)
      covariance[static_cast<std::size_t>(i * dim + i % dim)] = 1 + static_cast<float>(i % 7);
    std::uniform_real_distribution<float> part(0, 1);
    for (int r = 0; r < rows; ++r) {
      positions.push_back(2 * r + r % 2);
      attention.push_back({part(random), part(random) / 10, 1 + r % 9});
    }
    for (int w = 0; w < window; ++w) window_positions.push_back(positions.back() - window + 1 + w);
    seen.layer = 3;
    seen.kv_head = 1;
    seen.head_dim = dim;
    seen.group_size = group;
    seen.positions = positions;
    seen.keys = keys;
    seen.values = values;
    seen.window_queries = queries.data();
    seen.window_stride = group * dim;
    seen.window_positions = window_positions;
    seen.moments = {500, mean.data(), covariance.data()};
    seen.attention = attention;
    seen.rope = &rope;
    seen.output = {projection.data(), width};
    seen.output_stride = group * dim;
    seen.end_position = positions.back() + 1;
    seen.share = 0.5;
    seen.scratch = scratch;
  }
  // After the heads of the layer, of which there is one, have decided together.
  template <class Selector>
  std::vector<float> scores(const Selector& selector) const {
    std::vector<float> score(rows);
    Status status = selector.score(seen, score);
    REQUIRE_MESSAGE(status.ok(), status.message());
    if constexpr (JoinsHeads<Selector>) {
      const std::span<const int> own_positions = positions;
      const std::span<float> own_scores = score;
      status = selector.join({{&own_positions, 1}, {&own_scores, 1}});
      REQUIRE_MESSAGE(status.ok(), status.message());
    }
    return score;
  }
};

AnyAllocator allocator_of(const std::string& text) {
  AnyAllocator out;
  REQUIRE_MESSAGE(detail::parse_allocator(text, out).empty(), text);
  return out;
}
AnySelector selector_of(const std::string& text) {
  AnySelector out;
  const std::string wrong = detail::parse_selector(text, out);
  REQUIRE_MESSAGE(wrong.empty(), text << ": " << wrong);
  return out;
}

// A policy of a help text: "name", "name[:key=default,key=default]", "name:file=WHAT[,key=default]", with "(..)" around
// another.
struct Told {
  std::string name;
  std::vector<std::string> parameters;  // key=default
  bool around = false, file = false;
};
std::vector<Told> told(const std::string& help) {
  std::vector<Told> all;
  std::string item;
  int depth = 0;
  const auto end = [&] {
    if (const auto intro = item.find("around another: "); intro != item.npos) item = item.substr(intro + 16);
    while (!item.empty() && item[0] == ' ') item.erase(0, 1);
    Told one;
    one.name = item.substr(0, item.find_first_of("[(:"));
    one.around = item.ends_with("(..)");
    one.file = item.find(":file=") != item.npos;
    const auto open = item.find('[');
    if (open != item.npos) {
      std::string inside = item.substr(open + 2, item.find(']') - open - 2);  // after "[:" or "[,"
      for (std::size_t comma; !inside.empty(); inside = comma == inside.npos ? "" : inside.substr(comma + 1)) {
        comma = inside.find(',');
        one.parameters.push_back(inside.substr(0, comma));
      }
    }
    all.push_back(one);
    item.clear();
  };
  for (const char c : help) {
    depth += (c == '[' || c == '(') - (c == ']' || c == ')');
    if (depth == 0 && (c == ',' || c == ';')) {
      end();
    } else {
      item += c;
    }
  }
  end();
  return all;
}
std::set<std::string> names_told(const std::string& help) {
  std::set<std::string> names;
  for (const Told& one : told(help)) names.insert(one.name);
  return names;
}

// Names that the source compares with.
std::set<std::string> names_in_source(const std::string& path) {
  std::ifstream file(path);
  REQUIRE(file.is_open());
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  std::set<std::string> names;
  for (const std::string sign : {"spec.name == \"", "spec.name != \""}) {
    for (auto at = text.find(sign); at != text.npos; at = text.find(sign, at + 1)) {
      const auto begin = at + sign.size();
      names.insert(text.substr(begin, text.find('"', begin) - begin));
    }
  }
  return names;
}

// One sentence that has both parts, what was given and what is known.
void check_sentence(const std::string& wrong, const std::string& given, const std::string& known) {
  CAPTURE(wrong);
  CHECK_MESSAGE(wrong.find(given) != std::string::npos, "does not name " << given);
  CHECK_MESSAGE(wrong.find(known) != std::string::npos, "does not name " << known);
  CHECK(wrong.find('\n') == std::string::npos);
  CHECK(wrong.find(". ") == std::string::npos);
  CHECK(!wrong.ends_with('.'));
}

const std::string gates = "0.1\t0.9\n0.5\t0.2\n0.7\t0.3\n0.8\t0.4\n";
std::vector<float> gate_numbers() { return {0.1f, 0.9f, 0.5f, 0.2f, 0.7f, 0.3f, 0.8f, 0.4f}; }
const std::string curve = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7\n0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2\n";
std::vector<float> curve_numbers() {
  return {0, 0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f, 0.7f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f, 0.4f, 0.3f, 0.2f};
}

}  // namespace

TEST_CASE("an allocator's name with its parameters is that allocator") {
  const Folder folder;
  const std::string gate_file = folder.write("gates.tsv", gates), curve_file = folder.write("curve.csv", curve);
  const Request r;
  const std::vector<std::pair<std::string, AnyAllocator>> all = {
      {"uniform", AnyAllocator(Uniform{})},
      {"pyramid", AnyAllocator(Pyramid{.beta = 20})},
      {"pyramid:beta=1", AnyAllocator(Pyramid{.beta = 1})},
      {"pyramid:beta=3.5", AnyAllocator(Pyramid{.beta = 3.5})},
      {"pyramid:beta=1000", AnyAllocator(Pyramid{.beta = 1000})},
      {"adaptive", AnyAllocator(Adaptive{.safeguard = 0.2})},
      {"adaptive:safeguard=0", AnyAllocator(Adaptive{.safeguard = 0})},
      {"adaptive:safeguard=0.75", AnyAllocator(Adaptive{.safeguard = 0.75})},
      {"adaptive:safeguard=1", AnyAllocator(Adaptive{.safeguard = 1})},
      {"global", AnyAllocator(Global{.safeguard = 0.2})},
      {"global:safeguard=0", AnyAllocator(Global{.safeguard = 0})},
      {"global:safeguard=7.5e-1", AnyAllocator(Global{.safeguard = 0.75})},
      {"lava", AnyAllocator(Lava{.even = 0.5})},
      {"lava:even=0", AnyAllocator(Lava{.even = 0})},
      {"lava:even=1", AnyAllocator(Lava{.even = 1})},
      {"squeeze_attention", AnyAllocator(SqueezeAttention{.share = 0.35})},
      {"squeeze_attention:share=0.8", AnyAllocator(SqueezeAttention{.share = 0.8})},
      {"streaming_heads:file=" + gate_file, AnyAllocator(StreamingHeads{gate_numbers(), 384})},
      {"streaming_heads:file=" + gate_file + ",rows=0", AnyAllocator(StreamingHeads{gate_numbers(), 0})},
      {"streaming_heads:rows=9,file=" + gate_file, AnyAllocator(StreamingHeads{gate_numbers(), 9})},
      {"curve:file=" + curve_file, AnyAllocator(Curve{curve_numbers()})},
  };
  for (const auto& [name, policy] : all) {
    const std::string& text = name;
    CAPTURE(text);
    const AnyAllocator parsed = allocator_of(text);
    CHECK(r.kept(parsed) == r.kept(policy));
    CHECK(parsed.active_needs() == policy.active_needs());
  }
  // The others differ: a flat pyramid and streaming heads that are given all are uniform; a pyramid is no steeper than its
  // first layer has rows, and what heads are safe for by default they have by their scores here.
  std::set<std::vector<int>> different;
  for (const auto& [text, policy] : all) different.insert(r.kept(policy));
  CHECK(different.size() == all.size() - 4);
  // What belongs to a shape is looked at where there is one.
  const Geometry shape{4, 2, 4, 64}, other{4, 3, 6, 64};
  for (const std::string& text : {"streaming_heads:file=" + gate_file, "curve:file=" + curve_file}) {
    CHECK(allocator_of(text).check(shape).ok());
    CHECK(allocator_of(text).check(other).code == Errc::bad_shape);
  }
  CHECK(allocator_of("uniform").check(other).ok());
  CHECK(allocator_of("uniform").active_needs().empty());
  CHECK(allocator_of("lava").active_needs() == EvidenceSet(Evidence::scores));
  CHECK(allocator_of("squeeze_attention").active_needs() == EvidenceSet(Evidence::layer_similarity));
}

TEST_CASE("no allocator and no selector say so") {
  const Request r;
  std::vector<int> keep(8);
  CHECK(AnyAllocator{}.allocate(r.want, keep).message() == "no budget allocator was chosen");
  CHECK(AnyAllocator{}.check({1, 1, 1, 64}).code == Errc::bad_policy);
  CHECK(AnyAllocator{}.active_needs().empty());
  std::vector<float> score(1);
  CHECK(AnySelector{}.score({}, score).message() == "no token selector was chosen");
  CHECK(AnySelector{}.check({1, 1, 1, 64}).code == Errc::bad_policy);
  CHECK(AnySelector{}.join({}).code == Errc::bad_policy);
  CHECK(AnySelector{}.attention({}, score).code == Errc::bad_policy);
  CHECK(AnySelector{}.active_needs().empty());
}

TEST_CASE("the help text of allocators tells every name, parameter and default, and nothing else") {
  const Folder folder;
  const std::string gate_file = folder.write("gates.tsv", gates);
  const Request r;
  CHECK(names_told(known_allocators) == std::set<std::string>{"uniform", "pyramid", "adaptive", "global", "lava",
                                                              "squeeze_attention", "streaming_heads", "curve", "learned"});
  CHECK(names_told(known_allocators) == names_in_source("../include/kvtailor/budget/any_allocator.hpp"));
  int parameters = 0;
  for (const Told& one : told(known_allocators)) {
    if (one.name == "learned") continue;  // has files of its own: test_learned.cpp
    const std::string bare = one.name + (one.file ? ":file=" + gate_file : "");
    const std::vector<int> plain = r.kept(allocator_of(bare));
    for (const std::string& parameter : one.parameters) {
      CHECK_MESSAGE(r.kept(allocator_of(bare + (one.file ? "," : ":") + parameter)) == plain, one.name << " " << parameter);
      ++parameters;
    }
  }
  CHECK(parameters == 6);
}

TEST_CASE("what is wrong with an allocator's name is named, and what is known") {
  const Folder folder;
  const std::string gate_file = folder.write("gates.tsv", gates), words = folder.write("words", "some words\n");
  const std::string none = (folder.path / "none").string();
  const Request r;
  const std::vector<int> before = r.kept(allocator_of("global:safeguard=0"));
  const auto refused = [&](const std::string& text, const std::string& given, const std::string& known) {
    AnyAllocator policy = allocator_of("global:safeguard=0");
    check_sentence(detail::parse_allocator(text, policy), given, known);
    CHECK(r.kept(policy) == before);
  };
  for (const std::string name :
       {"", "unifor", "uniformly", "Uniform", " uniform", "uniform ", "uniform)", "snap_kv", "=", "uniform,pyramid"}) {
    refused(name, "unknown budget allocator \"" + name + "\"", known_allocators);
  }
  refused(":beta=3", "unknown budget allocator \"\"", known_allocators);
  for (const std::string text :
       {"pyramid(uniform)", "pyramid:beta=3(uniform)", "uniform(", "uniform()", "(uniform)", "pyramid(uniform", "()"}) {
    refused(text, "\"" + text + "\"", known_allocators);
  }
  refused("uniform:beta=1", "uniform has no parameter beta=1", "it takes none");
  for (const std::string value :
       {"0.99", "1001", "-2", "nan", "inf", "", "+2", " 2", "2 ", "0x2", "2f", "1e999", "two", "2=3"}) {
    refused("pyramid:beta=" + value, "pyramid has no parameter beta=" + value, "beta=1..1000");
  }
  refused("pyramid:beta", "pyramid has no parameter beta=", "beta=1..1000");
  refused("pyramid:Beta=2", "Beta=2", "beta=1..1000");
  refused("pyramid:beta=2,alpha=3", "alpha=3", "beta=1..1000");
  refused("pyramid:alpha=3,beta=2", "alpha=3", "beta=1..1000");
  refused("pyramid:,beta=2", "pyramid has no parameter =", "beta=1..1000");
  refused("pyramid:beta=2;beta=3", "beta=2;beta=3", "beta=1..1000");
  for (const std::string name : {"adaptive", "global"}) {
    for (const std::string value : {"-0.1", "1.1", "nan", "", "a"}) {
      refused(name + ":safeguard=" + value, name + " has no parameter safeguard=" + value, "safeguard=0..1");
    }
  }
  refused("lava:even=2", "lava has no parameter even=2", "even=0..1");
  refused("lava:window=2", "lava has no parameter window=2", "even=0..1");
  refused("squeeze_attention:share=-1", "squeeze_attention has no parameter share=-1", "share=0..1");
  for (const std::string value : {"-1", "1048577", "1.5", "99999999999", ""}) {
    refused("streaming_heads:file=" + gate_file + ",rows=" + value, "streaming_heads has no parameter rows=" + value,
            "rows=0..1048576");
  }
  refused("curve:file=" + gate_file + ",rows=3", "curve has no parameter rows=3", "file=PATH");
  refused("learned:file=" + none, none, "cannot be read");
  refused("learned:file=" + words, words, ".safetensors");
  refused("learned:file=" + words + ",seed=3", "learned has no parameter seed=3", "file=PATH");
  for (const std::string name : {"streaming_heads", "curve", "learned"}) {
    refused(name, name + " needs a file", name + ":file=PATH");
    refused(name + ":file=", name + " needs a file", name + ":file=PATH");
    refused(name + ":file=" + none, none, "cannot be read");
    refused(name + ":file=" + folder.path.string(), folder.path.string(), "cannot be read");
    if (name != "learned") refused(name + ":file=" + words, words, "line 1 of the table");
  }
}

TEST_CASE("a selector's name with its parameters is that selector") {
  const Evidences e;
  std::map<std::vector<float>, std::string> different;
  int tried = 0;
  const auto same = [&](const std::string& text, const auto& policy, int window) {
    CAPTURE(text);
    const AnySelector parsed = selector_of(text);
    const std::vector<float> want = e.scores(policy);
    CHECK(e.scores(parsed) == want);
    CHECK(parsed.check({30, 3, 9, 64}).ok());
    CHECK(parsed.window == window);
    CHECK(parsed.active_needs() == needs_of(policy));
    using Policy = std::remove_cvref_t<decltype(policy)>;
    CHECK(parsed.joins_heads() == JoinsHeads<Policy>);
    CHECK(parsed.gives_attention() == AttentionSelector<Policy>);
    if constexpr (AttentionSelector<Policy>) {
      std::vector<float> own(e.positions.size()), other(own.size());
      CHECK(parsed.attention(e.seen, own).ok());
      CHECK(policy.attention(e.seen, other).ok());
      CHECK(own == other);
    } else {
      std::vector<float> own(e.positions.size());
      CHECK(parsed.attention(e.seen, own).code == Errc::bad_policy);
    }
    const auto found = different.emplace(want, text);
    CHECK_MESSAGE(found.second, "scores as " << found.first->second);
    ++tried;
  };
  same("random", Random{}, 64);
  same("random:seed=7", Random{7}, 64);
  same("random:seed=18446744073709551615", Random{~std::uint64_t{0}}, 64);
  same("sink_recent", SinkRecent{4}, 64);
  same("sink_recent:num_sinks=0", SinkRecent{0}, 64);
  same("key_norm", KeyNorm{}, 64);
  same("key_diff", KeyDiff{}, 64);
  same("snap_kv", SnapKv{.window = 64, .kernel = 5, .pool = SnapKv::Pool::average}, 64);
  same("snap_kv:window=8", SnapKv{.window = 8}, 8);
  same("snap_kv:kernel=1", SnapKv{.kernel = 1}, 64);
  same("snap_kv:pool=max", SnapKv{.pool = SnapKv::Pool::maximum}, 64);
  same("snap_kv:pool=max,kernel=4095,window=9,pool=avg", SnapKv{.window = 9, .kernel = 4095}, 9);
  same("last_query", LastQuery{}, 1);
  same("heavy_hitter", HeavyHitter{HeavyHitter::Over::visible}, 64);
  same("heavy_hitter:over=all", HeavyHitter{HeavyHitter::Over::all}, 64);
  same("expected_attention", ExpectedAttention{512, 4, 0, true, true}, 64);
  same("expected_attention:future=3", ExpectedAttention{.future = 3}, 64);
  same("expected_attention:num_sinks=9", ExpectedAttention{.num_sinks = 9}, 64);
  same("expected_attention:epsilon=0.02", ExpectedAttention{.epsilon = 0.02f}, 64);
  same("expected_attention:covariance=off", ExpectedAttention{.covariance = false}, 64);
  same("expected_attention:value_norm=off", ExpectedAttention{.value_norm = false}, 64);
  same("lag_kv", LagKv{128, 4, false}, 64);
  same("lag_kv:lag=16", LagKv{.lag = 16}, 64);
  same("lag_kv:num_sinks=2", LagKv{.num_sinks = 2}, 64);
  same("lag_kv:cross=on", LagKv{.cross = true}, 64);
  same("leverage", Leverage{48, 0}, 64);
  same("leverage:sketch=16", Leverage{.sketch = 16}, 64);
  same("leverage:seed=5", Leverage{.seed = 5}, 64);
  same("lava", LavaScore{32, 7}, 32);
  same("lava:window=8", LavaScore{.window = 8}, 8);
  same("lava:kernel=3", LavaScore{.kernel = 3}, 32);
  same("reconstruction", Reconstruction{}, 64);

  using Snap = SnapKv;
  same("value_norm(snap_kv)", ValueNorm<Snap>{}, 64);
  same("value_norm:epsilon=0.5(snap_kv:window=8)", ValueNorm<Snap>{{.window = 8}, 0.5f}, 8);
  same("value_norm:through=output(snap_kv)", ValueNorm<Snap, Through::output>{}, 64);
  same("value_norm:through=output,epsilon=2(key_norm)", ValueNorm<KeyNorm, Through::output>{{}, 2}, 64);
  same("value_norm(key_norm)", ValueNorm<KeyNorm>{}, 64);
  same("critical_kv(snap_kv)", CriticalKv<Snap>{{}, 1e-4f, 0.5}, 64);
  same("critical_kv:epsilon=0.1(snap_kv)", CriticalKv<Snap>{{}, 0.1f}, 64);
  same("critical_kv:first_stage=0.1(snap_kv)", CriticalKv<Snap>{{}, 1e-4f, 0.1}, 64);
  same("caote(snap_kv)", Caote<Snap>{}, 64);
  same("caote(heavy_hitter:over=all)", Caote<HeavyHitter>{{HeavyHitter::Over::all}}, 64);
  same("caote(last_query)", Caote<LastQuery>{}, 1);
  same("caote(reconstruction)", Caote<Reconstruction>{}, 64);
  same("chunk_kv(snap_kv)", ChunkKv<Snap>{{}, 20}, 64);
  same("chunk_kv:length=7(snap_kv:kernel=3)", ChunkKv<Snap>{{.kernel = 3}, 7}, 64);
  same("chunk_kv(tova)", ChunkKv<Tova>{}, 1);
  same("value_norm(critical_kv(caote(snap_kv:window=5)))", ValueNorm<CriticalKv<Caote<Snap>>>{{{{.window = 5}}}}, 5);
  same("chunk_kv:length=3(value_norm(caote(snap_kv)))", ChunkKv<ValueNorm<Caote<Snap>>>{{}, 3}, 64);
  CHECK(tried == 49);
  // Of one head, the heads' decision of Tova is its own.
  CHECK(e.scores(selector_of("tova")) == e.scores(Tova{}));
  CHECK(selector_of("tova").joins_heads());
  CHECK(selector_of("tova").window == 1);
}

TEST_CASE("the help text of selectors tells every name, parameter and default, and nothing else") {
  const Evidences e;
  CHECK(names_told(known_selectors) == std::set<std::string>{"random", "sink_recent", "key_norm", "key_diff", "snap_kv", "tova",
                                                             "last_query", "heavy_hitter", "expected_attention", "lag_kv",
                                                             "leverage", "lava", "reconstruction", "value_norm", "critical_kv",
                                                             "caote", "chunk_kv", "learned"});
  CHECK(names_told(known_selectors) == names_in_source("../include/kvtailor/select/any_selector.hpp"));
  int parameters = 0;
  for (const Told& one : told(known_selectors)) {
    if (one.name == "learned") continue;
    const std::string inner = one.around ? "(snap_kv)" : "";
    const std::vector<float> plain = e.scores(selector_of(one.name + inner));
    for (const std::string& parameter : one.parameters) {
      CHECK_MESSAGE(e.scores(selector_of(one.name + ":" + parameter + inner)) == plain, one.name << " " << parameter);
      ++parameters;
    }
    // Those around another are never alone, and the others never around one.
    AnySelector ignored;
    const std::string wrong = detail::parse_selector(one.name + (one.around ? "" : "(snap_kv)"), ignored);
    check_sentence(wrong, one.name, one.around ? one.name + "(snap_kv)" : "value_norm, critical_kv, caote and chunk_kv are");
  }
  CHECK(parameters == 23);
}

TEST_CASE("what is wrong with a selector's name is named, and what is known") {
  const Evidences e;
  const std::vector<float> before = e.scores(Random{3});
  const auto refused = [&](const std::string& text, const std::string& given, const std::string& known) {
    CAPTURE(text);
    AnySelector policy = selector_of("random:seed=3");
    check_sentence(detail::parse_selector(text, policy), given, known);
    CHECK(e.scores(policy) == before);
  };
  for (const std::string name :
       {"", "snap", "snap_kv2", "Snap_kv", " snap_kv", "snap_kv ", "snap_kv)", "snap_kv))", "uniform", "snap_kv,tova"}) {
    refused(name, "unknown token selector \"" + name + "\"", known_selectors);
    if (name.find(')') == name.npos)
      refused("value_norm(" + name + ")", "unknown token selector \"" + name + "\"", known_selectors);
  }
  // Parentheses that do not match.
  for (const std::string text :
       {"snap_kv(", "value_norm(", "value_norm(snap_kv", "value_norm:epsilon=1(snap_kv", "value_norm(snap_kv)x",
        "value_norm:epsilon=1(snap_kv) ", "value_norm(snap_kv):epsilon=1", "(", "((", "chunk_kv((snap_kv"}) {
    refused(text, "\"" + text + "\" does not end with its parenthesis",
            "value_norm(..), critical_kv(..), caote(..) and chunk_kv(..)");
  }
  refused("value_norm(snap_kv))", "unknown token selector \"snap_kv)\"", known_selectors);
  refused("value_norm(value_norm(snap_kv)", "\"value_norm(snap_kv\"", "value_norm(..)");
  refused("value_norm()", "unknown token selector \"\"", known_selectors);
  refused("value_norm(())", "\"\" is not around another", "value_norm, critical_kv, caote and chunk_kv are");
  refused("(snap_kv)", "\"\" is not around another", "value_norm, critical_kv, caote and chunk_kv are");
  refused("()", "\"\" is not around another", "chunk_kv are");
  refused("snap_kv(tova)", "\"snap_kv\" is not around another", "chunk_kv are");
  refused("what(tova)", "\"what\" is not around another", "chunk_kv are");
  // Policies that do not go together.
  refused("value_norm(tova)", "value_norm scores each head alone, and cannot be around tova", "decide together");
  refused("critical_kv(chunk_kv(snap_kv))", "cannot be around chunk_kv(snap_kv)", "decide together");
  refused("caote(tova)", "cannot be around tova", "decide together");
  for (const std::string inner : {"key_norm", "lava", "expected_attention", "value_norm(snap_kv)", "caote(snap_kv)"}) {
    refused("caote(" + inner + ")", "which " + inner + " does not give",
            "snap_kv, last_query, heavy_hitter and reconstruction do");
  }
  // Parameters, alone and inside others.
  const auto parameter = [&](const std::string& name, const std::string& inner, const std::vector<std::string>& values,
                             const std::string& key, const std::string& known) {
    for (const std::string& value : values) {
      refused(name + ":" + key + "=" + value + inner, name + " has no parameter " + key + "=" + value, known);
      if (inner.empty())
        refused("chunk_kv(" + name + ":" + key + "=" + value + ")", name + " has no parameter " + key + "=" + value, known);
    }
  };
  parameter("random", "", {"-1", "18446744073709551616", "1.0", "", "x"}, "seed", "seed=number");
  parameter("sink_recent", "", {"-1", "1048577", "4.0"}, "num_sinks", "num_sinks=0..1048576");
  parameter("snap_kv", "", {"0", "-8", "4097", "8.5", ""}, "window", "window=1..4096");
  parameter("snap_kv", "", {"0", "2", "-1", "4096", "4097", "odd"}, "kernel", "kernel=1..4095 and odd");
  parameter("snap_kv", "", {"sum", "", "Max", "average"}, "pool", "pool=avg or max");
  parameter("heavy_hitter", "", {"", "some"}, "over", "over=visible (mean) or all (sum)");
  parameter("expected_attention", "", {"0", "1048577"}, "future", "future=1..1048576");
  parameter("expected_attention", "", {"-1"}, "num_sinks", "num_sinks=0..1048576");
  parameter("expected_attention", "", {"-0.1", "1001", "nan", "inf"}, "epsilon", "epsilon=0..1000");
  parameter("expected_attention", "", {"yes", "1", ""}, "covariance", "covariance=on or off");
  parameter("expected_attention", "", {"no", "true"}, "value_norm", "value_norm=on or off");
  parameter("lag_kv", "", {"1", "0", "1048577"}, "lag", "lag=2..1048576");
  parameter("lag_kv", "", {"-1"}, "num_sinks", "num_sinks=0..1048576");
  parameter("lag_kv", "", {"maybe"}, "cross", "cross=on or off");
  parameter("leverage", "", {"0", "257"}, "sketch", "sketch=1..256");
  parameter("leverage", "", {"-1"}, "seed", "seed=number");
  parameter("lava", "", {"0", "4097"}, "window", "window=1..4096");
  parameter("lava", "", {"0", "8"}, "kernel", "kernel=1..4095 and odd");
  for (const std::string name : {"key_norm", "key_diff", "tova", "last_query", "reconstruction"}) {
    parameter(name, "", {"1", ""}, "window", "it takes none");
  }
  parameter("value_norm", "(snap_kv)", {"-1", "1001", "nan"}, "epsilon", "epsilon=0..1000");
  parameter("value_norm", "(snap_kv)", {"", "both"}, "through", "through=nothing or output");
  parameter("critical_kv", "(snap_kv)", {"-1", "1001", "nan"}, "epsilon", "epsilon=0..1000");
  parameter("critical_kv", "(snap_kv)", {"-0.5", "1.5", "nan"}, "first_stage", "first_stage=0..1");
  parameter("caote", "(snap_kv)", {"1"}, "epsilon", "it takes none");
  parameter("chunk_kv", "(snap_kv)", {"0", "1048577", "2.5"}, "length", "length=1..1048576");
  refused("value_norm:window=8(snap_kv)", "value_norm has no parameter window=8", "epsilon=0..1000");
  refused("snap_kv:window", "snap_kv has no parameter window=", "window=1..4096");
  refused("snap_kv:,window=8", "snap_kv has no parameter =", "window=1..4096");
  refused("snap_kv:window=8,what=1", "snap_kv has no parameter what=1", "window=1..4096");
}

TEST_CASE("selectors go around one another sixteen deep, and a text of any length is refused") {
  const Evidences e;
  std::string text = "snap_kv:window=6";
  for (int depth = 1; depth <= 16; ++depth) {
    text = (depth % 2 == 0 ? "value_norm:epsilon=1(" : "critical_kv(") + text + ")";
    CHECK(selector_of(text).window == 6);
  }
  for (const float x : e.scores(selector_of(text))) REQUIRE(!std::isnan(x));
  for (const int depth : {17, 1000, 300000}) {
    std::string deep;
    for (int i = 0; i < depth; ++i) deep += "chunk_kv(";
    AnySelector policy;
    check_sentence(detail::parse_selector(deep + "key_norm" + std::string(static_cast<std::size_t>(depth), ')'), policy),
                   "chunk_kv", "at most 16");
    const std::string open(static_cast<std::size_t>(depth), '(');
    CHECK(!detail::parse_selector(open, policy).empty());
    CHECK(!detail::parse_selector(open + std::string(open.size(), ')'), policy).empty());
  }
}

TEST_CASE("the precision of codecs is chosen by name, where there is a choice") {
  using Codec = detail::AnyCodec<64>;
  // Of the codec that is chosen: 0 if there is none, 1 fast, 2 accurate.
  const auto chosen = [](const detail::CodecChoice& choice) {
    Codec codec;
    choice.apply(codec);
    const auto find = [](const auto& self, const auto& c) -> int {
      if constexpr (requires { c.residual; }) {
        return self(self, c.residual);
      } else if constexpr (requires { c.codec; }) {
        return self(self, c.codec);
      } else if constexpr (HasPrecision<std::remove_cvref_t<decltype(c)>>) {
        return c.precision == Precision::accurate ? 2 : 1;
      } else {
        return 0;
      }
    };
    return codec.visit([&](const auto& c) { return find(find, c); });
  };
  std::set<std::string> with_choice;
  for (const std::string_view name : detail::codec_names) {
    detail::KvChoice choice;
    REQUIRE(detail::parse_codecs(name, choice).empty());
    CAPTURE(name);
    const bool has = chosen(choice.keys) != 0;
    const std::string precise = std::string(name) + ":precision=accurate";
    const std::string wrong = detail::parse_codecs(precise + "/" + std::string(name), choice);
    CHECK(wrong.empty() == has);
    if (!has) {
      check_sentence(wrong, std::string(name) + " has no parameter precision=accurate", "it takes none");
      continue;
    }
    with_choice.emplace(name);
    CHECK(chosen(choice.keys) == 2);
    CHECK(chosen(choice.values) == 1);
    REQUIRE(detail::parse_codecs(std::string(name) + ":precision=fast", choice).empty());
    CHECK(chosen(choice.values) == 1);
    check_sentence(detail::parse_codecs(std::string(name) + ":precision=2", choice), "has no parameter precision=2",
                   "precision=fast or accurate");
  }
  for (const char* name :
       {"turbo1", "turbo4", "trellis4", "mean_trellis2", "low_rank_trellis2", "turbo3_gaussian", "kivi2_keys"})
    CHECK(with_choice.contains(name));
  for (const char* name : {"fp16", "turbo5", "q4_0", "kivi4_keys", "kivi2_values"}) CHECK(!with_choice.contains(name));
  detail::KvChoice choice;
  REQUIRE(detail::parse_codecs("low_rank_trellis2:rank=3,precision=accurate", choice).empty());
  CHECK(chosen(choice.keys) == 2);
  CHECK(choice.keys.low_rank.max_rank == 3);
}
