# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
#
# Each header alone: one generated file a header includes it twice and nothing before it.
# .hpp compiles as C++, .cuh as CUDA, kvtailor.cuh with every .hpp that the device may include.
function(kvt_header_tests)
  set(root ${PROJECT_SOURCE_DIR}/include)
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE ${root} ${root}/kvtailor/*.hpp ${root}/kvtailor/*.cuh)
  if(NOT llama_FOUND)
    list(FILTER headers EXCLUDE REGEX "/engine/")
  endif()
  foreach(header IN LISTS headers)
    string(MAKE_C_IDENTIFIER ${header} name)
    if(header MATCHES "\\.hpp$")
      kvt_include_twice(${header} ${name}.cpp)
      list(APPEND cpp_sources ${name}.cpp)
    elseif(KVT_HAVE_CUDA)
      kvt_include_twice(${header} ${name}.cu)
      list(APPEND cuda_sources ${name}.cu)
    endif()
  endforeach()

  if(cpp_sources)
    list(TRANSFORM cpp_sources PREPEND ${CMAKE_CURRENT_BINARY_DIR}/headers/)
    add_library(header_tests OBJECT ${cpp_sources})
    target_link_libraries(header_tests PRIVATE
      kvtailor::kvtailor kvt_own_flags nlohmann_json::nlohmann_json $<TARGET_NAME_IF_EXISTS:llama>)
    target_compile_options(header_tests PRIVATE -O0)  # nothing of it runs
  endif()
  if(cuda_sources)
    list(TRANSFORM cuda_sources PREPEND ${CMAKE_CURRENT_BINARY_DIR}/headers/)
    list(GET CMAKE_CUDA_ARCHITECTURES 0 architecture)
    add_library(header_tests_cuda OBJECT ${cuda_sources})
    target_link_libraries(header_tests_cuda PRIVATE kvtailor::cuda kvt_own_flags nlohmann_json::nlohmann_json)
    set_target_properties(header_tests_cuda PROPERTIES CUDA_ARCHITECTURES ${architecture})
  endif()
endfunction()

function(kvt_include_twice header file)
  set(text "#include <${header}>\n#include <${header}>\n")
  file(CONFIGURE OUTPUT headers/${file} CONTENT "${text}" @ONLY)  # writes only what changed
endfunction()
