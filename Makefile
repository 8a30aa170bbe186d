# `make train` and `make test` work alone on a fresh clone: the first call makes .venv, later ones start at once.
# Another interpreter: make PYTHON=python3.12 train        Overrides: make train ARGS="trainer=gpu optimizer.lr=3e-4"
PYTHON ?= python3
ARGS ?=
RUN := .venv/bin/python -m
INSTALLED := .venv/.installed
# A file of tests a process, a thread each: threads that outnumber the cores wait for each other in turns.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help train test test-all lint tensorboard bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

train: $(INSTALLED) ## train LeNet-5, test it, log it to logs/ (ARGS="trainer=gpu optimizer.lr=3e-4")
	@$(RUN) src.train $(ARGS)

test: $(INSTALLED) ## the default tests, offline (ARGS="-n 0 tests/test_train.py" for some, in one process)
	@$(PYTEST) $(ARGS)

test-all: $(INSTALLED) ## also the slow tests, and those on all of MNIST where it is at hand
	@$(PYTEST) -m "not gpu" $(ARGS)

lint: $(INSTALLED) ## ruff's linter and formatter, mypy
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

tensorboard: $(INSTALLED) ## show the curves of all runs in a browser
	@$(RUN) tensorboard.main --logdir logs $(ARGS)

bench: $(INSTALLED) ## time everything beside hand-written peers, twenty minutes (ARGS="--parts epoch start --turns 5")
	@$(RUN) tests.benchmarks $(ARGS)

lock: $(INSTALLED) ## renew requirements*.txt from the ranges in pyproject.toml
	@$(RUN) uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-annotate --custom-compile-command "make lock" pyproject.toml -o requirements.txt
	@$(RUN) uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-annotate --custom-compile-command "make lock" pyproject.toml --group dev -c requirements.txt \
		-o requirements-dev.txt

clean: ## remove .venv and the caches; logs/ and data/ stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
	find src hydra_plugins tests conf -name __pycache__ -type d -prune -exec rm -rf {} +

# uv installs about five times faster than pip. Bytecode is compiled here because importing Lightning without it takes
# 22 s instead of 4 wherever PYTHONDONTWRITEBYTECODE is set. The stamp comes last: an interrupted install is redone.
$(INSTALLED): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11:" \
		"name a newer one, as in make PYTHON=python3.12 train"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(RUN) pip install --quiet --disable-pip-version-check uv
	$(RUN) uv pip install --quiet --compile-bytecode --require-hashes -r requirements-dev.txt
	$(RUN) uv pip install --quiet --no-deps --editable .
	@touch $@
