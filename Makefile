# Each target does its own set-up, in .venv or .venv-oldest, and does it again only after pyproject.toml has changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-oldest slow fuzz

demo: .venv/core  ## images of every class, and how they take shape, into outputs/
	$(BIN)/detailflow generate --num 1 --progressive --output outputs

test: .venv/dev  ## what must pass before every commit
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -q -rs -n 2 -m "not slow"

test-oldest: .venv-oldest/dev  ## the tests on the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest -q -rs -n 2 -m "not slow"

slow: .venv/dev  ## the tests that take longer
	$(BIN)/pytest -q -m slow

fuzz: .venv/dev  ## ten thousand mutated inputs
	$(BIN)/python tests/fuzz --workers 2

.venv/core: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e .
	touch $@

.venv/dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	touch .venv/core $@

.venv-oldest/dev: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q uv
	.venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python --resolution lowest-direct -e '.[dev]'
	touch $@
