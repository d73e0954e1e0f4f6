# `make demo` and `make test` do all their own set-up: virtual environment, constrained install, run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Threads of torch that wait must not take time from those that work: cores are few and shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test
demo: $(VENV)/.installed
	$(BIN)/python -m cosa_fast.demo

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
