"""The schedule for chunks whose backward recursion starts from a tail: an adjoint from a prediction."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from bptt_study.backprop.adjoint import adjoints
from bptt_study.backprop.forward import forward
from bptt_study.backprop.forward_pass import ForwardPass, differentiate
from bptt_study.backprop.pytrees import add, adjoint_norms, in_one_row, last
from bptt_study.backprop.schedules.call import Call, Sums, nothing
from bptt_study.types import State


class Block(NamedTuple):
    """One block after its backward recursion."""

    run: ForwardPass
    begin: Int[Array, ""]  # its first step
    arriving: State  # the tail at its end, leaves [B, H]
    leaving: State  # the adjoint that it sends to the state before it, leaves [B, H]


def tailed(
    call: Call,
    state: State,
    tail: Callable[[State, Int[Array, ""]], State],
    learn: Callable[[Any, Block], Any],
    learned: Any,
) -> tuple[Sums, Any]:
    """Back-propagate blocks of `call.stride` steps, from the first to the last; holds the states of one.

    When to use it: a prediction replaces the adjoint from beyond a cut. With the true tails this is full BPTT,
    with zeros it is chunks.

    Args:
      call: The arguments of the estimate, without link weights.
      state: h_0, leaves [B, H].
      tail: (h_t, t) -> the adjoint that arrives at h_t from the steps after it; t from 1 to T.
      learn: (learned state, block) -> the learned state after the block.
      learned: The learned state before the first block.

    Returns:
      The sums, and the learned state after the last block.
    """
    steps, cell, theta = len(call.batch.mask), call.problem.cell, call.params["cell"]

    def go(carry: Any, nothing_read: None, length: int = call.stride) -> tuple[Any, Array]:
        begin, state, (loss, grads), learned = carry
        batch, _ = call.steps(begin, length)
        stored = forward(cell, theta, state, batch.inputs)
        residuals, end = stored.residuals(batch.inputs), last(stored.after)
        run = differentiate(call.problem, call.params, residuals, batch, call.tokens)
        arriving = tail(end, begin + length)
        leaving, found = adjoints(cell, theta, residuals, run.immediate, None, arriving)
        own = {"cell": run.parameter_gradient(found), "readout": run.readout_gradient}
        learned = learn(learned, Block(run, begin, arriving, leaving))
        sums = loss + run.loss, add(grads, own)
        return (begin + length, end, sums, learned), adjoint_norms(found)

    whole, rest = divmod(steps, call.stride)
    carry = (jnp.asarray(0), state, nothing(call, state)[1], learned)
    carry, found = lax.scan(go, carry, None, whole)
    norms = [found]
    if rest:
        carry, found = go(carry, None, rest)
        norms.append(found)
    _, end, (loss, grads), learned = carry
    return Sums(loss, grads, in_one_row(norms), end), learned
