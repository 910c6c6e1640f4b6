"""What every loss sends k steps back: the backward recursion run once for each lag, for all losses at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bptt_study.backprop.adjoint import recursion
from bptt_study.backprop.forward_pass import ForwardPass
from bptt_study.backprop.pytrees import zeros_like
from bptt_study.types import State


def lag_adjoints(
    run: ForwardPass,
    lags: int,
    reduce: Callable[[State, Int[Array, ""]], Any],
    start: State | None = None,
) -> Any:
    """Reduce what every loss sends k steps back, lag by lag: reduce(a_k, k) stacked over k < K.

    a_k[t] = ∂L_{t+k}/∂h_t, leaves [T, B, H], L_s the part of the mean loss that falls on step s; 0
    where t + k > T. From a_0 = e, or `start`, on, a_{k+1}[t-1] = J_tᵀ a_k[t]: one step for all T·B
    adjoints at once, K steps in all, and one a_k held at a time.
    """

    def further(adjoints: State, k: Int[Array, ""]) -> tuple[State, Any]:
        passed = jax.vmap(run.step_vjp)(adjoints, run.residuals)
        earlier = jax.tree.map(lambda a: jnp.roll(a, -1, axis=0).at[-1].set(0), passed)
        return earlier, reduce(adjoints, k)

    first = run.immediate if start is None else start
    return lax.scan(further, first, jnp.arange(lags))[1]


def flow_products(run: ForwardPass) -> Float[Array, "T T T"]:
    """Σ_b ⟨F_b[j,t], F_b[j,u]⟩ as [j, t, u]: F_b[j,t] = λ_jᵀ J_j … J_{t+1} I_t of sequence b, 0 for t ≥ j.

    F[j,t] is what all losses from step j on send over the link h_{j-1} -> h_j to the parameters at
    step t. Holds T²·B·H numbers and T gradients.
    """
    steps, size = jax.tree.leaves(run.immediate)[0].shape[:2]
    nothing = zeros_like(jax.tree.map(lambda e: e[0], run.immediate))
    _, total = recursion(run.step_vjp, run.immediate, run.residuals, nothing)
    passed = lag_adjoints(run, steps, lambda adjoints, k: adjoints, total)
    t = jnp.arange(steps)

    def over_link(j: Int[Array, ""]) -> Float[Array, "T T"]:
        def masked(a: Array) -> Array:
            return jnp.where((t < j)[:, None, None], a[jnp.maximum(j - t, 0), t], 0)

        here = jax.tree.map(masked, passed)

        def products(b: Int[Array, ""], gram: Array) -> Array:
            rows = [g.reshape(steps, -1) for g in jax.tree.leaves(run.token_gradients(here, b))]
            return gram + sum(row @ row.T for row in rows)

        return lax.fori_loop(0, size, products, jnp.zeros((steps, steps), run.loss.dtype))

    return lax.map(over_link, t)
