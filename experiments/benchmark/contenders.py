"""The benchmark's contenders by name, and the timing of one contender in a process of its own.

A contender is a function of a `Point` that returns `(once, about)`: `once()` computes the loss and the gradient
of all parameters and waits for them; `about` holds facts known without a run. All start from the weights of
`Problem.init`. tests/experiments/test_bench.py compares their losses and gradients, so the times compare the
same thing.
"""

import resource
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from point import Contender, Point

PHASES = ("embedding", "forward", "head", "backward", "contraction")
PRODUCTS = tuple(f"{phase}_products" for phase in PHASES if phase != "embedding")
TOGETHER = ("apart", *PHASES, *PRODUCTS)  # these run in one process, because they share arrays
OURS = ("ours", "full", "chunks", "checkpointed", "random_cuts", "sliding", "lag_table")
OURS += ("as_in_readme", "step_only", "scan_full", "scan_chunks")
OTHERS = ("textbook", "textbook_indexed", "lax_scan", "flax", "torch", "products")
PER_LOSS = ("one_pass_a_loss", "lags_one_pass_a_loss", "lags_one_pass_a_loss_and_lag")
# the file that holds a contender; JAX is imported with it
FILES = {"ours": OURS, "others": OTHERS, "per_loss": PER_LOSS, "phases": TOGETHER}


def find(name: str) -> Callable[[Point], Contender]:
    """Find the contender of that name."""
    (module,) = (module for module, names in FILES.items() if name in names)
    return getattr(import_module(module), name)


@cache
def _prepared(name: str, point: Point) -> Contender:
    return find(name)(point)


def prepare(name: str, point: Point) -> dict[str, Any]:
    """Compile and warm up; return the facts about the contender, and the time of one run."""
    _prepared.cache_clear()
    once, about = _prepared(name, point)
    once()
    return {"scaled_by": 1.0} | about | {"warm": run(name, point)[0]}


def run(name: str, point: Point, least: float = 0.05) -> tuple[float, float]:
    """Measure seconds and minor page faults of one run, as means over successive runs of `least` seconds.

    Runs follow each other as in training. If another process has just had the cores, the system may leave two
    threads on one core during a single run of some milliseconds.
    """
    once, _ = _prepared(name, point)
    faults, begun, runs, seconds = _usage().ru_minflt, time.perf_counter(), 0, 0.0
    while seconds < least:
        once()
        runs, seconds = runs + 1, time.perf_counter() - begun
    return seconds / runs, (_usage().ru_minflt - faults) / runs


def _usage() -> resource.struct_rusage:
    return resource.getrusage(resource.RUSAGE_SELF)


def peak_bytes() -> int:
    """Return the most memory that this process has had, in bytes."""
    return _usage().ru_maxrss * (1 if sys.platform == "darwin" else 1024)
