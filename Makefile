# Each target does its own set-up: a virtual environment in .venv, pinned packages, fastdit itself.
PYTHON ?= python3
PROMPT ?= a red circle moving right
BIN := .venv/bin

.PHONY: render test check clean

render: .venv/.ready
	$(BIN)/fastdit render "$(PROMPT)" --seed 1 --frames 33 --height 256 --width 256 --compare --out renders --overwrite

test: .venv/.ready
	$(BIN)/python -m pytest -q

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastdit needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "setting up .venv (once)"
	@start=$$(date +%s) && $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[test]" && echo "set-up took $$(($$(date +%s) - start)) s" && touch $@

clean:
	rm -rf .venv renders
