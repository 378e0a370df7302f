# Everything happens in a virtual environment of its own; a bare machine needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
EXTRAS ?= dev
CONSTRAINTS ?=
# Compiling all 20,000 files takes a minute, and few of them are ever imported: Python compiles those itself.
PIP = $(BIN)/python -m pip install --quiet --no-compile
# uv finds the versions that go with the oldest ones in seconds; pip takes longer than the suite.
INSTALL = $(if $(CONSTRAINTS),$(PIP) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS),$(PIP))

.PHONY: help demo docs gpu test test-long test-lowest lint types smoke check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

demo: $(VENV)/.installed  ## train, evaluate, export, serve and ask, in a few minutes; writes to demo-output/
	rm -rf demo-output
	$(BIN)/python examples/demo.py demo-output

docs: $(VENV)/wheel/ensembler  ## the documentation as a site in site/; writes docs/cli.md from the commands
	$(BIN)/python .ci/cli_reference.py
	NO_MKDOCS_2_WARNING=1 ENSEMBLER_PACKAGE=$(VENV)/wheel $(BIN)/python -m mkdocs build --strict

test: $(VENV)/.installed-dev  ## the test suite
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.installed-dev  ## the tests that take minutes: every fault, many times
	$(BIN)/python -m pytest -m long

test-lowest:  ## the test suite with the oldest libraries that pyproject.toml allows; they have wheels for Python 3.11 and 3.12
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=.ci/lowest.txt EXTRAS=dev,gcs,s3,tensorboard

gpu:  ## what a machine with a GPU must show, in 8 minutes, with the python that is there; writes gpu.json
	PYTHONPATH=$(CURDIR) $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py --json gpu.json

lint: $(VENV)/.installed-dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/wheel/ensembler  ## mypy on the built wheel, from outside the source tree, and on a user's script
	cd $(VENV)/wheel && MYPYPATH=. ../bin/mypy --config-file $(CURDIR)/pyproject.toml -p ensembler
	cd $(VENV)/wheel && MYPYPATH=. ../bin/mypy --config-file= --strict --follow-imports=silent $(CURDIR)/tests/_typed.py

smoke: $(VENV)/wheel/ensembler  ## the built wheel goes the demo's way, with less training, from a temporary folder
	sh .ci/smoke "$(abspath $(BIN))/python" "$(abspath $(VENV))/wheel"

check: lint types smoke docs test  ## what CI runs

clean:  ## remove what was built, not what was trained
	rm -rf build site *.egg-info $(VENV)/wheel .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ensembler needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) --editable '.[$(EXTRAS)]'
	touch $@ $(VENV)/.installed

$(VENV)/wheel/ensembler: $(VENV)/.installed-dev $(shell find ensembler trainers eval study serve -type f -not -name '*.pyc')
	rm -rf $(VENV)/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(VENV)/wheel .
	$(PIP) --no-deps --target $(VENV)/wheel $(VENV)/wheel/*.whl
	rm -rf build
