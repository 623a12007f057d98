# Two commands do everything: `make repro` and `make test`. Both make .venv first if it is not there.
PYTHON ?= python3.11
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
PORT ?= 5000
STUDIES_PORT ?= 5001

.PHONY: help repro test sweep theory bench ui clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

data/pbmc68k data/digits: | $(BIN)/.installed # only when missing: data of one's own under data/ are in no remote of ours
	dvc pull --quiet --remote bundled data.dvc

repro: $(BIN)/.installed data/pbmc68k data/digits ## run the whole pipeline and print the result
	dvc repro
	@scforget show

test: $(BIN)/.installed-dev ## lint, types, layers, tests
	ruff check src tests bench
	ruff format --check src tests bench
	mypy
	lint-imports
	pytest --numprocesses 2 --dist loadgroup

$(BIN)/.installed-bench: $(BIN)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

bench: $(BIN)/.installed-bench ## speed and memory against plain torch, scvi-tools and Opacus (LONG=1: to convergence too)
	python -m bench.engine $(if $(LONG),--long)

sweep: $(BIN)/.installed ## search settings of every method in sweep.full (params.yaml), after `make repro`; hours, resumes
	dvc repro pipelines/sweep/dvc.yaml

theory: $(BIN)/.installed ## why methods that move parameters fail: Fisher analysis, worlds, ablations, the paper's pictures; after `make repro`
	dvc repro pipelines/theory/dvc.yaml

ui: $(BIN)/.installed ## MLflow on http://127.0.0.1:$(PORT), Optuna's studies on $(STUDIES_PORT)
	scforget ui --port $(PORT) --studies-port $(STUDIES_PORT)

clean: ## remove what the pipeline made (DVC's cache keeps it)
	rm -rf work results report/figures report/tables report/theory report/report.html mlruns/mlflow.db mlruns/artifacts
