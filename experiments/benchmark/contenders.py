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
from functools import partial
from importlib import import_module
from typing import Any

from estimators import ESTIMATORS, planned, timed
from point import Contender, Point

PHASES = ("embedding", "forward", "head", "backward", "contraction")
PRODUCTS = tuple(f"{phase}_products" for phase in PHASES if phase != "embedding")
TOGETHER = ("apart", *PHASES, *PRODUCTS)  # these run in one process, because they share arrays
OURS = ("ours", "full", "chunks", "checkpointed", "random_cuts", "sliding", "lag_table")
OURS += ("as_in_readme", "one_device", "step_only", "scan_full", "scan_chunks")
OTHERS = ("textbook", "textbook_indexed", "lax_scan", "flax", "torch", "products")
PER_LOSS = ("one_pass_a_loss", "lags_one_pass_a_loss", "lags_one_pass_a_loss_and_lag")
PEERS = ("numpy_rtrl", "braintrace_rtrl", "braintrace_snap", "braintrace_d_rtrl")
PEERS += ("braintrace_pp_prop",)
# the file that holds a contender; JAX is imported with it
FILES = {"ours": OURS, "others": OTHERS, "per_loss": PER_LOSS, "phases": TOGETHER, "peers": PEERS}
# the process that contenders share; all others have one of their own
HOMES = dict.fromkeys(TOGETHER, "together") | dict.fromkeys(ESTIMATORS, "estimators")

_PREPARED: dict[tuple[str, Point], Contender] = {}  # at one point


def find(name: str) -> Callable[[Point], Contender]:
    """The contender of that name."""
    if name in ESTIMATORS:
        return partial(timed, name)
    (module,) = (module for module, names in FILES.items() if name in names)
    return getattr(import_module(module), name)


def prepare(name: str, point: Point) -> dict[str, Any]:
    """Compile and warm up; returns what is known of the contender, and how long one run takes."""
    if any(other != point for _, other in _PREPARED):
        _PREPARED.clear()
    once, about = _PREPARED[name, point] = find(name)(point)
    once()
    return {"scaled_by": 1.0} | about | {"warm": run(name, point)[0]}


def run(name: str, point: Point, least: float = 0.05) -> tuple[float, float]:
    """Measure seconds and minor page faults of one run, as means over successive runs of `least` seconds.

    Runs follow each other as in training. If another process has just had the cores, the system may leave two
    threads on one core during a single run of some milliseconds.
    """
    once, _ = _PREPARED[name, point]
    faults, begun, runs, seconds = _usage().ru_minflt, time.perf_counter(), 0, 0.0
    while seconds < least:
        once()
        runs, seconds = runs + 1, time.perf_counter() - begun
    return seconds / runs, (_usage().ru_minflt - faults) / runs


def plan(name: str, point: Point) -> dict[str, Any]:
    """The row of an estimator whose memory the compiler plans; nothing is run."""
    return point._asdict() | {"contender": name} | planned(name, point)


def _usage() -> resource.struct_rusage:
    return resource.getrusage(resource.RUSAGE_SELF)


def peak_bytes() -> int:
    """Return the most memory that this process has had, in bytes."""
    return _usage().ru_maxrss * (1 if sys.platform == "darwin" else 1024)
