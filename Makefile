# `make run` and `make test` need nothing but Python 3.11 or 3.12 and git.
PYTHON ?= python3
PROFILE ?= default
VENV := .venv
BIN := $(VENV)/bin
# offline by default: no telemetry of any tool leaves this machine
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY := false
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help run test test-slow lint profile flow serve app clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

run: $(VENV)/.installed ## make everything that is out of date: data, experts, fused model, report
	dvc repro
	@python -m h3fusion_core.report

test: $(VENV)/.installed ## run the tests that take seconds
	python -m pytest -n 2

test-slow: $(VENV)/.installed ## run the tests of the whole pipeline, which take minutes
	python -m pytest -m slow

lint: $(VENV)/.installed ## check style and types
	ruff check .
	ruff format --check .
	mypy

profile: ## choose a profile: make profile PROFILE=smoke|default|paper
	cp profiles/$(PROFILE).yaml params.yaml

flow: $(VENV)/.installed ## run the pipeline once as a Prefect flow
	python -m flows.pipeline

serve: $(VENV)/.installed ## serve the flow every night, with a local Prefect server (Ctrl-C ends both)
	prefect server start --host 127.0.0.1 --port 4200 --background
	trap 'prefect server stop' EXIT INT TERM; \
	PREFECT_API_URL=http://127.0.0.1:4200/api python -m flows.deployments --cron "0 2 * * *"

app: $(VENV)/.installed ## compare the models' answers in the browser
	streamlit run app/app.py

clean: ## remove what the pipeline made here (the DVC cache stays)
	rm -rf build checkpoints
