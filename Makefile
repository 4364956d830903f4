# make setup   .venv with the pinned packages and the lutqat command
# make repro   setup + the default experiment (dvc repro)
# make test    setup + the whole test suite
# make soak    setup + tests/faults in their long form (hours): kills, full disks, fuzzing
# make lint    setup + ruff and mypy
# make clean   remove caches of the tools (results and .venv stay)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export DVC_NO_ANALYTICS := 1

.PHONY: setup repro test soak lint clean

setup: $(VENV)/.installed

# The stamp is newer than its inputs once everything is installed.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; use make PYTHON=python3.12 or the like"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation --editable .
	@touch $@

# An unpacked archive has no .git: the pipeline runs all the same, experiments do not.
repro: setup
	@if [ ! -e .git ]; then \
	  echo "no git repository: the pipeline runs, but experiments (dvc exp) need git"; \
	  $(BIN)/dvc config --local core.no_scm true; \
	  $(BIN)/dvc config --local core.autostage false; \
	fi
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro

test: setup
	$(BIN)/python -m pytest

soak: setup
	LUTQAT_SOAK=1 $(BIN)/python -m pytest tests/faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lib

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find lib stages tests -name __pycache__ -type d -prune -exec rm -rf {} +
