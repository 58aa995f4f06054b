# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DCOMPILER=.. -DSOURCE=.. -DINCLUDE_DIR=.. -P compile_fail.cmake
#
# A misuse must not compile, and the compiler must say what the library wants it to say: every
# "// expect: <regex>" line of the source has to match the compiler's output.
cmake_minimum_required(VERSION 3.25)

file(STRINGS ${SOURCE} expected REGEX "^// expect: ")
if(NOT expected)
  message(FATAL_ERROR "${SOURCE} has no line '// expect: <regex>'")
endif()

execute_process(
  COMMAND ${COMPILER} -std=c++20 -fsyntax-only -I${INCLUDE_DIR} ${SOURCE}
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(result EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiles, and it should not")
endif()

foreach(line IN LISTS expected)
  string(REGEX REPLACE "^// expect: " "" regex "${line}")
  if(NOT output MATCHES "${regex}")
    message(FATAL_ERROR "the compiler does not say '${regex}', it says\n${output}")
  endif()
endforeach()
