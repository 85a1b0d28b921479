# Everything runs in .venv, which the first command makes: Python 3.11 or newer, pip and make are enough.
.DEFAULT_GOAL := help
.PHONY: help demo test lint clean
MAKEFLAGS += --no-print-directory

# The first that runs and is new enough; 3.11 before others, for that is what constraints.txt was tested with.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

BIN := .venv/bin
INSTALLED := .venv/installed
# One thread for each worker: two workers with two threads each only wait for one another.
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

help:
	@echo "make demo    fine-tune a small model and watch it move (about 3 minutes; ARGS='--help' for more)"
	@echo "make test    all checks: lint, types, tests"
	@echo "make lint    ruff and mypy alone"
	@echo "make clean   remove .venv and caches"
	@echo
	@echo "PYTHON=python3.12 takes another Python for .venv, WORKERS=8 runs that many tests at once."
	@echo "Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of download."

demo: $(INSTALLED)
	@$(BIN)/diffsensor demo $(ARGS)

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rfEs -n $(WORKERS) $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "Not formatted as above. Run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy --no-error-summary

clean:
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip 25.1 was the first to know --group, and Python 3.11 brings an older one.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "PYTHON=$(PYTHON) does not run, or is older than Python 3.11. Name another: make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make a .venv (on Debian and Ubuntu: apt install python3-venv)."; rm -rf .venv; exit 1; }
	@echo "Installing into .venv, once (a minute or more) ..."
	@$(BIN)/python -m pip install --quiet -c constraints.txt pip
	@$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[all]' --group dev
	@touch $@
