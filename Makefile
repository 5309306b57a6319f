# Every target sets up what it needs: a virtual environment in .venv with the versions of requirements.lock.
# The machine needs make, Python 3.10 or later (with venv and header files) and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# GPU=1 installs PyTorch's build for NVIDIA's GPUs from PyPI, with the versions of requirements-gpu.lock (docs/gpu.md).
GPU ?=
GPU_INDEX ?= https://pypi.org/simple
INSTALLED := $(VENV)/.installed$(if $(GPU),-gpu)
CODE := cl_dist kernels launch tests benchmarks tools setup.py
# One worker per file, because the tests of a file share the ranks that it starts (tests/conftest.py has their order).
# Three workers keep two cores busy: two would leave a quarter of the time idle while ranks start or wait for each other.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 40
# Releases of Triton that CUDA builds of PyTorch 2.11 and 2.13 pin; requirements-triton.lock has the one of `make test`.
TRITONS ?= 3.6.0 3.7.1
# Interpreters that requirements.lock supports: the oldest supported one, and one that the newest packages support.
LOCK_PYTHONS ?= python3.10 python3.11

# DeepSpeed compiles operators at run time with ninja, which is in the virtual environment.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-all test-triton test-cluster install lint site format lock clean

quickstart: $(INSTALLED)  ## Train a tiny model on four built-in tasks with two ranks, and write its report
	CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu $(BIN)/cl-dist run quickstart --fresh
	@$(BIN)/cl-dist report runs/quickstart >/dev/null
	@echo "report: open runs/quickstart/report/index.html in a browser"

test: $(INSTALLED)  ## Run the tests, except the slow ones
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-triton: $(INSTALLED)  ## Run the tests of the kernels with each Triton that a CUDA build of PyTorch pins
	for version in $(TRITONS); do \
	    test -d $(VENV)/triton-$$version || \
	        $(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/triton-$$version triton==$$version || exit 1; \
	    PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python -m pytest tests/kernels $(PYTEST_ARGS) || exit 1; \
	done

test-cluster: $(INSTALLED)  ## Run jobs on a Slurm cluster that the tests start on this machine; skipped if Slurm is not installed
	$(BIN)/python -m pytest tests/slurm/test_jobs.py $(PYTEST_ARGS)

test-all: $(INSTALLED)  ## Run all tests
	$(PYTEST) $(PYTEST_ARGS)

install: $(INSTALLED)  ## Set up only

lint: $(INSTALLED) site  ## Check style, formatting and types, and that the site builds without a warning
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

site: $(INSTALLED)  ## Build the documentation as a site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(INSTALLED)  ## Fix style and formatting automatically
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

lock:  ## Re-resolve the versions in requirements.lock
	python3 tools/make_lock.py $(LOCK_PYTHONS)

clean:  ## Remove the set-up, caches and build products, but not runs
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(wildcard $(CODE)) -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock requirements-triton.lock requirements-gpu.lock setup.py
	@sh tools/check_machine.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
ifneq ($(GPU),)
	$(BIN)/python -m pip install --quiet --index-url $(GPU_INDEX) --requirement requirements-gpu.lock
	@$(BIN)/python -c "import torch, sys; torch.version.cuda or sys.exit('cl_dist cannot be set up for GPUs: torch \
	in $(VENV) is a build for CPUs; remove $(VENV) and repeat')"
endif
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip show --quiet triton 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --requirement requirements-triton.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
