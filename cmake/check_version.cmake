# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DSOURCE_DIR=.. -DVERSION=.. -P check_version.cmake
#
# The header, the configured build and the README (where it names a version) agree.
cmake_minimum_required(VERSION 3.25)

file(READ ${SOURCE_DIR}/include/kvtailor/version.hpp header)
foreach(part MAJOR MINOR PATCH)
  string(REGEX MATCH "define KVT_VERSION_${part} ([0-9]+)" _ "${header}")
  list(APPEND in_header ${CMAKE_MATCH_1})
endforeach()
list(JOIN in_header . in_header)
if(NOT in_header STREQUAL VERSION)
  message(FATAL_ERROR "version.hpp says ${in_header}, CMake says ${VERSION}")
endif()

if(EXISTS ${SOURCE_DIR}/README.md)
  file(STRINGS ${SOURCE_DIR}/README.md lines REGEX "[Vv]ersion [0-9]+\\.[0-9]+\\.[0-9]+")
  foreach(line IN LISTS lines)
    string(REGEX MATCH "[Vv]ersion ([0-9.]+[0-9])" _ "${line}")
    if(NOT CMAKE_MATCH_1 STREQUAL VERSION)
      message(FATAL_ERROR "the README says ${CMAKE_MATCH_1}, CMake says ${VERSION}:\n${line}")
    endif()
  endforeach()
endif()
