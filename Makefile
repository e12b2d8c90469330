# Everything runs from nothing: the first target that needs an environment makes it, later ones find it there.
# PYTHON=/path/to/python3 names the interpreter; otherwise scripts/find-python looks for one.
# TORCH is what pip installs before anything that depends on torch. Where that would be a CUDA build of several gigabytes, name
# the CPU build instead: make demo TORCH='--index-url <the index that pytorch.org gives for CPU> torch==2.13.0'
TORCH ?= torch==2.13.0
MINIMUM := 3.11
TESTS := .venv/bin/python -m pytest -n 2 -m 'not gpu and not nightly and not slow' --profile quick
ALL_TESTS := .venv/bin/python -m pytest -n 2 -m 'not gpu and not nightly'
# Of every property one case: every case has run with the oldest JAX. make test-newest CASES='not gpu and not nightly' runs them all.
CASES := not gpu and not nightly and not slow
export PYTHON

.PHONY: help demo test test-all coverage test-nightly test-gpu evidence test-gpus test-newest lint docs smoke install install-docs install-lint install-gpu clean

help:
	@echo 'make demo          compare the norms bit by bit on real-sized activations; writes demo/out/bits.png'
	@echo 'make test          the tests that need no GPU, but for the slow ones (docs/testing.md); minutes'
	@echo 'make test-all      every test that needs no GPU'
	@echo 'make coverage      make test-all, and which lines and branches it leaves out'
	@echo 'make test-nightly  the tests that are too long for every push'
	@echo 'make test-gpu      the tests that need an NVIDIA GPU of compute capability 9.0 or newer'
	@echo 'make test-gpus     the tests that need two of them in one host; under five minutes'
	@echo 'make evidence      the result files that docs show, on a GPU, of this commit; again: goes on'
	@echo 'make test-newest   those of make test that need no torch, with the newest supported JAX (needs Python >= 3.12)'
	@echo 'make lint          ruff and pyright'
	@echo 'make docs          the pages of docs/ and of the API, in site/; a warning is an error'
	@echo 'make smoke         the wheel and the sdist, each in an environment of its own'

install:
	@scripts/bootstrap .venv $(MINIMUM) demo,test,test-torch -- $(TORCH)

demo: install
	@.venv/bin/python -m demo

test: install
	$(TESTS)

test-all: install
	$(ALL_TESTS)

coverage: install
	$(ALL_TESTS) --cov --cov-report=term-missing:skip-covered

test-nightly: install
	.venv/bin/python -m pytest -n 2 -m 'nightly and not gpu'

install-gpu:
	@scripts/bootstrap .venv-gpu $(MINIMUM) cuda13,demo,test -- $(TORCH)

test-gpu: install-gpu
	scripts/gpu-tests gpu-tests .venv-gpu/bin/python

evidence: install-gpu
	@.venv-gpu/bin/python -m pip install -q liger-kernel==0.8.5 quack-kernels==0.6.5 || echo 'Without Liger and Quack: the files say so'
	.venv-gpu/bin/python -m bench evidence evidence

test-gpus: install-gpu
	@.venv-gpu/bin/python -m pip install -q accelerate
	scripts/two-gpus two-gpus .venv-gpu/bin/python

test-newest:
	@if reason=$$(scripts/find-python 3.12 --highest 2>&1 >/dev/null); then \
		scripts/bootstrap .venv-newest 3.12 test --highest && \
		.venv-newest/bin/python -c 'import jax, sys; print("Testing with jax", jax.__version__, "on Python", sys.version.split()[0])' && \
		.venv-newest/bin/python -m pytest -n 2 -m '$(CASES)' --ignore=tests/interop --ignore=tests/test_demo.py; \
	else \
		printf 'make test-newest: skipped, because the newest JAX needs Python 3.12 or newer.\n%s\n' "$$reason"; \
	fi

install-lint: install
	@scripts/install-group .venv lint

lint: install-lint
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

install-docs: install
	@scripts/install-group .venv docs

docs: install-docs
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet
	@echo site/index.html

smoke:
	scripts/smoke-dist

clean:
	rm -rf .venv .venv-gpu .venv-newest dist demo/out site
