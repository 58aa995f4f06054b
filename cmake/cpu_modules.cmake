# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
#
# kvt_add_cpu_modules(NAME [HEAD_DIMS 64 128 ...] [SOURCES module.cpp ...]
#                     [OUTPUT_DIRECTORY folder] [LINK_LIBRARIES targets ...])
#
# Modules for kvt::CpuModule (kvtailor/host/cpu_module.hpp), one an instruction set: NAME-x86-64.so, NAME-x86-64-v3.so and
# NAME-x86-64-v4.so, or NAME-portable.so where processors are others. All codecs of kvtailor/compose.hpp for the head dims (all
# of them by default), or what the sources make. The target NAME builds all; NAME_TARGETS, for install(TARGETS), names each.
# CMAKE_CXX_FLAGS must not allow more than the least processor has, but for -march, which is overruled.
function(kvt_add_cpu_modules name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "OUTPUT_DIRECTORY" "HEAD_DIMS;SOURCES;LINK_LIBRARIES")
  if(arg_UNPARSED_ARGUMENTS OR (arg_HEAD_DIMS AND arg_SOURCES))
    message(FATAL_ERROR "kvt_add_cpu_modules(${name}) takes HEAD_DIMS or SOURCES, OUTPUT_DIRECTORY and LINK_LIBRARIES")
  endif()
  set(generated ${CMAKE_CURRENT_BINARY_DIR}/${name})
  if(NOT arg_OUTPUT_DIRECTORY)
    set(arg_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR})
  endif()

  if(NOT arg_SOURCES)
    if(NOT arg_HEAD_DIMS)
      set(arg_HEAD_DIMS 40 64 80 96 112 128 192 256 512)
    endif()
    # A file a head dim, so that they compile side by side.
    foreach(head_dim IN LISTS arg_HEAD_DIMS)
      set(source ${generated}/head_dim_${head_dim}.cpp)
      file(CONFIGURE OUTPUT ${source} CONTENT
        "#include \"kvtailor/compose.hpp\"\nKVT_INSTANTIATE_HEAD_DIM(${head_dim});\n")
      list(APPEND arg_SOURCES ${source})
    endforeach()
    list(JOIN arg_HEAD_DIMS ", " head_dims)
    file(CONFIGURE OUTPUT ${generated}/module.cpp CONTENT
      "#define KVT_HEAD_DIMS ${head_dims}
#define KVT_EXTERN_HEAD_DIMS
#include \"kvtailor/compose.hpp\"
#include \"kvtailor/host/cpu_module_source.hpp\"
KVT_CPU_MODULE(kvt::make_cache)
")
    list(APPEND arg_SOURCES ${generated}/module.cpp)
  endif()

  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    set(cpus x86-64 x86-64-v3 x86-64-v4)
  else()
    set(cpus portable)
  endif()
  # Visibility hides what is ours; the standard library's templates are visible whatever is asked for.
  set(exports ${generated}/exports.map)
  file(CONFIGURE OUTPUT ${exports} CONTENT "{ global: kvt_cpu_module; local: *; };\n")

  add_custom_target(${name})
  set(targets)
  foreach(cpu IN LISTS cpus)
    set(target ${name}-${cpu})
    add_library(${target} MODULE ${arg_SOURCES})
    target_link_libraries(${target} PRIVATE kvtailor::kvtailor ${arg_LINK_LIBRARIES})
    target_link_options(${target} PRIVATE LINKER:--version-script=${exports})
    set_target_properties(${target} PROPERTIES PREFIX "" SUFFIX .so LIBRARY_OUTPUT_DIRECTORY ${arg_OUTPUT_DIRECTORY}
      LINK_DEPENDS ${exports} CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
    if(NOT cpu STREQUAL portable)
      set_target_properties(${target} PROPERTIES kvt_march ${cpu})
      target_compile_options(${target} PRIVATE -march=${cpu})
    endif()
    if(cpu STREQUAL x86-64-v4)
      # What the kernels for AVX-512 ask for beyond it: see KVT_HOST_AVX512.
      target_compile_options(${target} PRIVATE -mavx512vbmi -mavx512vbmi2 -mavx512vnni)
    endif()
    add_dependencies(${name} ${target})
    list(APPEND targets ${target})
  endforeach()
  set(${name}_TARGETS ${targets} PARENT_SCOPE)
endfunction()
