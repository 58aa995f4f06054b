// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// The only place that states the version: CMake reads it from here, and a test compares the two.
#pragma once

#define KVT_VERSION_MAJOR 0
#define KVT_VERSION_MINOR 1
#define KVT_VERSION_PATCH 0

// One integer that compares like the version: 0.1.0 -> 100, 1.2.3 -> 10203.
#define KVT_VERSION (KVT_VERSION_MAJOR * 10000 + KVT_VERSION_MINOR * 100 + KVT_VERSION_PATCH)
