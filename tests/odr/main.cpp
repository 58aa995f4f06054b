// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Two translation units that include everything link only if every function of the headers is a
// template or inline.
#include <kvtailor/kvtailor.hpp>
#include <kvtailor/version.hpp>

int version_of_the_other_unit();

int main() { return version_of_the_other_unit() == KVT_VERSION ? 0 : 1; }
