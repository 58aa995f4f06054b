// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Passages: a text is cut into passages, and a hash of its bytes says whether one is there to tune by or to evaluate on.
// Whoever profiles, trains or chooses on the one part and measures on the other has not seen what is measured, in any run
// and whatever other texts there are.
#pragma once

#include <string>
#include <vector>

namespace kvt_llm {

enum class Part { all, tuning, evaluation };
const char* name_of(Part part);

// Passages end with the first paragraph that ends after 4 KiB, or at 8 KiB; a third of them, by their hashes, is for tuning.
// The passages of a part, one after another; empty if there are none.
std::string part_of(const std::string& text, Part part);

// The same of the file `path`; throws std::runtime_error with one sentence if there is nothing of that part.
std::string read_part(const std::string& path, Part part);

}  // namespace kvt_llm
