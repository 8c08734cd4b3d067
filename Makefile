# What a person, and the continuous integration, runs. `make` alone lists it.
# Needs python3 (3.11 or newer) and pip; everything else goes into .venv in this folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=
SECONDS ?= 600
# How many files of tests at a time, tests/conftest.py says.
# A process of tests that dies ends the run and names its test: another in its place has been seen to wait for ever.
PYTEST = $(BIN)/python -m pytest -n auto --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

# For every platform and every Python from 3.11 on.
TOOLS := build/tools
COMPILE = $(TOOLS)/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate \
	--quiet --custom-compile-command "make lock"

# Where known vulnerabilities are asked for; and whether it says that a version has some that is known to.
ADVISORIES ?= https://api.osv.dev/v1/query
HAS_ADVISORIES = curl --silent --max-time 5 --data \
	'{"version": "9.0.0", "package": {"name": "pillow", "ecosystem": "PyPI"}}' $(ADVISORIES) | grep -q '"vulns"'

# Tests start hundreds of processes, each of which would compile Graft anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-slow test-all fuzz check docs types lock audit audit-online sbom clean
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

# Exact versions, each file held against its sha256. Of the lock comes setuptools too, which Graft itself is built with.
$(INSTALLED): pyproject.toml requirements-dev.lock | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup  ## upload real pictures, train, predict, serve until Ctrl-C (ARGS=--exit ends instead)
	@$(BIN)/graft demo $(ARGS)

test: setup  ## every test but the slow ones (ARGS is passed to pytest)
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: setup  ## the tests that take minutes
	$(PYTEST) -m slow $(ARGS)

test-all: setup  ## every test
	$(PYTEST) $(ARGS)

# atheris is in no lock file: its newest version has files for newer Pythons alone, and the one before for older ones.
fuzz: setup  ## fuzz the doors for archives, pictures and /v2 by coverage, SECONDS (600) each; see tests/fuzz/run.py
	$(BIN)/python -m pip install --disable-pip-version-check 'atheris>=3.0'
	for target in archive picture open_inference; do \
		nice -n 15 $(BIN)/python tests/fuzz/run.py $$target --seconds $(SECONDS) || exit 1; done

check: setup  ## formatting, lint, types, the Dockerfile, imports, licences, the types for TypeScript, `audit` if online
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; fi
	$(BIN)/python -m pytest -q $(addprefix tests/,test_import_directions.py test_supply_chain.py client/test_typescript_types.py)
	@$(MAKE) --no-print-directory audit-online

docs: setup  ## build the documentation's pages into build/site; a link that leads nowhere ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

types: setup  ## write the API's types for TypeScript anew, where routes or bodies have changed; needs node
	$(BIN)/python clients/typescript/generate.py

lock: $(TOOLS)/.installed  ## refresh the lock files with today's newest versions that work together
	$(COMPILE) --upgrade --all-extras -o requirements-dev.lock
	$(COMPILE) -c requirements-dev.lock --extra demo --extra postgres -o requirements.lock

audit: $(TOOLS)/.installed  ## ask for known vulnerabilities of what an installation has; needs the internet
	$(TOOLS)/bin/pip-audit --strict --disable-pip --vulnerability-service osv --osv-url $(ADVISORIES) -r requirements.lock

audit-online:
	@if $(HAS_ADVISORIES); then $(MAKE) --no-print-directory audit; \
		else echo "make audit is skipped: $(ADVISORIES) told of no vulnerability within 5 s; no internet, or no curl?"; fi

sbom: $(TOOLS)/.installed  ## write build/sbom.json, what an installation is made of (CycloneDX)
	$(TOOLS)/bin/cyclonedx-py requirements requirements.lock --output-reproducible -o build/sbom.json

$(TOOLS)/.installed:
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@touch $@

clean:  ## remove what the tools left behind; data and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find app graft_client worker migrations tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
