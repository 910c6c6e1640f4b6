"""The draws of a strategy. The variance of those that its claim does not name would be 0 without a word."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from bptt_study.known import is_shipped
from bptt_study.types import Batch, Claim, Params, Strategy
from bptt_study.validation import SettingError


def names_draws(claim: Claim) -> bool:
    """Return True if the claim says what is drawn: patterns, a spread, link weights or noise."""
    weights = claim.lag_weights
    drawn = weights and (weights.patterns or weights.spread or weights.link_weights)
    return bool(drawn or claim.noise)


def unnamed() -> SettingError:
    """Make the error for a strategy that draws and does not say what."""
    way_out = "Without them nothing is drawn. `measure.quality` estimates the variance from draws."
    allowed = "all draws of the weights, since the estimate depends on its key"
    return SettingError("claim.lag_weights.patterns", None, allowed, way_out)


def check_draws(strategy: Strategy, params: Params, state: Any, batch: Batch) -> None:
    """Check that the gradient does not depend on the key if the claim has lag weights and names no draws.

    Raises:
      SettingError: If it does.
    """
    claim = strategy.claim
    if (
        claim.lag_weights is None
        or claim.exact
        or names_draws(claim)
        or is_shipped(strategy.estimate)
    ):
        return
    program, (estimate, after) = jax.make_jaxpr(strategy.estimate, return_shape=True)(
        params, state, batch, jax.random.key(0)
    )
    none = jax.tree.map(lambda _: False, (estimate, after))
    asked = none[0]._replace(grads=jax.tree.map(lambda _: True, estimate.grads)), none[1]
    used = partial_eval.dce_jaxpr(program.jaxpr, jax.tree.leaves(asked))[1]
    if used[-1]:
        raise unnamed()


def sign_shapes(claim: Claim, steps: int, sequences: int, params: Any) -> Any:
    """Return the random signs of a claim as a tree of `jax.ShapeDtypeStruct`; () if it has none.

    Args:
      claim: The claim; the leaves of its noise may be plain shapes, too.
      steps: T.
      sequences: B.
      params: The parameters, or their shapes.

    Returns:
      The tree.
    """

    def shaped(leaf: Any) -> bool:
        plain = isinstance(leaf, tuple) and all(isinstance(n, int) for n in leaf)
        return plain or hasattr(leaf, "shape")

    def struct(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(tuple(getattr(leaf, "shape", leaf)), jnp.zeros(()).dtype)

    if claim.noise is None:
        return ()
    return jax.tree.map(struct, claim.noise(steps, sequences, params), is_leaf=shaped)
