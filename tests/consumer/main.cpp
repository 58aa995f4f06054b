// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <kvtailor/kvtailor.hpp>
#include <kvtailor/version.hpp>

int main() { std::printf("kvtailor %d.%d.%d\n", KVT_VERSION_MAJOR, KVT_VERSION_MINOR, KVT_VERSION_PATCH); }
