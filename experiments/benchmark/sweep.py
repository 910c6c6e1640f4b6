"""A sweep of 12 configurations × 5 seeds of the headline, beside one fresh process for each of the 60 runs.

`python experiments/benchmark/sweep.py [FOLDER]` writes sweep.csv: all strategies of `compare_strategies` on
text, with two learning rates, at size quick but with 200 updates. The sweep is timed once with an empty compile
cache, and once more with the cache that the first sweep left. Of the 60 processes every fifteenth is timed,
with JAX's default, no cache, and with a cache that is warm from the same run. Their median is multiplied by
60.

    seconds    time of all 60 runs
    measured   number of processes timed
    ratio      seconds ÷ those of the sweep, no cache against an empty one, warm against warm
    compiled   number of programs compiled because no cache had them
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from bptt_study.report.csv_tables import write_table

STRATEGIES = [
    "full",
    "fixed",
    "sliding",
    "randomized",
    "randomized_power_law",
    "randomized_uncompensated",
]
RATES, SEEDS = (0.003, 0.01), 5
COMMON = ["task=char_lm", "truncation=16", "optimizer/schedule=cosine"]
COMMON += ["budget.updates=200", "budget.logs=2", "overwrite=true", "device=cpu"]

# The command line; it also counts the programs that JAX compiles
PROGRAM = """
import sys
from collections import Counter
from bptt_study import devices
from bptt_study.runner import cli
devices.use("cpu")
import jax, json
counts = Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: counts.update([name.split("/")[-1]])
)
try:
    cli.main()
finally:
    print("counted:", json.dumps(counts))
"""


def timed(results: Path, *arguments: str, **environment: str) -> tuple[float, int]:
    """Measure the seconds from the start of a process to its end, and the programs that it compiled."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments, *COMMON, f"results_dir={results}"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    counts = json.loads(done.stdout.rpartition("counted:")[2])
    # each request looks into the cache, if there is one
    compiled = counts.get("backend_compile_duration", 0) - counts.get("cache_hits", 0)
    return seconds, compiled


def measure(small: bool) -> pd.DataFrame:
    if small:
        size, strategies, rates, seeds, every = "size=smoke", STRATEGIES[:2], RATES[:1], 2, 4
    else:
        size, strategies, rates, seeds, every = "size=quick", STRATEGIES, RATES, SEEDS, 15
    runs = [
        [size, f"strategy={s}", f"optimizer.learning_rate={r}", f"first_seed={n}", "seeds=1"]
        for s in strategies
        for r in rates
        for n in range(seeds)
    ]
    grid = ["-m", size, f"seeds={seeds}", f"strategy={','.join(strategies)}"]
    grid.append(f"optimizer.learning_rate={','.join(map(str, rates))}")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        sweep = {}
        for way, name in (("no cache", "a sweep"), ("warm cache", "a sweep again")):
            sweep[way], compiled = timed(folder / "results", *grid, **cache)
            rows.append({"way": name, "seconds": sweep[way], "compiled": compiled})
            print(name, f"{sweep[way]:.0f} s", file=sys.stderr, flush=True)
        for way, environment in (
            ("no cache", {"JAX_ENABLE_COMPILATION_CACHE": "false"}),
            ("warm cache", {"JAX_COMPILATION_CACHE_DIR": str(folder / "own")}),
        ):
            found = []
            for run in runs[every // 2 :: every]:
                if way == "warm cache":
                    timed(folder / "results", *run, **environment)
                found.append(timed(folder / "results", *run, **environment))
            seconds, compiled = (statistics.median(column) for column in zip(*found, strict=True))
            row = {"way": f"a process for each run, {way}", "seconds": len(runs) * seconds}
            row |= {"measured": len(found), "ratio": len(runs) * seconds / sweep[way]}
            rows.append(row | {"compiled": len(runs) * compiled})
            print(row["way"], f"{seconds:.1f} s each", file=sys.stderr, flush=True)
    return pd.DataFrame(rows).assign(runs=len(runs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = Path(__file__).resolve().parents[2] / "results" / "bench"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="folder of the table")
    parser.add_argument(
        "--small", action="store_true", help="a sweep of a minute, to see that it works"
    )
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    write_table(measure(given.small), given.folder / "sweep.csv")
    print(given.folder / "sweep.csv")
