# Every target sets up what it needs: on a fresh checkout, `make demo` and `make test` are enough.
#
# PYTHON           the interpreter to make .venv with (3.11 or later)
# TORCH_INDEX_URL  where to install torch from, if your default index serves a CUDA build:
#                  make test TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# PYTEST_ARGS      handed to pytest, such as PYTEST_ARGS="-k align"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX_URL ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BROWSERS := chromium chromium-browser google-chrome
DEMO := runs/demo
EXPERIMENTS := adam_moments ratio_schedule ratio_vs_loss curvature layer_freezing open_questions
EXPERIMENT_ARGS ?=

.DELETE_ON_ERROR:
.PHONY: help demo experiments test soak lint format bench programs setup clean

help:
	@echo "make demo    train a small network on handwritten digits; leaves $(DEMO)/report.html"
	@echo "make experiments  run the six experiments of docs/experiments.md, or what is missing of them"
	@echo "make test    run the test suite"
	@echo "make soak    run the tests that take long: kills, long runs, wide searches"
	@echo "make lint    check style, types and docstrings"
	@echo "make format  put the code into its standard format"
	@echo "make bench   measure what observing costs"
	@echo "make setup   make $(VENV) with everything that development needs"
	@echo "make clean   remove $(VENV) and what tools left behind"

# A .venv whose interpreter is gone (the checkout moved, Python was upgraded) is made anew.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11 or set PYTHON=..." >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv --clear $(VENV)

# torch first and pinned, so that nothing else chooses a build of it.
$(VENV)/.torch-installed: constraints.txt $(BIN)/python
	@echo "Installing torch"
	@$(PIP) install --quiet $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) --constraint constraints.txt torch
	@touch $@

$(VENV)/.lab-installed: pyproject.toml constraints.txt $(VENV)/.torch-installed
	@echo "Installing streamlens with what the demo needs"
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[lab]"
	@touch $@

# Everything that the demo needs is among it.
$(VENV)/.dev-installed: pyproject.toml constraints.txt $(VENV)/.torch-installed
	@echo "Installing streamlens with what development needs"
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(VENV)/.lab-installed $@

setup: $(VENV)/.dev-installed

demo: $(VENV)/.lab-installed
	@$(BIN)/streamlens train --model AlexNetMini --dataset digits --epochs 10 --optimizer Adam \
		--learning-rate 3e-3 --ratio --norm --health --train-accuracy --test-accuracy --out $(DEMO)

# Two runs at a time with a thread each; what is done already is not run again.
# EXPERIMENT_ARGS  handed to each script, such as EXPERIMENT_ARGS="--dataset CIFAR10 --data-dir data"
experiments: $(VENV)/.dev-installed
	@for name in $(EXPERIMENTS); do \
		OMP_NUM_THREADS=1 $(BIN)/python examples/$$name.py $(EXPERIMENT_ARGS) || exit 1; \
	done

# Two workers with a thread each: more threads than cores would only wait for each other.
test: $(VENV)/.dev-installed programs
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not soak" $(PYTEST_ARGS)

# One worker: the long runs weigh memory.
soak: $(VENV)/.dev-installed
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m soak $(PYTEST_ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev-installed
	@$(BIN)/python -m benchmarks

# What tests drive and Debian has: a browser, and the server of the Redis sink.
programs:
	@$(call install,chromium,$(BROWSERS),the browser tests)
	@$(call install,redis-server,redis-server,the tests of the Redis stream)

# $(call install,package,any of these programs will do,what needs it)
define install
	for name in $(2); do command -v $$name >/dev/null 2>&1 && exit 0; done; \
	if ! command -v apt-get >/dev/null 2>&1; then \
		echo "No $(1) found, and no apt-get to install it: install it for $(3)" >&2; \
		exit 0; \
	fi; \
	echo "Installing $(1) for $(3)"; \
	if [ "$$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi; \
	$$as_root apt-get update -qq \
	&& DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -qq --no-install-recommends $(1) >/dev/null \
	|| echo "$(1) could not be installed: $(3) will say so" >&2
endef

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
