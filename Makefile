# What one needs to know: `make demo` shows it, `make test` proves it.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
# More than a machine of two cores has: servers are waited for.
PROCESSES ?= 3
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint format wheel wheel-test benchmarks system-packages clean

help:
	@echo "make demo             a site on a primary and two lagging replicas, on http://127.0.0.1:$(PORT)"
	@echo "make test             all tests, real servers included"
	@echo "make lint             ruff and mypy"
	@echo "make format           ruff, changing files"
	@echo "make benchmarks       measurements, among them the figures of the README"
	@echo "make system-packages  MariaDB, HAProxy, PgBouncer, Chromium, on Debian and Ubuntu"
	@echo "make clean            remove what the others made"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; choose one by PYTHON=…"; exit 1; }
	@echo "Creating $(VENV) …"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	@echo "Installing the demo …"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	@echo "Installing the tests …"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@if pkg-config --exists libmariadb 2>/dev/null || pkg-config --exists mysqlclient 2>/dev/null; \
		then $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[mariadb]'; \
		else echo "MariaDB's headers are missing: see make system-packages."; fi
	@touch $@

demo: $(VENV)/.demo
	@PORT=$(PORT) exec $(BIN)/python -m sample_site

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=worksteal $(TESTS)

lint: $(VENV)/.test
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check --no-cache .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# In a folder of its own, so that the package comes from the wheel and not from here.
wheel: $(VENV)/.test
	@rm -rf build dist
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist

wheel-test: wheel
	tests/against-wheel $(PYTHON) $(TESTS)

benchmarks: $(VENV)/bin/python
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[benchmark]'
	$(BIN)/python -m benchmarks

system-packages:
	tests/system-packages

clean:
	rm -rf sample_site/.demo .mypy_cache .pytest_cache .ruff_cache build dist $(VENV) .venv-*
