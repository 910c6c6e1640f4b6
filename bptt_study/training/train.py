"""Training: a run of all its seeds in one program, advanced from log point to log point."""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from bptt_study.optimizers import Optimizer, check_clip, check_state
from bptt_study.training.budget import Budget
from bptt_study.training.programs import Progress, Setup, programs, run_keys
from bptt_study.training.resets import folded_size, make_sampler
from bptt_study.types import Problem, Strategy, Task

__all__ = ["Budget", "Progress", "Trained", "make_train", "run_keys"]

PAUSE_SECONDS = 1.0  # time between two pauses, unless one update takes longer


class Trained(NamedTuple):
    """A run so far, or all of it: the state of all S seeds and one record per log point."""

    progress: Progress  # every leaf [S, …]
    records: list[dict[str, np.ndarray]]  # per log point, each value [S]
    seconds: float = 0.0  # of all seeds together, without compilation and validation
    compile_seconds: float = 0.0


def make_train(
    problem: Problem, strategy: Strategy, optimizer: Optimizer, budget: Budget, task: Task
) -> Callable[..., Trained]:
    """Make the function `train(keys, watch=None, pause=None, restore=None)`, which runs the whole budget.

    A key fixes the initial weights and the data of its seed, whatever the strategy, so comparisons of
    strategies are paired. Seeds are split over the devices. The seeds of a device run one after the other on a
    CPU, and side by side on an accelerator.

    A seed diverges when the loss of an update or the norm of its gradient is not finite, or the loss exceeds
    the budget's bound. The squares of a finite gradient may overflow. Then that update is not done, and the
    seed stops; the others go on. It still has a row at every log point, with the scores of its last parameters
    and without training metrics.

    Args:
      problem: Cell, readout and loss.
      strategy: The gradient estimator.
      optimizer: The optimizer that turns estimates into updates.
      budget: The amount of training.
      task: The source of batches, validation data and reference losses.

    Returns:
      `train`. `keys` are [S] keys, or one key. `train` calls `watch(record, progress)` at every log point, and
      `pause(trained)` about every second. `restore(progress)` gets the first state and returns the Trained to
      start from, which may be any that `pause` got. Pauses and restarts do not change a bit of the result.

    Raises:
      SettingError: For an optimizer that `optimizers.check_clip` refuses; by `train`, for one that
        `optimizers.check_state` refuses.
    """
    check_clip(optimizer, problem.init)
    sampler = make_sampler(task, budget)
    transform, norm, largest = optimizer.transform, optimizer.clip_norm, _largest_loss(budget, task)
    sample, level, size = sampler.sample, sampler.level, folded_size(budget)
    setup = Setup(problem, strategy, transform, norm, sample, level, size, largest)

    def train(
        keys: Key[Array, "*S"],
        watch: Callable[..., None] | None = None,
        pause: Callable[[Trained], None] | None = None,
        restore: Callable[[Progress], Trained] | None = None,
    ) -> Trained:
        if keys.dtype == jnp.uint32:  # keys of two words each, as `jax.random.PRNGKey` makes them
            keys = jax.random.wrap_key_data(keys)
        keys = keys if keys.ndim else keys[None]
        nowhere = np.array([-1, -1], np.int32)
        begun = time.perf_counter()
        compiled = programs(setup, budget.split, len(keys))
        progress = compiled.start(sampler.data, dict(optimizer.numbers), keys)
        check_state(progress.optimizer)
        run = compiled.advance.lower(sampler.data, nowhere, progress).compile()
        score = compiled.validate.lower(task.validation, nowhere, progress).compile()
        progress, records, seconds, _ = restore(progress) if restore else Trained(progress, [])
        jax.block_until_ready(run(sampler.data, nowhere, progress))  # the first call is slower
        compile_seconds = time.perf_counter() - begun

        pace = _Pace(lambda span, p: run(sampler.data, span, p))
        for since, point in [*pairwise([0, *budget.log_points])][len(records) :]:
            for done, latest, took in pace.advance(progress, since, point):
                progress, seconds = latest, seconds + took
                if pause and done < point:
                    pause(Trained(progress, records, seconds))
            scores = score(task.validation, nowhere, progress)
            each = {"seconds": np.full(len(keys), seconds / len(keys))}
            # a new list, since what `pause` got stays as it was
            records = [*records, _record(progress, scores, point) | each]
            if watch:
                watch(records[-1], progress)
            if pause:
                pause(Trained(progress, records, seconds))
        return Trained(progress, records, seconds, compile_seconds)

    return train


def _largest_loss(budget: Budget, task: Task) -> float:
    """Compute the largest loss that does not count as diverged; no multiple of 0 or less is one."""
    chance, bound = max(task.references.values(), default=np.inf), budget.divergence_bound
    return np.inf if bound is None or chance <= 0 else bound * chance


class _Pace:
    """The pace of a run: it advances by as many updates as take about PAUSE_SECONDS."""

    def __init__(self, run: Callable[[Any, Progress], Progress]) -> None:
        self.run, self.updates = run, 1

    def advance(
        self, progress: Progress, since: int, point: int
    ) -> Iterator[tuple[int, Progress, float]]:
        """Run up to update `point`; yield the updates done, the progress and the seconds of each part."""
        done = int(progress.update.max())
        while done < point:
            until = min(point, done + self.updates)
            begun = time.perf_counter()
            span = np.array([since, until], np.int32)
            progress = jax.block_until_ready(self.run(span, progress))
            took = time.perf_counter() - begun
            self.updates = max(1, int((until - done) * min(8.0, PAUSE_SECONDS / took)))
            done = until
            yield done, progress, took


def _record(progress: Progress, scores: dict[str, Array], point: int) -> dict[str, np.ndarray]:
    """Collect the scores of each seed at a log point, and the means of its metrics since the last one.

    Updates whose batch has no token that counts are left out of the means.
    """
    at = np.asarray(progress.diverged_at)
    diverged = at > 0
    sums = {name: np.asarray(total) for name, total in progress.sums.items()}
    counted = sums.pop("counted")
    count = np.where(diverged | (counted == 0), np.nan, counted)
    means = {name: (total / count).astype(total.dtype) for name, total in sums.items()}
    measured = {name: np.asarray(score) for name, score in scores.items()}
    at = np.where(diverged, at, np.nan)
    lost = ~diverged & ~np.isfinite(measured["validation_loss"])
    # the start or the last update may ruin the parameters, and no later update tells
    if lost.any():
        at = np.where(lost & ~_finite(progress.params), point, at)
        others = {name: score for name, score in measured.items() if name != "validation_loss"}
        measured |= {name: np.where(lost, np.nan, score) for name, score in others.items()}
    return (
        means
        | measured
        | {
            "update": np.full(len(at), point),
            "diverged": diverged | lost,
            "diverged_at": at,
        }
    )


def _finite(params: Any) -> np.ndarray:
    """Return for each seed whether all of its parameters are finite."""
    floats = [a for a in jax.tree.leaves(params) if jnp.issubdtype(a.dtype, jnp.inexact)]
    whole = [np.isfinite(np.asarray(a)).all(axis=tuple(range(1, a.ndim))) for a in floats]
    return np.all(whole, axis=0)
