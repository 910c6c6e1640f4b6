"""The schedule that stores all states, then goes back through the segments from the last to the first."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bptt_study.backprop.forward import Stored, forward
from bptt_study.backprop.pytrees import in_one_row, last
from bptt_study.backprop.schedules.call import Call, Sums, back_through, nothing
from bptt_study.types import State


def store_all(call: Call, state: State, length: int) -> Sums:
    """Back-propagate through all steps in segments of `length`; holds T states.

    When to use it: always, unless the truncation allows `windowed` or memory is short.
    """
    steps = len(call.batch.mask)
    whole, rest = divmod(steps, length)
    cell, theta = call.problem.cell, call.params["cell"]

    def run(state: State, start: Any, length: int = length) -> tuple[State, Stored]:
        stored = forward(cell, theta, state, call.steps(start, length)[0].inputs)
        return last(stored.after), stored

    def back(carry: Any, segment: tuple[Stored, Array]) -> tuple[Any, Array]:
        return back_through(call, carry, *segment)

    starts = jnp.arange(whole) * length
    end, segments = lax.scan(run, state, starts)
    carry, norms = nothing(call, state), []
    if rest:
        end, tail = run(end, whole * length, rest)
        carry, found = back_through(call, carry, tail, whole * length)
        norms = [found]
    (_, (loss, grads)), found = lax.scan(back, carry, (segments, starts), reverse=True)
    return Sums(loss, grads, in_one_row([found, *norms]), end)
