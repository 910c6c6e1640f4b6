"""Full backpropagation through time: the whole sequence, every link."""

import jax.numpy as jnp

from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.types import Claim, LagWeights, Problem, Strategy


def full(problem: Problem) -> Strategy:
    """The exact gradient (Rumelhart, Hinton & Williams 1986; Werbos 1990)."""
    return Strategy(
        init=lambda params, batch_size: problem.cell.zeros(batch_size),
        estimate=lambda params, state, batch, key: backpropagate(problem, params, state, batch),
        claim=Claim(
            exact=True,
            unbiased=True,
            source="Werbos 1990",
            lag_weights=LagWeights(jnp.ones, lambda steps, lags: jnp.ones((steps, lags))),
        ),
    )
