# make quickstart    pretraining, SFT, reward model, PPO and the report on an embedded task
# make label         the page on which people compare responses, with samples of the quickstart
# make test          the tests; `make test ARGS="tests/test_losses.py -k kl"` for some of them
# make test-slow     the tests that take minutes each
# make lint          formatting and lint by ruff, and the layers of .importlinter
# make format        formats the files and fixes what ruff can fix
# make docs          the documentation site in docs/_build/html; a warning is an error
# make mutants       faults put into a copy of the code one at a time: each must fail its nearest
#                    tests; `make mutants ARGS='--only "NAME"'` for one of them
#
# Each makes a virtual environment in .venv if there is none and installs into it what is missing.
# `make test PYTHON=python3.13` does so with another Python, 3.11 to 3.13, in .venv-python3.13.

PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
WORKDIR ?= runs/quickstart
LABELS ?= runs/label
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 \
  -c constraints.txt

.PHONY: quickstart label test lint format docs test-slow mutants

quickstart: $(VENV)/installed
	$(BIN)/python -m rlhf_jax.main --config=configs/quickstart.py --workdir=$(WORKDIR)

label: $(VENV)/installed-feedback
	$(BIN)/python -m rlhf_jax.tasks.review_samples --quickstart=$(WORKDIR) --out=$(LABELS)/samples
	$(BIN)/python -m rlhf_jax.label --db=$(LABELS)/feedback.db --project=quickstart \
	  --data=$(LABELS)/samples $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-logo --no-cache

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow $(ARGS)

docs: $(VENV)/installed-docs
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -E -W --keep-going -d docs/_build/doctrees \
	  docs docs/_build/html $(ARGS)

mutants: $(VENV)/installed-test
	$(BIN)/python -m tools.mutants $(ARGS)

$(VENV)/installed: setup.py constraints.txt | $(BIN)/pip
	@echo 'installing rlhf_jax into $(VENV)'
	$(PIP) -e .
	@touch $@

$(VENV)/installed-feedback: setup.py constraints.txt | $(BIN)/pip
	@echo 'installing rlhf_jax and its labelling page into $(VENV)'
	$(PIP) -e '.[feedback]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-test: setup.py constraints.txt | $(BIN)/pip
	@echo 'installing rlhf_jax and what its tests need into $(VENV)'
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/installed $(VENV)/installed-feedback

$(VENV)/installed-docs: setup.py constraints.txt | $(BIN)/pip
	@echo 'installing rlhf_jax and what its documentation needs into $(VENV)'
	$(PIP) -e '.[docs]'
	@touch $@ $(VENV)/installed

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else \
	  "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
