"""Truncation after a fixed number of steps: chunks, the sliding window, and all between."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.types import Claim, LagWeights, Problem, Strategy
from bptt_study.validation import SettingError, whole


def fixed(problem: Problem, window: int, stride: int | None = None) -> Strategy:
    """TBPTT(k1 = stride, k2 = window) (Williams & Peng 1990, BPTT(h; h')).

    Losses come in blocks of `stride` time steps; each block is back-propagated to `window - stride`
    steps before its start. stride None: equal to the window, chunks; 1: the sliding window, which
    keeps lags 0 … window - 1 of every loss. window ≥ T with chunks is full BPTT.

    Raises SettingError for a window or stride below 1, or a stride above the window.
    """
    whole("window", window)
    if stride is not None and whole("stride", stride) > window:
        raise SettingError("stride", stride, f"between 1 and window ({window}), or null for chunks")
    return Strategy(
        init=lambda params, batch_size: problem.cell.zeros(batch_size),
        estimate=lambda params, state, batch, key: backpropagate(
            problem, params, state, batch, Truncation(window, stride)
        ),
        claim=Claim(
            memory="window",
            steps="window",
            source="Williams & Peng 1990",
            lag_weights=lag_weights(window, stride or window),
        ),
    )


def lag_weights(window: int, stride: int) -> LagWeights:
    """What TBPTT(k1, k2) keeps: a loss r steps into its block goes r + window - stride back;
    r = 0 … stride - 1 alike often."""

    def weights(steps: int, lags: int) -> Float[Array, "T K"]:
        reach = jnp.arange(steps) % stride + window - stride
        return 1.0 * (jnp.arange(lags) <= reach[:, None])

    return LagWeights(lambda lags: jnp.clip((window - jnp.arange(lags)) / stride, 0, 1), weights)
