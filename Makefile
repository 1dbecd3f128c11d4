# Every target works on a fresh clone with Python >= 3.11 and make alone; PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint docs oldest newest audit clean

help:
	@echo "make demo    train, profile, optimize and plot at small size: minutes on a laptop"
	@echo "make test    run the tests (ARGS='-m slow' for the slow ones)"
	@echo "make lint    ruff (rules and format) and mypy"
	@echo "make docs    documentation, notebooks with their figures and API reference in build/docs (SHORT=1: tiny runs)"
	@echo "make venv    create $(VENV) with gradscope and the development tools"
	@echo "make oldest  the tests under the oldest versions allowed (gigabytes: CUDA builds of torch); newest likewise"
	@echo "make audit   look the tested versions up among known vulnerabilities (needs the network)"
	@echo "make clean   remove $(VENV), caches and build outputs"
	@echo "             PYTHON=python3.12 picks the interpreter that creates $(VENV)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gradscope needs Python 3.11 or newer: pass PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "could not create $(VENV) with '$(PYTHON) -m venv': install its venv module (Debian: python3-venv) or pass another PYTHON"; \
		exit 1; }

# A stamp is newer than its inputs exactly when what they ask for is installed. BackPACK, an oracle of the tests,
# comes without its dependencies: it asks for torchvision, which nothing that the tests use imports.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps backpack-for-pytorch
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/.installed

venv: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	$(BIN)/gradscope demo $(ARGS)
	@echo "to go on by hand: source $(BIN)/activate"

# tests keep to one thread each, so several run side by side
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(if $(SHORT),GRADSCOPE_SHORT=1) $(BIN)/python docs/pages.py

# Other versions may warn of what is to come; oracles, integrations and notebooks are left to the tested ones.
oldest newest:
	$(PYTHON) -m venv build/$@
	build/$@/bin/python -m pip install --quiet --upgrade $(if $(filter oldest,$@),-c constraints-oldest.txt) -e . \
		pytest pytest-xdist hypothesis
	build/$@/bin/python -m pytest -o filterwarnings=default --numprocesses auto --maxprocesses 4 \
		--dist worksteal $(ARGS)

audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find gradscope schedulers benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
