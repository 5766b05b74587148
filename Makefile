# make quickstart    pretraining, SFT, reward model, PPO and the report on an embedded task
# make test          the tests; `make test ARGS="tests/test_losses.py -k kl"` for some of them
# make test-slow     the tests that take minutes each
#
# Each makes a virtual environment in .venv if there is none and installs into it what is missing.
# PYTHON is the interpreter the environment is made with, 3.11 to 3.13.

PYTHON ?= python3
WORKDIR ?= runs/quickstart
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 -c constraints.txt

.PHONY: quickstart test test-slow

quickstart: .venv/installed
	$(BIN)/python -m rlhf_jax.main --config=configs/quickstart.py --workdir=$(WORKDIR)

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow $(ARGS)

.venv/installed: setup.py constraints.txt | $(BIN)/pip
	@echo 'installing rlhf_jax into .venv'
	$(PIP) -e .
	@touch $@

.venv/installed-test: setup.py constraints.txt | $(BIN)/pip
	@echo 'installing rlhf_jax and what its tests need into .venv'
	$(PIP) -e '.[test]'
	@touch $@ .venv/installed

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else \
	  "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
