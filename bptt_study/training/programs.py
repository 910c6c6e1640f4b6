"""The compiled programs of a run for all its seeds at once: start, updates and validation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, Key

from bptt_study.backprop.forward import evaluate
from bptt_study.backprop.pytrees import wide
from bptt_study.known import kept
from bptt_study.optimizers import first_state
from bptt_study.training.parallel import over_seeds
from bptt_study.training.resets import reseed
from bptt_study.types import Batch, Level, Params, Problem, Strategy

METRICS = ("train_loss", "gradient_norm", "clipped_fraction")  # of an update


class Progress(NamedTuple):
    """The whole state of a run of one seed: everything that the next update needs, and nothing else."""

    params: Params
    optimizer: Any
    strategy: Any
    update: Int[Array, ""]  # the number of updates done
    diverged_at: Int[Array, ""]  # the update that diverged and was not done; 0: none so far
    data_key: Key[Array, ""]
    draw_key: Key[Array, ""]
    sums: Any = ()  # the sums of the metrics since the last log point
    level: tuple[Any, ...] = ()  # see `types.Level`


class Setup(NamedTuple):
    """The things that are fixed at compilation. Rate, seeds, data and number of updates are arguments."""

    problem: Problem
    strategy: Strategy
    transform: optax.GradientTransformation
    clip_norm: float
    sample: Callable[..., tuple[Batch, Array]]  # see `types.Sampler`
    level: Level
    sequences: int  # number of sequences of a batch
    limit: float  # the largest loss that does not count as diverged


class Programs(NamedTuple):
    """The compiled programs; every function is of (data, scalars, one leaf [S, …] per seed)."""

    start: Any  # (data, numbers of the optimizer's first state, key) -> Progress
    advance: Any  # (data, span, Progress) -> Progress
    validate: Any  # (validation batch, anything, Progress) -> scores


@kept(64)
def programs(setup: Setup, split: int, seeds: int) -> Programs:
    """Make the programs of a run; the same arguments give the same programs, compiled once in a process.

    Args:
      setup: The things that are fixed at compilation.
      split: The number of parts of a batch, each on its own device.
      seeds: S, the number of seeds.

    Returns:
      The programs.
    """
    made = (partial(f, setup) for f in (_start, _advance, _validate))
    return Programs(*(over_seeds(f, seeds, split) for f in made))


def run_keys(key: Key[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""], Key[Array, ""]]:
    """Split the key of a seed.

    Args:
      key: The key.

    Returns:
      Three keys: for the initial weights, for the data, and for the draws of strategy and optimizer.
    """
    init_key, data_key, draw_key = jax.random.split(key, 3)
    return init_key, data_key, draw_key


def _start(setup: Setup, data: Any, numbers: Any, key: Key[Array, ""]) -> Progress:
    init_key, data_key, draw_key = run_keys(key)
    params = setup.problem.init(init_key)
    first = Progress(
        params=params,
        optimizer=reseed(first_state(setup.transform, params, numbers), draw_key),
        strategy=setup.strategy.init(params, setup.sequences),
        update=jnp.zeros((), jnp.int32),
        diverged_at=jnp.zeros((), jnp.int32),
        data_key=data_key,
        draw_key=draw_key,
        level=setup.level.start(),
    )
    metrics = jax.eval_shape(partial(_update, setup), data, first)[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), metrics)
    return first._replace(sums=wide(zeros))


def _update(setup: Setup, data: Any, p: Progress) -> tuple[Progress, dict[str, Array]]:
    """Renew the state for fresh sequences and do one update; if it diverges, mark the seed and undo it."""
    batch, fresh = setup.sample(data, p.data_key, p.update, *p.level)
    # `cond` copies no state where none is fresh: RTRL's has n P numbers per sequence
    renewed = lax.cond(fresh, lambda: _renewed(setup, p, batch), lambda: p.strategy)
    p = p._replace(strategy=renewed)
    draw = jax.random.fold_in(p.draw_key, p.update)
    estimate, state = setup.strategy.estimate(p.params, reseed(p.strategy, draw), batch, draw)

    steps, opt_state = setup.transform.update(estimate.grads, p.optimizer, p.params)
    norm = optax.tree.norm(wide(estimate.grads))
    good = jnp.isfinite(estimate.loss) & (estimate.loss <= setup.limit) & jnp.isfinite(norm)
    counts = jnp.any(batch.mask != 0)  # the loss of a batch without tokens is 0, and says nothing
    clipped = (norm > setup.clip_norm).astype(norm.dtype)
    metrics = dict(zip(METRICS, (estimate.loss, norm, clipped), strict=True))
    new = (optax.apply_updates(p.params, steps), opt_state, state)
    kept = jax.tree.map(partial(jnp.where, good), new, (p.params, p.optimizer, p.strategy))
    level = setup.level.advance(p.level, metrics)
    return p._replace(
        params=kept[0],
        optimizer=kept[1],
        strategy=kept[2],
        level=jax.tree.map(partial(jnp.where, good & counts), level, p.level),
        update=p.update + good,
        diverged_at=jnp.where(good, 0, p.update + 1),
    ), metrics | {"counted": counts.astype(jnp.int32)}


def _renewed(setup: Setup, p: Progress, batch: Batch) -> Any:
    """Make the strategy's state for fresh sequences."""
    if setup.strategy.renew is not None:
        return setup.strategy.renew(p.params, p.strategy)
    return setup.strategy.init(p.params, batch.mask.shape[1])


def _advance(setup: Setup, data: Any, span: Array, p: Progress) -> Progress:
    """Do updates up to number span[1], and sum their metrics since number span[0]."""

    def body(p: Progress) -> Progress:
        p, metrics = _update(setup, data, p)
        return p._replace(sums=jax.tree.map(jnp.add, p.sums, metrics))

    def going(p: Progress) -> Array:
        return (p.update < span[1]) & (p.diverged_at == 0)

    begins = p.update == span[0]
    p = p._replace(sums=jax.tree.map(lambda s: jnp.where(begins, 0, s), p.sums))
    return lax.while_loop(going, body, p)


def _validate(setup: Setup, batch: Batch, _: Array, p: Progress) -> dict[str, Array]:
    return evaluate(setup.problem, p.params, batch) | setup.level.scores(p.level)
