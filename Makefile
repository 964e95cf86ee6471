# `make run` shows the testbed at work, `make test` runs every check, `make bench` measures. All need only Python 3.11 or
# newer: they set up .venv in this folder first, and again when pyproject.toml or constraints.txt has changed.
#     make PYTHON=/path/to/python3.12 run
#     make PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu' run      torch without CUDA

SHELL := bash
.PHONY: run test test-compiled bench compiled format clean

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
# The pinned release by name: a local build of it (2.13.0+cpu) is taken where pip is offered one.
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)

run: $(STAMP)
	$(BIN)/deepflow demo

test: export OMP_WAIT_POLICY = passive
test: export HF_HUB_OFFLINE = 1
test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest
	@if command -v cc > /dev/null; then $(MAKE) --no-print-directory test-compiled; \
	else echo "no C compiler: the compiled core was not tested"; fi

# The same tests on the compiled core, of what is compiled.
test-compiled: compiled
	DEEPFLOW_COMPILED=1 $(BIN)/pytest tests/core tests/control tests/golden tests/policies tests/sim/test_coalesced.py \
	    tests/sim/test_network.py tests/sim/test_sim_lifecycle.py

# All that this machine can measure, in about 15 minutes on two idle cores; writes experiments/data/bench and README.md.
bench: $(STAMP)
	$(BIN)/deepflow bench

# The torch-free core compiled by mypyc, for runs with DEEPFLOW_COMPILED=1: about twice as fast. Needs a C compiler.
compiled: $(STAMP)
	$(BIN)/python -m experiments.compiled > build-compiled.log 2>&1 || { tail -n 20 build-compiled.log >&2; exit 1; }
	@rm -f build-compiled.log

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Caches and build products. The environment and the results in runs/ and multirun/ stay.
clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v '$(PYTHON)' >/dev/null || { echo "$(PYTHON) is not there: DeepFlow needs Python 3.11 or newer, name one with make PYTHON=..." >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$('$(PYTHON)' -V): DeepFlow needs Python 3.11 or newer, name one with make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/pip || '$(PYTHON)' -m venv .venv
	@echo "Installing into .venv: about 2 minutes and 3 GB the first time, one dot per package"
	@set -o pipefail; PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --progress-bar off $(PIP_FLAGS) \
	    -c constraints.txt '$(TORCH)' -e '.[dev]' 2>&1 | tee .venv/install.log | while IFS= read -r line; do \
	    case "$$line" in Collecting*|Processing*) printf . ;; 'Installing collected'*) printf ' installing' ;; esac; done \
	    || { echo; tail -n 20 .venv/install.log >&2; exit 1; }
	@echo
	@touch $(STAMP)
