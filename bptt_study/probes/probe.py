"""A probe, and the snapshot of a run that it measures."""

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
    # the first sequences of the validation part, as many as in training and cut at the same resets
    batch: Batch
    key: Key[Array, ""]  # a key for this seed and update
    batches: Callable[[int], Batch]  # N training batches, spread over the run: leaves [N, T, B, …]


class Probe(NamedTuple):
    """The function `look`, which maps a snapshot to rows of a table, and the conditions for it."""

    look: Callable[[Snapshot], pd.DataFrame]
    metrics: frozenset[str] = frozenset()  # the metrics that the strategy's estimate must report
    # task -> nothing; it raises SettingError if the task does not fit
    check: Callable[[Task], None] = lambda task: None
    # (problem, T) -> nothing; it raises SettingError if the network does not fit
    fits: Callable[[Problem, int], None] = lambda problem, steps: None
    lag_weights: bool = False  # whether the strategy must declare its lag weights
