"""One forward pass with its loss and all derivatives that instruments and schedules need."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bptt_study.backprop.adjoint import (
    StepVJP,
    parameter_gradient,
    per_sequence,
    step_vjp,
    through_update,
)
from bptt_study.backprop.forward import Residuals, count_tokens, forward, mean_loss
from bptt_study.backprop.pytrees import floats, norm, with_floats
from bptt_study.types import Affine, Batch, Cell, Params, Problem, State


class ForwardPass(NamedTuple):
    """One forward pass with its loss, and the derivatives from which every backward pass is built."""

    loss: Float[Array, ""]  # mean over unmasked tokens
    readout_gradient: Params  # the readout's own gradient, which is local in time
    residuals: Residuals  # leaves [T, B, …]; residuals.after are the states h_1 … h_T
    immediate: State  # e_t of the mean loss, leaves [T, B, H]
    step_vjp: StepVJP
    parameter_gradient: Callable[[State], Params]  # λ_1 … λ_T -> Σ_t λ_tᵀ I_t, the cell's gradient
    # (λ, b) -> λ_tᵀ I_t of sequence b, leaves [T, …]
    token_gradients: Callable[[State, Int[Array, ""]], Params]
    token_norms: Callable[[State], Float[Array, "T B"]]  # λ_1 … λ_T -> ‖λ_tᵀ I_t‖ of each sequence


def forward_pass(problem: Problem, params: Params, state: State, batch: Batch) -> ForwardPass:
    """Run the forward pass from h_0 = `state`, which is detached; all T states are stored."""
    state = lax.stop_gradient(state)
    stored = forward(problem.cell, params["cell"], state, batch.inputs)
    residuals = stored.residuals(batch.inputs)
    return differentiate(problem, params, residuals, batch, count_tokens(batch.mask))


def differentiate(
    problem: Problem,
    params: Params,
    residuals: Residuals,
    batch: Batch,
    tokens: Float[Array, ""],
) -> ForwardPass:
    """Compute the loss, a sum over the batch's tokens ÷ `tokens`, and the derivatives of a forward pass."""
    cell, theta = problem.cell, params["cell"]

    def loss_of(readout: Params, after: State) -> Float[Array, ""]:
        return mean_loss(problem, readout, with_floats(residuals.after, after), batch, tokens)

    loss, (readout_gradient, immediate) = jax.value_and_grad(loss_of, argnums=(0, 1))(
        params["readout"], floats(residuals.after)
    )

    return ForwardPass(
        loss=loss,
        readout_gradient=readout_gradient,
        residuals=residuals,
        immediate=immediate,
        step_vjp=step_vjp(cell, theta),
        parameter_gradient=lambda adjoints: parameter_gradient(cell, theta, residuals, adjoints),
        token_gradients=partial(_token_gradients, cell, theta, residuals),
        token_norms=partial(_token_norms, cell, theta, residuals),
    )


def _token_gradients(
    cell: Cell, params: Params, residuals: Residuals, adjoints: State, sequence: Int[Array, ""]
) -> Params:
    if not isinstance(cell.affine, Affine):
        return jax.vmap(partial(_of_one_sequence, cell, params))(
            residuals, adjoints, jnp.broadcast_to(sequence, len(residuals.inputs))
        )
    tokens = _affine_tokens(cell.affine, residuals, adjoints)
    own = jax.tree.map(lambda a: a[:, sequence], tokens)
    return jax.vmap(partial(_affine_token_gradient, cell.affine, params))(own)


def _token_norms(
    cell: Cell, params: Params, residuals: Residuals, adjoints: State
) -> Float[Array, "T B"]:
    # one step at a time, because the gradients of all tokens take T·B times the parameters' memory
    if not isinstance(cell.affine, Affine):
        sequences = jnp.arange(residuals.inputs.shape[1])

        def norms(now: tuple[Residuals, State]) -> Array:
            gradient = partial(_of_one_sequence, cell, params, *now)
            return jax.vmap(lambda b: norm(gradient(b)))(sequences)

        return lax.map(norms, (residuals, adjoints))
    gradient = partial(_affine_token_gradient, cell.affine, params)
    return lax.map(
        jax.vmap(lambda token: norm(gradient(token))),
        _affine_tokens(cell.affine, residuals, adjoints),
    )


def _of_one_sequence(
    cell: Cell, params: Params, now: Residuals, adjoint: State, sequence: Int[Array, ""]
) -> Params:
    """Compute λ_tᵀ I_t of one sequence at one step: the other sequences get no adjoint."""

    def alone(a: Array) -> Array:
        own = jnp.arange(len(a)) == sequence
        return jnp.where(per_sequence(own, a), a, 0)

    run = lambda p: floats(cell.step(p, now.before, now.inputs))  # noqa: E731
    return jax.vjp(run, params)[1](jax.tree.map(alone, adjoint))[0]


def _affine_tokens(affine: Affine, residuals: Residuals, adjoints: State) -> tuple[Any, Any, Any]:
    """Return (cotangents of project and recur, x_t, h_{t-1}) of each token, leaves [T, B, …]."""
    return through_update(affine, residuals, adjoints), residuals.inputs, residuals.before


def _affine_token_gradient(affine: Affine, params: Params, token: tuple[Any, Any, Any]) -> Params:
    cotangents, x, before = token
    _, vjp = jax.vjp(lambda p: (affine.project(p, x), affine.recur(p, before)), params)
    return vjp(cotangents)[0]
