# `make train` and `make test` work on a fresh clone: the first call installs into .venv, later ones start at once.
# Another interpreter: make PYTHON=python3.12 train        Settings: make train trainer=gpu optimizer.lr=3e-4
PYTHON ?= python3
ARGS ?=
RUN := .venv/bin/python -m
INSTALLED := .venv/.installed
DEV := .venv/.installed-dev
# A file of tests a process, a thread each: threads that outnumber the cores wait for each other in turns.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -n auto --maxprocesses 4 --dist loadfile

# Make takes key=value for variables of its own. These are the settings among them, each in quotes for the shell;
# MARK stands for a blank within one.
COMMANDS := train eval predict export demo
MARK := $(shell printf '\001')
GIVEN := $(filter-out ARGS=% PYTHON=% $(if $(filter new,$(MAKECMDGOALS)),NAME=% DIR=% KEEP=%),$(subst \\,\,$(subst \ ,$(MARK),$(MAKEOVERRIDES))))
SETTINGS := $(subst $(MARK), ,$(patsubst %,'%',$(subst ','\'',$(GIVEN))))
ifneq ($(GIVEN),)
ifneq ($(filter-out $(COMMANDS),$(or $(MAKECMDGOALS),help)),)
$(error $(subst $(MARK), ,$(GIVEN)): only $(COMMANDS) take settings; other targets take options, as in ARGS="-n 0")
endif
endif

.DEFAULT_GOAL := help
.PHONY: help $(COMMANDS) tensorboard test test-all lint bench new install lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

train: $(INSTALLED) ## train LeNet-5, test it, log it to logs/; settings as in: make train trainer=gpu optimizer.lr=3e-4
	@$(RUN) src.train $(ARGS) $(SETTINGS)

eval: $(INSTALLED) ## test the newest run's best checkpoint (ckpt_path=<file>)
	@$(RUN) src.test $(ARGS) $(SETTINGS)

predict: $(INSTALLED) ## classify image files (inputs='digits/*.png')
	@$(RUN) src.predict $(ARGS) $(SETTINGS)

export: $(INSTALLED) ## write the checkpoint as a file that needs nothing of this project (format=onnx)
	@$(RUN) src.export $(ARGS) $(SETTINGS)

demo: $(INSTALLED) ## draw a digit in the browser, and watch each layer
	@$(RUN) src.demo $(ARGS) $(SETTINGS)

tensorboard: $(INSTALLED) ## show the curves of all runs in a browser (ARGS="--port 7000")
	@$(RUN) tensorboard.main --logdir logs $(ARGS)

test: $(DEV) ## the tests of the code, offline (ARGS="-n 0 tests/test_train.py" for some, in one process)
	@$(PYTEST) $(ARGS)

test-all: $(DEV) ## also the slow tests, and those on all of MNIST where it is at hand
	@$(PYTEST) -m "not gpu" $(ARGS)

lint: $(DEV) ## ruff's linter and formatter, mypy
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

bench: $(DEV) ## time everything beside hand-written peers, twenty minutes (ARGS="--parts epoch start --turns 5")
	@$(RUN) tests.benchmarks $(ARGS)

new: $(DEV) ## a project of your own: NAME=myproject DIR=../myproject, with LeNet-5 and MNIST: KEEP=mnist
	@.venv/bin/python src/engine/new "$(NAME)" "$(DIR)" $(if $(KEEP),--keep $(KEEP))

install: $(DEV) ## only install: what running needs, and what the tests need

lock: $(DEV) ## renew requirements*.txt from the ranges in pyproject.toml
	@$(RUN) uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-annotate --custom-compile-command "make lock" pyproject.toml -o requirements.txt
	@$(RUN) uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-annotate --custom-compile-command "make lock" pyproject.toml --group dev -c requirements.txt \
		-o requirements-dev.txt

clean: ## remove .venv and the caches; logs/ and data/ stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
	find src hydra_plugins tests conf -name __pycache__ -type d -prune -exec rm -rf {} +

# uv installs about five times faster than pip. Bytecode is compiled here because importing Lightning without it takes
# 22 s instead of 4 wherever PYTHONDONTWRITEBYTECODE is set. The stamps come last: an interrupted install is redone.
# What you have added to .venv stays when the requirements change.
UV_INSTALL := $(RUN) uv pip install --compile-bytecode

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11:" \
		"name a newer one, as in make PYTHON=python3.12 train"; exit 1; }
	@echo "Installing what running needs into .venv; with CUDA, as on Linux, that is 3 GB to download"
	@.venv/bin/python -c "" 2> /dev/null || { rm -f .venv/bin/python*; $(PYTHON) -m venv .venv; }
	@$(RUN) pip --version > /dev/null 2>&1 || $(RUN) ensurepip > /dev/null
	@$(RUN) pip install --quiet --disable-pip-version-check uv
	@$(UV_INSTALL) --require-hashes -r requirements.txt
	@$(UV_INSTALL) --quiet --no-deps --editable .
	@touch $@

$(DEV): requirements-dev.txt $(INSTALLED)
	@echo "Adding what the tests and linters need"
	@$(UV_INSTALL) --require-hashes -r requirements-dev.txt
	@touch $@
