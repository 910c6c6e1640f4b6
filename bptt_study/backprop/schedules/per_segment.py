"""The schedule from cut to cut: beyond its own last cut, a sequence needs none of its past."""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bptt_study.backprop.forward import forward
from bptt_study.backprop.pytrees import add, adjoint_norms
from bptt_study.backprop.schedules import revolve
from bptt_study.backprop.schedules.call import Call, Sums, nothing, of_segment
from bptt_study.backprop.schedules.recompute import recompute
from bptt_study.types import State

# The least number of rounds. The last round is never full; with fewer rounds it weighs more than an eighth.
ROUNDS = 8


def per_segment(call: Call, state: State, length: int) -> Sums:
    """Back-propagate each sequence in its own time, from cut to cut; holds `length` states.

    When to use it: one draw of link weights cuts every sequence about every `length` steps or more often, and
    the sequence has at least `ROUNDS` times as many steps.

    A round runs each sequence `length` steps forward from its own last cut, and back-propagates the steps up to
    the last cut among them. The next round runs the rest again. If a sequence has no cut among its steps, it
    cannot go on, and `recompute` does everything, with 2√T states. This schedule has no reverse-mode
    derivative.
    """
    steps, size = call.batch.mask.shape
    cell, theta = call.problem.cell, call.params["cell"]
    row, lane = jnp.arange(length)[:, None], jnp.arange(size)
    weights = cast(Array, call.link_weights)  # one draw
    ends = jnp.concatenate([weights[1:] == 0, jnp.ones((1, size), bool)])  # a segment's last step

    def unfinished(carry: Any) -> Array:
        done, stuck, _ = carry
        return jnp.any(done < steps) & ~stuck

    def go(carry: Any) -> Any:
        done, _, (loss, grads, norms, state) = carry
        t = done + row
        # made-up steps beyond the end take the first inputs again: zeros might cause a division by zero, and
        # if the last input were repeated, a state that other inputs reset might overflow
        batch = jax.tree.map(lambda a: a[t % steps, lane], call.batch)
        mask, xi, end = jax.tree.map(
            lambda a: a.at[t, lane].get(mode="fill", fill_value=0),
            (call.batch.mask, weights, ends),
        )
        ready = jnp.max(jnp.where(end, row + 1, 0), axis=0)  # steps of whole segments
        own = row < ready
        stored = forward(cell, theta, state, batch.inputs)
        batch = batch._replace(mask=mask * own)
        _, adjoints, found = of_segment(call, stored, batch, xi, nothing(call, state)[0])
        # the next round computes the norms of steps that are not ready again
        norms = norms.at[t, lane].set(adjoint_norms(adjoints).astype(norms.dtype), mode="drop")
        state = jax.tree.map(
            lambda h0, h: jnp.where(_rows(ready > 0, h0), h[ready - 1, lane], h0),
            state,
            stored.after,
        )
        stuck = jnp.any((ready == 0) & (done < steps))
        return done + ready, stuck, (*add((loss, grads), found), norms, state)

    zero = (*nothing(call, state)[1], jnp.zeros_like(call.batch.mask, call.tokens.dtype), state)
    begin = (jnp.zeros(size, int), jnp.zeros((), bool), zero)
    _, stuck, found = lax.while_loop(unfinished, go, begin)

    def by_recomputation(_: Any) -> Any:
        layout = revolve.layout(steps, 2 * math.isqrt(steps))
        return False, tuple(recompute(call, state, *layout))

    # a loop of one turn or none, because under vmap a condition would always compute both branches
    return Sums(*lax.while_loop(lambda carry: carry[0], by_recomputation, (stuck, found))[1])


def _rows(condition: Array, leaf: Array) -> Array:
    return condition.reshape(condition.shape + (1,) * (leaf.ndim - 1))
