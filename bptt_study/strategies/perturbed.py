"""Perturbation: the gradient from the response of the loss to random directions, without a backward pass.

`backprop.perturbed` runs the perturbations. If `sigma` is None, the response is a derivative in forward mode
(jvp) along random tangents of the cell's parameters; the readout's own gradient is local in time and exact. If
`sigma` is a number, the strategy is an evolution strategy: antithetic pairs at θ ± σv. It needs values of the
loss alone, and perturbs the readout, too. All directions are random signs, the same for all sequences of a
batch. So the mean of an evolution strategy is smoothed: it is the derivative by each parameter, averaged over a
uniform change of this parameter by at most σ and over ±σ in all others, those of other blocks among them. It
tends to the gradient as σ falls. The reported loss is the one without perturbation. A σ that rounding drops
from θ ± σv is refused in `estimate`; within jit, the gradient is nan.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from bptt_study.backprop.perturbed import (
    TANGENTS,
    Course,
    Derivative,
    Particles,
    differences,
    perturbed,
)
from bptt_study.backprop.pytrees import floats
from bptt_study.backprop.shapes import check_real
from bptt_study.types import Batch, Claim, Estimate, LagWeights, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, number, whole


def derivative(sigma: float | None) -> Derivative:
    """Return differences at θ ± σv, or for None tangents; raise SettingError for a σ of 0 or less."""
    return TANGENTS if sigma is None else differences(number("sigma", sigma, above=0))


# (what v resembles, noise, number of a block, N) -> v, leaves [N, …]
Draw = Callable[[Params, Any, Any, int], Params]


def of_course(
    problem: Problem,
    course: Course,
    pairs: int,
    source: str,
    smoothed: float | None = None,
    unbiased: bool = True,
    carried: bool = False,
    draw: Draw | None = None,
) -> Strategy:
    """Make a strategy from a course.

    Args:
      problem: Cell, readout and loss.
      course: What is perturbed, and when another perturbation is drawn.
      pairs: The number of pairs of particles, or of tangents.
      source: The reference of the claim.
      smoothed: σ of the smoothed gradient for which the estimate is unbiased. None: the gradient itself.
      unbiased: Whether it is.
      carried: Whether particles go on from call to call. If not, they start from the hidden state.
      draw: What draws the directions. None: random signs.

    Returns:
      The strategy.

    Raises:
      SettingError: For fewer than one pair, and a cell with complex numbers.
    """
    whole("pairs", pairs)
    check_real(problem.cell, "estimators that perturb")
    moved = course.derivative.moved

    def start(params: Params, state: State) -> Particles:
        undrawn = jax.tree.map(lambda p: jnp.zeros((pairs, *p.shape), p.dtype), moved(params))
        return Particles(state, course.derivative.start(state, pairs), undrawn)

    def init(params: Params, batch_size: int) -> State:
        state = problem.cell.zeros(batch_size)
        return start(params, state) if carried else state

    def run(
        draw: Draw, params: Params, state: State, batch: Batch, noise: Any
    ) -> tuple[Estimate, State]:
        particles = state if carried else start(params, state)
        # only shapes, as parameters that a split batch has elsewhere cannot be closed over
        drawn = partial(draw, pairs, jax.eval_shape(moved, params))
        estimate, end = perturbed(problem, params, particles, batch, drawn, noise, course)
        if course.derivative.sigma is not None:
            grads = _unless_lost(course.derivative.sigma, params, estimate.grads)
            estimate = estimate._replace(grads=grads)
        return estimate, end if carried else end.state

    shapes = _shapes(problem)
    _check_moved(moved(shapes))
    kept = jax.eval_shape(lambda: init(shapes, 1)), jax.eval_shape(lambda: problem.cell.zeros(1))
    claim = Claim(
        unbiased=unbiased,
        memory="segment",
        steps="0",
        source=source,
        reach="stream" if carried else "call",
        online=carried,
        numbers=_numbers(floats(kept[0])) - _numbers(floats(kept[1])) or None,
        passes="forward" if course.derivative is TANGENTS else "evaluations",
        smoothed=smoothed,
        noise=partial(_noise, course, pairs),
    )
    return Strategy(init, partial(run, draw or signs), claim, partial(run, _listed))


def _check_moved(moved: Params) -> None:
    """Raise SettingError if there is nothing to move: a cell without parameters has no tangents."""
    if not jax.tree.leaves(moved):
        allowed = "one with parameters, for tangents of the cell's parameters"
        raise SettingError("cell", "one without", allowed, "Use full with this cell.")


def _noise(course: Course, pairs: int, steps: int, batch_size: int, params: Params) -> Params:
    """Return the shapes of the random signs of a call."""
    blocks = -(-steps // (course.hold or steps))
    moved = course.derivative.moved(params)
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct((blocks, pairs, *p.shape), p.dtype), moved)


def _unless_lost(sigma: float, params: Params, grads: Params) -> Params:
    """Return the gradient if θ ± σ differs from θ by σ. If rounding drops σ, raise; within jit, nan."""

    def dropped(p: Array) -> Array:
        off = jnp.maximum(jnp.abs(p + sigma - p - sigma), jnp.abs(p - sigma - p + sigma))
        return jnp.any(jnp.isfinite(p) & ~(off < sigma / 10))

    leaves = jax.tree.leaves(params)
    lost = jnp.stack([dropped(p) for p in leaves]).any()
    if not isinstance(lost, jax.core.Tracer) and lost:
        largest = f"{leaves[0].dtype} of up to {max(float(jnp.abs(p).max()) for p in leaves):.3g}"
        raise SettingError("sigma", sigma, f"so large that θ ± σ is not rounded to θ, {largest}")
    return jax.tree.map(lambda g: jnp.where(lost, jnp.nan, g), grads)


def signs(pairs: int, like: Params, key: Key[Array, ""], block: Any) -> Params:
    """Draw independent random signs, 32 from each word of random bits, as drawing takes most of the time."""
    vector, tree = zeros_as_vector(like)
    number = pairs * len(vector)
    words = jax.random.bits(jax.random.fold_in(key, block), (-(-number // 32), 1), "uint32")
    drawn = 2.0 * (words >> jnp.arange(32, dtype="uint32") & 1) - 1
    drawn = drawn.astype(vector.dtype).reshape(-1)[:number]
    return jax.vmap(tree)(drawn.reshape(pairs, -1))


def zeros_as_vector(like: Params) -> tuple[Array, Any]:
    """Return zeros of these shapes as one vector, and the map from such a vector to the tree."""
    return ravel_pytree(jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), like))


def _listed(pairs: int, like: Params, noise: Params, block: Any) -> Params:
    """Return the noise that was passed in."""
    return jax.tree.map(lambda v: v[block], noise)


def _shapes(problem: Problem) -> Params:
    return jax.eval_shape(problem.init, jax.random.key(0))


def cell_size(problem: Problem) -> int:
    """Count the cell's parameters."""
    return _numbers(TANGENTS.moved(_shapes(problem)))


def _numbers(tree: Any) -> int:
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# Variance of one pair, σ -> 0, from `lags.shared_flows`


def all_lags(draws: int, spread: Callable[[int], Float[np.ndarray, "T T T"]]) -> LagWeights:
    """Make the lag weights of an unbiased estimator, which averages so many draws of this variance."""
    return LagWeights(
        jnp.ones,
        lambda steps, lags: jnp.ones((steps, lags)),
        draws=draws,
        spread=spread,
        table="shared_flows",
    )


def with_lags(strategy: Strategy, weights: LagWeights) -> Strategy:
    """Add lag weights to the claim of a strategy."""
    return strategy._replace(claim=strategy.claim._replace(lag_weights=weights))


def of_one_block(factor: float, steps: int) -> Float[np.ndarray, "T T T"]:
    """Make c[j,t,u] of a variance that is `factor` times the squared gradient."""
    spread = np.zeros((steps, steps, steps))
    spread[0] = factor
    return spread


def of_blocks(count: int, hold: int, steps: int) -> Float[np.ndarray, "T T T"]:
    """Make c[j,t,u] of accumulated signs from a fresh start, for P = `count` parameters.

    Let c_ef be the gradient of all losses from block max(e, f) on for the parameters used in block e. Then

        Var = Σ_e (P - 1) ‖c_ee‖² + Σ_{e<f} [P (‖c_ef‖² + ‖c_fe‖²) + 2 c_ef·c_fe].

    If j is the first step of block f, c_ef = Σ_{t in e} F[j,t] for e ≤ f, and c_fe = c_ff.
    """
    spread = np.zeros((steps, steps, steps))
    z = 1.0 * (np.arange(steps) // hold == np.arange(-(-steps // hold))[:, None])  # [block, step]
    earlier, squares = np.zeros(steps), np.zeros((steps, steps))  # Σ z_e and Σ z_e z_eᵀ over e < f
    for f, own in enumerate(z):
        square, both = np.outer(own, own), np.outer(earlier, own)
        spread[f * hold] = (count - 1 + f * count) * square + count * squares + both + both.T
        earlier, squares = earlier + own, squares + square
    return spread
