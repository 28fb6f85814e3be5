# Each target does its own set-up in .venv. Needed beforehand: python >= 3.10 with venv, make and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test lint types bench

quickstart: $(INSTALLED)
	$(BIN)/tlcr run examples/quickstart.yaml --resume

test: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -p no:benchmark

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest benchmarks --benchmark-only

$(INSTALLED): pyproject.toml setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("tlcr needs python >= 3.10 and this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade 'setuptools>=77' wheel
# torch first and alone: under this pin it is the build that the machine's package index is set up for, CPU or CUDA.
	$(BIN)/python -m pip install 'torch==2.13.0'
	$(BIN)/python -m pip install --no-build-isolation --editable '.[dev]'
	@touch $@
