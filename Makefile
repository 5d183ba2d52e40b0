# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment with the versions of
# constraints.txt, which were tested together.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: dev demo test test-slow bench check format wheel clean

dev: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rin needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip   # 3.11's venv brings one without --group
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $@

demo: dev
	$(BIN)/rin-server demo --out demo

# Two files at a time: much of the suite waits for processes that it has started.
test: dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: dev
	$(BIN)/python -m pytest -m slow

bench: dev
	$(BIN)/python -m tests.benchmarks.training
	$(BIN)/python -m tests.benchmarks.round_overhead
	$(BIN)/python -m tests.benchmarks.coordinator_memory

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The wheel is tried where nothing of this checkout can help it.
wheel: dev
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/try
	build/try/bin/python -m pip install --quiet --upgrade pip
	build/try/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd / && $(CURDIR)/build/try/bin/rin-client --help >/dev/null && $(CURDIR)/build/try/bin/rin-server --help >/dev/null

clean:
	rm -rf build dist demo *.egg-info
