"""Jobs that differ in numbers only trace and compile once; a second process compiles nothing."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

# The command line, told on: what is traced and compiled for each job, and how often its estimate is traced.
PROGRAM = """
import sys
from collections import Counter
from bptt_study import devices
from bptt_study.runner import cli
devices.use("cpu")
import jax, json
from bptt_study import strategies
from bptt_study.runner import run

counts = Counter()

def counted(problem, window):
    fixed = strategies.fixed(problem, window)
    def estimate(*args):
        counts["estimate"] += 1
        return fixed.estimate(*args)
    return fixed._replace(estimate=estimate)

sys.modules["told"] = sys.modules["__main__"]
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: counts.update([name]))
perform = run.perform

def told(*args, **settings):
    counts.clear()
    rows = perform(*args, **settings)
    print("told:", json.dumps({name.split("/")[-1]: n for name, n in counts.items()}), flush=True)
    return rows

run.perform = told
cli.main()
"""
SWEEP = [
    "-m",
    "task=char_lm",
    "size=smoke",
    "strategy=fixed",
    "strategy._target_=told.counted",
    "~strategy.stride",
    "truncation=4",
    "snapshots=2",
    "probe=[lag_mass,generalisation]",
    "optimizer/schedule=cosine",
]
RATES, SEEDS = "optimizer.learning_rate=0.1,0.2", "first_seed=0,7"


def told(tmp_path, *arguments) -> list[dict[str, int]]:
    """Of each run: jax's events by name, and how often `estimate` was traced."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, script, *SWEEP, f"results_dir={tmp_path / 'results'}", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (line.partition("told:")[2] for line in done.stdout.splitlines())
    return [json.loads(line) for line in lines if line]


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """A process that starts with an empty cache, and the same once more."""
    folder: Path = tmp_path_factory.mktemp("compile")
    return [told(folder, "hidden=4,5", RATES, SEEDS, "overwrite=true") for _ in range(2)]


@pytest.mark.slow
def test_rates_and_seeds_trace_and_compile_once(twice):
    for first, *others in (twice[0][:4], twice[0][4:]):  # other sizes are other programs
        assert first["estimate"] >= 1
        assert first["backend_compile_duration"] >= 3
        assert others == [{}] * 3, "not even a trace"


@pytest.mark.slow
def test_a_second_process_compiles_nothing(twice):
    first, second = (sum(map(Counter, jobs), Counter()) for jobs in twice)
    assert first["cache_misses"] > 0
    assert second["cache_misses"] == 0
    assert second["cache_hits"] == second["compile_requests_use_cache"] > 0
