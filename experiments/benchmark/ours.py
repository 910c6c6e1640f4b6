"""The contenders of bptt_study in the benchmark: one loss and gradient each.

A strategy's estimate runs as a training loop has it, compiled, with its batch split over devices of one core
each; `as_in_readme` runs as README's block has it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from point import GATES, SYMBOLS, Contender, Point, compiled, setting

import bptt_study as bs
from bptt_study import strategies
from bptt_study.backprop import BATCH_AXIS
from bptt_study.backprop.forward import forward
from bptt_study.backprop.schedules import revolve
from bptt_study.backprop.schedules.call import segment_length
from bptt_study.backprop.schedules.per_segment import ROUNDS
from bptt_study.strategies.laws import reach


def _estimate(make: Callable[..., Any], point: Point, *settings: Any) -> Contender:
    """Make the estimate of a strategy, with the memory that its claim promises."""
    bs.devices.use("auto")
    problem, params, state, batch = setting(point)
    strategy = make(problem, *settings)
    parts = math.gcd(point.batch_size, jax.device_count())
    contender = split_estimate(strategy, parts, params, state, batch)
    return contender[0], contender[1] | _predicted(strategy.claim, problem, params, point, parts)


def split_estimate(strategy: Any, parts: int, params: Any, state: Any, batch: Any) -> Contender:
    """Make the estimate of a strategy with its batch in `parts` parts, each on its own device."""

    def estimate(*arguments: Any) -> Any:
        estimate, state = strategy.estimate(*arguments)
        return estimate.loss, estimate.grads, state

    # operations on one device, so that those of several do not add what each of them repeats
    key = jax.random.key(1)
    operations = bs.measure.arithmetic(estimate, params, state, batch, key)
    with bs.devices.split_batch(parts):

        def placed(tree: Any, *axes: Any) -> Any:
            return jax.device_put(tree, jax.NamedSharding(jax.sharding.get_mesh(), P(*axes)))

        arguments = placed(params), placed(state, BATCH_AXIS), placed(batch, None, BATCH_AXIS)
        return compiled(estimate, *arguments, key, operations=operations)


def _predicted(
    claim: bs.Claim, problem: Any, params: Any, point: Point, parts: int
) -> dict[str, Any]:
    """Compute the memory that the strategy's claim promises.

    bytes = states held × (h_t and the residuals of its update) + segment × (e_t, λ_t, twice the pre-activations
    that λ_t is pulled back to, and the logits with their derivative) + tokens × the numbers of each, such as
    draws.

    The states held follow from the claim. For "T" they are T. For "window" they are the steps whose states a
    cache holds, or the window if it is longer. For "segment" they are the same, or the reach of the law, and T
    below `per_segment.ROUNDS` such lengths. For "√T" they are the places and one unit.
    """
    if point.cell not in GATES:
        return {}
    size, T = point.batch_size // parts, point.steps
    start, x = jax.eval_shape(lambda: (problem.cell.zeros(size), jnp.zeros((1, size), jnp.int32)))
    left = jax.eval_shape(lambda h, x: forward(problem.cell, params["cell"], h, x)[1:], start, x)
    state, step = (sum(a.size for a in jax.tree.leaves(tree)) for tree in (start, left))
    fits = segment_length(start, size)
    segment = min(T, max(point.window or 1, fits))
    longest = max(fits, reach(_law(point), point.batch_size * T))
    held = {
        "T": T,
        "window": segment,
        "segment": longest if ROUNDS * longest <= T else T,
        "√T": sum(revolve.layout(T, 2 * max(1, math.isqrt(T)))),
    }[claim.memory]
    working = 2 * state + 2 * size * (GATES[point.cell] * point.hidden + SYMBOLS)
    one = params["readout"]["b_q"].dtype.itemsize
    numbers = held * step + min(segment, held) * working + claim.per_token * T * size
    return {"states": held, "predicted_bytes": one * parts * numbers}


def full(point: Point) -> Contender:
    """bptt_study: full BPTT."""
    return _estimate(strategies.full, point)


def chunks(point: Point) -> Contender:
    """bptt_study: fixed truncation, chunks."""
    return _estimate(strategies.fixed, point, point.window)


def checkpointed(point: Point) -> Contender:
    """bptt_study: the gradient of full BPTT at √T memory."""
    return _estimate(strategies.checkpointed, point)


def random_cuts(point: Point) -> Contender:
    """bptt_study: randomized truncation, segments of a quarter of the window on average."""
    return _estimate(strategies.randomized, point, _law(point))


def _law(point: Point) -> Any:
    return strategies.constant(max(2, (point.window or point.steps) / 4))


def sliding(point: Point) -> Contender:
    """bptt_study: the sliding window."""
    return _estimate(strategies.fixed, point, point.window, 1)


def ours(point: Point) -> Contender:
    """bptt_study: full, or chunks if the point has a window."""
    return (full if point.window is None else chunks)(point)


def _make(problem: Any, point: Point) -> Any:
    if point.window is None:
        return strategies.full(problem)
    return strategies.fixed(problem, point.window)


def as_in_readme(point: Point) -> Contender:
    """bptt_study: as in README's block for a notebook."""
    bs.devices.use("cpu")
    problem, params, state, batch = setting(point)
    strategy = bs.devices.compile(_make(problem, point))
    key = jax.random.key(1)

    def once() -> Any:
        estimate, last = jax.block_until_ready(strategy.estimate(params, state, batch, key))
        return estimate.loss, estimate.grads, last

    return once, {}


def one_device(point: Point) -> Contender:
    """bptt_study: `jax.jit` of the estimate as it is, on one device as the textbook's."""
    problem, params, state, batch = setting(point)
    return split_estimate(_make(problem, point), 1, params, state, batch)


def step_only(point: Point) -> Contender:
    """bptt_study: a cell without its affine form, on one device like the textbook's."""
    problem, params, state, batch = setting(point)
    problem = problem._replace(cell=problem.cell._replace(affine=None))
    return split_estimate(_make(problem, point), 1, params, state, batch)


def lag_table(point: Point) -> Contender:
    """bptt_study: `lags.gradients`, G_k of all losses for all lags k < window."""
    problem, params, state, batch = setting(point)

    def table(params: Any, state: Any, batch: Any) -> Any:
        return bs.lags.gradients(problem, params, batch, point.window, state)

    return compiled(table, params, state, batch)


def scan_full(point: Point) -> Contender:
    """bptt_study: `bs.scan` without a truncation, in place of `lax.scan` in the textbook's loss."""
    from others import by_scan

    return by_scan(point, bs.scan)


def scan_chunks(point: Point) -> Contender:
    """bptt_study: `bs.scan` with a window, in place of `lax.scan` in the textbook's loss."""
    from functools import partial

    from others import by_scan

    return by_scan(point, partial(bs.scan, window=point.window))
