# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DINCLUDE_DIR=.. -P check_includes.cmake
#
# The three kinds of policies know nothing of one another, and what needs nvcc says so in its name.
cmake_minimum_required(VERSION 3.25)

set(policy_kinds select budget codec)
set(cuda_header "\\.cuh[>\"]|[<\"](cuda|cub/|thrust/|cooperative_groups|mma\\.h|nv/)")

file(GLOB_RECURSE headers RELATIVE ${INCLUDE_DIR} ${INCLUDE_DIR}/kvtailor/*.hpp ${INCLUDE_DIR}/kvtailor/*.cuh)
if(NOT headers)
  message(FATAL_ERROR "no headers under ${INCLUDE_DIR}")
endif()

set(broken)
foreach(header IN LISTS headers)
  set(forbidden)
  string(REGEX REPLACE "^kvtailor/([^/]*).*" "\\1" folder ${header})
  if(folder IN_LIST policy_kinds)
    set(others ${policy_kinds})
    list(REMOVE_ITEM others ${folder})
    list(JOIN others | others)
    list(APPEND forbidden "[</\"](${others})/")
  endif()
  if(header MATCHES "\\.hpp$")
    list(APPEND forbidden ${cuda_header})
  endif()
  file(STRINGS ${INCLUDE_DIR}/${header} includes REGEX "^[ \t]*#[ \t]*include")
  foreach(line IN LISTS includes)
    foreach(regex IN LISTS forbidden)
      if(line MATCHES "${regex}")
        string(APPEND broken "  ${header}: ${line}\n")
      endif()
    endforeach()
  endforeach()
endforeach()

if(broken)
  message(FATAL_ERROR "headers that include what they must not:\n${broken}")
endif()
