# The commands of this repository; `make help` lists them. CONTRIBUTING.md says when to use which.

# On Linux, a plain `torch` from PyPI brings several gigabytes of CUDA libraries that the CPU tests do not need. To take
# the CPU build from PyTorch's own index: make demo TORCH="torch==2.13.0 --index-url <its CPU index>"
TORCH ?= torch==2.13.0
# The interpreter to build .venv with; if empty, scripts/find-python looks for one.
PYTHON ?=
# Test processes.
JOBS ?= 2
PYTEST_ARGS ?=

RUFF = ruff==0.17.6
PYRIGHT = pyright==1.1.414

export PYTHON

.PHONY: help venv demo test test-nightly test-gpu test-newest lint format clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

venv:
	@scripts/bootstrap .venv 3.11 demo,test -- $(TORCH)

demo: venv ## compare the norms bit by bit; writes demo/out/rounding.png
	@.venv/bin/python -m demo

test: venv ## every test that needs no GPU
	.venv/bin/python -m pytest -n $(JOBS) -m "not gpu and not nightly" $(PYTEST_ARGS)

test-nightly: venv ## the long tests that need no GPU
	.venv/bin/python -m pytest -n $(JOBS) -m "nightly and not gpu" $(PYTEST_ARGS)

test-gpu: venv ## the tests that need an NVIDIA GPU (compute capability 9.0 or newer) and a CUDA jax in .venv
	.venv/bin/python -m pytest -m gpu $(PYTEST_ARGS)

test-newest: ## the core tests, without torch, under the newest supported JAX (needs Python >= 3.12)
	@scripts/test-newest -n $(JOBS) $(PYTEST_ARGS)

lint: venv ## ruff check, ruff format --check, pyright
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check $(RUFF) $(PYRIGHT)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright --warnings

format: venv ## apply ruff's fixes and format
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check $(RUFF)
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean: ## remove the environments and everything generated
	rm -rf .venv .venv-newest dist demo/out .pytest_cache .ruff_cache .hypothesis
