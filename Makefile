PYTHON ?= python3
# The CPU or CUDA build that pip finds; `make test TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest release of transformers that works, in an environment of its own.
FLOOR ?= transformers==5.15.0
FLOOR_VENV ?= .venv-floor

.PHONY: demo test test-floor quality

demo: $(VENV)/.installed
	$(BIN)/hf-poss demo

# A process a core, each with one thread.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto tests

# What touches `generate` and Trainer, against the oldest release; the rest is tested once.
FLOOR_TESTS := $(filter-out tests/test_package.py,$(wildcard tests/test_*.py)) tests/training \
	$(addprefix tests/evaluation/test_,$(addsuffix .py,benchmark_runs contestants drafters drift passes rehearsal runner))

test-floor: $(FLOOR_VENV)/.installed
	OMP_NUM_THREADS=1 $(FLOOR_VENV)/bin/python -m pytest --numprocesses=auto $(FLOOR_TESTS)

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first: what depends on it would otherwise choose a build of its own.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(FLOOR_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(FLOOR_VENV)
	$(FLOOR_VENV)/bin/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(FLOOR_VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]' '$(FLOOR)'
	touch $@
