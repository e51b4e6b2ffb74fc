# All that a machine needs is make and a python3 (3.11 or newer) with venv and pip.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Its date says when .venv was last made to match the two files it depends on.
INSTALLED := $(VENV)/installed

.PHONY: help demo test install clean
.DELETE_ON_ERROR:

help:
	@echo "make demo     train a small model on two CPU ranks (minutes)"
	@echo "make test     format, lint, types and all tests"
	@echo "make install  only make .venv"
	@echo "make clean    remove .venv and what builds and tests left behind"

demo: install
	@$(PY) -m seqpar.launch.demo

test: install
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "seqpar needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV): about a minute, 1.3 GB with a CPU build of torch."
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist seqpar.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
