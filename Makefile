# make demo and make test do all the set-up; VENV= names another virtual environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# of test-oldest
OLDEST ?= .venv-oldest
STAMP := $(VENV)/.timm-cascade-installed

.PHONY: demo test test-all test-oldest lint docs wheel clean

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(STAMP) lint
	$(BIN)/python -m pytest

# the default tests with the lowest versions that pyproject.toml admits
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n 2 -m "not slow"

$(OLDEST)/.installed: pyproject.toml .ci/lowest
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	.ci/lowest > $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/lowest.txt -e ".[test]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff format --check timm_cascade scripts tests
	$(BIN)/ruff check timm_cascade scripts tests
	$(BIN)/mypy

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml
	@echo "build/site/index.html"

$(STAMP)-docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

# builds, checks and installs the distribution, and runs the quickstart from it
wheel: $(STAMP)
	.ci/wheel $(BIN)/python

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache
