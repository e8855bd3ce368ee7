# Everything starts from a bare clone with python3 and pip: `make test`, `make demo`, `make docs`.

PYTHON ?= python3
# Where torch comes from. By default: the index that pip is configured with, whichever build it serves for the pin
# (PyPI on Linux: the CUDA build, several GB). For the small CPU build:
#     make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
TORCH := $(shell grep '^torch==' constraints.txt)
RUN_PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-deep parity lint check docs docs-serve format clean

help: ## Show these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  \1\t/' | expand -t 14

demo: .venv/.installed ## Run the small ablation on the embedded teacher and write its report
	$(BIN)/mixlab ablate demo --out runs/demo

test: .venv/.installed ## Run all tests
	$(RUN_PYTEST)

test-deep: .venv/.installed ## Run the mixers' tests with 1,000 random examples a check, on every configuration (hours)
	$(RUN_PYTEST) --hypothesis-profile=deep tests/mixers

parity: .venv/.installed ## Install the libraries that ours is compared with (300 MB), and compare
	$(PIP) -c constraints.txt -e '.[test,parity]'
	$(RUN_PYTEST) tests/parity

lint: .venv/.installed-dev ## Check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint ## Formatting, lint, types and the fast tests
	$(RUN_PYTEST) -m "not slow and not gpu"

docs: .venv/.installed ## Build the documentation site into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html, or run: make docs-serve"

docs-serve: .venv/.installed ## Serve the documentation at http://127.0.0.1:8000 and rebuild it on every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: .venv/.installed-dev ## Format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the environment, caches and build outputs (runs/ is kept)
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch goes first, so that TORCH_INDEX serves torch (and what it needs) and nothing else.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) -c constraints.txt -e '.[test]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
