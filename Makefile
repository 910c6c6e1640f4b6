# `make study`, `make lab` and `make test`: each sets up its own environment first, once.
PYTHON ?= python3
SIZE ?= quick
# quick is the size of the committed results; others must not overwrite them
RESULTS ?= $(if $(filter quick,$(SIZE)),results,results/runs/$(SIZE))
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

.PHONY: help study lab test figures lint format lock clean
help:
	@echo "make study    the headline study at SIZE=quick (smoke, quick, paper): tables and figures in results/"
	@echo "make lab      the laboratory: studies of bias, variance and learning"
	@echo "make test     linter, type checker, tests"
	@echo "make figures  draw the committed figures again from the committed tables"
	@echo "make format   lay the code out; make lock: pin the newest versions; make clean"
	@echo "PYTHON=python3.12 makes and uses an environment of its own"

$(VENV)/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q --require-hashes -r requirements.lock
	$(BIN)/pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

study: $(VENV)/ready
	$(call run,compare_strategies gradient_norms)

lab: $(VENV)/ready
	$(call run,influence_balancing bias_variance spectral_radius add_task book_verdict)

run = for study in $(1); do \
	$(BIN)/bptt-study -m experiment=$$study size=$(SIZE) results_dir="'$(RESULTS)'" || exit 1; done

test: lint
	$(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(VENV)/ready
	for study in $(patsubst results/%/table.csv,%,$(wildcard results/*/table.csv)); do \
		$(BIN)/python experiments/$$study.py || exit 1; done

lock: $(VENV)/ready
	$(BIN)/pip install --disable-pip-version-check -q uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
		--generate-hashes --no-emit-index-url --no-header -o requirements.lock

clean:
	rm -rf .venv* .cache .pytest_cache .ruff_cache .mypy_cache dist build
