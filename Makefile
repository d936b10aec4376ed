# Each target is one line of the command line or of a test runner; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
DEVICE ?= auto
.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' Makefile | expand -t 16

.PHONY: setup
setup: .venv/installed ## create .venv and install the pinned dependencies

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); fix: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: demo
demo: setup ## train, pack, verify and serve the digits, ask for every test image over HTTP, compare, stop
	@$(BIN)/marina demo

.PHONY: serve
serve: setup ## serve what is in model_store/ until Ctrl-C
	@$(BIN)/marina serve

.PHONY: up
up: setup ## serve model_store/ in containers behind the gateway, with monitoring (DEVICE=cpu|gpu, GATEWAY_PORT=8000)
	@$(BIN)/marina up --device $(DEVICE)

.PHONY: down
down: setup ## drain and stop the containers, leave nothing behind
	@$(BIN)/marina down

.PHONY: logs
logs: setup ## follow the containers' logs
	@$(BIN)/marina logs --follow

.PHONY: test
test: setup ## run all tests (TESTS="FOLDER ..." some); a tier whose tools are missing is skipped with the reason (and fails when CI is set)
	$(PYTEST) $(TESTS)

.PHONY: test-fast
test-fast: setup ## run the tests that need no server
	$(PYTEST) tests/unit tests/property tests/archive

.PHONY: bench
bench: setup ## compare with other servers on this machine (45 minutes, nothing else running); DEVICE=cpu|gpu, DATA=CIFAR10_JPEGS
	$(BIN)/python -m benchmarks --device $(if $(filter auto,$(DEVICE)),cpu,$(DEVICE)) $(if $(DATA),--data-root $(DATA))

.PHONY: chaos
chaos: setup ## measure the promises under faults (nothing else running); CHAOS="--quick", "--soak 10", "--cycles 200"
	$(BIN)/python -m benchmarks.chaos $(CHAOS)

.PHONY: check
check: setup ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.PHONY: clean
clean: ## remove the environment and caches; runs, artifacts and archives stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
