"""How far the gradients of many estimators point the same way."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax import lax
from jaxtyping import Array, Float, Key

from bptt_study.backprop.pytrees import numbers
from bptt_study.instruments.compiled import compiled
from bptt_study.probes.lessons import taught
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.types import Batch, Params, Problem, Strategy
from bptt_study.validation import SettingError, fits, whole


def alignment(
    estimators: Mapping[str, Callable[[Problem], Strategy]], batches: int = 8, lessons: int = 0
) -> Probe:
    """Measure the cosines between the gradients of many estimators at the run's parameters.

    Whatever the run trains with, each estimator makes one estimate on each of some training batches, from the
    zero state and with keys of its own. The cosine of two of them is that of their gradients of the cell's
    parameters on the same batch, as the mean over the batches.

    Args:
      estimators: name -> (problem) -> strategy.
      batches: Training batches, spread over the run.
      lessons: The number of estimates that an estimator makes before, if it learns as synthetic gradients do.
        The parameters stay as they are.

    Returns:
      A probe with the columns first, second and cosine, a row for each ordered pair.

    Raises:
      SettingError: For less than one batch, and a negative number of lessons.

    References:
      Marschall, Cho & Savin 2020, "A unified framework of online learning algorithms for training recurrent
      neural networks".
    """
    whole("batches", batches)
    whole("lessons", lessons, least=0)

    @cache  # a strategy made anew would be compiled anew
    def strategies_for(problem: Problem) -> dict[str, Strategy]:
        found = {}
        for name, make in estimators.items():
            try:
                found[name] = make(problem)
            except SettingError as error:
                raise error.within(f"estimators.{name}") from None
        return found

    def look(snapshot: Snapshot) -> pd.DataFrame:
        data, made = snapshot.batches(batches), strategies_for(snapshot.problem)
        keys = jax.random.split(snapshot.key, len(made))
        units = {
            name: _directions(strategy, snapshot.params, data, key, lessons)
            for (name, strategy), key in zip(made.items(), keys, strict=True)
        }
        rows = [
            (first, second, np.mean(np.sum(a * b, axis=1)))
            for first, a in units.items()
            for second, b in units.items()
        ]
        return pd.DataFrame(rows, columns=["first", "second", "cosine"])

    def check_fit(problem: Problem, steps: int) -> None:
        fits("batches", batches, 3 * batches * steps)
        strategies_for(problem)

    return Probe(look, fits=check_fit)


def _directions(
    strategy: Strategy, params: Params, batches: Batch, key: Key[Array, ""], lessons: int
) -> Float[np.ndarray, "N P"]:
    """The gradients of N batches at length 1; nan without a gradient."""
    state = taught(strategy, params, batches, key, lessons)
    grads = np.asarray(_gradients(strategy, params, state, batches, key), float)
    with np.errstate(invalid="ignore"):
        return grads / np.linalg.norm(grads, axis=1, keepdims=True)


@compiled()
def _gradients(
    strategy: Strategy, params: Params, state: Any, batches: Batch, key: Key[Array, ""]
) -> Float[Array, "N P"]:

    def one(arguments: tuple[Batch, Key[Array, ""]]) -> Float[Array, "P"]:
        batch, key = arguments
        return numbers(strategy.estimate(params, state, batch, key)[0].grads["cell"])

    return lax.map(one, (batches, jax.random.split(key, len(batches.mask))))
