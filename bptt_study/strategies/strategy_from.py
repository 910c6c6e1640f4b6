"""What the truncations share: a state that is the hidden state alone, and the claim to keep every lag."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bptt_study.types import Batch, Claim, Estimate, LagWeights, Params, Problem, State, Strategy

ALL_LAGS = LagWeights(
    window=lambda lags: jnp.ones(lags), weights=lambda steps, lags: jnp.ones((steps, lags))
)


def strategy_from(
    problem: Problem,
    estimate: Callable[[Params, State, Batch, Any], tuple[Estimate, State]],
    claim: Claim,
) -> Strategy:
    """The strategy whose state is the hidden state alone, h_0 = 0.

    Args:
      problem: Its cell says what the zero state is.
      estimate: (params, h_0, batch, key) -> (estimate, h_T).
      claim: What the strategy promises.
    """
    return Strategy(lambda params, batch_size: problem.cell.zeros(batch_size), estimate, claim)
