"""Whether a strategy draws something that its claim does not name: its variance would be 0 without a word."""

from typing import Any

import jax
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
