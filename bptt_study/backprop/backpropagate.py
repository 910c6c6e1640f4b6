"""The gradient of one batch: this file chooses the schedule for a truncation and a memory."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bptt_study.backprop.forward import token_count
from bptt_study.backprop.parts import WHOLE, in_parts, sequences
from bptt_study.backprop.pytrees import as_arrays, as_types_of
from bptt_study.backprop.scan import blocks
from bptt_study.backprop.schedules import revolve
from bptt_study.backprop.schedules.call import Call, Sums, even, segment_length
from bptt_study.backprop.schedules.per_segment import ROUNDS, per_segment
from bptt_study.backprop.schedules.recompute import recompute
from bptt_study.backprop.schedules.store_all import store_all
from bptt_study.backprop.schedules.windowed import windowed
from bptt_study.backprop.shapes import check_call
from bptt_study.types import Batch, Estimate, Params, Problem, State
from bptt_study.validation import whole


class Truncation(NamedTuple):
    """The part of the gradient that passes back through time; by default all of it, which is full BPTT.

    window: k2 of TBPTT(k1, k2), in time steps. None: no end.
    stride: k1. None: the window.
    link_weights: ξ_t, which multiplies the adjoint that passes back over the link h_{t-1} -> h_t, for each
      sequence. N draws of ξ give the average of their N gradients.
    reach: A promise that hardly ever more than this number of steps lie between two cuts, ξ = 0.
    """

    window: int | None = None
    stride: int | None = None
    link_weights: Float[Array, "*N T B"] | None = None
    reach: int | None = None


class Memory(NamedTuple):
    """The part of the forward pass that is stored at once.

    states: The number of states; the others are recomputed in the best order. None: all states that the
      truncation needs.
    segment: Time steps of a segment. None: as many as fill a cache.
    """

    states: int | None = None
    segment: int | None = None


FULL, ALL = Truncation(), Memory()


def backpropagate(
    problem: Problem,
    params: Params,
    state: State,
    batch: Batch,
    truncation: Truncation = FULL,
    memory: Memory = ALL,
) -> tuple[Estimate, State]:
    """Compute the loss and the truncated gradient of one batch.

        λ_t = e_t + ξ_{t+1} J_{t+1}ᵀ λ_{t+1},    ĝ = Σ_t λ_tᵀ I_t + the readout's own gradient,

    where λ_t leaves out the losses beyond the window. `scan` is the definition; this is equal to rounding.

    Args:
      problem: Cell, readout and loss.
      params: {"cell": …, "readout": …}.
      state: h_0, leaves [B, H]; no gradient flows into it.
      batch: Inputs [T, B] or [T, B, D], targets [T, B, …], mask [T, B].
      truncation: The part of the gradient that passes back through time.
      memory: The part of the forward pass that is stored at once.

    Returns:
      The estimate, with metrics `adjoint_norms` [T, B], ‖λ_t‖, and `cuts` [T, B], the links that pass nothing;
      and the state h_T.

    Raises:
      SettingError: For a truncation or memory that does not exist, a batch that cannot be split over the
        devices, and a cell that breaks a promise of its affine form.

    References:
      Werbos 1990; Williams & Peng 1990 (TBPTT); Tallec & Ollivier 2017 (ξ).
    """
    params, state, batch = as_arrays((params, state, batch))
    check_call(problem, params, state, batch, truncation.link_weights)
    steps, size = batch.mask.shape
    stride, window = blocks(steps, truncation.window, truncation.stride)
    if truncation.reach is not None:
        whole("reach", truncation.reach)

    def run(params: Params, state: State, batch: Batch, weights: Any, tokens: Array) -> Any:
        weights = None if weights is None else jnp.moveaxis(weights, -2, 0)  # time first
        call = Call(problem, params, batch, weights, tokens, window, stride)
        sums = _by_schedule(call, state, truncation.reach, memory)
        return (sums.loss, sums.grads), (sums.adjoint_norms, sums.last)

    weights = truncation.link_weights
    draws = 0 if weights is None else weights.ndim - 2
    arguments = (WHOLE, sequences(0), sequences(1), sequences(1 + draws), WHOLE)
    run = in_parts(run, size, arguments, (sequences(1), sequences(0)))
    state = lax.stop_gradient(state)
    found = run(params, state, batch, weights, token_count(params, batch))
    (loss, grads), (norms, end) = found
    boundary = (jnp.arange(steps)[:, None] % stride == 0) & (window == stride)
    if weights is not None:
        boundary |= jnp.all(weights.reshape(-1, steps, size) == 0, axis=0)
    cuts = jnp.broadcast_to(boundary, batch.mask.shape).at[0].set(False)
    metrics = {"adjoint_norms": norms, "cuts": cuts}
    return Estimate(loss, as_types_of(params, grads), metrics), lax.stop_gradient(end)


def _by_schedule(call: Call, state: State, reach: int | None, memory: Memory) -> Sums:
    """Choose the schedule that the truncation and the memory allow, and run it."""
    steps, size = call.batch.mask.shape
    length, weights = memory.segment or segment_length(state, size), call.link_weights
    if call.stride < steps:
        return windowed(call, state, length)
    if reach is not None and weights is not None and weights.ndim == 2:
        longest = max(length, reach)
        if steps >= ROUNDS * longest:
            return per_segment(call, state, longest)
    if memory.states is None or memory.states >= steps:
        return store_all(call, state, even(steps, length))
    return recompute(call, state, *revolve.layout(steps, memory.states))
