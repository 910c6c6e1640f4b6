"""Lag profiles: the part of each lag that a strategy keeps, and the bias and variance that follow from it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from bptt_study.backprop.promises import vouch
from bptt_study.backprop.pytrees import norm
from bptt_study.types import (
    Affine,
    Batch,
    Cell,
    LagWeights,
    Params,
    Problem,
    Readout,
    Strategy,
)
from bptt_study.validation import SettingError, whole


def window(strategy: Strategy, lags: int) -> Float[Array, "K"]:
    """The lag profile w_k: the share of lag k that the strategy keeps on average, in closed form.

    The average is over draws, and over the phase of the strategy's grid in an endless sequence.
    """
    return declared(strategy).window(whole("lags", lags))


def weights(strategy: Strategy, steps: int, lags: int) -> Float[Array, "T K"]:
    """E[w[s,k]] over draws, for one call on T = `steps` steps; 0 where s - k < 0."""
    if whole("lags", lags) > whole("steps", steps):
        raise SettingError("lags", lags, f"between 1 and T ({steps})")
    return jnp.tril(declared(strategy).weights(steps, lags))


def estimated_window(
    make_strategy: Callable[[Problem], Strategy],
    lags: int,
    key: Key[Array, ""],
    draws: int = 32,
    phases: int | None = None,
    steps: int | None = None,
) -> tuple[Float[Array, "K"], Float[Array, "K"]]:
    """Read the lag profile w_k off a strategy's own gradients.

    The network is h_t = h_{t-1} + W_xh[x_t] with one unit. Every token of every sequence has a row of W_xh to
    itself, and sequence b has the loss o_s = h_s at the step s = T - phases + b alone. So row (t, b) of the
    estimate is w[s, s-t] of that loss, with no division and no least squares. It holds T · phases rows.

    Args:
      make_strategy: Problem -> strategy. A profile that depends on parameters or data is that of this network.
      lags: K.
      key: For the draws.
      draws: How many estimates.
      phases: The mean is over the last `phases` steps, `lags` of them by default. For a grid it is exact if
        they are a multiple of its stride.
      steps: T, by default as many as all lags need. Random cuts that remember (the power law) are stationary
        only after some mean lengths: they need more.

    Returns:
      w_k, and its standard error over draws, 0 if nothing is drawn.

    Raises:
      SettingError: For fewer steps than lags and phases need, and fewer than two draws.
    """
    phases = whole("phases", lags if phases is None else phases)
    steps = whole("steps", phases + lags - 1 if steps is None else steps, phases + lags - 1)
    problem = Problem(
        _adder(steps * phases),
        Readout(init=lambda key: {}, apply=lambda params, h: h),
        lambda outputs, targets: outputs[..., 0],
    )
    losses = steps - phases + jnp.arange(phases)
    tokens = jnp.arange(steps * phases).reshape(steps, phases)
    mask = 1.0 * (jnp.arange(steps)[:, None] == losses)
    batch = Batch(tokens, jnp.zeros_like(mask), mask)
    strategy, params = make_strategy(problem), problem.init(key)
    state = strategy.init(params, phases)

    @jax.jit
    def one(key: Key[Array, ""]) -> Float[Array, "K"]:
        grads = strategy.estimate(params, state, batch, key)[0].grads["cell"]["W_xh"]
        kept = phases * grads.reshape(steps, phases)  # the mean loss is over `phases` tokens
        return kept[losses - jnp.arange(lags)[:, None], jnp.arange(phases)].mean(axis=1)

    drawn = jax.lax.map(one, jax.random.split(key, whole("draws", draws, least=2)))
    return drawn.mean(axis=0), drawn.std(axis=0, ddof=1) / draws**0.5


def _adder(inputs: int) -> Cell:
    """h_t = h_{t-1} + W_xh[x_t] with one unit."""
    affine = Affine(
        project=lambda params, x: params["W_xh"][x],
        recur=lambda params, h: h,
        update=lambda x, recurred, h: x + recurred,
    )
    cell = Cell(
        init=lambda key: {"W_xh": jnp.zeros((inputs, 1))},
        zeros=lambda batch_size: jnp.zeros((batch_size, 1)),
        step=affine.step,
        read=lambda h: h,
        affine=affine,
    )
    return vouch(cell)


def expected_gradient(window: Float[Array, "K"], gradients: Params) -> Params:
    """Σ_k w_k G_k from one table, for any lag profile: a tree like params.

    If the weights w[s,k] depend on k alone (full, the sliding window, the constant law, all compensated ones),
    it is exactly the strategy's expected gradient. For a grid it is that on average over the phase, as if the
    sequence were cut out of a long text anywhere. `weighted_gradient` is exact on one batch.
    """
    return jax.tree.map(lambda g: jnp.tensordot(window, g, axes=1), gradients)


def bias(window: Float[Array, "K"], gradients: Params) -> Float[Array, ""]:
    """‖Σ_k (1 - w_k) G_k‖ over all parameters, for a table of all T lags, as exact as `expected_gradient`."""
    return norm(expected_gradient(1 - window, gradients))


def variance(strategy: Strategy, flows: Float[Array, "T T *T"], table: str = "flows") -> float:
    """E‖ĝ - E[ĝ]‖² over draws, exactly: one table of a batch serves every setting.

    Args:
      strategy: One that draws nothing has the variance 0.
      flows: `flows(problem, params, batch)`, or the table that the strategy's claim names.
      table: The name of that table: "shared_flows" for perturbations, "products" for random horizons.

    Raises:
      SettingError: For a claim without its variance in closed form (random cuts without compensation), for
        another table than the claim's, and for a table of so many steps that products are beyond floats.
    """
    claim = declared(strategy)
    if claim.patterns is None and strategy.claim.noise is None and claim.spread is None:
        return 0.0
    if claim.spread is None:
        way_out = "`measure.quality` estimates the variance from draws."
        raise SettingError("claim.lag_weights.spread", None, "declared by the strategy", way_out)
    if table != claim.table:
        raise SettingError("table", table, f"{claim.table}, of which this variance is a sum")
    with np.errstate(invalid="ignore", over="ignore"):
        found = float(np.vdot(claim.spread(len(flows)), np.asarray(flows, float))) / claim.draws
    if not np.isfinite(found):
        way_out = (
            "Numbers of the table, or the weights of its lags, lie beyond the range of a float."
        )
        raise SettingError("flows", f"one of {len(flows)} steps", "a table of fewer steps", way_out)
    return found


def declared(strategy: Strategy) -> LagWeights:
    """The lag weights of the strategy's claim, or SettingError."""
    claim = strategy.claim
    if claim.lag_weights is None:
        way_out = "`measure.quality` estimates the bias from draws."
        raise SettingError("claim.lag_weights", None, "declared by the strategy", way_out)
    return claim.lag_weights
