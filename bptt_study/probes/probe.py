"""A probe, and the snapshot of a run that it looks at."""

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
from jaxtyping import Array, Key

from bptt_study.types import Batch, Params, Problem, Strategy, Task


class Snapshot(NamedTuple):
    """The state of one seed of a run at one log point."""

    problem: Problem
    strategy: Strategy
    task: Task
    params: Params
    batch: Batch  # as large as in training, the first sequences of the validation part
    key: Key[Array, ""]  # of this seed and update
    batches: Callable[[int], Batch]  # N training batches, spread over the run: leaves [N, T, B, …]


class Probe(NamedTuple):
    """The function `look`, which maps a snapshot to rows of a table, and what it needs."""

    look: Callable[[Snapshot], pd.DataFrame]
    metrics: frozenset[str] = frozenset()  # what the strategy's estimate must report for it
    check: Callable[[Task], None] = lambda task: None  # SettingError for a task that does not fit
    lag_weights: bool = False  # whether the strategy must declare its lag weights
