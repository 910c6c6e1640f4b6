"""The interface of a way to store M, `Past`, and the steps through which its M moves, `Block`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jaxtyping import Array

from bptt_study.backprop.adjoint import StepVJP, parameter_gradient, recursion, step_vjp
from bptt_study.backprop.forward import Residuals
from bptt_study.backprop.pytrees import as_types_of, floats, zeros_like
from bptt_study.types import Cell, Params, State


class Block(NamedTuple):
    """S steps of a forward pass, and the Jacobians through which credit passes them."""

    cell: Cell
    params: Params  # the cell's parameters
    residuals: Residuals  # leaves [S, B, …]
    vjp: StepVJP  # λ_t -> J_tᵀ λ_t, or an estimator's approximation of it

    def back(self, immediate: State, arriving: State) -> tuple[State, State]:
        """Run λ_t = e_t + J_{t+1}ᵀ λ_{t+1}; return λ_0 = J_1ᵀ λ_1, and λ_1 … λ_S."""
        return recursion(self.vjp, immediate, self.residuals, arriving)

    def retreat(self, u: State) -> tuple[State, Params]:
        """Send u back from the last state: Φᵀ u, and Σ_t (Φ_{S,t} I_t)ᵀ u of each sequence, leaves [B, …]."""
        nothing = zeros_like(floats(self.residuals.after))
        leaving, adjoints = self.back(nothing, as_types_of(nothing, u))
        return leaving, self.each_gradient(adjoints)

    def advance(self, v: State) -> State:
        """Send v forward from the state before the block: Φ v."""

        def step(v: State, now: Residuals) -> tuple[State, None]:
            return jax.linear_transpose(lambda adjoint: self.vjp(adjoint, now), v)(v)[0], None

        v = as_types_of(floats(self.residuals.after), v)
        return lax.scan(step, v, self.residuals)[0]

    def each_gradient(self, adjoints: State) -> Params:
        """Compute Σ_t λ_tᵀ I_t of each sequence alone, leaves [B, …]."""

        def alone(residuals: Residuals, adjoints: State) -> Params:
            of_one = jax.tree.map(lambda a: a[:, None], (residuals, adjoints))
            return parameter_gradient(self.cell, self.params, *of_one)

        return jax.vmap(alone, in_axes=1)(self.residuals, adjoints)


class Past(NamedTuple):
    """A way to hold M, the influence of the parameters on the state, as a tree of arrays [B, …]."""

    start: Callable[[Params, int], Any]  # (θ, B) -> M = 0
    # (M, λ) -> Σ λᵀM over the batch, like the cell's parameters
    send: Callable[[Any, State], Params]
    # (M, block, signs [B, k]) -> M at the end of the block
    roll: Callable[[Any, Block, Any], Any]
    signs: Callable[[Params], int] = lambda params: 0  # k, the number of ±1 per sequence and roll
    # (cell, θ) -> the map (λ_t, residuals) -> J_tᵀ λ_t, or an approximation of it
    through: Callable[[Cell, Params], StepVJP] = step_vjp
    # (θ, inputs) -> nothing; it raises SettingError for a cell that does not fit
    check: Callable[[Params, Array], None] = lambda params, inputs: None
    # (M, block, e_t) -> M at the end of the block, and the gradient if each step rolls M and then sends it;
    # None: each step does so
    all_steps: Callable[[Any, Block, State], tuple[Any, Params]] | None = None
