"""Truncation after a fixed number of steps: chunks, the sliding window, and everything between them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.strategies.strategy_from import strategy_from
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, LagWeights, Problem, Strategy
from bptt_study.validation import SettingError, whole


@validated
def fixed(problem: Problem, window: int, stride: int | None = None) -> Strategy:
    """Make TBPTT(k1, k2) with k1 = stride and k2 = window: each loss goes back a bounded number of steps.

    Losses come in blocks of `stride` time steps, and each block is back-propagated to `window - stride` steps
    before its start. Chunks with window ≥ T are full BPTT.

    Args:
      problem: Cell, readout and loss.
      window: k2, time steps.
      stride: k1, time steps. None: the window, so that blocks are chunks; 1: the sliding window, which keeps
        the lags 0 … window - 1 of every loss.

    Returns:
      The strategy.

    Raises:
      SettingError: For a window or stride below 1, or a stride above the window.

    References:
      Williams & Peng 1990, BPTT(h; h').
    """
    whole("window", window)
    if stride is not None and whole("stride", stride) > window:
        raise SettingError("stride", stride, f"between 1 and window ({window}), or null for chunks")
    return strategy_from(
        problem,
        lambda params, state, batch, key: backpropagate(
            problem, params, state, batch, Truncation(window, stride)
        ),
        Claim(
            memory="window",
            held=window,
            steps="window",
            source="Williams & Peng 1990",
            lag_weights=lag_weights(window, stride or window),
        ),
    )


def lag_weights(window: int, stride: int) -> LagWeights:
    """Derive the lag weights of TBPTT(k1, k2).

    A loss r steps after the start of its block goes r + window - stride steps back, and r = 0 … stride - 1
    are equally frequent.

    Args:
      window: k2, time steps.
      stride: k1, time steps.

    Returns:
      The weights, each 0 or 1, and their mean over r.
    """

    def weights(steps: int, lags: int) -> Float[Array, "T K"]:
        reach = jnp.arange(steps) % stride + window - stride
        return 1.0 * (jnp.arange(lags) <= reach[:, None])

    return LagWeights(lambda lags: jnp.clip((window - jnp.arange(lags)) / stride, 0, 1), weights)
