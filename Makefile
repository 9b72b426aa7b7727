# Two commands, each of which does all the set-up on a fresh machine (Python 3.11 or newer and its venv module):
#
#   make demo   the main job on made-up head CTs: train on two devices, predict, evaluate, report.html
#   make test   every check that a change must pass
#
# `make demo PYTHON=python3.12` chooses the interpreter, `make clean` removes what was set up.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

setup: $(STAMP)

# torch comes first and by its exact pin: resolving a range may fetch several releases of gigabytes each.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --editable '.[dev,bench]' --constraint constraints.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/lamp3d demo

# One thread a process: the workers of the distributed tests share the cores.
test: export OMP_NUM_THREADS := 1
# Some libraries change the process's locale, and with it what the tests' files are read as.
test: export PYTHONUTF8 := 1
# Every worker is a new interpreter; none should compile lamp3d anew.
test: export PYTHONDONTWRITEBYTECODE :=
# On the CPU, with as many workers as a test wants, files that take long first; then what needs a GPU, where there is one.
test: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/lint-imports
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/cuda
	$(BIN)/pytest tests/cuda

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
