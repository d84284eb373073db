# What one needs to know: `make demo` shows it, `make test` proves it.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
# The versions of a corner.
DJANGO ?= 6.0
POSTGRESQL ?= 16
# More than a machine of two cores has: servers are waited for.
PROCESSES ?= 3
BIN = $(VENV)/bin

PIP = $(BIN)/pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast corner soak long-life django-suite drf-suite mutants lint format docs package package-check wheel-test \
	benchmarks system-packages clean

help:
	@echo "make demo             a site on a primary and two lagging replicas, on http://127.0.0.1:$(PORT)"
	@echo "make test             all tests, real servers included: ten to fifteen minutes"
	@echo "make test-fast        the tests that need no server: a minute and a half"
	@echo "make corner           all tests on PYTHON=…, DJANGO=… and POSTGRESQL=…, by default $(DJANGO) and $(POSTGRESQL)"
	@echo "make mutants          whether the tests notice small changes of central modules: an hour or more"
	@echo "make lint             ruff, mypy and codespell"
	@echo "make format           ruff, changing files"
	@echo "make docs             the documentation, in docs/_build"
	@echo "make package          the sdist and the wheel, in dist"
	@echo "make package-check    their metadata and contents, and the workflows"
	@echo "make soak             clients on real servers under faults, for a minute; SOAK=\"--help\" has the options"
	@echo "make django-suite     Django's own tests on PostgreSQL, with a router and without"
	@echo "make drf-suite        the same with the tests of Django REST framework"
	@echo "make long-life        whether a served site grows, for an hour; LONG_LIFE=\"--help\" has the options"
	@echo "make benchmarks       measurements, among them the figures of the documentation"
	@echo "make system-packages  MariaDB, HAProxy, nginx, PgBouncer, etcd, Chromium, on Debian and Ubuntu"
	@echo "make clean            remove what the others made"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; choose one by PYTHON=…"; exit 1; }
	@echo "Creating $(VENV) …"
	@$(PYTHON) -m venv $(VENV)

# A folder that was not made here may have an older one. The first with --group is 25.1.
$(VENV)/.pip: | $(VENV)/bin/python
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml
	@echo "Installing the demo: about 10 packages …"
	$(PIP) install --editable . --group demo
	@touch $@

$(VENV)/.test: $(VENV)/.pip pyproject.toml
	@echo "Installing the tests: about 150 packages, a minute or two …"
	$(PIP) install --editable . --group test --group lint
	@if pkg-config --exists libmariadb 2>/dev/null || pkg-config --exists mysqlclient 2>/dev/null; \
		then $(PIP) install --group mariadb; \
		else echo "MariaDB's headers are missing: see make system-packages."; fi
	@touch $@

$(VENV)/.docs: $(VENV)/.pip pyproject.toml
	@echo "Installing Sphinx …"
	$(PIP) install --editable . --group docs
	@touch $@

$(VENV)/.release: $(VENV)/.pip pyproject.toml
	@echo "Installing the tools that build and check packages …"
	$(PIP) install --group release
	@touch $@

demo: $(VENV)/.demo
	@PORT=$(PORT) exec $(BIN)/python -m sample_site

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=worksteal $(TESTS)

test-fast: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=worksteal -m "not real" $(TESTS)

corner:
	tests/corner $(PYTHON) $(DJANGO) $(POSTGRESQL) $(TESTS)

mutants: $(VENV)/.test
	$(PIP) install --quiet --group mutants
	$(BIN)/python -m tests.mutants $(MUTANTS)

lint: $(VENV)/.test
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check --no-cache .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/sphinx-build --fail-on-warning --nitpicky --keep-going --quiet docs docs/_build/html

package: $(VENV)/.release
	@rm -rf build dist
	@$(BIN)/python -m build --quiet .
	@ls dist

package-check: package
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/pyproject-fmt --check pyproject.toml
	$(BIN)/zizmor --offline --pedantic .github

wheel-test: package
	tests/against-wheel $(PYTHON) $(TESTS)

soak: $(VENV)/.test
	$(BIN)/python -m tests.soak $(SOAK)

django-suite: $(VENV)/.test
	$(BIN)/python -m tests.other_suites.django $(TESTS)

drf-suite: $(VENV)/.test
	$(BIN)/python -m tests.other_suites.rest_framework $(TESTS)

long-life: $(VENV)/.test
	$(BIN)/python -m tests.long_life $(LONG_LIFE)

benchmarks: $(VENV)/.pip
	$(PIP) install --quiet --editable . --group benchmark
	$(BIN)/python -m benchmarks

system-packages:
	tests/system-packages

clean:
	rm -rf sample_site/.demo .mypy_cache .pytest_cache .ruff_cache build dist docs/_build *.egg-info $(VENV) .venv-*
	find . -name __pycache__ -prune -exec rm -r {} +
