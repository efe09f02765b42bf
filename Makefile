PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
UV_VERSION := 0.13.9

SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

BIN := $(VENV)/bin
LOCK_VENV := .lock-venv
# Wheels only: building a source package would fetch build tools that no lock names.
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check --require-virtualenv
FROM_LOCK := --require-hashes --only-binary=:all:
CODE := src tests $(wildcard bench)
# Every test process would compile all tests again.
export PYTHONDONTWRITEBYTECODE :=
# Another umask would make an environment that only its builder, or everybody, can change.
UMASK := umask 022

.PHONY: help
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(VENV)/.runtime  ## stop a zone and look at its bundle (KEEP=1 leaves the files)
	@$(BIN)/zone-bundle demo $(if $(KEEP),--keep)

.PHONY: test
test: lint  ## every check and every test
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup $(ARGS)

.PHONY: test-quick
test-quick: $(VENV)/.dev  ## the tests that are not marked slow
	@$(BIN)/python -m pytest -q -m "not slow" -n $(JOBS) --dist loadgroup $(ARGS)

.PHONY: bench
bench: $(VENV)/.dev  ## measure the speeds of docs/design.md, side by side
	@$(BIN)/python -m bench $(ARGS)

.PHONY: lint
lint: $(VENV)/.dev  ## ruff, mypy and the layer rules
	@$(BIN)/ruff check -q $(CODE)
	@$(BIN)/ruff format -q --check $(CODE) || { echo "run 'make format'" >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary $(CODE)
	@out=$$($(BIN)/lint-imports 2>&1) || { printf '%s\n' "$$out" >&2; exit 1; }

.PHONY: format
format: $(VENV)/.dev  ## rewrite the code in the one format
	@$(BIN)/ruff check -q --fix-only $(CODE)
	@$(BIN)/ruff format -q $(CODE)

.PHONY: venv
venv: $(VENV)/.dev  ## the environment in .venv, with everything the tests need

$(BIN)/python:
	@$(UMASK); \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: $(PYTHON) has to be Python 3.11 or newer; name another one with PYTHON=" >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) cannot make environments: install python3-venv (Debian, Ubuntu)" >&2; exit 1; }; \
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.lock pyproject.toml | $(BIN)/python
	@echo "installing requirements.lock in $(VENV)" >&2
	@$(UMASK); $(PIP_INSTALL) $(FROM_LOCK) -r requirements.lock
	@$(UMASK); $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	@echo "installing requirements-dev.lock in $(VENV)" >&2
	@$(UMASK); $(PIP_INSTALL) $(FROM_LOCK) -r requirements-dev.lock
	@touch $@

.PHONY: lock
lock: $(LOCK_VENV)/.uv-$(UV_VERSION)  ## resolve the dependencies again (UPGRADE=1: to their newest versions)
	@UV_CUSTOM_COMPILE_COMMAND="make lock"; export UV_CUSTOM_COMPILE_COMMAND; \
	compile="$(LOCK_VENV)/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links $(if $(UPGRADE),--upgrade)"; \
	$$compile --group build pyproject.toml -o requirements.lock; \
	$$compile --group dev -c requirements.lock pyproject.toml -o requirements-dev.lock

$(LOCK_VENV)/.uv-$(UV_VERSION):
	@$(UMASK); $(PYTHON) -m venv $(LOCK_VENV)
	@$(LOCK_VENV)/bin/python -m pip install -qq --no-input --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

.PHONY: clean
clean:  ## remove everything that was made here
	@rm -rf $(VENV) $(LOCK_VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find src tests $(wildcard bench) -name __pycache__ -type d -prune -exec rm -rf {} +
