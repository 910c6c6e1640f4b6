"""The loss of a problem by plain loops, which JAX differentiates: the reference of all checks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bptt_study.backprop.pytrees import add, floats, norm, with_floats
from bptt_study.types import Batch, Problem


def plain_loss(problem: Problem, params: Any, state: Any, batch: Batch, cut: Any = ()) -> Any:
    """Compute the mean loss and the last state by a plain Python loop.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      state: h_0, leaves [B, H].
      batch: One batch of T steps.
      cut: The steps before which the state is detached.

    Returns:
      The loss, and h_T.
    """
    outputs = []
    for t in range(len(batch.mask)):
        state = lax.stop_gradient(state) if t in cut else state
        state = problem.cell.step(params["cell"], state, batch.inputs[t])
        outputs.append(problem.readout.apply(params["readout"], problem.cell.read(state)))
    tokens = problem.loss(jnp.stack(outputs), batch.targets)
    return (tokens * batch.mask).sum() / batch.mask.sum(), state


looped_loss = jax.jit(plain_loss, static_argnames=("problem", "cut"))  # one program of T steps


@partial(jax.jit, static_argnames="problem")
def scanned_loss(problem: Problem, params: Any, state: Any, batch: Batch) -> Any:
    """The same by `lax.scan`, for other lengths than T: a plain loop of many steps compiles for long."""

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        state = problem.cell.step(params["cell"], state, x)
        return state, problem.readout.apply(params["readout"], problem.cell.read(state))

    last, outputs = lax.scan(step, state, batch.inputs)
    tokens = problem.loss(outputs, batch.targets)
    return (tokens * batch.mask).sum() / batch.mask.sum(), last


@partial(jax.jit, static_argnames="problem")
def adjoint_norms(problem: Problem, params: Any, start: Any, batch: Batch) -> Any:
    """Compute ‖∂L/∂h_t‖ [T, B] from moves of the states that are 0."""

    def loss(moves: Any) -> Any:
        """The loss with the state after each step moved by so much."""

        def step(state: Any, now: Any) -> tuple[Any, Any]:
            x, move = now
            state = problem.cell.step(params["cell"], state, x)
            state = with_floats(state, add(floats(state), move))
            return state, problem.readout.apply(params["readout"], problem.cell.read(state))

        tokens = problem.loss(lax.scan(step, start, (batch.inputs, moves))[1], batch.targets)
        return (tokens * batch.mask).sum() / batch.mask.sum()

    still = jax.tree.map(lambda a: jnp.zeros((len(batch.mask), *a.shape), a.dtype), floats(start))
    return norm(jax.grad(loss)(still), keep=2)
