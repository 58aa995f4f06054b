// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// SharedPrefill: one cache reads a text, and others are forked from it, each cut in its own way.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "command.hpp"

namespace kvt_llm {

// Groups of items that one cache can serve: their codec is the same, and their policies want the same observed of a text.
// Groups are in the order of their first items. names_of(item) is its composition.
template <class Item, class NamesOf>
std::vector<std::vector<Item>> sharing_prefill(const std::vector<Item>& items, const NamesOf& names_of) {
  std::vector<std::vector<Item>> groups;
  std::map<std::pair<std::string, std::pair<std::uint32_t, int>>, std::size_t> places;
  for (const Item& item : items) {
    const kvt::Composition names = names_of(item);
    const auto [place, first] = places.try_emplace({names.codec, observed_by(names)}, groups.size());
    if (first) groups.emplace_back();
    groups[place->second].push_back(item);
  }
  return groups;
}

class SharedPrefill {
 public:
  // `served` are the compositions of one group; read(cache) lets an empty cache read the text, when something is first cut.
  // look_ahead(cache) says by see_importance() what rows of such a cache matter to what comes then, and is for the oracle.
  SharedPrefill(const Model& model, const kvt::CacheOptions& zones, const std::vector<kvt::Composition>& served,
                std::function<void(kvt::AnyCache&)> read, std::function<std::vector<float>(kvt::AnyCache&)> look_ahead = {});

  // A fork with policies of its own, cut to the budget; `oracle` ranks its rows instead of the token selector. Its bytes are
  // counted, so there may be one at a time.
  std::unique_ptr<kvt::AnyCache> cut(const kvt::Composition& names, const Budget& budget, bool oracle = false);
  long long bytes_of(const kvt::AnyCache& cut) const { return measured_bytes(cut, memory_, whole_->memory().total()); }
  double seconds() const { return seconds_; }  // that the text took; 0 until it is read

 private:
  std::function<void(kvt::AnyCache&)> read_;
  std::function<std::vector<float>(kvt::AnyCache&)> look_ahead_;
  std::shared_ptr<const std::vector<float>> importance_;  // once the oracle was asked
  CountingResource memory_;
  std::unique_ptr<kvt::AnyCache> whole_;
  double seconds_ = 0;
};

}  // namespace kvt_llm
