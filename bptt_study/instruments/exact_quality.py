"""Bias and variance of a gradient estimator by enumeration of all its draws."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from bptt_study.backprop.arguments import arguments
from bptt_study.backprop.pytrees import numbers
from bptt_study.instruments import lags
from bptt_study.instruments.draws import check_draws
from bptt_study.instruments.lag_arguments import finite
from bptt_study.types import Batch, Params, Problem, State, Strategy
from bptt_study.validation import SettingError


class Moments(NamedTuple):
    """The numbers of `Quality` that can be computed exactly."""

    bias2: float
    variance: float
    mse: float
    signal_to_noise: float  # inf without variance, nan without both


def exact_quality(
    strategy: Strategy, problem: Problem, params: Params, batch: Batch, state: State | None = None
) -> Moments:
    """Compute bias², variance and the like exactly, by enumerating all draws that the strategy's claim lists.

    The sequences of a batch draw independently, so their variances add. For random cuts each sequence has
    2^(T-1) patterns, and as many gradients per sequence are held at once.

    Args:
      strategy: The estimator, whose claim has lag weights.
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of at most 12 steps.
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      The numbers.

    Raises:
      SettingError: For T > 12, a claim without lag weights or that does not name its draws, and parameters
        that are not finite.
    """
    params, batch = arguments(problem, params, batch)
    steps, size = batch.mask.shape
    if steps > 12:
        way_out = "For longer sequences use `lags.variance` or `measure.quality`."
        raise SettingError("steps", steps, "between 1 and 12", way_out)
    finite(params)
    claim = lags.declared(strategy)
    if claim.patterns is None and (strategy.claim.noise or claim.spread or claim.link_weights):
        way_out = "Use `lags.variance` or `measure.quality`."
        raise SettingError(
            "strategy", "another kind of noise", "one that draws lag weights", way_out
        )
    check_draws(strategy, params, strategy.init(params, size), batch)
    alone = lags.weights(strategy, steps, steps)[None], jnp.ones(1)
    weights, probability = claim.patterns(steps) if claim.patterns else alone

    def cell(weights: Float[Array, "T T B"]) -> Float[Array, "P"]:
        grads = lags.weighted_gradient(problem, params, batch, weights, state)
        return numbers(grads["cell"])

    @jax.jit
    def single(weights: Float[Array, "N T T"]) -> Float[Array, "N B P"]:
        return lax.map(lambda w: jax.vmap(lambda b: cell(w[..., None] * b))(jnp.eye(size)), weights)

    draws = single(weights)
    mean = jnp.einsum("n,nbp->bp", probability, draws)
    variance = float(jnp.einsum("n,nbp->", probability, (draws - mean) ** 2)) / claim.draws
    total, every = mean.sum(axis=0), jnp.ones((steps, steps, size))
    readout = lags.gradients(problem, params, batch, 1, state)["readout"]
    bias2 = float(jnp.sum((total - cell(every)) ** 2))
    signal = float(jnp.sum(total**2) + jnp.sum(numbers(readout) ** 2))
    noiseless = np.inf if signal > 0 else np.nan
    ratio = signal / variance if variance > 0 else noiseless
    return Moments(bias2, variance, bias2 + variance, ratio)
