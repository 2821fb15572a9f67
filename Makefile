# The two commands a newcomer needs are `make demo` and `make test`. Both work on a machine that has only
# Python 3.10+, make and git; a second run reuses .venv and starts at once.
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 7860
JOBS   ?= 2
PYTEST_ARGS ?=

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-interop lint docs benchmark chromium clean

help:  ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Reinstalled only when what is asked for changes. uv does the installing (it is several times faster than pip and
# keeps a cache that later clones share); the pins are in constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'vishub needs Python 3.10 or newer: make PYTHON=/path/to/python3.x ...'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo 'Could not make $(VENV): on Debian and Ubuntu install python3-venv first.'; exit 1; }
	@echo 'Installing vishub and what it needs into $(VENV) (some minutes the first time) ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@UV_LINK_MODE=$${UV_LINK_MODE:-hardlink} VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet \
		--compile-bytecode --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## set up everything and serve the demo: make demo [HOST=127.0.0.1] [PORT=7860]
	@$(BIN)/vishub demo --host $(HOST) --port $(PORT)

test: $(STAMP) chromium  ## set up everything and run the whole suite: make test [JOBS=2] [PYTEST_ARGS='-k favit']
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

test-interop: $(STAMP)  ## test our models in segmentation_models.pytorch, transformers, ONNX Runtime, torch.compile
	@VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --constraint constraints.txt --editable '.[interop]'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m interop tests/interop $(PYTEST_ARGS)

lint: $(STAMP)  ## style, imports and types
	@$(BIN)/ruff check .
	@$(BIN)/mypy

docs: $(STAMP)  ## build the documentation into artifacts/site, with warnings as errors
	@VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'artifacts/site/index.html'

# Those that can run by themselves: with a main, and without an option that must be given (a folder of a training run).
benchmark: $(STAMP)  ## measure speed; tables and plots go to benchmarks/results
	@for script in $$(grep -l '__main__' benchmarks/*.py | xargs grep -L 'required=True'); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# The browser tests drive the system's Chromium. Where the package manager may not be used the tests say what is missing.
chromium:
	@sh .ci/install-chromium

clean:  ## remove the environment and everything that is made again
	rm -rf $(VENV) build dist artifacts .pytest_cache .mypy_cache .ruff_cache *.egg-info
