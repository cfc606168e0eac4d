# Two commands: `make run`, `make test`. Everything is installed into .venv, or by `make install` alone.
SHELL  := /bin/bash
PYTHON ?= python3
# The torch to install first, so that nothing else chooses one. A build for CPU only, on Linux:
#   make run TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH  ?= torch==2.13.0
# Arguments of `spry run`:  make run ARGS='--nodes 20 --run-config "num-server-rounds=5"'
ARGS   ?=

BIN := .venv/bin
# Files of tests beside each other, on all cores but no more than four. The slow ones, which measure and break real
# processes, come one by one.
BESIDE := -n logical --maxprocesses 4 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help install run test test-deploy check bench format clean
.DEFAULT_GOAL := help

help:
	@echo "make install     install all of it into .venv"
	@echo "make run         fine-tune a language model on ten virtual devices (ARGS='...' for spry run)"
	@echo "make test        run the tests, but for the slow ones"
	@echo "make test-deploy break a server and nodes on loopback, and see what comes of it (ARGS='--only NAME')"
	@echo "make check       format, lint, types and all tests: what CI runs"
	@echo "make bench       what does a step cost in time and memory? (ARGS='--help' for benchmarks.step)"
	@echo "make format      format the code"
	@echo "make clean       remove .venv, caches and outputs"

install: .venv/installed

run: .venv/installed
	@$(BIN)/spry run $(ARGS)

test: .venv/installed
	@$(BIN)/python -m pytest $(BESIDE)

test-deploy: .venv/installed
	@$(BIN)/python -m pytest -m "" tests/test_deployment.py tests/test_secured_deployment.py
	@$(BIN)/python tests/drills.py $(ARGS)

check: .venv/installed
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest $(BESIDE)
	@$(BIN)/python -m pytest -m slow

bench: .venv/installed
	@$(BIN)/python -m benchmarks.step $(ARGS)

format: .venv/installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Made again whenever what to install has changed.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11, 3.12 or 3.13 is needed (PYTHON=python3.12 make ...)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (a few minutes the first time) ..."
	@$(PIP) install $(TORCH)
	@$(PIP) install --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

clean:
	rm -rf .venv outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
