# make train ARGS="--precision=mixed_float16"   trains in a virtual environment
# make test                                     installs what tests need, runs them
# make check                                    style, types
# make test EXTRAS=dev,tpu-plan                 with the TPU's compiler (libtpu)

VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo $$python && break; done)
BIN := $(VENV)/bin
ARGS ?=
EXTRAS ?= dev

.PHONY: train test check clean

train: $(VENV)/.installed
	$(BIN)/python -m launch.train $(ARGS)

test: check
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile \
		--no-loadscope-reorder $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: dist_amp needs Python 3.11, 3.12 or 3.13; pass PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
