"""Link weights ξ_t: factors of the cotangents that pass back over a link of time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.validation import SettingError


def checked(weights: Array, steps: int, init: Any) -> Array:
    """Check link weights [T] or [T, B]."""
    rows = {leaf.shape[:1] for leaf in jax.tree.leaves(init)}
    if weights.shape[:1] != (steps,) or (weights.ndim > 1 and {weights.shape[1:]} != rows):
        allowed = f"of shape [T] with T = {steps}, or [T, B] if every leaf of the carry is [B, …]"
        raise SettingError("link_weights", f"shape {list(weights.shape)}", allowed)
    if jnp.iscomplexobj(weights):
        raise SettingError("link_weights", weights.dtype, "real numbers")
    return weights


@jax.custom_jvp
def link(carry: Any, weight: Float[Array, "*B"]) -> Any:
    """Return the carry, and multiply its tangents and cotangents by ξ; where ξ = 0 nothing passes.

    The carry does not depend on ξ, but its derivative does, and so has a derivative by ξ. A link that is cut
    stays cut: where ξ = 0, that is 0.

    Args:
      carry: A tree of arrays, leaves [B, …] if ξ is [B].
      weight: ξ, a scalar or [B].

    Returns:
      The carry.
    """
    return carry


@link.defjvp
def _link_jvp(primals: tuple[Any, Array], tangents: tuple[Any, Array]) -> tuple[Any, Any]:
    carry, weight = primals

    def passed(leaf: Array, tangent: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return tangent
        xi = weight.astype(leaf.dtype).reshape(weight.shape + (1,) * (leaf.ndim - weight.ndim))
        return jnp.where(xi == 0, 0, xi * tangent)

    return carry, jax.tree.map(passed, carry, tangents[0])


def weighted(f: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Let the step function take (x, ξ), and weight the link to it."""

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        x, weight = x
        return f(link(carry, weight), x)

    return step
