# make demo   set everything up, then: raw text -> shards -> a trained Finch -> loss curve -> generated text
# make test   set everything up, build, run every test
# make build  build what changed
# make test-kernels   the CUDA kernels without a GPU, all of it: every instance, sanitizers, mutations, every architecture
# make chaos          builds of shards killed at 50 random moments
# make fuzz           random inputs to every parser, encoder, decoder and reader under sanitizers: 10 minutes, a million or more
# make lint   ruff, the one-file-includes-torch rule, file lengths
#
# make test-gpu      on a GPU: primitives, every test of the ops, models, memory and race checks (says so without a GPU)
# make bench-gpu     on a GPU: check, then time; one report with pictures under benchmarks/results/
# make gpu-programs  the programs that test-gpu runs; needs nvcc and no GPU
#
# DATA=PATH    the demo's text: a folder or file of your own
# MINUTES=N    how long the demo may take, 10 unless told
# TORCH=SPEC   another torch than the constraints name, e.g. TORCH='torch==2.11.0'
# PYTHON=EXE   the Python that makes .venv, 3.10 or newer
# BUILT=1      test-gpu and bench-gpu: build nothing, run PYTHON with the libraries in place, wherever they were built
# FUZZ=...     fuzz: options of tests/fuzz/run.py, such as FUZZ='--minutes 2 stream_encoder'
# BENCH=...    bench-gpu: options of benchmarks/bench_gpu.py, such as BENCH='--upstream PATH'

SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= -c constraints.txt torch
RUN := .venv/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
CPU_TORCH := --extra-index-url https://download.pytorch.org/whl/cpu --retries 0 --timeout 10

# The CUDA code is built wherever nvcc is, GPU or not, for one architecture: the GPU's own, or Hopper.
export RWKV_EXT_CUDA ?= $(if $(shell command -v nvcc),1,auto)
export TORCH_CUDA_ARCH_LIST ?= $(or $(GPU),9.0)

KERNELS := $(wildcard csrc/cuda/*.cu csrc/cuda/instances/*.cu)
# One architecture as nvcc names it: 9.0 is sm_90.
ARCH := sm_$(subst .,,$(firstword $(subst ;, ,$(subst +PTX,,$(TORCH_CUDA_ARCH_LIST)))))
GPU_RUN := $(if $(BUILT),$(PYTHON),$(RUN))

.PHONY: demo test chaos fuzz test-gpu bench-gpu gpu-programs build lint clean prerequisites

demo: build
	$(RUN) train/demo.py --out demo $(if $(DATA),--data "$(DATA)") $(if $(MINUTES),--minutes $(MINUTES))

test: build
	$(RUN) -m pytest tests

ifeq ($(GPU),)
test-gpu bench-gpu:
	@echo "make $@: skipped, nvidia-smi finds no GPU here"
else
# First the tests that are about a GPU, then the ops' own with the GPU as torch's default device.
OP_TESTS := $(filter-out %_abi.py %_library.py tests/test_wkv_cuda_%,$(wildcard tests/test_wkv_*.py))

test-gpu: $(if $(BUILT),,build gpu-programs)
	$(GPU_RUN) -m pytest -rs tests/test_device_primitives.py tests/test_gpu_*.py tests/test_wkv_cuda_*.py; first=$$?; \
	$(GPU_RUN) -m pytest -rs --device cuda $(OP_TESTS) && exit $$first

bench-gpu: $(if $(BUILT),,build)
	$(GPU_RUN) benchmarks/bench_gpu.py $(BENCH)
endif

gpu-programs: build/gpu/device_primitives build/gpu/run

build/gpu/device_primitives: tests/device_primitives/main.cu tests/device_primitives/cases.cuh $(wildcard csrc/cuda/*.h)
	mkdir -p build/gpu
	nvcc -std=c++20 -O2 -arch=$(ARCH) -cudart static -Xcompiler -static-libstdc++ -Icsrc -o $@ $<

test-kernels: build
	$(RUN) -m pytest tests -m kernels

chaos: build
	$(RUN) -m pytest tests -m chaos

fuzz: build
	$(RUN) tests/fuzz/run.py $(FUZZ)

# The kernels themselves were compiled with the extension.
build/gpu/run: tests/emulator/run.cpp tests/device_kernels/on_device.h build
	mkdir -p build/gpu
	nvcc -std=c++20 -O2 -arch=$(ARCH) -Icsrc -Itests -x cu -c -o $@.o $<
	nvcc -arch=$(ARCH) -cudart static -Xcompiler -static-libstdc++ -o $@ $@.o $(KERNELS:%.cu=build/objects/%.o)

build: .venv/installed
	$(RUN) setup.py --quiet build_ext --inplace

# pybind11, ninja and torch come first because the build of the package itself is not isolated from them.
.venv/installed: constraints.txt pyproject.toml | prerequisites
	test -x $(RUN) || $(PYTHON) -m venv .venv
	@echo "installing torch ($(if $(GPU),CUDA build for the GPU here,CPU build where there is one))"
	$(if $(GPU),,$(PIP) $(CPU_TORCH) $(TORCH) 2>/dev/null ||) $(PIP) $(TORCH)
	$(PIP) 'setuptools >= 77' wheel ninja 'pybind11 >= 2.12'
	$(PIP) --no-build-isolation -e '.[test,log]'
	touch $@

prerequisites:
	@command -v $(PYTHON) >/dev/null || { echo "rwkv_ext needs Python 3.10 or newer: $(PYTHON) is not there; install it or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "rwkv_ext needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "rwkv_ext needs Python's venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { echo "rwkv_ext needs Python's headers; on Debian and Ubuntu: apt install python3-dev"; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { echo "rwkv_ext needs a C++20 compiler (g++ 11 or newer); on Debian and Ubuntu: apt install g++"; exit 1; }

lint: build
	.venv/bin/ruff check rwkv_ext train tests benchmarks setup.py
	@! grep -rlE '#include [<"](torch|ATen|c10)/' csrc --include='*' | grep -v '^csrc/torch_api.h$$' || { echo "only csrc/torch_api.h may include torch"; exit 1; }
	@git ls-files '*.py' '*.cpp' '*.h' '*.cu' '*.cuh' | xargs wc -l | awk '$$2 != "total" && $$1 > 400 {print $$2 " has " $$1 " lines, more than 400"; bad = 1} END {exit bad}'
	@git ls-files csrc | xargs awk 'length > 120 {print FILENAME ":" FNR " is longer than 120 characters"; bad = 1} END {exit bad}'
	@test "$$(wc -l < setup.py)" -le 120 || { echo "setup.py has more than 120 lines"; exit 1; }

clean:
	rm -rf build .venv demo runs *.egg-info rwkv_ext/*.so rwkv_ext/vocabulary/*.bin
