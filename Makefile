# Two commands: `make train` and `make test`. Each sets up .venv by itself and skips what is done.
#   NP=2  ranks of `make train`        TORCH='torch==X.Y.Z'  another torch        PYTHON=python3.12  another Python
SHELL := /bin/bash
VENV ?= $(CURDIR)/.venv
PY := $(VENV)/bin/python
NP ?= 2
SEED ?= 1
PYTEST := env PATH="$(VENV)/bin:$$PATH" $(PY) -m pytest
export VENV

.DEFAULT_GOAL := setup
.PHONY: help setup train test test-only test-full test-slurm lint soak bench volume convergence fingerprint papers clean distclean
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 14

setup: ## torch, MPI, Horovod, mpi4py and this package in .venv
	@scripts/setup_env.sh

train: setup ## train dense and DEF on two Horovod ranks, compare accuracy, traffic and time
	@env PATH="$(VENV)/bin:$$PATH" $(PY) examples/compare.py --ranks $(NP)

test: setup lint ## everything quick: lint, unit tests, real jobs of 1 to 4 ranks
	@$(PYTEST) -q -m "not full" tests

test-only: setup ## what test runs, without lint
	@$(PYTEST) -q -m "not full" tests

test-full: setup lint ## also the slow ones: more rank counts, 8 ranks, mpirun
	@HVD_COMPRESS_FULL=1 $(PYTEST) -q tests

test-slurm: setup ## a real SLURM on this machine: install, start, submit, check, stop (root)
	@scripts/slurm_cluster.sh test

lint: setup ## ruff (rules and format) and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy && $(VENV)/bin/mypy --no-warn-return-any --allow-untyped-calls tests

soak: setup ## 20,000 steps at 4 ranks with everything that scripts do, at random (SEED=1)
	@env PATH="$(VENV)/bin:$$PATH" PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $(VENV)/bin/horovodrun --gloo -np 4 -H localhost:4 \
		$(PY) -m tests.soak.soak --seed $(SEED)

bench: setup ## step times on a virtual cluster with rate-limited links (root)
	@env PATH="$(VENV)/bin:$$PATH" $(PY) benchmarks/run.py

volume: setup ## bytes per method, rank and step on the virtual cluster against the formulas (root)
	@env PATH="$(VENV)/bin:$$PATH" $(PY) benchmarks/volume.py

convergence: setup ## the convergence table of docs/convergence.md
	@env PATH="$(VENV)/bin:$$PATH" $(PY) benchmarks/convergence.py

fingerprint: setup ## compare every bit of training, per algorithm and compressor, with the stored lines
	@$(PY) scripts/fingerprint.py

papers: setup ## compare the papers' methods on eight ranks (about two hours)
	@env PATH="$(VENV)/bin:$$PATH" $(PY) benchmarks/papers.py

clean: ## remove what building, testing and training left
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache runs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## also .venv (the built Horovod stays in the cache)
	rm -rf $(VENV)
