// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// What clang-tidy reads: every header once.
#include <kvtailor/compose.hpp>
#include <kvtailor/host/cpu_module_source.hpp>
#include <kvtailor/io/safetensors.hpp>
#include <kvtailor/kvtailor.hpp>
#include <kvtailor/learn/importance.hpp>
#include <kvtailor/version.hpp>
