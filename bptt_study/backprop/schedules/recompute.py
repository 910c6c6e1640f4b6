"""The schedule that stores some states and computes the others again, in the order of `revolve`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bptt_study.backprop.forward import forward, last_state
from bptt_study.backprop.schedules import revolve
from bptt_study.backprop.schedules.call import Call, Sums, back_through, nothing
from bptt_study.types import State


def recompute(call: Call, state: State, length: int, places: int) -> Sums:
    """Back-propagate through all steps, storing `places` states and the `length` states of one segment.

    When to use it: the gradient has to be exact, and T states do not fit into memory. Each step is run forward
    more than once; `revolve.forward_steps` gives the number.
    """
    units = len(call.batch.mask) // length
    cell, theta = call.problem.cell, call.params["cell"]

    def operate(carry: Any, operation: revolve.Plan) -> tuple[Any, None]:
        state, stored, end, found, norms = carry
        load, unit, pull, store = operation
        state = jax.tree.map(lambda h, s: jnp.where(load < 0, h, s[load]), state, stored)
        start = unit * length
        inputs = call.steps(start, length)[0].inputs

        def run() -> Any:
            return last_state(cell, theta, state, inputs), end, found, norms

        def back() -> Any:
            segment = forward(cell, theta, state, inputs)
            after, own = back_through(call, found, segment, start)
            last = jax.tree.map(
                lambda h, e: jnp.where(unit == units - 1, h[-1], e), segment.after, end
            )
            return (
                state,
                last,
                after,
                lax.dynamic_update_slice_in_dim(norms, own.astype(norms.dtype), start, 0),
            )

        state, end, found, norms = lax.cond(pull, back, run)
        stored = jax.tree.map(
            lambda s, h: s.at[jnp.where(store < 0, places, store)].set(h, mode="drop"),
            stored,
            state,
        )
        return (state, stored, end, found, norms), None

    stored = jax.tree.map(lambda h: jnp.broadcast_to(h, (places, *h.shape)), state)
    norms = jnp.zeros(call.batch.mask.shape, call.tokens.dtype)
    carry = (state, stored, state, nothing(call, state), norms)
    plan = revolve.plan(units, places)
    (_, _, end, (_, (loss, grads)), norms), _ = lax.scan(operate, carry, plan)
    return Sums(loss, grads, norms, end)
