# Every target sets up what it needs: a virtual environment in .venv with the versions of requirements.lock.
# Needed on the machine: make, Python 3.10 or later (with venv and its header files) and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := cl_dist kernels launch tests benchmarks tools setup.py
# Each file on one worker: a file's tests share the ranks that it starts. Three of them fill two cores: ranks that start
# and ranks that wait for each other leave a quarter of two workers' time idle.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
# Interpreters that requirements.lock serves: the oldest one supported, and one that the newest packages support.
LOCK_PYTHONS ?= python3.10 python3.11

# What DeepSpeed compiles at run time it builds with ninja, which lies in the virtual environment.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-all test-cluster install lint format lock clean

quickstart: $(INSTALLED)  ## Train a tiny model on four built-in tasks with two ranks
	CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu $(BIN)/cl-dist run quickstart --fresh

test: $(INSTALLED)  ## The tests, but the slow ones
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-cluster: $(INSTALLED)  ## Jobs on a Slurm cluster that the tests bring up on this machine; skipped where Slurm is not installed
	$(BIN)/python -m pytest tests/slurm/test_jobs.py $(PYTEST_ARGS)

test-all: $(INSTALLED)  ## All tests
	$(PYTEST) $(PYTEST_ARGS)

install: $(INSTALLED)  ## The set-up alone

lint: $(INSTALLED)  ## Style, formatting and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(INSTALLED)  ## Repair style and formatting where a program can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

lock:  ## Choose the versions in requirements.lock anew
	python3 tools/make_lock.py $(LOCK_PYTHONS)

clean:  ## Remove the set-up, caches and build products; runs stay
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(wildcard $(CODE)) -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock requirements-triton.lock setup.py
	@sh tools/check_machine.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip show --quiet triton 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --requirement requirements-triton.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
