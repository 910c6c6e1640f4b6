"""Discounting: every link passes the same share, as random cuts do on average."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.types import Claim, LagWeights, Problem, Strategy
from bptt_study.validation import number


def discounted(problem: Problem, mean_length: float) -> Strategy:
    """λ_t = e_t + π J_{t+1}ᵀ λ_{t+1} with π = 1 - 1/mean_length: lag k counts π^k.

    The expectation of uncompensated cuts under the constant law, exactly, since their gates are
    independent and the gradient is affine in each: the same bias without any variance.
    mean_length in time steps; 1 keeps lag 0 alone. Raises SettingError for less.
    """
    pi = 1 - 1 / number("mean_length", mean_length, least=1)

    def window(lags: int) -> Float[Array, "K"]:
        return pi ** jnp.arange(lags)

    return Strategy(
        init=lambda params, batch_size: problem.cell.zeros(batch_size),
        estimate=lambda params, state, batch, key: backpropagate(
            problem, params, state, batch, Truncation(link_weights=jnp.full(batch.mask.shape, pi))
        ),
        claim=Claim(
            source="Tallec & Ollivier 2017",
            lag_weights=LagWeights(
                window, lambda steps, lags: jnp.broadcast_to(window(lags), (steps, lags))
            ),
        ),
    )
