# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
#
# cmake -DNM=.. -DOBJDUMP=.. -DPREFIX=.. -DPROGRAM=.. -P check_modules.cmake
#
# Each module PREFIX-CPU.so shows one symbol, so that nothing of it can take the place of another image's, and has the
# instructions of its own processor and of no better one; PROGRAM, which opens them, has those of every processor.
cmake_minimum_required(VERSION 3.25)

set(avx2 "%ymm|vfmadd")
set(avx512 "%zmm|%k[1-7]")
function(expect file)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "HAS;LACKS")
  foreach(regex IN LISTS arg_HAS arg_LACKS)
    execute_process(COMMAND ${OBJDUMP} -d --no-show-raw-insn ${file} COMMAND grep -cE ${regex}
      OUTPUT_VARIABLE lines OUTPUT_STRIP_TRAILING_WHITESPACE RESULTS_VARIABLE results)
    list(GET results 0 failed)
    if(failed)
      message(FATAL_ERROR "${OBJDUMP} cannot read ${file}")
    endif()
    if((regex IN_LIST arg_HAS AND lines EQUAL 0) OR (regex IN_LIST arg_LACKS AND lines GREATER 0))
      message(SEND_ERROR "${file}: ${lines} instructions with ${regex}")
    endif()
  endforeach()
endfunction()

foreach(cpu x86-64 x86-64-v3 x86-64-v4)
  execute_process(COMMAND ${NM} -D --defined-only --format=just-symbols ${PREFIX}-${cpu}.so
    OUTPUT_VARIABLE shown COMMAND_ERROR_IS_FATAL ANY)
  if(NOT shown STREQUAL "kvt_cpu_module\n")
    message(SEND_ERROR "${PREFIX}-${cpu}.so shows ${shown}")
  endif()
endforeach()
expect(${PREFIX}-x86-64.so LACKS ${avx2} ${avx512})
expect(${PREFIX}-x86-64-v3.so HAS %ymm vfmadd LACKS ${avx512})
expect(${PREFIX}-x86-64-v4.so HAS %zmm vpdpbusd)
expect(${PROGRAM} LACKS ${avx2} ${avx512})
