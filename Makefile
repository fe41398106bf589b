# Every target sets up what it needs. `make` alone lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Shows what is downloaded; everything else pip says goes to the log.
PIP_LOG := $(VENV)/pip.log
define pip_install
$(BIN)/python -m pip install --disable-pip-version-check $(1) 2>$(PIP_LOG) \
	| { grep --line-buffered -oE 'Downloading .*\([0-9.]+ [kMG]B\)|Processing [^ ]*\.whl' || true; } \
	|| { tail -n 20 $(PIP_LOG); exit 1; }
endef

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(READY): requirements-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11, 3.12 or 3.13 is needed, which SGLang is built for: make PYTHON=python3.13 ...")'
	@echo "[1/4] virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] torch (about 190 MB)"
	@$(call pip_install,torch==2.13.0)
	@echo "[3/4] SGLang, Triton, gRPC and tools (about 600 MB, pinned in requirements-cpu.txt)"
	@$(call pip_install,--no-deps -r requirements-cpu.txt)
	@echo "[4/4] vase_sgl"
	@$(call pip_install,--no-deps -e .)
	@touch $@

.PHONY: setup
setup: $(READY) ## Create .venv with every pinned dependency (once)

.PHONY: model
model: $(READY)
	@$(BIN)/python -m vase_sgl.demo.model >/dev/null

.PHONY: demo
demo: model ## Serve a real model with a fixed KV budget, stream, replay, compare
	@$(BIN)/python -m vase_sgl.demo

.PHONY: test
test: model ## Run the default test suite (two processes, 11 to 20 minutes)
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

MINUTES ?= 10
.PHONY: soak
soak: $(READY) ## Random load on the real scheduler for MINUTES=10, every invariant checked
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.engine.soak --minutes $(MINUTES) $(addprefix --seed ,$(SEED))
.PHONY: loadtest
loadtest: model ## Throughput and TTFT of the real CPU model, 1 to 64 users (an idle machine, an hour)
	@$(BIN)/python benchmarks/loadtest_report.py --model "$$($(BIN)/python -m vase_sgl.demo.model)" $(LOADTEST_ARGS)

.PHONY: bench-quick
bench-quick: model ## Ratios of every part against the committed baseline (an idle machine, 5 minutes)
	@$(BIN)/python -m benchmarks.quick $(QUICK_ARGS)

.PHONY: lint
lint: $(READY) ## ruff, mypy --strict, buf lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@cd proto && ../$(BIN)/buf lint

.PHONY: format
format: $(READY) ## Reformat and fix what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: proto
proto: $(READY) ## Regenerate the gRPC code from proto/
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash proto/generate.sh

.PHONY: clean
clean: ## Remove the environment and every cache in this folder
	@rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: helm
helm: $(READY) ## Fetch helm and kubectl into .cache/ (pinned)
	@$(BIN)/python k8s/tools/fetch_helm.py

.PHONY: chart-docs
chart-docs: $(READY) ## Write the table of values in k8s/vase-sgl/README.md
	@$(BIN)/python k8s/tools/values_table.py

.PHONY: chart-security
chart-security: helm ## Scan the rendered chart with checkov (installs it once, about 300 MB)
	@$(BIN)/python k8s/tools/scan.py

.PHONY: gpu-constraints
gpu-constraints: $(READY) ## Resolve the versions of the GPU worker's image anew
	@$(BIN)/python k8s/tools/gpu_constraints.py
