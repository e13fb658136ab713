# `make demo` and `make test` do all their own set-up: they need Python 3.11 or later, and make.
#
#   PYTHON=python3.12     another interpreter for the virtual environment
#   TORCH_INDEX=...       where to look for torch besides the default index. On a machine without
#                         a GPU give PyTorch's CPU wheel index: the default build brings gigabytes
#                         of CUDA libraries
#   JOBS=2                test processes that run side by side

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
READY := $(VENV)/.ready

# Processes of the tests start in half the time where bytecode is kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test slow lint format check wheel clean

help:
	@echo "make demo    lower, tune, compile and run the built-in model"
	@echo "make test    the tests, without the slow ones"
	@echo "make slow    the slow tests"
	@echo "make lint    style, types and the floors of the architecture"
	@echo "make check   lint and test"
	@echo "make format  let ruff rewrite what it can"
	@echo "make wheel   dist/*.whl, by way of the source distribution"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or later is needed; $(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
			"Name one with make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once, and again after a change of pyproject.toml or constraints.txt)"
	$(PIP) setuptools
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) --no-build-isolation --editable ".[compile,dev,predict,ray]"
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS)

slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not alone" -n $(JOBS)
	$(BIN)/python -m pytest -m "slow and alone"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

wheel: $(READY)
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
