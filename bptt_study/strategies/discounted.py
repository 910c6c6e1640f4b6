"""Discounting: every link passes the same share of the adjoint, as random cuts do on average."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.strategies.strategy_from import strategy_from
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, LagWeights, Problem, Strategy
from bptt_study.validation import number


@validated
def discounted(problem: Problem, mean_length: float) -> Strategy:
    """Make λ_t = e_t + π J_{t+1}ᵀ λ_{t+1} with π = 1 - 1/mean_length, so that lag k has the weight π^k.

    This is the exact expectation of uncompensated cuts under the constant law: their link weights are
    independent, and the gradient is affine in each. It has the same bias and no variance.

    Args:
      problem: Cell, readout and loss.
      mean_length: The mean length of those segments, in time steps; 1 keeps lag 0 alone.

    Returns:
      The strategy.

    Raises:
      SettingError: For a mean length below 1.

    References:
      Tallec & Ollivier 2017.
    """
    pi = 1 - 1 / number("mean_length", mean_length, least=1)

    def window(lags: int) -> Float[Array, "K"]:
        return pi ** jnp.arange(lags)

    def weights(steps: int, lags: int) -> Float[Array, "T K"]:
        return jnp.broadcast_to(window(lags), (steps, lags))

    return strategy_from(
        problem,
        lambda params, state, batch, key: backpropagate(
            problem, params, state, batch, Truncation(link_weights=jnp.full(batch.mask.shape, pi))
        ),
        Claim(source="Tallec & Ollivier 2017", lag_weights=LagWeights(window, weights)),
    )
