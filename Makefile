# `make demo` and `make test` do all their own set-up: virtual environment, constrained install, run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Threads of torch that wait must not take time from those that work: cores are few and shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow test-gpu-stack test-compiled
demo: $(VENV)/.installed
	$(BIN)/python -m cosa_fast.demo

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# What takes too long for every change: as many fuzzed inputs of each kind as COSA_FAST_DEEP_EXAMPLES says (2000), and
# as many kills of runs as COSA_FAST_DEEP_KILLS (200).
test-slow: $(VENV)/.installed
	HF_HUB_OFFLINE=1 COSA_FAST_DEEP=1 $(BIN)/python -m pytest tests/fuzz tests/faults

# The software of GPU machines, older than that of constraints.txt, in an environment of its own: the kernels and the
# engine in the interpreter and on fake CUDA tensors, the GPU check's dry run, the kernels compiled for an H100.
STACK ?= .venv-gpu-stack
test-gpu-stack: $(STACK)/.installed
	HF_HUB_OFFLINE=1 $(STACK)/bin/python -m pytest tests/kernels tests/engine tests/bench/gpu -m "not slow"
	$(STACK)/bin/python bench/kernels.py --static --quick --architectures sm_90 --out $(STACK)/kernels_static.json

$(STACK)/.installed: bench/gpu/stack.txt
	$(PYTHON) -m venv $(STACK)
	$(STACK)/bin/python -m pip install --quiet -r bench/gpu/stack.txt
	touch $@

# The kernels' own tests on compiled kernels, executed on this CPU: real warps, barriers and shared memory, at the launch
# shapes of an H100. x86-64 and Python 3.11; takes hours, as every specialisation is compiled for itself.
COMPILED ?= .venv-compiled
test-compiled: $(COMPILED)/.installed
	$(COMPILED)/bin/python -m bench.compiled.check --out bench/results/kernels_compiled.json

$(COMPILED)/.installed: bench/compiled/requirements.txt
	$(PYTHON) -m venv $(COMPILED)
	$(COMPILED)/bin/python -m pip install --quiet -r bench/compiled/requirements.txt
	touch $@

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
