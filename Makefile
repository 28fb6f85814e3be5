# Each target does its own set-up in .venv. Needed beforehand: python >= 3.10 with venv, make and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest/.environment
ENVIRONMENT := $(VENV)/.environment
INSTALLED := $(VENV)/.installed
RIVALS := $(VENV)/.rivals
DOCS := $(VENV)/.docs
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -p no:benchmark -p tests.whole
CPP := $(shell find csrc tests/cuda/emulator .ci -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inl')

.PHONY: quickstart test test-slow test-again lint format docs bench bench-report bench-compare wheels lowest newest lock hosts vllm engines gpu gpu-in-small faults fuzz fuzz-sanitized audit results-check

quickstart: $(INSTALLED)
	$(BIN)/tlcr run examples/quickstart.yaml --resume

# All tests but those that take long. Those of a file run in one process, which makes what they share once.
test: $(INSTALLED)
	$(PYTEST) -n 2 --dist loadfile -m "not slow" --durations=15

# Those: they start several processes, kill some, compile for GPUs, build older commits or run whole examples.
test-slow: $(INSTALLED)
	$(PYTEST) -n 2 --dist loadfile -m slow --durations=15

# What failed last time, one test after the other. It fails where nothing did, and where that run left tests out.
test-again: $(INSTALLED)
	$(PYTEST) --last-failed --last-failed-no-failures none -rA

# Hundreds of kills, full disks and damaged files, each followed by a comparison with the uninterrupted run: some 10
# minutes. make faults RUNS=50 SEED=7
faults: $(INSTALLED)
	$(BIN)/python -m tests.faults --runs $(or $(RUNS),300) --seed $(or $(SEED),0)

# Random inputs to every reader, the same each time, in a minute. Others: make fuzz MINUTES=60 SEED=7
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.faults.fuzz $(if $(MINUTES),--minutes $(MINUTES),--rounds 2) --seed $(or $(SEED),0)

# The arguments of the ops under the sanitizers of the compiler, which builds them in build/sanitized.
fuzz-sanitized: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.faults.sanitized --minutes $(or $(MINUTES),1) --seed $(or $(SEED),0)

# Every study behind docs/results at a tiny size by the same code, and the figures of those pages against their files.
results-check: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.results

# Asks PyPI and OSV for known vulnerabilities of the newest versions that are tested. Fails where one is known, and
# where neither answers; CI calls it with AUDIT=--without-an-answer-too, because a network that is down is no fault.
audit: $(INSTALLED)
	$(BIN)/python .ci/audit.py $(AUDIT)

# Changes nothing. What `make format` cannot mend is for a person.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python .ci/tidy.py

lint: docs

format: $(INSTALLED)
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# build/docs/index.html. A link to a page, a heading or a name that is not there is an error; what stands on other sites
# is not asked, because a build needs no network.
docs: $(DOCS)
	$(BIN)/pydoclint --quiet tlcr
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -E -W --keep-going --nitpicky -b html docs build/docs

# Every op and rival on this machine, in some 10 minutes. On a GPU: python -m benchmarks.ops --device cuda
bench: $(RIVALS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest benchmarks --benchmark-only
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.ops

# docs/benchmarks.md and its plots, from benchmarks/results
bench-report: $(INSTALLED)
	$(BIN)/python -m benchmarks.report

# On a machine with a GPU: tests, compute-sanitizer, timings and a PPO round in 10 minutes, results in build/gpu. Without
# a network, with what is installed in an environment of your own: python -m benchmarks.gpu
gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu

# The path of every step of it at tiny sizes, on any machine.
gpu-in-small: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu --device cpu --minutes 4

# Two commits in alternation: make bench-compare BASE=HEAD~1, or BASE=... HEAD=...; both are built in a folder of their own.
bench-compare: $(INSTALLED)
	$(BIN)/python -m benchmarks.compare $(or $(BASE),$(error name a revision: make bench-compare BASE=HEAD~1)) $(HEAD)

# The three kinds of wheel, each installed alone and tested, the CPU wheel beside two Pythons and two torches. Needs nvcc
# and, in the environment of the lowest versions, a CUDA build of torch, but no GPU.
wheels: $(INSTALLED) $(LOWEST)
	$(BIN)/python .ci/wheels.py $(CURDIR)/$(BIN)/python $(CURDIR)/$(dir $(LOWEST))bin/python

# All tests with the lowest and with the newest versions that pyproject.toml allows: those of .ci/versions, each in an
# environment and a copy of the sources of its own. 8 GB where the package index has CUDA builds of torch.
lowest: $(INSTALLED)
	$(BIN)/python .ci/versions.py lowest
	@touch $(LOWEST)

newest: $(INSTALLED)
	$(BIN)/python .ci/versions.py newest

# The adaptors, each beside the trainer that it is for: make hosts, or make hosts HOST=verl. 2 GB for each environment.
hosts: $(INSTALLED)
	$(BIN)/python .ci/hosts.py $(HOST)

# A real vLLM on the CPU serves discriminators, and every token is compared: 4 GB in .venv-hosts, some minutes.
vllm: $(INSTALLED)
	$(BIN)/python .ci/vllm.py

# A real vLLM on the CPU samples for a policy whose weights move, and every log-probability is compared.
engines: $(INSTALLED)
	$(BIN)/python .ci/engines.py

# Looks up anew which versions these are.
lock: $(INSTALLED)
	$(BIN)/python .ci/versions.py lock

# The environment alone, without compiled kernels: of tests it only asks for the names of a few.
$(LOWEST): .ci/versions/lowest.txt pyproject.toml | $(INSTALLED)
	TLCR_BUILD=none $(BIN)/python .ci/versions.py lowest --collect-only -q tests/ops/test_installation.py
	@touch $@

$(ENVIRONMENT): Makefile
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("tlcr needs python >= 3.10 and this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade 'setuptools>=77' wheel ninja
# torch first and alone: under this pin it is the build that the machine's package index is set up for, CPU or CUDA.
	$(BIN)/python -m pip install 'torch==2.13.0'
# The triton of this torch, which its CUDA builds name and its CPU builds do not.
	$(BIN)/python -m pip install 'triton==3.7.1'
	@touch $@

# Compiles csrc into .venv, what changed only; without a C++ compiler the installation is a pure one, and says so.
$(INSTALLED): $(ENVIRONMENT) pyproject.toml setup.py $(shell find csrc -type f)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -c 'import tlcr; print("tlcr.build_info():", tlcr.build_info())'
	@touch $@

# Other than tlcr and what it needs to be developed: the packages that the benchmarks compare it with.
$(RIVALS): $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --no-build-isolation --editable '.[dev,bench]'
	@touch $@

# What draws the documentation site.
$(DOCS): $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --no-build-isolation --editable '.[dev,docs]'
	@touch $@
