#!/bin/sh
# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
#
#   compare.sh PROGRAM HEAD_DIM
#
# Attention through KvCache takes at most 3 % more instructions than the same loops written by hand.
set -eu
for flag in avx2 fma f16c; do
  grep -qw "$flag" /proc/cpuinfo || { echo "skipped: no CPU with $flag"; exit 77; }
done
command -v valgrind > /dev/null || { echo "skipped: no valgrind"; exit 77; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# A count that is missing or zero is a failure, not a ratio.
count() {
  valgrind --tool=callgrind --collect-atstart=no --callgrind-out-file="$folder/$2" "$1" "$2" "$3" > "$folder/log" 2>&1 ||
    { cat "$folder/log" >&2; return 1; }
  number=$(sed -n 's/^summary: \([0-9][0-9]*\)$/\1/p' "$folder/$2")
  case $number in
    [1-9]*) echo "$number" ;;
    *) echo "callgrind counted nothing for '$2'" >&2; return 1 ;;
  esac
}
cache=$(count "$1" cache "$2")
hand=$(count "$1" hand "$2")
awk -v cache="$cache" -v hand="$hand" -v dim="$2" 'BEGIN {
  ratio = cache / hand
  printf "head_dim %d: %d instructions through KvCache, %d by hand, ratio %.4f, at most 1.03\n", dim, cache, hand, ratio
  exit !(ratio <= 1.03)
}'
