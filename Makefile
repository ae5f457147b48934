# `make demo` and `make test` need git and Python only; both set up .venv on their first call.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
WEB    := $(VENV)/.web

.PHONY: demo demo-kinds app gpu test test-quick test-slow docs clean

demo: $(READY)
	$(BIN)/python examples/demo/demo.py

demo-kinds: $(READY)
	$(BIN)/python examples/demo/demo_kinds.py

# GPU_ARGS=--small runs every part at its smallest, also without a GPU.
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

# The page of the bundled model and the checkpoint of `make demo`; APP_ARGS are further flags.
app: $(WEB)
	$(BIN)/python examples/app/app.py $(APP_ARGS)

$(WEB): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[flux,app]"
	touch $(WEB)

# One process a core, each with one thread. Each gets a run of whole files, so that tests share
# set-ups, and takes over from the others at the end. PYTEST_ARGS are further flags of pytest,
# QUICK_ARGS those of the quick tests alone.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: test-quick test-slow

test-quick: $(READY)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS) $(QUICK_ARGS)

test-slow: $(READY)
	$(PYTEST) -m slow $(PYTEST_ARGS)

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "moe_lora needs Python 3.10 or newer; name one with make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[flux,dev,docs]"
	touch $(READY)

clean:
	rm -rf $(VENV) outputs docs/_build dist
