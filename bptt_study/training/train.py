"""Training: a run as one compiled program for all its seeds, stepped from log point to log point."""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Int, Key

from bptt_study.backprop.forward import evaluate
from bptt_study.optimizers import Optimizer, first_state
from bptt_study.training.budget import Budget
from bptt_study.training.parallel import over_seeds
from bptt_study.training.resets import folded_size, make_sampler, reseed
from bptt_study.types import Batch, Params, Problem, Strategy, Task

CHUNK_SECONDS = 1.0  # between two pauses, if one update takes no longer


class Progress(NamedTuple):
    """The whole state of a run of one seed: what a next update needs, and nothing else."""

    params: Params
    optimizer: Any
    strategy: Any
    update: Int[Array, ""]  # how many are done
    diverged_at: Int[Array, ""]  # the update that diverged and was not done; 0: none so far
    data_key: Key[Array, ""]
    draw_key: Key[Array, ""]
    sums: Any = ()  # of the metrics since the last log point


class Trained(NamedTuple):
    """A run so far, or all of it: the state of all S seeds and one record per seed and log point."""

    progress: Progress  # every leaf [S, …]
    records: list[dict[str, np.ndarray]]  # per log point, each value [S]
    seconds: float = 0.0  # of all seeds together, without compilation and validation
    compile_seconds: float = 0.0


class Programs(NamedTuple):
    """What runs compiled; every function is of (data, scalars, one leaf [S, …] per seed)."""

    start: Any  # (data, numbers of the optimizer's first state, key) -> Progress
    advance: Any  # (data, span, Progress) -> Progress
    validate: Any  # (validation batch, anything, Progress) -> scores


@lru_cache(maxsize=64)
def programs(
    problem: Problem,
    strategy: Strategy,
    transform: optax.GradientTransformation,
    clip_norm: float,
    sample: Callable[..., tuple[Batch, Array]],
    sequences: int,
    limit: float,
    split: int,
    seeds: int,
) -> Programs:
    """The same programs for the same arguments, so that each is traced and compiled once in a process.

    What is no argument, such as rate, seeds, data and number of updates, is traced. sequences: of a batch;
    limit: the largest loss that does not count as diverged; split: of the batch, into how many parts;
    seeds: how many.
    """

    def start(data: Any, numbers: Any, key: Key[Array, ""]) -> Progress:
        init_key, data_key, draw_key = run_keys(key)
        params = problem.init(init_key)
        first = Progress(
            params=params,
            optimizer=first_state(transform, params, numbers),
            strategy=strategy.init(params, sequences),
            update=jnp.zeros((), jnp.int32),
            diverged_at=jnp.zeros((), jnp.int32),
            data_key=data_key,
            draw_key=draw_key,
        )
        metrics = jax.eval_shape(update, data, first)[1]
        return first._replace(sums=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), metrics))

    def renewed(p: Progress, batch: Batch) -> Any:
        """The strategy's state for fresh sequences."""
        if strategy.renew is not None:
            return strategy.renew(p.params, p.strategy)
        return strategy.init(p.params, batch.mask.shape[1])

    def update(data: Any, p: Progress) -> tuple[Progress, dict[str, Array]]:
        batch, fresh = sample(data, p.data_key, p.update)
        state = jax.tree.map(partial(jnp.where, fresh), renewed(p, batch), p.strategy)
        draw = jax.random.fold_in(p.draw_key, p.update)
        estimate, state = strategy.estimate(p.params, reseed(state, draw), batch, draw)

        steps, opt_state = transform.update(estimate.grads, p.optimizer, p.params)
        norm = optax.tree.norm(estimate.grads)
        good = jnp.isfinite(estimate.loss) & (estimate.loss <= limit) & jnp.isfinite(norm)
        metrics = {
            "train_loss": estimate.loss,
            "gradient_norm": norm,
            "clipped_fraction": (norm > clip_norm).astype(norm.dtype),
        }
        new = (optax.apply_updates(p.params, steps), opt_state, state)
        kept = jax.tree.map(partial(jnp.where, good), new, (p.params, p.optimizer, p.strategy))
        return p._replace(
            params=kept[0],
            optimizer=kept[1],
            strategy=kept[2],
            update=p.update + good,
            diverged_at=jnp.where(good, 0, p.update + 1),
        ), metrics

    def advance(data: Any, span: Array, p: Progress) -> Progress:
        """Updates up to number span[1], with their metrics' sums since number span[0]."""

        def body(p: Progress) -> Progress:
            p, metrics = update(data, p)
            return p._replace(sums=jax.tree.map(jnp.add, p.sums, metrics))

        def going(p: Progress) -> Array:
            return (p.update < span[1]) & (p.diverged_at == 0)

        begins = p.update == span[0]
        p = p._replace(sums=jax.tree.map(lambda s: jnp.where(begins, 0, s), p.sums))
        return lax.while_loop(going, body, p)

    def validate(batch: Batch, _: Array, p: Progress) -> dict[str, Array]:
        return evaluate(problem, p.params, batch)

    return Programs(*(over_seeds(f, seeds, split) for f in (start, advance, validate)))


def make_train(
    problem: Problem, strategy: Strategy, optimizer: Optimizer, budget: Budget, task: Task
) -> Callable[..., Trained]:
    """A function `train(key)` or `train(keys)`, one key per seed, that runs the whole budget.

    `train(keys, watch=None, pause=None, restore=None)` calls `watch(record, progress)` at every log point and
    `pause(trained)` about every second. Any such `trained` can be gone on from: `restore(progress)` gets the
    first state and returns the one to start with, as a Trained; the rest is the same bit for bit wherever
    the pauses were. Keys fix initial weights and data whatever the strategy, so strategies are compared in
    pairs. Seeds run in one program: split over the devices; on each, one after the other on a CPU and side
    by side on an accelerator.

    A seed diverges when the loss or gradient of an update is not finite, or the loss beyond the budget's
    bound: that update is not done and the seed stops. The others go on; it has rows at every log point,
    those from then on with the scores of the parameters with which it stopped, without training metrics.
    """
    sampler = make_sampler(task, budget)
    chance = max(task.references.values(), default=np.inf)
    limit = np.inf if budget.divergence_bound is None else budget.divergence_bound * chance
    of_seeds = partial(
        programs,
        problem,
        strategy,
        optimizer.transform,
        optimizer.clip_norm,
        sampler.sample,
        folded_size(budget),
        limit,
        budget.split,
    )

    def train(
        keys: Key[Array, "S"],
        watch: Callable[..., None] | None = None,
        pause: Callable[[Trained], None] | None = None,
        restore: Callable[[Progress], Trained] | None = None,
    ) -> Trained:
        keys = keys if keys.ndim else keys[None]
        data, nowhere = sampler.data, np.array([-1, -1], np.int32)
        begun = time.perf_counter()
        start, advance, validate = of_seeds(len(keys))
        progress = start(data, dict(optimizer.numbers), keys)
        run = advance.lower(data, nowhere, progress).compile()
        score = validate.lower(task.validation, nowhere, progress).compile()
        progress, records, seconds, _ = restore(progress) if restore else Trained(progress, [])
        jax.block_until_ready(
            run(data, nowhere, progress)
        )  # the first call is slower than the next
        compile_seconds = time.perf_counter() - begun

        chunk, records = 1, list(records)
        for since, point in [*pairwise([0, *budget.log_points])][len(records) :]:
            done = int(progress.update.max())
            while done < point:
                until = min(point, done + chunk)
                begun = time.perf_counter()
                progress = jax.block_until_ready(
                    run(data, np.array([since, until], np.int32), progress)
                )
                took = time.perf_counter() - begun
                seconds += took
                chunk = max(1, int((until - done) * min(8.0, CHUNK_SECONDS / took)))
                done = until
                if pause and done < point:
                    pause(Trained(progress, records, seconds))
            scores = score(task.validation, nowhere, progress)
            record = _record(progress, scores, since, point) | {
                "seconds": np.full(len(keys), seconds / len(keys))
            }
            records.append(record)
            if watch:
                watch(record, progress)
            if pause:
                pause(Trained(progress, records, seconds))
        return Trained(progress, records, seconds, compile_seconds)

    return train


def _record(
    progress: Progress, scores: dict[str, Array], since: int, point: int
) -> dict[str, np.ndarray]:
    """Of each seed at a log point: its scores, and its metrics' means since the log point before."""
    at = np.asarray(progress.diverged_at)
    count = (point - since) or np.nan
    means = {
        name: np.where(at > 0, np.nan, np.asarray(total) / count).astype(total.dtype)
        for name, total in progress.sums.items()
    }
    return (
        means
        | {name: np.asarray(score) for name, score in scores.items()}
        | {
            "update": np.full(len(at), point),
            "diverged": at > 0,
            "diverged_at": np.where(at > 0, at, np.nan),
        }
    )


def run_keys(key: Key[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""], Key[Array, ""]]:
    """A seed's three keys: initial weights, data, draws of the strategy."""
    init_key, data_key, draw_key = jax.random.split(key, 3)
    return init_key, data_key, draw_key
