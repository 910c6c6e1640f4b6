"""Probes: what is looked at beside the loss, at some log points of a run and outside of its time.

A probe maps a `Scene` to rows of a table, `<probe>.csv.gz` of the study; the run's name, seed and update are
added to them. A factory per probe, named with its settings in conf/probe/; like a strategy, it may live
anywhere that Python can import.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from jaxtyping import Array, Key

from bptt_study import measure
from bptt_study.checks import whole
from bptt_study.types import Batch, Params, Problem, Strategy, Task


class Scene(NamedTuple):
    """One seed of a run at one log point."""

    problem: Problem
    strategy: Strategy
    task: Task
    params: Params
    batch: Batch  # as large as in training, the first sequences of the validation part
    key: Key[Array, ""]  # of this seed and update


class Probe(NamedTuple):
    """`look(scene)` returns the rows of one seed at one log point."""

    look: Callable[[Scene], pd.DataFrame]
    metrics: frozenset[str] = frozenset()  # what the strategy's estimate must report for it


def gradient_norms(draws: int = 16) -> Probe:
    """The strategy's own gradient norms over time steps and lag: axis, step, gradient_norm."""
    norms = jax.jit(partial(measure.gradient_norms, draws=whole("draws", draws)), static_argnums=0)

    def look(scene: Scene) -> pd.DataFrame:
        over = norms(scene.strategy, scene.params, scene.batch, scene.key)
        tables = (
            pd.DataFrame(
                {
                    "axis": axis,
                    "step": np.arange(len(values)) + (axis == "time"),
                    "gradient_norm": np.asarray(values),
                }
            )
            for axis, values in over.items()
        )
        return pd.concat(tables, ignore_index=True)

    return Probe(look, frozenset({"adjoint_norms"}))
