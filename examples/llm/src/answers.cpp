// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// See answers.hpp.
#include "answers.hpp"

#include <algorithm>
#include <optional>

#include "caches.hpp"
#include "measure.hpp"

namespace kvt_llm {

namespace {

// `logits` are those after each token of the reply.
Score score(const Prompt::Reply& reply, std::span<const float> logits, std::size_t vocabulary) {
  std::vector<bool> right(reply.answers, true);
  Score score;
  double right_tokens = 0;
  for (const auto& target : reply.targets) {
    const int token = reply.tokens[target.token];
    const auto here = logits.subspan((target.token - 1) * vocabulary, vocabulary);
    const bool most_likely = std::max_element(here.begin(), here.end()) - here.begin() == token;
    right_tokens += most_likely;
    if (!most_likely) right[target.answer] = false;
    score.log_prob += log_probability(here, token) / static_cast<double>(reply.targets.size());
  }
  const auto right_answers = static_cast<double>(std::count(right.begin(), right.end(), true));
  const auto answers = static_cast<double>(reply.answers);
  score.exact = right_answers == answers ? 1 : 0;
  score.partial = reply.answers == 1 ? right_tokens / static_cast<double>(reply.targets.size()) : right_answers / answers;
  return score;
}

}  // namespace

Reader reader_of(Engine& engine, kvt::AnyCache& cache) {
  return {
      [&](std::span<const int> tokens, int first, Engine::Logits which) { return engine.eval(cache, tokens, first, which); },
      [&](int position) { check(cache.truncate(position)); }};
}

Score answer(const Reader& reader, const Prompt& prompt, std::size_t vocabulary,
             const std::function<void(std::size_t reply, std::span<const float> logits)>& see) {
  const int asked_at = static_cast<int>(prompt.context.size()), at = asked_at + static_cast<int>(prompt.asked.size());
  if (!prompt.asked.empty()) reader.eval(prompt.asked, asked_at, Engine::Logits::last);
  std::optional<Score> best;
  for (std::size_t r = 0; r < prompt.replies.size(); ++r) {
    reader.truncate(at);
    const auto logits = reader.eval(prompt.replies[r].tokens, at, Engine::Logits::all);
    const Score s = score(prompt.replies[r], logits, vocabulary);
    if (!best || std::pair(s.exact, s.log_prob) > std::pair(best->exact, best->log_prob)) best = s;
    if (see) see(r, logits);
  }
  return *best;
}

}  // namespace kvt_llm
