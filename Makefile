PYTHON ?= python3
# The CPU or CUDA build that pip finds; `make test TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test quality

demo: $(VENV)/.installed
	$(BIN)/hf-poss demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first: what depends on it would otherwise choose a build of its own.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
