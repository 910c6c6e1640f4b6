"""Is the library as fast as it was? The same estimates in two checkouts, in turn.

    python experiments/benchmark/before.py OTHER_CHECKOUT [FILE.csv] [--small] [--cpu]

A row is an estimate at a place of the grid. It has the median seconds of each checkout, and `ratio`, the
other's seconds ÷ ours, as the median of 15 successive pairs; above 1 this checkout is faster. A pair's seconds
are the least of 3 runs. Each checkout has a separate process. The comparison holds if the median of all ratios
is at least 0.98 and the least at least 0.93. With `--cpu` the seconds are processor time of all threads
together, which means more on a machine with other load.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pandas as pd

HERE = Path(__file__).resolve().parents[2]
MEDIAN, WORST = 0.98, 0.93
STRATEGIES = ("full", "chunks", "sliding", "random", "checkpointed")

# The program reads lines "strategy cell hidden batch_size steps runs", and answers each with the seconds of the
# fastest run, without compilation. Both checkouts run it, so it uses names that both have.
PROGRAM = """
import functools, os, sys, time
import bptt_study as bs
bs.devices.use("cpu")
import jax, jax.numpy as jnp
assert bs.__file__.startswith(os.environ["CHECKOUT"]), bs.__file__
law, clock = bs.strategies.constant, getattr(time, os.environ["CLOCK"])
MAKE = {
    "full": bs.strategies.full,
    "chunks": lambda p: bs.strategies.fixed(p, 32),
    "sliding": lambda p: bs.strategies.fixed(p, 16, 1),
    "random": lambda p: bs.strategies.randomized(p, law(8)),
    "checkpointed": bs.strategies.checkpointed,
}

@functools.cache
def program(name, cell, H, B, T):
    problem = bs.Problem(
        getattr(bs.cells, cell)(28, H), bs.readouts.linear(H, 28), bs.losses.cross_entropy
    )
    strategy = MAKE[name](problem)
    params = problem.init(jax.random.key(0))
    symbols = jax.random.randint(jax.random.key(1), (T + 1, B), 0, 28)
    batch = bs.Batch(symbols[:-1], symbols[1:], jnp.ones((T, B)))

    def estimate(*arguments):
        found, state = strategy.estimate(*arguments)
        return found.loss, found.grads, state

    arguments = params, strategy.init(params, B), batch, jax.random.key(2)
    compiled = jax.jit(estimate).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))

for line in sys.stdin:
    name, cell, *numbers = line.split()
    *sizes, runs = map(int, numbers)
    once = program(name, cell, *sizes)
    took = []
    for _ in range(runs):
        begun = clock()
        once()
        took.append(clock() - begun)
    print(min(took), flush=True)
"""


class Place(NamedTuple):
    """The estimate that a row measures."""

    strategy: str
    cell: str
    hidden: int
    batch_size: int
    steps: int


def places(small: bool) -> Iterator[Place]:
    """Yield the places of the grid."""
    cells, sizes = ("elman", "gru", "lstm"), (64, 128, 256)
    for cell in cells[: 1 if small else None]:
        for hidden in sizes[: 1 if small else None]:
            for strategy in STRATEGIES[: 2 if small else None]:
                yield Place(strategy, cell, 8 if small else hidden, 16, 64 if small else 512)


def compare(other: Path, small: bool, clock: str, turns: int = 15) -> Iterator[dict[str, object]]:
    """Time each place in both checkouts in turn, and swap their order from turn to turn."""
    with _process(HERE, clock) as ours, _process(other, clock) as theirs:
        for place in places(small):
            both = [ours, theirs]
            for one in both:
                _asked(one, place, 2)  # compiled and warm
            pairs = []
            for turn in range(2 if small else turns):
                order = both[:: 1 if turn % 2 else -1]
                seconds = {one.pid: _asked(one, place, 3) for one in order}
                pairs.append((seconds[ours.pid], seconds[theirs.pid]))
            now, before = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            yield place._asdict() | {"seconds": now, "seconds_before": before, "ratio": ratio}


def _process(checkout: Path, clock: str) -> subprocess.Popen[str]:
    environment = {"PYTHONPATH": str(checkout), "CHECKOUT": str(checkout), "CLOCK": clock}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | environment, cwd=checkout, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def _asked(process: subprocess.Popen[str], place: Place, runs: int) -> float:
    """Ask a process for the seconds of the fastest run."""
    into: IO[str] | None = process.stdin
    out: IO[str] | None = process.stdout
    assert into is not None and out is not None
    print(*place, runs, file=into, flush=True)
    return float(out.readline())


def main() -> int:
    """Print the table and the judgement, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("file", nargs="?", type=Path, help="file of the table")
    parser.add_argument(
        "--small", action="store_true", help="a grid of seconds, to see that it works"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="measure processor time instead of the clock"
    )
    given = parser.parse_args()
    clock = "process_time" if given.cpu else "perf_counter"
    rows = []
    for row in compare(given.other.resolve(), given.small, clock):
        rows.append(row)
        print(*row.values(), flush=True)
    table = pd.DataFrame(rows)
    if given.file:
        table.to_csv(given.file, index=False)
    median, worst = table["ratio"].median(), table["ratio"].min()
    print(table.groupby("strategy", sort=False)["ratio"].describe().to_string())
    print(f"median {median:.3f} (at least {MEDIAN}), worst {worst:.3f} (at least {WORST})")
    return int(median < MEDIAN or worst < WORST)


if __name__ == "__main__":
    sys.exit(main())
