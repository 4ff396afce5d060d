# Each target does its own set-up: a virtual environment in .venv, pinned packages, fastdit itself.
PYTHON ?= python3
PROMPT ?= a red circle moving right
BIN := .venv/bin

.PHONY: render quick test check clean

render: .venv/.ready
	$(BIN)/fastdit render "$(PROMPT)" --seed 1 --frames 33 --height 256 --width 256 --compare --out renders --overwrite

# Tests run in JOBS processes of one thread each (JOBS=0: in pytest's own): as many as cores, at most 8.
JOBS ?= logical
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 8
# What most changes break. Left out: whatever is asked of every model family or scheduler, processes, compilation.
QUICK := $(addprefix tests/,core policies planning approx runs attach reporting test_api.py test_config.py test_end_to_end.py \
	test_ops.py test_schedule.py kernels/test_cpu.py kernels/test_cpu_options.py)
LONG := $(addprefix --ignore tests/,attach/test_guiders.py attach/test_interplay.py attach/test_seam.py runs/test_noise_level.py)

quick: .venv/.ready
	$(PYTEST) -m "not slow and not process and not compile" $(QUICK) $(LONG)

test: .venv/.ready
	$(PYTEST)

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
