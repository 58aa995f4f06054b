# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
#
#   make demo        a real model with a tailored cache
#   make test        the tests; PRESETS="release clang asan tsan" for all of them
#   make bench       the benchmarks
#   make codecs      every codec's bits and distance from the full cache, beside llama.cpp's caches
#   make selectors   every token selector and budget allocator at equal rows kept
#   make report      a page that says which composition to use at which budget
#   make mutate      deliberate bugs, each of which a test has to catch
#   make ci          all that has to pass

PRESETS ?= release
JOBS ?= $(shell nproc)

sources = git ls-files -z --cached --others --exclude-standard -- '*.hpp' '*.cpp' '*.cu' '*.cuh'

.PHONY: bootstrap demo test bench codecs selectors report format check-format tidy mutate ci clean

bootstrap:
	@tools/bootstrap

demo: bootstrap
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target kvt-llm
	tools/demo

test: bootstrap
	@set -e; for preset in $(PRESETS); do \
	  echo "== $$preset"; \
	  cmake --preset $$preset $(OPTIONS); \
	  cmake --build --preset $$preset -j $(JOBS); \
	  ctest --preset $$preset -j $(JOBS); \
	done

bench: bootstrap
	cmake --preset release
	cmake --build --preset release -j $(JOBS)
	tools/bench

codecs: bootstrap
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target kvt-llm
	tools/codecs

selectors: bootstrap
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target kvt-llm
	tools/selectors

report: bootstrap
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target kvt-llm
	tools/report

format:
	$(sources) | xargs -0 -r clang-format-14 -i

check-format:
	$(sources) | xargs -0 -r clang-format-14 --dry-run --Werror

# One file that includes everything is enough to read every header once.
tidy: bootstrap
	cmake --preset clang --log-level=WARNING
	clang-tidy-14 --quiet --warnings-as-errors='*' -p build/clang tests/tidy.cpp

mutate: bootstrap
	tools/mutate

ci:
	$(MAKE) bootstrap
	$(MAKE) check-format
	$(MAKE) tidy
	$(MAKE) test PRESETS="release asan tsan" OPTIONS='"-DKVT_LLM_HEAD_DIMS=40;64" -DKVT_BUILD_BENCH=OFF'

clean:
	rm -rf build
