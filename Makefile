# make demo   set everything up, then: raw text -> shards -> a trained Finch -> loss curve -> generated text
# make test   set everything up, build, run every test
# make build  build what changed
# make lint   ruff, the one-file-includes-torch rule, file lengths
#
# DATA=PATH    the demo's text: a folder or file of your own
# MINUTES=N    how long the demo may take, 10 unless told
# TORCH=SPEC   another torch than the constraints name, e.g. TORCH='torch==2.11.0'
# PYTHON=EXE   the Python that makes .venv, 3.10 or newer

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

.PHONY: demo test build lint clean prerequisites

demo: build
	$(RUN) train/demo.py --out demo $(if $(DATA),--data "$(DATA)") $(if $(MINUTES),--minutes $(MINUTES))

test: build
	$(RUN) -m pytest tests

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
	rm -rf build .venv demo runs *.egg-info rwkv_ext/*.so
