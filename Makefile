# `make` alone lists what there is. Needs Python 3.11 or newer, make and git; everything else goes into .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Extra arguments: `make test ARGS="-k shards -x"`, `make demo ARGS="clips=1000"`.
ARGS ?=

.PHONY: help
help:  ## show this list
	@echo "usage: make TARGET [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

.PHONY: venv
venv: $(STAMP)  ## make .venv and install the project with everything it needs

# Torch first and pinned: otherwise the resolver may try several builds of it, each of them large.
$(STAMP): pyproject.toml constraints-cpu.txt
	@python=""; \
	for candidate in $(PYTHON) python3 python3.11 python3.12 python3.13; do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "error: needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear $(VENV)
	@echo "installing torch, then the rest, into $(VENV): some minutes, 1.8 GB"
	@$(PIP) install --quiet --constraint constraints-cpu.txt torch
	@$(PIP) install --quiet --constraint constraints-cpu.txt --editable '.[demo,dev]'
	@touch $(STAMP)

.PHONY: demo
demo: $(STAMP)  ## data set, VAE, DiT, clips and figures on moving digits, in runs/ (minutes)
	$(BIN)/sora-lite demo $(ARGS)

.PHONY: test
test: $(STAMP)  ## the tests (minutes)
	$(BIN)/python -m pytest $(ARGS)

.PHONY: test-long
test-long: $(STAMP)  ## the tests that take longer
	$(BIN)/python -m pytest -m "slow and not slurm" $(ARGS)

.PHONY: faults
faults: $(STAMP)  ## the long tests of kills, damage, full disks and hangs
	$(BIN)/python -m pytest -m slow tests/faults $(ARGS)

.PHONY: test-slurm
test-slurm: $(STAMP)  ## the tests on a real Slurm of two nodes on this machine (root on Debian; else skipped)
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

.PHONY: lint
lint: $(STAMP)  ## format, lint and types, without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: format
format: $(STAMP)  ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(STAMP)  ## measure against the plain way to do the same: packing, cuts, decoding, reading, saving, steps
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: wheel
wheel: $(STAMP)  ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist .

.PHONY: clean
clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
