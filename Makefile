# Needs make, git, bash and Python 3.11 or newer with venv. `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# The first interpreter that is new enough; `make setup PYTHON=/path/to/python` overrides it.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.skiff-setup
JOBS ?= 2
PYTEST_ARGS ?=
# Where the environment forbids it, pytest would rewrite every assertion, and each child compile our packages, every time.
unexport PYTHONDONTWRITEBYTECODE
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
	--no-emit-find-links --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade) pyproject.toml

.PHONY: help setup demo test test-all crash-states lint format bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## create .venv from the hashed locks (again only when they change)

$(STAMP): requirements/dev.txt pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer on the PATH; install one, or run: make setup PYTHON=/path/to/python3" >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is missing or older than Python 3.11; run: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) has no venv/ensurepip; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "creating $(VENV) with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv --clear $(VENV); fi
	@total=$$(grep -cE '^[a-z0-9]' requirements/dev.txt); \
		echo "installing the pinned packages of requirements/dev.txt (up to $$total)"; \
		$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --require-hashes -r requirements/dev.txt \
		| awk -v total="$$total" '/^(Collecting|Processing) /{n++; if (n % 10 == 0) {print "  fetched " n " of " total; fflush()}} \
			/^Installing collected/{print "  installing"; fflush()}'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "ready: $(BIN)/skiff"

demo: $(STAMP) ## the whole loop on this machine (KEEP=1 keeps the work folder, JSON=file writes the result)
	@$(BIN)/skiff demo $(if $(KEEP),--keep) $(if $(JSON),--json $(JSON))

test: $(STAMP) ## the tests, without the long matrices (five minutes on two cores)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP) ## every test, the long matrices and more random examples too (up to an hour on two cores)
	@HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-full} $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

crash-states: $(STAMP) ## start a device on N states that a power cut may leave behind (N=20000, one to five minutes)
	@$(BIN)/python -m tests.support.crash_states $(or $(N),20000)

lint: $(STAMP) ## ruff, mypy and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## rewrite the sources in the house style
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(STAMP) ## peers side by side, one run, ratios
	@$(BIN)/python -m benchmarks

# The host and device locks are resolved under the dev lock, so that all three agree.
lock: $(STAMP) ## resolve the locks again (UPGRADE=1 takes newer versions)
	@$(COMPILE) --extra host --extra dev --output-file requirements/dev.txt
	@$(COMPILE) --extra host --constraint requirements/dev.txt --output-file requirements/host.txt
	@$(COMPILE) --constraint requirements/dev.txt --output-file requirements/device.txt

clean: ## remove .venv, caches and build output
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
