"""The part that truncations share: their state is the hidden state alone."""

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
    """Make a strategy whose state is the hidden state alone, h_0 = 0.

    Args:
      problem: Cell, readout and loss. The cell gives the zero state.
      estimate: (params, h_0, batch, key) -> (estimate, h_T).
      claim: The promises of the strategy.

    Returns:
      The strategy.
    """
    return Strategy(lambda params, batch_size: problem.cell.zeros(batch_size), estimate, claim)
