# make demo   the main job on a photograph      make lint    style, types, import contracts
# make test   the fast tests                    make bench   the benchmarks
# make test-slow   every test but the GPU's     make clean   removes what these made
#
# The kernels alone, in a C++ program that needs no Python (CMake and a compiler):
# make selftest   natively      make selftest-sanitized   with ASan and UBSan
# make selftest-neon   cross-compiled for AArch64, under qemu's emulation
#
# Everything happens in $(VENV). Set PYTHON to choose the interpreter, TORCH to choose the torch
# (a torch that already is in $(VENV) and is new enough stays).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

# torchvision asks for one exact torch. Naming the torch that is there keeps pip from replacing it.
INSTALLED_TORCH = torch==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')

.PHONY: demo test test-slow lint bench clean selftest selftest-sanitized selftest-neon

demo: $(STAMPS)/demo
	$(BIN)/disco demo $(DEMO_ARGS)

# Rooms whose tests expect nothing of time and wait for no process under a deadline go two files at
# a time; the others one after the other.
SIDE_BY_SIDE = $(wildcard $(patsubst %,tests/%,triton kernels cli cuda train bench/test_accuracy.py bench/test_cluster.py bench/test_throughput.py partition sparsify executor capture program tasks packaging))
test: $(STAMPS)/test
	$(BIN)/python -m pytest -m "not slow and not gpu" --durations=15 -n 2 --dist loadfile $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m "not slow and not gpu" --durations=15 $(patsubst %,--ignore=%,$(SIDE_BY_SIDE))

test-slow: $(STAMPS)/test
	DISCO_TEST_ALL_EXAMPLES=1 $(BIN)/python -m pytest -m "not gpu"

bench: $(STAMPS)/test
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-only

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy
	PYTHONPATH=python $(BIN)/lint-imports

# $(call build_selftest,directory,settings)
build_selftest = \
  cmake -S . -B build/$(1) -DDISCO_BUILD_SELFTEST=ON $(2) >/dev/null && \
  cmake --build build/$(1) --parallel $$(nproc) >/dev/null
# Threads that sleep while they wait: spinning takes the cores from the threads waited for, wherever
# these have something else to do.
RUN_SELFTEST = OMP_WAIT_POLICY=passive

selftest:
	$(call build_selftest,selftest)
	$(RUN_SELFTEST) build/selftest/conv_selftest

SANITIZE := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
# Half of the compiler's time, for kernels that could not run.
WITHOUT_AVX512 = $(if $(shell grep -sw avx512f /proc/cpuinfo | head -n 1),OFF,ON)

selftest-sanitized:
	$(call build_selftest,selftest-sanitized,-DCMAKE_BUILD_TYPE=None -DDISCO_WITHOUT_AVX512=$(WITHOUT_AVX512) -DCMAKE_CXX_FLAGS="$(SANITIZE)")
	$(RUN_SELFTEST) build/selftest-sanitized/conv_selftest

CROSS_CXX ?= aarch64-linux-gnu-g++
CROSS_ROOT ?= /usr/aarch64-linux-gnu
QEMU ?= $(or $(shell command -v qemu-aarch64-static),qemu-aarch64)

# By name: a build that left NEON out would otherwise pass. (The portable kernels, which no such CPU
# takes, are in the other self-tests.)
selftest-neon:
	@for tool in $(CROSS_CXX) $(QEMU); do command -v $$tool >/dev/null || { \
	  echo "There is no $$tool. Debian and Ubuntu have it: apt-get install g++-aarch64-linux-gnu qemu-user-static. On an AArch64 machine, make selftest does the same." >&2; \
	  exit 1; }; done
	$(call build_selftest,selftest-neon,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(CROSS_CXX))
	DISCO_KERNELS_ISA=neon $(RUN_SELFTEST) $(QEMU) -L $(CROSS_ROOT) build/selftest-neon/conv_selftest

clean:
	rm -rf $(VENV) build dist *.egg-info disco_kernels/_C.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find disco_kernels python tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is " + sys.version + ": set PYTHON=")'
	@$(PYTHON) -c 'import os, sys, sysconfig as s; h = os.path.join(s.get_path("include"), "Python.h"); os.path.exists(h) or sys.exit("Python headers are needed to build the extension, and there is no " + h + ": install them (Debian and Ubuntu: apt-get install python3-dev)")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# CUDA builds of torch are gigabytes: TORCH names a version rather than whatever is newest.
$(STAMPS)/torch: $(STAMPS)/venv
	@echo "[make] installing $(TORCH) into $(VENV) unless 2.11 or newer is there"
	$(BIN)/python -c 'import re, torch; v = re.match(r"(\d+)\.(\d+)", torch.__version__); assert v and tuple(map(int, v.groups())) >= (2, 11)' 2>/dev/null \
	  || $(PIP) install --quiet "$(TORCH)"
	touch $@

$(STAMPS)/demo: $(STAMPS)/torch $(SOURCES)
	@echo "[make] building and installing the project into $(VENV)"
	$(PIP) install --quiet --editable '.[demo]' "$(INSTALLED_TORCH)"
	touch $@

$(STAMPS)/test: $(STAMPS)/torch $(SOURCES)
	@echo "[make] building and installing the project with its test tools into $(VENV)"
	$(PIP) install --quiet --editable '.[demo,test]' "$(INSTALLED_TORCH)"
	touch $@ $(STAMPS)/demo

# What the linters read, without the project: its extension would be compiled for nothing.
LINT_EXTRAS = train mpi lint
$(STAMPS)/lint: $(STAMPS)/torch pyproject.toml
	@echo "[make] installing linters and what the project imports into $(VENV)"
	$(BIN)/python -c 'import sys; toml = __import__("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli", fromlist=["load"]); p = toml.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *(r for e in sys.argv[1:] for r in p["optional-dependencies"][e]), sep="\n")' \
	  $(LINT_EXTRAS) >$(STAMPS)/lint-requirements.txt
	$(PIP) install --quiet --requirement $(STAMPS)/lint-requirements.txt "$(INSTALLED_TORCH)"
	touch $@
