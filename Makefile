# make demo   set everything up, then: raw text -> shards -> a trained Finch -> loss curve -> generated text
# make test   set everything up, build, run every test
# make build  (re)build the C++ and CUDA code: only what changed
# make lint   ruff, the torch-include rule, file lengths
#
# TORCH=SPEC     another torch than constraints.txt names, e.g. TORCH='torch==2.11.0'
# DATA=PATH      the demo's text: a folder or file of your own     MINUTES=N  the demo's training time

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
export RWKV_EXT_CUDA ?= auto

.PHONY: demo test build lint clean

build: $(VENV)/installed
	$(RUN) setup.py -q build_ext --inplace

clean:
	rm -rf build .venv *.egg-info rwkv_ext/*.so
