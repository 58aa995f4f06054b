# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DWAY=subdirectory|package -DVERSION=.. -DSOURCE_DIR=.. -DBUILD_DIR=.. -DCOMPILER=.. -DFLAGS=.. -DGENERATOR=..
#       -P consumer.cmake
#
# Builds and runs tests/consumer the way a user would, from nothing.
cmake_minimum_required(VERSION 3.25)

set(work ${BUILD_DIR}/consumer/${WAY})
file(REMOVE_RECURSE ${work})

if(WAY STREQUAL package)
  execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${work}/prefix
    OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
  set(where -DCMAKE_PREFIX_PATH=${work}/prefix)
else()
  set(where -DKVTAILOR_SOURCE_DIR=${SOURCE_DIR})
endif()

execute_process(COMMAND ${CMAKE_COMMAND} -S ${SOURCE_DIR}/tests/consumer -B ${work}/build -G ${GENERATOR}
  -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_CXX_FLAGS=${FLAGS} ${where} COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CMAKE_COMMAND} --build ${work}/build COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${work}/build/consumer OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
if(NOT output STREQUAL "kvtailor ${VERSION}\n")
  message(FATAL_ERROR "the consumer printed '${output}', not the version ${VERSION}")
endif()
if(WAY STREQUAL package)
  execute_process(COMMAND ${work}/build/module_consumer COMMAND_ERROR_IS_FATAL ANY)
endif()
