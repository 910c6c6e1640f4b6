"""The parts that schedules share: the arguments of an estimate, the sums that it returns, a segment of time.

A segment is a stretch of time whose arrays fill a core's cache. Every schedule goes from segment to segment,
because that at least halves the time of a gradient, however much memory there is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bptt_study.backprop.adjoint import adjoints
from bptt_study.backprop.forward import Stored
from bptt_study.backprop.forward_pass import differentiate
from bptt_study.backprop.pytrees import add, adjoint_norms, floats, wide, zeros_like
from bptt_study.types import Batch, Params, Problem, State


class Call(NamedTuple):
    """The arguments of one estimate."""

    problem: Problem
    params: Params
    batch: Batch
    link_weights: Float[Array, "T *N B"] | None
    tokens: Float[Array, ""]  # number of tokens of the whole batch, which may be split over devices
    window: int
    stride: int

    def steps(self, start: Any, length: int) -> tuple[Batch, Array | None]:
        """Cut batch and link weights to `length` steps from step `start` on."""

        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, start, length)

        return jax.tree.map(cut, (self.batch, self.link_weights))


class Sums(NamedTuple):
    """The sums that a schedule returns."""

    loss: Float[Array, ""]  # Σ of the masked losses ÷ tokens
    grads: Params  # wide
    adjoint_norms: Float[Array, "T B"]  # ‖λ_t‖
    last: State  # h_T


def nothing(call: Call, state: State) -> tuple[State, tuple[Array, Params]]:
    """Make the zeros that a backward pass starts from: adjoints (for N draws [N, B, H]), loss and gradient."""
    draws = () if call.link_weights is None else call.link_weights.shape[1:-1]
    arriving = jax.tree.map(lambda h: jnp.zeros((*draws, *h.shape), h.dtype), floats(state))
    return arriving, no_sums(call.params, call.tokens)


def no_sums(params: Params, tokens: Float[Array, ""]) -> tuple[Array, Params]:
    """Make the zeros to which a loss and a gradient are added; in 16 bits long sums would stop growing."""
    return jnp.zeros((), tokens.dtype), wide(zeros_like(params))


def of_segment(
    call: Call, stored: Stored, batch: Batch, link_weights: Array | None, arriving: State
) -> tuple[State, State, tuple[Array, Params]]:
    """Back-propagate one segment.

    Args:
      call: The arguments of the estimate.
      stored: The segment's forward pass.
      batch: The segment's batch.
      link_weights: The segment's ξ_t. None: 1.
      arriving: The adjoint from later steps, leaves [B, H], or [N, B, H] for N draws.

    Returns:
      The adjoint that the segment sends to earlier steps, λ_t, and (loss, gradient).
    """
    cell, theta = call.problem.cell, call.params["cell"]
    residuals = stored.residuals(batch.inputs)
    run = differentiate(call.problem, call.params, residuals, batch, call.tokens)

    def of_draw(weights: Array | None, arriving: State) -> tuple[State, State]:
        return adjoints(cell, theta, residuals, run.immediate, weights, arriving)

    leaving, found = each_draw(of_draw, link_weights, arriving)
    grads = {"cell": run.parameter_gradient(found), "readout": run.readout_gradient}
    return leaving, found, (run.loss, grads)


def each_draw(of_draw: Any, link_weights: Array | None, *arriving: State) -> tuple[Any, State]:
    """Average the adjoints over all draws: the parameter gradient is linear in λ, so it is computed once."""
    if link_weights is None or link_weights.ndim == 2:
        return of_draw(link_weights, *arriving)
    axes = (1, *[0] * len(arriving))
    leaving, each = jax.vmap(of_draw, in_axes=axes)(link_weights, *arriving)
    return leaving, jax.tree.map(lambda a: a.mean(axis=0), each)


def back_through(call: Call, carry: Any, stored: Stored, start: Any) -> tuple[Any, Array]:
    """Go back through the segment of `stored`, whose first step is `start`; also return its ‖λ_t‖."""
    arriving, total = carry
    length = len(jax.tree.leaves(stored.after)[0])
    leaving, found, own = of_segment(call, stored, *call.steps(start, length), arriving)
    return (leaving, add(total, own)), adjoint_norms(found)


# Measured on a CPU for H 32 … 512 and 4 … 16 sequences a device; results/bench has the numbers.
NUMBERS = 2**14  # numbers in each of a segment's arrays, so that a core's cache holds all arrays
TOKENS = 256  # least tokens of a segment: fewer do not repay the work that each segment does once
LONGEST = 512  # most time steps of a segment


def segment_length(state: State, size: int) -> int:
    """Compute the number of time steps of a segment of `size` sequences."""
    width = sum(leaf.size for leaf in jax.tree.leaves(state)) or size
    return max(1, min(max(NUMBERS // width, TOKENS // size), LONGEST))


def even(steps: int, length: int) -> int:
    """Round `length` down to a divisor of `steps` if one is near, since a remainder is compiled separately."""
    least = -(-steps // length)
    parts = (n for n in range(least, 2 * least + 1) if steps % n == 0)
    return -(-steps // next(parts, least))
