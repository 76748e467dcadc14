# Each target installs into .venv first, if necessary. A machine needs Python 3.11 or newer, and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
# Processes that run the tests; all tests of a file run in the same one, because they share models.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help demo test test-all check
.DEFAULT_GOAL := help

help:
	@echo "make demo      run the method in eight minutes: four teachers, one student, four tasks, a page"
	@echo "make test      run the tests that every change must pass (WORKERS=2 processes)"
	@echo "make test-all  run the slow tests too"
	@echo "make check     check lint, format and types"

demo: $(READY)
	$(BIN)/shoulders demo

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp is written last, so that an interrupted installation is repeated.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)
