// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See tasks.hpp.
#include "tasks.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <random>
#include <stdexcept>

namespace kvt_llm {

namespace {

constexpr std::array words = {
    "apple",   "anchor", "basket", "bridge", "butter",   "camera",  "candle",  "carpet", "castle", "cherry", "circle",
    "copper",  "cotton", "dragon", "engine", "falcon",   "feather", "finger",  "forest", "garden", "guitar", "hammer",
    "harbor",  "helmet", "honey",  "island", "jacket",   "jungle",  "kitchen", "ladder", "lemon",  "letter", "magnet",
    "marble",  "meadow", "mirror", "monkey", "mountain", "needle",  "orange",  "palace", "pencil", "pepper", "pillow",
    "planet",  "pocket", "potato", "rabbit", "ribbon",   "river",   "rocket",  "saddle", "shadow", "silver", "spider",
    "station", "summer", "temple", "tiger",  "tunnel",   "valley",  "velvet",  "violin", "window"};

// What wordings hide that hide no numbers.
constexpr std::array other_words = {"amber",   "banjo",   "barley",  "cactus",  "canyon", "cobalt", "coral",  "domino",
                                    "ember",   "fennel",  "galaxy",  "ginger",  "hazel",  "indigo", "ivory",  "jasmine",
                                    "juniper", "lantern", "lotus",   "maple",   "nectar", "onyx",   "orchid", "pebble",
                                    "pirate",  "quartz",  "saffron", "sparrow", "tulip",  "walnut", "willow", "zebra"};

// The distributions of <random> differ between libraries; its engines do not.
class Random {
 public:
  Random(unsigned seed, const std::string& task, int number) {
    std::vector<unsigned> parts = {seed, static_cast<unsigned>(number)};
    for (const char c : task) parts.push_back(static_cast<unsigned char>(c));
    std::seed_seq sequence(parts.begin(), parts.end());
    engine_.seed(sequence);
  }
  int below(int n) { return static_cast<int>(engine_() % static_cast<unsigned long long>(n)); }
  double unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  std::string digits() { return std::to_string(10000 + below(90000)); }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (std::size_t n = items.size(); n > 1; --n)
      std::swap(items[n - 1], items[static_cast<std::size_t>(below(static_cast<int>(n)))]);
  }
  // n of them, all different.
  std::vector<std::string> pick(int n, std::span<const char* const> from = words) {
    std::vector<std::string> all(from.begin(), from.end());
    shuffle(all);
    all.resize(static_cast<std::size_t>(n));
    return all;
  }
  // Numbers that are all different.
  std::vector<std::string> numbers(int n) {
    std::vector<std::string> out;
    while (static_cast<int>(out.size()) < n) {
      if (auto next = digits(); std::find(out.begin(), out.end(), next) == out.end()) out.push_back(std::move(next));
    }
    return out;
  }

 private:
  std::mt19937_64 engine_;
};

// The same said otherwise: what was learned from one of them is tried on another.
struct Wording {
  const char *name, *before, *after;  // a key and its number (or word), as they are hidden and answered
  const char *ask, *end;              // before and after the key in a question
  bool word = false;
};
constexpr Wording all_wordings[] = {
    {"magic", "The special magic number for ", " is ", "What is the special magic number for ", "?"},
    {"badge", "Agent ", " carries the badge ", "Which badge does agent ", " carry?"},
    {"locker", "The locker of ", " opens with ", "With which number does the locker of ", " open?"},
    {"ticket", "The ticket for the ", " has the number ", "Which number has the ticket for the ", "?"},
    {"score", "In the final team ", " scored ", "How much did team ", " score in the final?"},
    {"room", "Visitors of the ", " should go to room ", "To which room should visitors of the ", " go?"},
    {"phone", "To reach the ", " dial ", "What should one dial to reach the ", "?"},
    {"price", "For its ", " the museum paid ", "How much did the museum pay for its ", "?"},
    {"password", "The password of the ", " team is ", "What is the password of the ", " team?", true},
    {"name", "Long ago the old ", " was renamed ", "What was the old ", " renamed?", true},
    {"ship", "The cargo of the ship called ", " is ", "What is the cargo of the ship called ", "?", true}};

// What one task is made of.
struct Draft {
  Random& random;
  const Haystack& haystack;
  const Tasks::Options& options;
  const Wording& wording;
  double where;  // in the text
  Question& out;

  // n that are hidden, all different.
  std::vector<std::string> values(int n) const { return wording.word ? random.pick(n, other_words) : random.numbers(n); }

  // A response of `parts`, of which every other one, from the second on, is an answer.
  void respond(const std::vector<std::string>& parts) const {
    Response response;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const std::size_t begin = response.text.size();
      response.text += parts[i];
      if (i % 2 == 1) response.answers.push_back({begin, response.text.size()});
    }
    out.responses.push_back(std::move(response));
  }
  // The answers in any order, each after `mark`.
  void respond_list(const std::string& start, const std::string& mark, std::vector<std::string> answers) const {
    std::sort(answers.begin(), answers.end());
    do {
      std::vector<std::string> parts;
      for (std::size_t i = 0; i < answers.size(); ++i) {
        const char* const before = i == 0 ? "" : i + 1 < answers.size() ? ", " : " and ";
        parts.insert(parts.end(), {(i == 0 ? start : before) + mark, answers[i]});
      }
      parts.push_back(".");
      respond(parts);
    } while (std::next_permutation(answers.begin(), answers.end()));
  }

  // A piece of the text with the needles at sentence borders, in their order.
  void hide(const std::vector<std::string>& needles, const std::vector<double>& depths) const {
    int tokens = options.tokens;
    for (const auto& needle : needles) tokens -= haystack.count(needle + " ");
    if (2 * tokens < options.tokens) {
      throw std::runtime_error("--tokens " + std::to_string(options.tokens) + " leaves too little text around what the task " +
                               out.task + " hides in it");
    }
    const auto sentences = haystack.piece(where, tokens);
    std::size_t total = 0, at = 0, next = 0;
    for (const auto& sentence : sentences) total += sentence.size();
    // A border is taken by the needles whose depth is nearer to it than to the next one.
    const auto insert = [&](double until) {
      for (; next < needles.size() && depths[next] * static_cast<double>(total) < until; ++next)
        out.document += needles[next] + " ";
    };
    for (const auto& sentence : sentences) {
      insert(static_cast<double>(at) + static_cast<double>(sentence.size()) / 2);
      out.document += sentence;
      at += sentence.size();
    }
    insert(HUGE_VAL);
  }
  // One in each of as many equal parts as there are needles.
  void hide(const std::vector<std::string>& needles) const {
    std::vector<double> depths;
    for (std::size_t i = 0; i < needles.size(); ++i)
      depths.push_back((static_cast<double>(i) + random.unit()) / static_cast<double>(needles.size()));
    hide(needles, depths);
  }
};

// All of them are asked in turn.
void ask(const Draft& d, const std::vector<std::string>& keys, const std::vector<std::string>& values) {
  std::vector<std::string> parts;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const char* const blank = i == 0 ? "" : " ";
    d.out.question += blank + (d.wording.ask + keys[i] + d.wording.end);
    parts.insert(parts.end(), {(i == 0 ? "" : ". ") + (d.wording.before + keys[i] + d.wording.after), values[i]});
  }
  parts.push_back(".");
  d.respond(parts);
}

std::vector<std::string> sentences(const Draft& d, const std::vector<std::string>& keys,
                                   const std::vector<std::string>& values) {
  std::vector<std::string> out;
  for (std::size_t i = 0; i < keys.size(); ++i) out.push_back(d.wording.before + keys[i] + d.wording.after + values[i] + ".");
  return out;
}

void niah_single(const Draft& d) {
  const auto keys = d.random.pick(1), values = d.values(1);
  d.hide(sentences(d, keys, values));
  ask(d, keys, values);
}

void niah_multikey(const Draft& d) {
  const auto keys = d.random.pick(4), values = d.values(4);
  d.hide(sentences(d, keys, values));
  const auto asked = static_cast<std::size_t>(d.random.below(4));
  ask(d, {keys[asked]}, {values[asked]});
}

void niah_multivalue(const Draft& d) {
  const auto key = d.random.pick(1)[0];
  const auto numbers = d.random.numbers(2);
  std::vector<std::string> needles;
  for (const auto& number : numbers) needles.push_back("One of the special magic numbers for " + key + " is " + number + ".");
  d.hide(needles);
  d.out.question = "What are the two special magic numbers for " + key + "?";
  d.respond_list("The two special magic numbers for " + key + " are ", "", numbers);
}

void niah_multiquery(const Draft& d) {
  auto keys = d.random.pick(2), values = d.values(2);
  d.hide(sentences(d, keys, values));
  if (d.random.below(2) == 1) {
    std::swap(keys[0], keys[1]);
    std::swap(values[0], values[1]);
  }
  ask(d, keys, values);
}

// Each of three variables has the value of the one before it.
void vt(const Draft& d) {
  std::vector<std::string> names;
  for (char letter = 'A'; letter <= 'Z'; ++letter)
    names.push_back(std::string(1, letter) + std::to_string(1 + d.random.below(9)));
  d.random.shuffle(names);
  names.resize(3);
  const auto value = d.random.digits();
  std::vector<std::string> needles = {"VAR " + names[0] + " = " + value + "."};
  for (std::size_t i = 1; i < names.size(); ++i) needles.push_back("VAR " + names[i] + " = VAR " + names[i - 1] + ".");
  d.hide(needles);
  d.out.question = "Which three variables are assigned the value " + value + "?";
  d.respond_list("The three variables that are assigned the value " + value + " are ", "VAR ", names);
}

// Words in any order, quoted as in the reply, cut to the tokens of a document.
std::string shuffled(const Draft& d, std::vector<std::string> list) {
  d.random.shuffle(list);
  std::string out = "\"";
  int tokens = 0;
  for (const auto& word : list) {
    if (tokens > 0) out += "\", \"";
    out += word;
    tokens += d.haystack.count(word + "\", \"");
    if (tokens >= d.options.tokens) break;
  }
  return out + "\".";
}

// Every other word of a list is the same.
void cwe(const Draft& d) {
  const auto vocabulary = d.random.pick(12);
  std::vector<std::string> list;
  for (std::size_t i = 0; static_cast<int>(list.size()) < d.options.tokens; ++i) {
    list.push_back(vocabulary[0]);
    list.push_back(vocabulary[1 + i % (vocabulary.size() - 1)]);
  }
  d.out.document = "A list of words: " + shuffled(d, std::move(list));
  d.out.question = "Which word comes most often in the list?";
  d.respond({"The word that comes most often in the list is \"", vocabulary[0], "\"."});
}

std::string coded_word(Random& random) {
  std::string word;
  for (int i = 0; i < 2; ++i) word += std::string(1, "bdfgklmnprstvz"[random.below(14)]) + "aeiou"[random.below(5)];
  return word;
}

// The numbers of the words fall with the square of their rank, as in RULER; the first is asked.
void fwe(const Draft& d) {
  std::vector<std::string> coded, list;
  while (coded.size() < 12) {
    if (auto next = coded_word(d.random); std::find(coded.begin(), coded.end(), next) == coded.end()) coded.push_back(next);
  }
  for (std::size_t rank = 1; rank <= coded.size(); ++rank) {
    const int times = d.options.tokens * 2 / 3 / static_cast<int>(rank * rank);
    list.insert(list.end(), static_cast<std::size_t>(std::max(1, times)), coded[rank - 1]);
  }
  d.out.document = "A coded text: " + shuffled(d, std::move(list));
  d.out.question = "Which word comes most often in the coded text?";
  d.respond({"The word that comes most often in the coded text is \"", coded[0], "\"."});
}

void passkey(const Draft& d) {
  const auto& depths = d.options.depths;
  d.out.depth = depths[static_cast<std::size_t>(d.out.number) % depths.size()];
  const auto number = d.random.digits();
  d.hide({"The pass key is " + number + ". Remember it."}, {*d.out.depth});
  d.out.question = "What is the pass key?";
  d.respond({"The pass key is ", number, "."});
}

struct Task {
  const char* name;
  void (*make)(const Draft&);
  bool worded;  // in each wording, not in the first alone
};
constexpr Task all_tasks[] = {{"niah_single", niah_single, true},
                              {"niah_multikey", niah_multikey, true},
                              {"niah_multivalue", niah_multivalue, false},
                              {"niah_multiquery", niah_multiquery, true},
                              {"vt", vt, false},
                              {"cwe", cwe, false},
                              {"fwe", fwe, false},
                              {"passkey", passkey, false}};

bool blank(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

// Past the blanks after the sentence that begins at `from`: a full stop, or a line left empty, as after a heading.
std::size_t sentence_end(const std::string& text, std::size_t from) {
  for (std::size_t at = from + 1; at < text.size(); ++at) {
    if (!blank(text[at])) continue;
    std::size_t end = at;
    while (end < text.size() && blank(text[end])) ++end;
    const bool stop = std::string_view(".!?").find(text[at - 1]) != std::string_view::npos;
    if (stop ||
        std::count(text.begin() + static_cast<std::ptrdiff_t>(at), text.begin() + static_cast<std::ptrdiff_t>(end), '\n') > 1)
      return end;
    at = end - 1;
  }
  return text.size();
}

}  // namespace

Haystack::Haystack(const Tokenizer& tokenizer, std::string text) : tokenizer_(tokenizer), text_(std::move(text)), before_{0} {
  for (std::size_t at = 0; at < text_.size();) {
    const std::size_t end = sentence_end(text_, at);
    sentences_.emplace_back(text_.data() + at, end - at);
    before_.push_back(before_.back() + count(text_.substr(at, end - at)));
    at = end;
  }
}

std::span<const std::string_view> Haystack::piece(double where, int tokens) const {
  const std::size_t n = sentences_.size();
  const auto first = static_cast<std::size_t>(where * static_cast<double>(n));
  for (std::size_t step = 0; step < n; ++step) {
    const std::size_t begin = (first + step) % n;
    const auto past =
        std::upper_bound(before_.begin() + static_cast<std::ptrdiff_t>(begin), before_.end(), before_[begin] + tokens);
    const auto end = static_cast<std::size_t>(past - before_.begin()) - 1;
    // Sentences can be long, and the text ends somewhere.
    if (before_[end] - before_[begin] >= tokens * 4 / 5) return std::span(sentences_).subspan(begin, end - begin);
  }
  throw std::runtime_error("the text has " + std::to_string(before_.back()) + " tokens, and nowhere whole sentences of " +
                           std::to_string(tokens) + "; give a longer text or fewer --tokens");
}

std::vector<std::string> Tasks::names(const std::string& wording) {
  std::vector<std::string> names;
  for (const auto& task : all_tasks) {
    if (task.worded || wording == wordings().front()) names.push_back(task.name);
  }
  return names;
}

const std::vector<std::string>& Tasks::wordings() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> out;
    for (const auto& wording : all_wordings) out.push_back(wording.name);
    return out;
  }();
  return names;
}

void Tasks::check_name(const std::string& task, const std::string& wording) {
  std::string known;
  for (const auto& name : names(wording)) {
    if (name == task) return;
    known += (known.empty() ? "" : ", ") + name;
  }
  throw std::runtime_error("there is no task \"" + task + "\" in the wording " + wording + "; known: " + known);
}

int Tasks::count(const std::string& task, int samples) const {
  const int depths = static_cast<int>(options_.depths.size());
  return task == "passkey" ? (samples + depths - 1) / depths * depths : samples;
}

Question Tasks::make(const std::string& task, int number) const {
  Question question;
  question.task = task;
  question.number = number;
  Random random(options_.seed, task, number);
  // Steps of the golden ratio spread pieces evenly, however many there will be.
  const double where = Random(options_.seed, task, -1).unit() + 0.6180339887498949 * number;
  check_name(task, options_.wording);
  const auto named = [](const std::string& name) { return [&](const auto& each) { return each.name == name; }; };
  const auto& wording = *std::find_if(std::begin(all_wordings), std::end(all_wordings), named(options_.wording));
  const auto& found = *std::find_if(std::begin(all_tasks), std::end(all_tasks), named(task));
  found.make({random, haystack_, options_, wording, where - std::floor(where), question});
  return question;
}

}  // namespace kvt_llm
