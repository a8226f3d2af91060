# Run `make` or `make help` for the list of targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# No telemetry.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0
# What the installation below leaves uncompiled is compiled once, at its first import, and not by every process again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-deploy lint typecheck bench docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --no-compile: byte-compiling all of PyTorch takes a third of the installation; Python compiles what is imported.
$(READY): pyproject.toml
	@echo "Creating $(VENV) and installing the project (PyTorch is large: this takes a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	@touch $@

demo: $(READY) ## Compare SGD, LightCL and LightCL-plus on the same ten devices: a table and a page
	@$(BIN)/lightcl sweep demo --out runs/demo --overwrite

# A quarter of the time is spent waiting, so that three tests at a time fit two cores. The longest ones come first, and a
# process gets one test at a time, or one of them would have all the long ones.
test: $(READY) ## Run the test suite in three processes (without the slow tests)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --maxschedchunk 1

test-slow: $(READY) ## Run the slow tests: real SuperLink and SuperNode processes, `flwr run`
	@$(BIN)/python -m pytest -m slow

# Two thirds of the time are spent waiting, so that three tests at a time fit two cores. The longest ones come first.
test-deploy: $(READY) ## Run the tests of a fleet of boards: TLS, keys, attacks, killed processes, 200 rounds
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 3 --maxschedchunk 1 tests/deployment

lint: $(READY) ## Check style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

typecheck: $(READY) ## Check types only
	@$(BIN)/mypy

bench: $(READY) ## Measure the training step, its ratio to the paper's, and fleets of devices
	@$(BIN)/python benchmarks/training_step.py
	@$(BIN)/python benchmarks/learning_step.py
	@$(BIN)/python benchmarks/fleet_runtime.py
	@$(BIN)/python benchmarks/fleet_scale.py
	@$(BIN)/python benchmarks/fleet_rival.py

docs: $(READY) ## Build the documentation site in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir site
	@echo "open site/index.html"

clean: ## Remove the environment and caches; runs stay
	@rm -rf $(VENV) site *.egg-info .pytest_cache .mypy_cache .ruff_cache
