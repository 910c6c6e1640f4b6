"""The adjoints that losses send k steps back, lag by lag and for all losses at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bptt_study.backprop.adjoint import per_sequence, recursion
from bptt_study.backprop.forward_pass import ForwardPass
from bptt_study.backprop.pytrees import add, as_types_of, real_parts, wide, zeros_like
from bptt_study.types import State


def lag_adjoints(
    run: ForwardPass,
    lags: int,
    reduce: Callable[[State, Int[Array, ""]], Any],
    start: State | None = None,
) -> Any:
    """Reduce the adjoints of each lag.

    a_k[t] = ∂L_{t+k}/∂h_t, leaves [T, B, H], where L_s is step s's part of the mean loss; 0 where t + k > T.
    From a_0 = e, or `start`, a_{k+1}[t-1] = J_tᵀ a_k[t]: K steps, each for all T·B adjoints at once. Memory
    holds one a_k at a time.

    Args:
      run: The forward pass.
      lags: K.
      reduce: (a_k, k) -> the result of lag k.
      start: a_0. None: e.

    Returns:
      The results of all lags, stacked.
    """

    def fold(nothing: Any, adjoints: State, k: Int[Array, ""]) -> tuple[Any, Any]:
        return nothing, reduce(adjoints, k)

    return fold_lags(run, lags, fold, (), start)


def fold_lags(
    run: ForwardPass,
    lags: int,
    fold: Callable[[Any, State, Int[Array, ""]], tuple[Any, Any]],
    carry: Any,
    start: State | None = None,
) -> Any:
    """Run `lag_adjoints` with a carry from lag to lag: fold(carry, a_k, k) -> (carry, result of lag k)."""

    def further(state: tuple[State, Any], k: Int[Array, ""]) -> tuple[Any, Any]:
        adjoints, carry = state
        carry, out = fold(carry, adjoints, k)
        return (_one_link_back(run, adjoints), carry), out

    first = run.immediate if start is None else start
    return lax.scan(further, (first, carry), jnp.arange(lags))[1]


def _one_link_back(run: ForwardPass, adjoints: State) -> State:
    """Compute a_{k+1} from a_k."""
    passed = jax.vmap(run.step_vjp)(adjoints, run.residuals)
    return jax.tree.map(lambda a: jnp.roll(a, -1, axis=0).at[-1].set(0), passed)


def weighed_adjoints(
    run: ForwardPass,
    weight: Callable[[Int[Array, ""]], Float[Array, "..."]],
    lags: int | Int[Array, ""],
) -> State:
    """Sum w_k a_k over k < `lags` as a running sum, which holds two a_k at a time.

    weight(k) is w_k[t] for a_k[t], which comes from the loss at step t + k. Its shape is [T, B], or one that
    broadcasts to it.
    """

    def further(k: Int[Array, ""], carry: tuple[State, State]) -> tuple[State, State]:
        adjoints, total = carry

        def added(total: Array, a: Array) -> Array:
            weighed = per_sequence(jnp.broadcast_to(weight(k), a.shape[:2]), a) * a
            return total + weighed.astype(total.dtype)

        return _one_link_back(run, adjoints), jax.tree.map(added, total, adjoints)

    first = run.immediate, wide(zeros_like(run.immediate))
    return as_types_of(run.immediate, lax.fori_loop(0, lags, further, first)[1])


def flow_products(run: ForwardPass, shared: bool = False) -> Float[Array, "T T T"]:
    """Compute Σ_b ⟨F_b[j,t], F_b[j,u]⟩ at [j, t, u], with F_b[j,t] = Σ_{s ≥ max(j,t)} G_b[s,s-t] of sequence b.

    F[j,t] is the gradient that all losses from step j on send to the parameters at step t. For t < j it is the
    part that passes over the link h_{j-1} -> h_j. If `shared`, the result is ⟨F[j,t], F[j,u]⟩ of F = Σ_b F_b.
    Memory holds T²·B·H numbers and T gradients.
    """
    steps, size = jax.tree.leaves(run.immediate)[0].shape[:2]
    nothing = zeros_like(jax.tree.map(lambda e: e[0], run.immediate))
    _, total = recursion(run.step_vjp, run.immediate, run.residuals, nothing)
    passed = lag_adjoints(run, steps, lambda adjoints, k: adjoints, total)
    t = jnp.arange(steps)

    def over_link(j: Int[Array, ""]) -> Float[Array, "T T"]:
        here = jax.tree.map(lambda a: a[jnp.maximum(j - t, 0), t], passed)

        def rows(b: Int[Array, ""]) -> list[Array]:
            return [g.reshape(steps, -1) for g in real_parts(run.token_gradients(here, b))]

        def products(rows: list[Array]) -> Array:
            return sum((row @ row.T for row in rows), start=jnp.zeros((), "float32"))

        sequences = jnp.arange(size)
        if shared:
            return products(_summed(rows, sequences))
        return _summed(lambda b: products(rows(b)), sequences)

    return lax.map(over_link, t)


def _summed(f: Callable[[Int[Array, ""]], Any], numbers: Int[Array, "N"]) -> Any:
    """Sum f(n), one n after the other."""
    total = wide(zeros_like(jax.eval_shape(f, numbers[0])))
    return lax.scan(lambda total, n: (add(total, f(n)), None), total, numbers)[0]
