# Every target sets up what it needs; a second run finds it done. `make demo` is the front door.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# With the bytecode of a run before, to collect the tests takes a third of the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo up test check format bench chaos fuzz setup clean
.DEFAULT_GOAL := demo

## A job of every type through the whole platform, then stop.
demo: $(VENV)/.run
	@$(BIN)/python -m local.demo

## The whole platform until Ctrl-C.
up: $(VENV)/.run
	@$(BIN)/python -m local.up

test: setup check

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	# The models of some tests: to make them takes both cores for a while, and others' seconds would run out meanwhile.
	$(BIN)/python -m engines.packaged smollm2-135m-instruct whisper-base all-minilm-l6-v2
	# These alone load torch and diffusers, which takes each process ten seconds; and they never wait.
	$(BIN)/pytest -n 2 --dist loadfile tests/engines tests/shapes
	$(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder $(addprefix --ignore tests/,engines shapes chaos faults)
	# By themselves: these count the seconds until a killed or frozen part is made up for, and mostly wait; and they make
	# network interfaces, at which every browser drops what it is fetching (ERR_NETWORK_CHANGED).
	$(BIN)/pytest -n 4 --dist loadfile tests/chaos tests/faults

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: setup $(VENV)/.bench
	$(BIN)/python -m bench

## Faults under load, and what they did to the jobs; CHAOS='--jobs 2000 --faults 200 --broker rabbitmq' and so on.
chaos: setup
	@$(BIN)/python -m tests.chaos.harness $(CHAOS)

## Bad and good input at scale, for an hour or so: 40,000 requests, 500 runs of events. FUZZ="--seed 7 --cases 1000"
fuzz: setup
	$(BIN)/python -m tests.fuzz.run $(FUZZ)

setup: $(VENV)/.develop $(VENV)/.triton $(VENV)/.openai_js

## The virtual environment and everything that was built or written; prepared models stay in var/models.
clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find var -mindepth 1 -maxdepth 1 ! -name models -exec rm -rf {} + 2>/dev/null || true

# What the platform needs to run, and what its development needs beyond that. The stamps are written last.
$(VENV)/.run: $(VENV)/.made requirements.txt requirements/api.txt requirements/cli.txt requirements/gpu_admin.txt requirements/worker.txt requirements/constraints.txt
	@echo "Installing the packages of requirements.txt (torch is large: this takes a minute or more)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@ln -sf ../../gpuctl $(BIN)/gpuctl
	@touch $@

$(VENV)/.develop: $(VENV)/.run requirements/dev.txt
	@echo "Installing the packages of requirements/dev.txt"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@

# NVIDIA's tritonserver, which tests run: an environment of its own inside this one, as it needs an older numpy.
$(VENV)/.triton: $(VENV)/.made requirements/triton_server.txt
	@echo "Installing the packages of requirements/triton_server.txt"
	@$(BIN)/python -m venv $(VENV)/triton && \
	  $(VENV)/triton/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    -r requirements/triton_server.txt && \
	  touch $@ || echo "There is no tritonserver for this system and Python; the tests that run it are skipped." >&2

# The server that bench.openai measures the platform against.
$(VENV)/.bench: $(VENV)/.develop requirements/bench.txt
	@echo "Installing the packages of requirements/bench.txt"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/bench.txt
	@touch $@

# OpenAI's JavaScript client, which a test runs.
$(VENV)/.openai_js: $(VENV)/.made tests/openai_js/package-lock.json
	@echo "Installing the packages of tests/openai_js"
	@npm ci --prefix tests/openai_js --no-audit --no-fund --loglevel error >/dev/null && touch $@ || \
	  echo "npm is missing or cannot install; the test of the JavaScript client is skipped." >&2

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." \
	    "Say which one to use: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@
