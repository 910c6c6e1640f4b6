"""TBPTT(k1, k2): each block of k1 = stride losses goes back k2 = window steps, all blocks side by side.

Time is laid out in rows and lanes. Take a stride of 3 and a window of 7: losses go 4 steps further back than
the start of their block. Then step t of a segment lies in row t mod 3 of lane t // 3:

              lanes before   lanes with losses
    row 0       0    3          6    9   12
    row 1       1    4          7   10   13        each adjoint goes up its lane,
    row 2       2    5          8   11   14        then on in the lane before, from the last row up

All lanes with losses go up together: 3 rows of their own, then 4 more. There lane n adds its adjoints to those
of lane n - 1, and then of lane n - 2. This takes `window` sequential steps for the whole segment.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bptt_study.backprop.adjoint import (
    adjoints,
    joint_adjoints,
    parameter_gradient,
    step_vjp,
    weighted,
)
from bptt_study.backprop.forward import Residuals, forward
from bptt_study.backprop.forward_pass import ForwardPass, differentiate
from bptt_study.backprop.pytrees import (
    add,
    adjoint_norms,
    as_types_of,
    floats,
    in_one_row,
    last,
    wide,
    zeros_like,
)
from bptt_study.backprop.schedules.call import Call, Sums, each_draw, nothing
from bptt_study.types import Cell, Params, State


class _Open(NamedTuple):
    """Steps to which later losses may still send adjoints; all leaves [S, …]."""

    residuals: Residuals
    link_weights: Float[Array, "S *N B"] | None
    adjoints: State  # λ_t from the losses so far


def _segment(call: Call, state: State, start: Any, length: int) -> tuple[State, ForwardPass, _Open]:
    """Run `length` steps forward: the last state, the derivatives of their losses, and the open steps."""
    batch, weights = call.steps(start, length)
    stored = forward(call.problem.cell, call.params["cell"], state, batch.inputs)
    residuals = stored.residuals(batch.inputs)
    found = differentiate(call.problem, call.params, residuals, batch, call.tokens)
    return last(stored.after), found, _Open(residuals, weights, zeros_like(floats(stored.after)))


def windowed(call: Call, state: State, length: int) -> Sums:
    """Back-propagate truncated passes; holds the states of one segment, and of window - stride steps before it.

    When to use it: whenever there is a window. The parameter gradient of a step is taken when no later loss can
    send it more.
    """
    steps, stride, further = len(call.batch.mask), call.stride, call.window - call.stride
    before = -(-further // stride) * stride
    length = min(max(length // stride * stride, stride, before), steps)
    cell, theta = call.problem.cell, call.params["cell"]

    def close(part: _Open) -> tuple[Params, Array]:
        gradient = parameter_gradient(cell, theta, part.residuals, part.adjoints)
        return gradient, adjoint_norms(part.adjoints)

    def go(carry: Any, start: Any, length: int = length) -> tuple[Any, Array]:
        state, open_, (loss, grads) = carry
        state, found, own = _segment(call, state, start, length)
        open_ = jax.tree.map(lambda *a: jnp.concatenate(a), open_, own)

        def of_draw(weights: Array | None) -> tuple[None, State]:
            links = open_.residuals, weights
            return None, _blocks(cell, theta, links, found.immediate, stride, further)

        _, sent = each_draw(of_draw, open_.link_weights)
        # the made-up steps before the first get no adjoint
        sent = jax.tree.map(lambda a: a.at[:before].set(jnp.where(start > 0, a[:before], 0)), sent)
        open_ = open_._replace(adjoints=add(open_.adjoints, sent))
        gradient, norms = close(jax.tree.map(lambda a: a[:length], open_))
        grads = add(grads, {"cell": gradient, "readout": found.readout_gradient})
        open_ = jax.tree.map(lambda a: a[length:], open_)
        return (state, open_, (loss + found.loss, grads)), norms

    # made-up steps before the first have the links of a real step: zeros might cause a division by zero
    first = _segment(call, state, 0, 1)[2]
    open_ = jax.tree.map(lambda a: jnp.repeat(a, before, axis=0), first)
    whole, rest = divmod(steps, length)
    carry = (state, open_, nothing(call, state)[1])
    carry, found = lax.scan(go, carry, jnp.arange(whole) * length)
    norms = [found]
    if rest:
        carry, found = go(carry, whole * length, rest)
        norms.append(found)
    end, open_, (loss, grads) = carry
    if before:
        gradient, tail = close(open_)
        grads = grads | {"cell": add(grads["cell"], gradient)}
        norms.append(tail)
    return Sums(loss, grads, in_one_row(norms)[before:], end)


def _blocks(
    cell: Cell, params: Params, links: Any, immediate: State, stride: int, further: int
) -> State:
    """Compute λ_t of P + S steps, leaves [P + S, B, H], of which the last S have the losses.
    Args:
      cell: The cell.
      params: Its parameters.
      links: (residuals, link weights) of the P + S steps.
      immediate: e_t of the last S steps.
      stride: The number of losses of a block.
      further: The number of steps that each block goes back beyond its start.
    """
    steps = len(jax.tree.leaves(links)[0])
    immediate = jax.tree.map(lambda a: _lanes(a, stride, "constant"), immediate)
    links = jax.tree.map(lambda a: _lanes(a, stride, "edge"), links)  # "edge": no division by zero
    blocks, own = (jax.tree.leaves(a)[0].shape[1] for a in (links, immediate))
    before = blocks - own

    def up(links: Any, immediate: State) -> tuple[State, State]:
        """Go up the rows of one lane, layer by layer if no adjoint leaves its lane."""
        of_lane = joint_adjoints if further else adjoints
        arriving = zeros_like(jax.tree.map(lambda e: e[0], immediate))
        return of_lane(cell, params, links[0], immediate, links[1], arriving)

    with_losses = jax.tree.map(lambda a: a[:, before:], links)
    leaving, total = jax.vmap(up, in_axes=1, out_axes=(0, 1))(with_losses, immediate)
    if before:
        total = jax.tree.map(partial(_pad_lanes, before), total)
        hop = partial(_hop, weighted(step_vjp(cell, params)), links, stride, before, own)
        _, total = lax.fori_loop(0, further, hop, (leaving, wide(total)))
    total = as_types_of(immediate, total)
    return jax.tree.map(
        lambda a: jnp.swapaxes(a, 0, 1).reshape(blocks * stride, *a.shape[2:])[:steps], total
    )


def _hop(
    vjp: Any, links: Any, stride: int, before: int, own: int, n: Any, carry: tuple[State, State]
) -> tuple[State, State]:
    """Do the n-th step beyond the blocks' starts: add the arriving adjoints, and go one row up."""
    arriving, total = carry
    row, lane = stride - 1 - n % stride, before - 1 - n // stride

    def corner(a: Array) -> tuple[Any, ...]:
        return row, lane, *[0] * (a.ndim - 2)

    def here(a: Array) -> Array:
        return lax.dynamic_slice(a, corner(a), (1, own, *a.shape[2:]))[0]

    def added(t: Array, a: Array) -> Array:
        return lax.dynamic_update_slice(t, (here(t) + a)[None], corner(t))

    total = jax.tree.map(added, total, arriving)
    return jax.vmap(vjp)(arriving, jax.tree.map(here, links)), total


def _lanes(a: Array, stride: int, beyond: str) -> Array:
    """Reshape [S, …] to [stride, lanes, …]."""
    a = jnp.pad(a, [(0, -len(a) % stride)] + [(0, 0)] * (a.ndim - 1), beyond)
    return jnp.swapaxes(a.reshape(len(a) // stride, stride, *a.shape[1:]), 0, 1)


def _pad_lanes(before: int, a: Array) -> Array:
    return jnp.pad(a, [(0, 0), (before, 0)] + [(0, 0)] * (a.ndim - 2))
