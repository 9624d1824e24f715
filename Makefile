# Every command of a developer's day; `make help` tells them.
SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
VENV_RUN := .venv-run
BIN := $(VENV)/bin
SOURCES := libs services agents tests
# Most tests wait for real processes: two workers a processor keep both processors busy.
WORKERS ?= $(shell echo $$(( 2 * $$(nproc) )))

.PHONY: help run run-workers run-jobs up test soak check fmt lint types imports proto proto-check bench lock clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

run: $(VENV_RUN)/.ready ## Set everything up and run the main job: workers share a budget on a replayed trace
	@$(VENV_RUN)/bin/python -m leasehold.demo $(ARGS)

run-workers: $(VENV_RUN)/.ready ## The second scene: a Celery pool that memory sizes and no SIGKILL loses
	@$(VENV_RUN)/bin/python -m leasehold.demo.pool_run $(ARGS)

run-jobs: $(VENV_RUN)/.ready ## The third scene: jobs on four hosts, the leader and an agent killed in the midst
	@$(VENV_RUN)/bin/python -m leasehold.demo.job_run $(ARGS)

up: $(VENV_RUN)/.ready ## Start the whole system here, until Ctrl-C
	@$(VENV_RUN)/bin/leasehold up $(ARGS)

test: $(VENV)/.ready ## Run the tests, real etcd and Postgres included
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not soak and not alone" $(ARGS)
	@$(BIN)/python -m pytest -m "alone and not soak" $(ARGS) || [ $$? -eq 5 ]

soak: $(VENV)/.ready ## Run the slow tests: long simulations and repeated kills
	@$(BIN)/python -m pytest -m soak --timeout 7200 $(ARGS)

check: $(VENV)/.ready fmt lint types imports proto-check ## Verify format, lint, types, layers and generated code

fmt: $(VENV)/.ready ## Verify the format (make fmt FIX=1 writes it)
	@$(BIN)/ruff format $(if $(FIX),,--check) $(SOURCES)

lint: $(VENV)/.ready ## Verify the style rules
	@$(BIN)/ruff check $(if $(FIX),--fix) $(SOURCES)

types: $(VENV)/.ready ## Verify the types, strictly
	@$(BIN)/mypy

imports: $(VENV)/.ready ## Verify that dependencies point one way
	@$(BIN)/lint-imports

proto: $(VENV)/.ready ## Write the stubs of proto/ into libs/
	@PYTHON=$(BIN)/python tools/proto.sh libs

proto-check: $(VENV)/.ready ## Verify that the committed stubs are those of proto/
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && PYTHON=$(BIN)/python tools/proto.sh "$$tmp" && \
	cd "$$tmp" && find . -type f | LC_ALL=C sort | while read -r stub; do \
	    cmp -s "$$stub" "$(CURDIR)/libs/$$stub" || { echo "stale: libs/$$stub (run: make proto)"; exit 1; }; done && \
	echo "generated code is fresh"

bench: $(VENV)/.ready ## Measure speed as ratios; a table, and JSON in bench-results/
	@$(BIN)/python tests/benchmarks/run.py $(ARGS)

lock: $(VENV)/.ready ## Resolve the dependencies anew into requirements/
	@$(BIN)/uv pip compile -q --no-header --generate-hashes --python-version 3.11 $(if $(UPGRADE),--upgrade) pyproject.toml --extra dev -o requirements/dev.lock
	@$(BIN)/uv pip compile -q --no-header --generate-hashes --python-version 3.11 $(if $(UPGRADE),--upgrade) pyproject.toml --extra up --extra build -o requirements/run.lock

clean: ## Remove environments, caches and the demo's data
	rm -rf $(VENV) $(VENV_RUN) .leasehold .mypy_cache .ruff_cache .pytest_cache .hypothesis bench-results

$(VENV)/.ready: requirements/dev.lock pyproject.toml tools/venv.sh
	@PYTHON=$(PYTHON) tools/venv.sh $(VENV) requirements/dev.lock

$(VENV_RUN)/.ready: requirements/run.lock pyproject.toml tools/venv.sh
	@PYTHON=$(PYTHON) tools/venv.sh $(VENV_RUN) requirements/run.lock
