// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// llama.cpp as an engine: see engine.hpp.
#include <llama.h>

#include <algorithm>
#include <bit>
#include <stdexcept>

#include "engine.hpp"
#include "kvtailor/engine/llama_cpp.hpp"

namespace kvt_llm {

namespace {

class LlamaCppRunner : public Engine::Runner {
 public:
  LlamaCppRunner(const Model& model, int num_threads)
      : model_(model), threads_(num_threads), batch_(llama_batch_init(most, 0, 1)), context_(nullptr, llama_free) {}
  ~LlamaCppRunner() override { llama_batch_free(batch_); }

  void run(kvt::AnyCache& cache, std::span<const int> tokens, int first, Engine::Logits which, std::span<float> to) override {
    attention_.set_cache(cache);
    make_room(first + static_cast<int>(tokens.size()));
    // The context counts the positions of one text; caches may be of several.
    for (; known_ < first; known_ += batch_.n_tokens) {
      fill(
          std::min(most, first - known_), known_, [](int) { return 0; }, [](int) { return false; });
      if (const auto status = attention_.advance(context_.get(), batch_); !status.ok())
        throw std::runtime_error(status.message());
    }
    if (known_ > first) llama_memory_seq_rm(llama_get_memory(context_.get()), 0, first, -1);
    known_ = first;
    const auto width = static_cast<std::size_t>(model_.parameters().vocabulary);
    const int total = static_cast<int>(tokens.size());
    for (int at = 0; at < total; at += batch_.n_tokens) {
      const int n = std::min(most, total - at);
      fill(
          n, first + at, [&](int i) { return tokens[static_cast<std::size_t>(at + i)]; },
          [&](int i) { return which == Engine::Logits::all || at + i + 1 == total; });
      const int failed = llama_decode(context_.get(), batch_);
      if (const auto status = attention_.finish(); failed != 0 || !status.ok()) {
        // What came before it goes too.
        (void)cache.truncate(first);
        throw std::runtime_error(status.ok() ? "llama.cpp cannot decode " + std::to_string(n) + " tokens" : status.message());
      }
      known_ = first + at + n;
      if (which == Engine::Logits::all) {
        std::copy_n(llama_get_logits(context_.get()), width * static_cast<std::size_t>(n),
                    to.begin() + static_cast<std::ptrdiff_t>(width * static_cast<std::size_t>(at)));
      } else if (at + n == total) {
        std::copy_n(llama_get_logits_ith(context_.get(), -1), width, to.begin());
      }
    }
  }

 private:
  static constexpr int most = 512;  // tokens of a graph

  template <class Token, class Asked>
  void fill(int n, int first, const Token& token, const Asked& asked) {
    batch_.n_tokens = n;
    for (int i = 0; i < n; ++i) {
      batch_.token[i] = token(i);
      batch_.pos[i] = first + i;
      batch_.n_seq_id[i] = 1;
      batch_.seq_id[i][0] = 0;
      batch_.logits[i] = asked(i);
    }
  }

  // A longer context is a new one, which knows nothing yet. Each takes memory for all its positions, if only for a moment.
  void make_room(int positions) {
    if (context_ && positions <= static_cast<int>(llama_n_ctx(context_.get()))) return;
    auto how = llama_context_default_params();
    how.n_ctx = std::min(std::bit_ceil(static_cast<unsigned>(std::max(positions, 2048))),
                         static_cast<unsigned>(model_.parameters().context));
    how.n_batch = how.n_ubatch = most;
    how.n_threads = how.n_threads_batch = threads_;
    context_.reset();
    if (const auto status = attention_.attach(how); !status.ok()) throw std::runtime_error(status.message());
    context_.reset(llama_init_from_model(model_.library(), how));
    if (!context_) throw std::runtime_error("llama.cpp cannot make a context of " + std::to_string(how.n_ctx) + " tokens");
    known_ = 0;
  }

  const Model& model_;
  int threads_, known_ = 0;  // positions that the context has
  llama_batch batch_;
  kvt::LlamaCppAttention<kvt::AnyCache> attention_;
  std::unique_ptr<llama_context, void (*)(llama_context*)> context_;
};

}  // namespace

std::unique_ptr<Engine::Runner> make_llama_cpp_runner(const Model& model, int num_threads) {
  return std::make_unique<LlamaCppRunner>(model, num_threads);
}

}  // namespace kvt_llm
