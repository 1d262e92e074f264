# Each target does its own set-up, in .venv or .venv-oldest, and does it again only after pyproject.toml has changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-browser test-oldest slow examples docs package fuzz gpu ray

demo: .venv/core  ## images of every class, and how they take shape, into outputs/
	$(BIN)/detailflow generate --num 1 --progressive --output outputs
	$(BIN)/detailflow generate --model emoji-64 --num 4 --output outputs/emoji

test: .venv/dev  ## what must pass before every commit
	$(BIN)/ruff check
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -q -rs -n 2 --dist worksteal -m "not slow and not example and not browser and not ray"

test-browser: .venv/dev  ## the studio and examples/browser in a real browser; needs Chromium: apt-get install chromium, or CHROMIUM=/path/to/one
	$(BIN)/pytest -q -rs tests/browser

test-oldest: .venv-oldest/dev  ## the tests on the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest -q -rs -n 2 -m "not slow and not browser and not ray"

slow: .venv/dev  ## the tests that take longer
	$(BIN)/pytest -q -m slow

examples: .venv/dev  ## the longer examples and the notebook
	$(BIN)/pytest -q -rs -n 2 --dist worksteal -m example

docs: .venv/docs  ## the site, in build/site; every link in it is checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/hooks/links.py build/site

package: .venv/dev  ## the wheel and the source archive, in dist/; the wheel is installed and generates
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/pytest -q tests/test_package.py

ray: .venv-ray/dev  ## the service on a Ray of this machine with two replicas
	.venv-ray/bin/python -m pytest -q -m ray

fuzz: .venv/dev  ## ten thousand mutated inputs
	$(BIN)/python tests/fuzz --workers 2

ifeq ($(VENV),none)  # with the PyTorch that is installed already: make gpu PYTHON=python3 VENV=none
gpu:
	$(PYTHON) benchmarks/gpu.py
else
gpu: .venv/dev  ## the tests and measurements that need a GPU: under eight minutes, and a report in benchmarks/reports
	$(BIN)/python benchmarks/gpu.py
endif

.venv/core: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e .
	touch $@

.venv/dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	touch .venv/core $@

.venv/docs: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[docs]'
	touch .venv/core $@

.venv-oldest/dev: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q uv
	.venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python --resolution lowest-direct -e '.[dev]'
	touch $@

.venv-ray/dev: pyproject.toml
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/pip install -q -e '.[dev,ray]'
	touch $@
