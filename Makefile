# `make study`, `make lab` and `make test`: each sets up its own environment first, once.
PYTHON ?= python3
SIZE ?= quick
FORMAT ?= png
# quick is the size of the committed results; others must not overwrite them
RESULTS ?= $(if $(filter quick,$(SIZE)),results,results/runs/$(SIZE))
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

.PHONY: help thorough study lab bench gpu test test-launchers chaos many figures published quotes lint format lock clean
help:
	@echo "make study    the headline study at SIZE=quick (smoke, quick, paper): tables and figures in results/"
	@echo "make lab      the laboratory: studies of bias, variance and learning"
	@echo "make bench    time and memory beside textbook JAX, flax, PyTorch and braintrace (25 minutes), in an environment of its own"
	@echo "make gpu      six minutes on a GPU: equal gradients, speed, the headline; ARGS=--small: a minute on a CPU"
	@echo "make test     linter, type checker, the quick tests on a sample of their cases; CASES=all: every test"
	@echo "make thorough every strategy's checks on every cell (make test CASES=all has one cell for most)"
	@echo "make test-launchers  sweeps by joblib, submitit and Ray, in an environment of its own (1.4 GB)"
	@echo "make chaos    sweeps killed and failed at each change of the disk, damaged files, races: is the table the same? SEED=2: other moments"
	@echo "make many     seconds that 1,000 runs in one sweep take beside training; maps and memory over 200 shapes"
	@echo "make figures  draw the committed figures again from the committed tables; FORMAT=svg"
	@echo "make published  look up our numbers beside published ones: results/published.csv"
	@echo "make quotes   render the pages that quote numbers (PAGE.md.j2) from the tables, and name the changed"
	@echo "make format   lay the code out; make lock: pin the newest versions; make clean"
	@echo "PYTHON=python3.12 makes and uses an environment of its own"

%/ready: pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/pip install --disable-pip-version-check -q --require-hashes -r $(filter %.lock,$^)
	$*/bin/pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/ready: requirements.lock
$(VENV)-launchers/ready: requirements-launchers.lock
$(VENV)-bench/ready: requirements.lock

study: $(VENV)/ready
	$(call run,compare_strategies gradient_norms)

# two at a time, the longest first: compilation and figures keep one core busy, and no seconds are compared here
LAB := online_series book_verdict estimator_errors bias_variance alignment influence_balancing online_descents copy_curriculum perturbation_noise add_task spectral_radius
lab: $(VENV)/ready
	$(MAKE) -j2 $(LAB:%=lab/%)

# losses down to 1e-17, which float32 does not reach
lab/influence_balancing lab/online_descents: export JAX_ENABLE_X64 = 1

lab/%: $(VENV)/ready
	$(call run,$*)

run = for study in $(1); do \
	$(BIN)/bptt-study -m experiment=$$study size=$(SIZE) \
	hydra.sweeper.only_latest=true results_dir="'$(RESULTS)'" || exit 1; done

bench: $(VENV)-bench/ready
	$(VENV)-bench/bin/pip install --disable-pip-version-check -q --no-build-isolation -e '.[bench]'
	$(VENV)-bench/bin/python experiments/benchmark/sweep.py
	$(VENV)-bench/bin/python experiments/benchmark/bench.py --measure
	$(VENV)-bench/bin/python tools/quotes.py

gpu: $(VENV)/ready
	$(BIN)/python experiments/benchmark/gpu.py $(or $(FOLDER),results) $(ARGS)

# in the order of tests/conftest.py, where xdist would start with the groups of most tests
TOGETHER := -n auto --dist loadscope --no-loadscope-reorder
test: lint
	$(BIN)/pytest $(TOGETHER) $(if $(filter all,$(CASES)),-m "not thorough",-m "not thorough and not slow" --sample)

thorough: $(VENV)/ready
	$(BIN)/pytest $(TOGETHER) -m thorough

chaos: $(VENV)/ready
	$(BIN)/python tools/chaos.py $(SEED)

many: $(VENV)/ready
	$(BIN)/python tools/many.py
	$(BIN)/python tools/many.py shapes 200

test-launchers: $(VENV)-launchers/ready
	$(VENV)-launchers/bin/pytest -m launchers tests/runner

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(VENV)/ready
	$(BIN)/bptt-study-figures --only-figures --format $(FORMAT) \
		$(foreach study,$(patsubst experiments/%.py,%,$(wildcard experiments/*.py)),$(dir $(wildcard results/$(study)/table.csv.gz)))
	$(BIN)/python experiments/benchmark/bench.py --format $(FORMAT)

published: $(VENV)/ready
	$(BIN)/python tools/published.py

quotes: $(VENV)/ready
	$(BIN)/python tools/quotes.py

lock: $(VENV)/ready
	$(BIN)/pip install --disable-pip-version-check -q uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
		--generate-hashes --no-emit-index-url --no-header -o requirements.lock
# the same versions, but of what Hydra's launcher for Ray holds back: it wants cloudpickle<3
	grep -E '^[a-z0-9_.-]+==' requirements.lock | tr -d '\\' \
		| grep -vE '^(joblib|cloudpickle|python-dateutil)==' > .cache/constraints.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra launchers --universal --python-version 3.11 \
		--constraint .cache/constraints.txt --upgrade \
		--generate-hashes --no-emit-index-url --no-header -o requirements-launchers.lock

clean:
	rm -rf .venv* .cache .pytest_cache .ruff_cache .mypy_cache dist build
