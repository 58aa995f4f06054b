// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <kvtailor/kvtailor.hpp>
#include <kvtailor/version.hpp>

int version_of_the_other_unit();

int version_of_the_other_unit() { return KVT_VERSION; }
