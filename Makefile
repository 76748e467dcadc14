# Every target sets up .venv by itself: Python 3.11 or newer and make are all a machine needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-all check
.DEFAULT_GOAL := help

help:
	@echo "make demo      the whole idea in five minutes: a student, four tasks, a page"
	@echo "make test      the tests that a change has to pass"
	@echo "make test-all  the slow ones too"
	@echo "make check     lint, format and types"

demo: $(READY)
	$(BIN)/shoulders demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp is written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)
