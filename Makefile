# What a person, and the continuous integration, runs. `make` alone lists it.
# Needs python3 (3.11 or newer) and pip; everything else goes into .venv in this folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=
# Two files of tests at a time, or four: many wait for processes of their own. More would need gigabytes for torch.
# A process of tests that dies ends the run and names its test: another in its place has been seen to wait for ever.
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 4 --max-worker-restart 0 --dist loadfile

.PHONY: help setup demo test test-slow test-all check lock clean
.DEFAULT_GOAL := help

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## make .venv and install everything into it (quick when nothing changed)

# Debian splits ensurepip off into python3-venv; without it the environment gets pip from the machine's own pip.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Graft needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) 2>/dev/null \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $@ install pip; }

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: setup  ## upload real pictures, train, predict, serve until Ctrl-C (ARGS=--exit ends instead)
	@$(BIN)/graft demo $(ARGS)

test: setup  ## every test but the slow ones (ARGS is passed to pytest)
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: setup  ## the tests that take minutes
	$(PYTEST) -m slow $(ARGS)

test-all: setup  ## every test
	$(PYTEST) $(ARGS)

check: setup  ## formatting, lint, types, the Dockerfile, and which package may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; fi
	$(BIN)/python -m pytest -q tests/test_import_directions.py

lock:  ## refresh constraints.txt with today's newest versions that work together
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --disable-pip-version-check '.[demo,dev,postgres]'
	sed -n '/^#/p' constraints.txt > build/constraints.txt
	build/lock/bin/python -m pip freeze --exclude graft >> build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:  ## remove what the tools left behind; data and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find app worker migrations tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
